"""Parts of a step as graphs of tensor operations: traced once, shared by all layers of equal structure, compiled.

A layer is called once and the operations it performs are noted, with its weights as inputs beside the hidden state.
Two layers whose notes are equal compute the same function of their weights, so one compiled kernel sequence serves
both; how many layers a model has makes no difference to the time that compiling takes.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default}
Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Region:
    """A traced function: its graph, which takes constants first and inputs then, and its constants.

    Attributes:
        graph: the operations; called with all tensors, it returns a list of tensors.
        constants: weights and other tensors that the function has of its own.
        key: equal for two regions that compute the same function of constants and inputs.
        results: how many of the returned tensors the function returns; those behind them serve the compiler.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    key: str
    results: int


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Region:
    """Call `function` on `inputs` and note what it does; in-place changes of inputs are part of that.

    Raises:
        RuntimeError: the function looks at values of tensors, and would do something else for others.
    """
    with torch.no_grad(), _OneQueryAttention():
        graph = make_fx(lambda *tensors: list(function(*tensors)))(*inputs)
    constants = _lift(graph)
    results = _returned(graph.graph)
    _plain_writes(graph.graph)
    _thin_products(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Region(graph, constants, _key(graph, (*constants, *inputs)), results)


def compile_region(region: Region, inputs: Sequence[Tensor], options: dict[str, Any]) -> Compiled:
    """Kernels for the graph of a region, by torch's own compiler; for fixed shapes."""
    from torch._inductor import compile as inductor

    tensors: list[Any] = [*region.constants, *inputs]
    with torch.no_grad():
        made = inductor(region.graph, tensors, options=options)
    return lambda values: made(*values)


def interpret_region(region: Region, inputs: Sequence[Tensor], options: dict[str, Any]) -> Compiled:
    """The graph of a region as it stands, operation by operation."""
    return lambda values: region.graph(*values)


def _lift(graph: fx.GraphModule) -> tuple[Tensor, ...]:
    """Make the tensors that a graph holds its first inputs; returns them, each once."""
    constants: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(graph.graph.nodes))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = operator.attrgetter(node.target)(graph)
        known = constants.get(id(value))
        if known is None:
            with graph.graph.inserting_before(first):
                lifted = graph.graph.placeholder(f"constant_{len(constants)}")
            lifted.meta = {**node.meta, "tensor_meta": None, "value": value}
            known = constants[id(value)] = (value, lifted)
        node.replace_all_uses_with(known[1])
        graph.graph.erase_node(node)
    return tuple(value.detach() for value, _ in constants.values())


def _key(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> str:
    shapes = [(tuple(t.shape), tuple(t.stride()), str(t.dtype), str(t.device)) for t in tensors]
    return hashlib.sha256(f"{graph.code}\n{shapes}".encode()).hexdigest()


def _plain_writes(graph: fx.Graph) -> None:
    """Write copies into some columns as assignments to an index, which can be mapped over a new dimension."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is aten.index_copy_.default:
            target, dim, index, source = node.args
            node.target = aten.index_put_.default
            node.args = (target, [*[None] * (dim % len(_shape(target))), index], source)


def _thin_products(graph: fx.Graph) -> None:
    """Write products of a single row with a transposed matrix as sums over its columns.

    A compiler can then make one kernel of such a product and of what stands behind it; a single row leaves nothing for
    a matrix unit to do anyway. Sums are taken in float32. What stands before it is best done once, and not again for
    every row of the matrix: so each row that is multiplied becomes one of the graph's outputs, which are kept.
    """
    rows: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, row, turned = node.args
        matrix = _untransposed(turned)
        if matrix is None or _shape(row)[:1] != (1,):
            continue
        with graph.inserting_before(node):
            wide = [graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32}) for x in (row, matrix)]
            products = graph.call_function(aten.mul.Tensor, tuple(wide))
            total = graph.call_function(aten.sum.dim_IntList, (products, [1]))
            for one in bias:
                total = graph.call_function(aten.add.Tensor, (total, one))
            total = graph.call_function(aten._to_copy.default, (total,), {"dtype": node.meta["val"].dtype})
            total = graph.call_function(aten.unsqueeze.default, (total, 0))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        rows[_origin(row)] = None
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ([*output.args[0], *(row for row in rows if row.op == "call_function")],)


def _returned(graph: fx.Graph) -> int:
    """How many tensors a graph returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return len(output.args[0])


def _origin(node: Any) -> fx.Node:
    """The node whose values a chain of changes of shape shows."""
    while node.op == "call_function" and node.target in _RESHAPES:
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _untransposed(node: Any) -> fx.Node | None:
    if isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.t.default:
            return node.args[0]  # type: ignore[return-value]
        if node.target in (aten.transpose.int, aten.permute.default) and len(_shape(node)) == 2:
            return node.args[0]  # type: ignore[return-value]
    return None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


class _OneQueryAttention(TorchFunctionMode):
    """Attention of few queries to many keys as plain sums, which need no copies of keys shared by several heads."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` computes, written out.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, key heads, columns, width), where heads is a multiple of key heads.
        value: (batch, key heads, columns, width of a value).
        attn_mask: True where a query sees a column, or what is added to its score; broadcast over heads and batch.
        dropout_p: must be 0.
        is_causal: must be False.
        scale: what scores are multiplied with; 1 / sqrt(width) where it is None.
        enable_gqa: heads may share keys.
    """
    if dropout_p or is_causal:
        raise RuntimeError("a decoding step has neither dropout nor queries that must not see one another")
    batch, heads, queries, width = query.shape
    shared = heads // key.shape[1]
    factor = 1 / math.sqrt(width) if scale is None else scale
    grouped = query.reshape(batch, key.shape[1], shared, queries, 1, width).float() * factor
    scores = (grouped * key[:, :, None, None].float()).sum(-1).reshape(batch, heads, queries, -1)
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).reshape(batch, key.shape[1], shared, queries, -1, 1)
    mixed = (weights * value[:, :, None, None].float()).sum(-2)
    return mixed.reshape(batch, heads, queries, value.shape[-1]).to(query.dtype)
