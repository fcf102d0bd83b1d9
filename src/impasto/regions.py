"""Parts of a step as graphs of tensor operations: traced once, shared by all layers of equal structure, compiled.

A layer is called once and the operations it performs are noted, with its weights as inputs beside the hidden state.
Two layers whose notes are equal compute the same function of their weights, so one compiled kernel sequence serves
both; how many layers a model has makes no difference to the time that compiling takes.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from impasto import rows
from impasto.lowering import RESHAPES, lowered, moments, shape_of

aten = torch.ops.aten
_ATTEND = torch.ops.impasto.attend.default
_MULTIPLY = torch.ops.impasto.multiply.default
Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]
MOST = 256  # compiled graphs that a process keeps for other decoders
ALIGNED = 16  # bytes: a compiler makes other code for tensors that do not begin at a multiple of them
_TRACING = threading.Lock()  # tracing changes classes of torch for its time, whichever thread it is in
_compiled: OrderedDict[str, Callable[..., Sequence[Tensor]]] = OrderedDict()  # by what they are; last used last


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
    one = TracingContext(FakeTensorMode(allow_fallback_kernels=True))  # that notes all shapes, instead of one for each
    with _TRACING, torch.no_grad(), _OneQueryAttention(), tracing(one):
        graph = make_fx(lambda *tensors: list(function(*tensors)))(*inputs)
    constants = _lift(graph)
    _plain_writes(graph.graph)
    _single_rows(graph.graph)
    _shared_keys(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Region(graph, constants, _key(graph, (*constants, *inputs)))


def compile_region(region: Region, inputs: Sequence[Tensor], options: dict[str, Any]) -> Compiled:
    """Kernels for the graph of a region, by torch's compiler and, for what it is slow at, ours; for fixed shapes.

    A process compiles what computes the same once, whatever model, schedule or decoder it stands in: constants are
    inputs like others. Inputs that are changed must not share memory with one another.
    """
    from torch._inductor import compile as inductor
    from torch._inductor import config

    # A kernel of ours waits for the one in front alone, so that one must not be launched early without waiting itself.
    options = {**options, "triton.enable_pdl": False} if hasattr(config.triton, "enable_pdl") else options
    tensors: list[Any] = [*region.constants, *inputs]
    graph = lowered(region.graph)
    aligned = [x.data_ptr() % ALIGNED == 0 for x in tensors]
    key = f"{_key(graph, tensors)} {aligned} {sorted(options.items())} {_settings()}"
    made = _compiled.pop(key, None)
    if made is None:
        with torch.no_grad():
            made = inductor(graph, tensors, options=options)
    _compiled[key] = made
    if len(_compiled) > MOST:
        _compiled.popitem(last=False)
    count = _returned(region.graph.graph)  # behind these come rows that are kept
    return lambda values: made(*values)[:count]


def _settings() -> tuple[object, ...]:
    """What torch's compiler reads beside a graph and its tensors."""
    from torch._inductor import config

    matmul = torch.backends.cuda.matmul
    return (
        config.get_hash(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


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
            node.args = (target, [*[None] * (dim % len(shape_of(target))), index], source)


def _single_rows(graph: fx.Graph) -> None:
    """Write products of a single row with a transposed matrix as `impasto.rows.multiply`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, row, turned = node.args
        matrix = _untransposed(turned) if node.meta["val"].is_floating_point() else None
        if matrix is None or shape_of(row)[:1] != (1,) or any(shape_of(one) != shape_of(matrix)[:1] for one in bias):
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
    changed = moments(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _ATTEND:
            query, key, value, *rest = node.args
            once = _unrepeated(key), _unrepeated(value)
            # nothing changes between a repetition and its use
            unwritten = changed[key] == changed[value] == changed[node]
            if all(once) and unwritten and shape_of(once[0])[1] == shape_of(once[1])[1]:
                node.args = (query, *once, *rest)


def _unrepeated(node: Any) -> fx.Node | None:
    """The (batch, key heads, columns, width) of which each head is repeated next to itself; None if it is not known."""
    wanted = shape_of(node)
    while node.op == "call_function" and node.target in (*RESHAPES - {aten.unsqueeze.default}, aten.clone.default):
        node = node.args[0]
    if node.op != "call_function" or node.target is not aten.expand.default or len(shape_of(node)) != 5:
        return None
    inner: Any = node.args[0]
    if inner.op != "call_function" or inner.target is not aten.unsqueeze.default or inner.args[1] != 2:
        return None
    batch, heads, times, *rest = shape_of(node)
    same = shape_of(inner.args[0]) == (batch, heads, *rest) and wanted == (batch, heads * times, *rest)
    return inner.args[0] if same else None


def _returned(graph: fx.Graph) -> int:
    """How many tensors a graph returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return len(output.args[0])


def _untransposed(node: Any) -> fx.Node | None:
    if isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.t.default:
            return node.args[0]  # type: ignore[return-value]
        turns = node.target is aten.transpose.int and (node.args[1] - node.args[2]) % 2  # type: ignore[operator]
        permutes = node.target is aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[operator,union-attr]
        if len(shape_of(node)) == 2 and (turns or permutes):
            return node.args[0]  # type: ignore[return-value]
    return None


class _OneQueryAttention(TorchFunctionMode):
    """Attention as `impasto.rows` has it, which stays whole and needs no copies of keys that heads share."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return rows.attention(*args, **kwargs)
