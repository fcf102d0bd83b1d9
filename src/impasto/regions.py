"""Parts of a step as graphs of tensor operations: traced once, shared by all layers of equal structure, compiled.

A layer is called once and the operations it performs are noted, with its weights as inputs beside the hidden state.
Two layers whose notes are equal compute the same function of their weights, so one compiled kernel sequence serves
both; how many layers a model has makes no difference to the time that compiling takes.
"""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from impasto import rows

aten = torch.ops.aten
_ATTEND = torch.ops.impasto.attend.default
_MULTIPLY, _SEVERAL = torch.ops.impasto.multiply.default, torch.ops.impasto.multiply_several.default
_GATED = torch.ops.impasto.multiply_gated.default
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default}
WIDE = 4096  # entries of which the largest is looked for in two stages
Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Region:
    """A traced function: its graph, which takes constants first and inputs then, and its constants.

    Attributes:
        graph: the operations; called with all tensors, it returns a list of tensors.
        constants: weights and other tensors that the function has of its own.
        key: equal for two regions that compute the same function of constants and inputs.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    key: str


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Region:
    """Call `function` on `inputs` and note what it does; in-place changes of inputs are part of that.

    Raises:
        RuntimeError: the function looks at values of tensors, and would do something else for others.
    """
    with torch.no_grad(), _OneQueryAttention():
        graph = make_fx(lambda *tensors: list(function(*tensors)))(*inputs)
    constants = _lift(graph)
    _plain_writes(graph.graph)
    _single_rows(graph.graph)
    _shared_keys(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Region(graph, constants, _key(graph, (*constants, *inputs)))


def compile_region(region: Region, inputs: Sequence[Tensor], options: dict[str, Any]) -> Compiled:
    """Kernels for the graph of a region, by torch's compiler and, for what it is slow at, ours; for fixed shapes."""
    from torch._inductor import compile as inductor

    tensors: list[Any] = [*region.constants, *inputs]
    with torch.no_grad():
        made = inductor(lowered(region.graph), tensors, options=options)
    count = _returned(region.graph.graph)  # behind these come rows that are kept
    return lambda values: made(*values)[:count]


def lowered(graph: fx.GraphModule, streams: Callable[[Tensor], bool] = rows.streamed) -> fx.GraphModule:
    """A copy of a traced graph as a compiler should see it.

    Args:
        graph: the graph, which stays as it is.
        streams: whether matrices are read by a kernel of ours.
    """
    made = fx.GraphModule({}, copy.deepcopy(graph.graph))  # a copy of the module would copy the weights of its layer
    _together(made.graph, streams)
    _gates(made.graph)
    _sums(made.graph, streams)
    _two_stages(made.graph)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


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
            lifted.meta = {**node.meta, "tensor_meta": None}
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


def _single_rows(graph: fx.Graph) -> None:
    """Write products of a single row with a transposed matrix as `impasto.rows.multiply`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, row, turned = node.args
        matrix = _untransposed(turned) if node.meta["val"].is_floating_point() else None
        if matrix is None or _shape(row)[:1] != (1,) or any(_shape(one) != _shape(matrix)[:1] for one in bias):
            continue
        with graph.inserting_before(node):
            matrices, *biases = (graph.call_function(aten.unsqueeze.default, (x, 0)) for x in (matrix, *bias))
            product = graph.call_function(_MULTIPLY, (row, matrices, biases[0] if biases else None))
            for new, old in zip((matrices, *biases), (matrix, *bias), strict=True):
                new.meta["val"] = old.meta["val"][None]
            product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _shared_keys(graph: fx.Graph) -> None:
    """Give attention the keys and values that heads share as they are, and not once for every head."""
    written: dict[fx.Node, int] = {}
    writes = 0
    for node in graph.nodes:
        writes += _writes(node)
        written[node] = writes
        if node.op == "call_function" and node.target is _ATTEND:
            query, key, value, *rest = node.args
            once = _unrepeated(key), _unrepeated(value)
            unwritten = written[key] == written[value] == writes  # nothing changes between a repetition and its use
            if all(once) and unwritten and _shape(once[0])[1] == _shape(once[1])[1]:
                node.args = (query, *once, *rest)


def _unrepeated(node: Any) -> fx.Node | None:
    """The (batch, key heads, columns, width) of which each head is repeated next to itself; None if it is not known."""
    wanted = _shape(node)
    while node.op == "call_function" and node.target in (*_RESHAPES - {aten.unsqueeze.default}, aten.clone.default):
        node = node.args[0]
    if node.op != "call_function" or node.target is not aten.expand.default or len(_shape(node)) != 5:
        return None
    inner: Any = node.args[0]
    if inner.op != "call_function" or inner.target is not aten.unsqueeze.default or inner.args[1] != 2:
        return None
    batch, heads, times, *rest = _shape(node)
    same = _shape(inner.args[0]) == (batch, heads, *rest) and wanted == (batch, heads * times, *rest)
    return inner.args[0] if same else None


def _together(graph: fx.Graph, streams: Callable[[Tensor], bool]) -> None:
    """Make one operation of products of the same row with two or three matrices, if one of these is large."""
    alike: dict[tuple[fx.Node, tuple[int, ...], bool, int], list[Any]] = {}
    writes = 0  # so far: none is passed by
    for node in graph.nodes:
        writes += _writes(node)
        if node.op == "call_function" and node.target is _MULTIPLY:
            row, matrices, bias = node.args
            if matrices.meta["val"].is_contiguous() and _free(matrices) and (bias is None or _free(bias)):
                alike.setdefault((_origin(row), _shape(row), bias is None, writes), []).append(node)
    for found in alike.values():
        for nodes in (found[first : first + 3] for first in range(0, len(found), 3)):
            if len(nodes) < 2 or not any(streams(node.args[1].meta["val"]) for node in nodes):
                continue
            with graph.inserting_before(nodes[0]):
                matrices, biases = ([_moved(graph, x) for node in nodes if (x := node.args[i])] for i in (1, 2))
                product = graph.call_function(_SEVERAL, (nodes[0].args[0], matrices, biases))
                parts = [graph.call_function(operator.getitem, (product, i)) for i in range(len(nodes))]
            for node, part in zip(nodes, parts, strict=True):
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)
                graph.erase_node(node)


def _gates(graph: fx.Graph) -> None:
    """Make one operation of two products of the same row, the activation of the first, and their product."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.mul.Tensor or len(node.args) != 2:
            continue
        left, right = node.args
        found = _gate(left, right, _shape(node)) or _gate(right, left, _shape(node))
        if found is None:
            continue
        product, gate, other, activation = found
        row, matrices, biases = product.args
        added = (biases[gate], biases[other]) if biases else (None, None)
        with graph.inserting_before(product):
            made = graph.call_function(_GATED, (row, matrices[gate], matrices[other], *added, activation))
            made.meta["val"] = matrices[gate].meta["val"].new_empty(_shape(matrices[gate])[:2])
        with graph.inserting_before(node):
            shown = graph.call_function(aten.view.default, (made, list(_shape(node))))
            shown.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(shown)
        graph.erase_node(node)


def _gate(active: Any, plain: Any, shape: tuple[int, ...]) -> tuple[Any, int, int, str] | None:
    """What gates what: their common operation, the numbers of both products there, and the activation between them."""
    active, shapes = _alone(active), {_shape(active), _shape(plain), shape}
    activation = None if active is None else _activation(active)
    gate, other = (_alone(active.args[0]), _alone(plain)) if activation else (None, None)
    if gate is None or other is None or len(shapes) > 1 or _shape(gate) != _shape(other):
        return None
    if any(part.target is not operator.getitem for part in (gate, other)) or gate.args[0] is not other.args[0]:
        return None
    product: Any = gate.args[0]
    if product.target is not _SEVERAL or len(product.args[1]) != 2:
        return None
    return product, gate.args[1], other.args[1], activation  # type: ignore[return-value]


def _alone(node: Any) -> Any:
    """The node whose values a chain of changes of shape shows, if nothing else is made of any of them; else None."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.op != "call_function" or not (node.target in _RESHAPES or _unmoved(node)):
            return node
        node = node.args[0]
    return None


def _activation(node: Any) -> str | None:
    """The name that `impasto.rows.ACTIVATIONS` has for what a node computes."""
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(node.target)


def _writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _free(node: fx.Node) -> bool:
    """Whether a node only shows one of the graph's inputs in another shape."""
    return _origin(node).op == "placeholder"


def _moved(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A copy, where nodes are inserted now, of a node that shows an input in another shape."""
    return node if node.op == "placeholder" else graph.node_copy(node, lambda inner: _moved(graph, inner))


def _sums(graph: fx.Graph, streams: Callable[[Tensor], bool]) -> None:
    """Write products with small matrices as sums over columns.

    A compiler can then make one kernel of such a product and of what stands behind it. What stands before it is best
    done once, and not again for every row of the matrix: so each row that is multiplied becomes one of the graph's
    outputs, which are kept. Large matrices, and those that no kernel of ours reads, stay as they are.
    """
    kept: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _MULTIPLY:
            continue
        row, matrices, bias = node.args
        if streams(matrices.meta["val"]):
            continue
        with graph.inserting_before(node):
            tall = graph.call_function(aten.unsqueeze.default, (row, 1))
            dtype = torch.promote_types(node.meta["val"].dtype, torch.float32)
            wide = [graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype}) for x in (tall, matrices)]
            products = graph.call_function(aten.mul.Tensor, tuple(wide))
            total = graph.call_function(aten.sum.dim_IntList, (products, [2]))
            if bias is not None:
                total = graph.call_function(aten.add.Tensor, (total, bias))
            total = graph.call_function(aten._to_copy.default, (total,), {"dtype": node.meta["val"].dtype})
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        kept[_origin(row)] = None
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ([*output.args[0], *(row for row in kept if row.op == "call_function")],)


def _two_stages(graph: fx.Graph) -> None:
    """Look for the place of the largest of many entries in two steps, each of which many programs can share.

    The first of equal entries is taken. Where an entry is no number, none is equal to the largest: the last place.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.max.dim or node.kwargs or len(node.args) > 2:
            continue
        entries, dim = node.args[0], node.args[1]
        shape = _shape(entries)
        if not shape or dim % len(shape) != len(shape) - 1 or shape[-1] < WIDE:
            continue
        device = entries.meta["val"].device
        with graph.inserting_before(node):
            peak = graph.call_function(aten.amax.default, (entries, [-1], True))
            equal = graph.call_function(aten.eq.Tensor, (entries, peak))
            places = graph.call_function(aten.arange.default, (shape[-1],), {"device": device, "dtype": torch.int64})
            marked = graph.call_function(aten.where.ScalarOther, (equal, places, shape[-1] - 1))
            found = [
                graph.call_function(aten.squeeze.dim, (peak, -1)),
                graph.call_function(aten.amin.default, (marked, [-1])),
            ]
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _returned(graph: fx.Graph) -> int:
    """How many tensors a graph returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return len(output.args[0])


def _origin(node: Any) -> fx.Node:
    """The node whose values a chain of changes of shape shows."""
    while node.op == "call_function" and (node.target in _RESHAPES or _unmoved(node)):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _unmoved(node: fx.Node) -> bool:
    """Whether a node changes the order of dimensions, and in fact changes nothing."""
    if node.target is not aten.permute.default:
        return False
    order: Any = node.args[1]
    return list(order) == sorted(order)


def _untransposed(node: Any) -> fx.Node | None:
    if isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.t.default:
            return node.args[0]  # type: ignore[return-value]
        turns = node.target is aten.transpose.int and (node.args[1] - node.args[2]) % 2  # type: ignore[operator]
        permutes = node.target is aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[operator,union-attr]
        if len(_shape(node)) == 2 and (turns or permutes):
            return node.args[0]  # type: ignore[return-value]
    return None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


class _OneQueryAttention(TorchFunctionMode):
    """Attention as `impasto.rows` has it, which stays whole and needs no copies of keys that heads share."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return rows.attention(*args, **kwargs)
