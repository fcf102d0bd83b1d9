"""What a compiler should see of a traced step: our own operations where they are faster, plain sums where not.

Every pass looks for one pattern of operations, whatever model they come from, and writes another one that computes the
same. What a pass does not know stays as it is.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from impasto import rows

aten = torch.ops.aten
_ATTEND, _TURNED = torch.ops.impasto.attend.default, torch.ops.impasto.multiply_turned.default
_MULTIPLY, _SEVERAL = torch.ops.impasto.multiply.default, torch.ops.impasto.multiply_several.default
_GATED = torch.ops.impasto.multiply_gated.default
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default}
NORMED = 1024  # columns of a row that a product norms while it reads weights, at most
WIDE = 4096  # entries of which the largest is looked for in two stages


def lowered(graph: fx.GraphModule, streams: Callable[..., bool] = rows.streamed) -> fx.GraphModule:
    """A copy of a traced graph as a compiler should see it.

    Args:
        graph: the graph, which stays as it is.
        streams: whether matrices that meet the same rows are read by a kernel of ours.
    """
    made = fx.GraphModule({}, copy.deepcopy(graph.graph))  # a copy of the module would copy the weights of its layer
    _together(made.graph, streams)
    _gates(made.graph, streams)
    made.graph.eliminate_dead_code()  # so that it is known who still uses what
    _norms(made.graph)
    _turns(made.graph)
    _added(made.graph, streams)
    _sums(made.graph, streams)
    _two_stages(made.graph)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _turns(graph: fx.Graph) -> None:
    """Make one operation of products for query, key and value, of rotary positions, and of writing into slots."""
    changed = moments(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _ATTEND:
            continue
        query, *read = node.args[:3]
        puts = [_put(x, node) for x in read]
        product, *turn = _rotary(node, puts) if all(puts) else (None,)
        if product is None or [changed[x] - changed[node] for x in (product, *puts)] != [-2, -1, 0]:
            continue
        slots, (*_, position) = [put.args[0] for put in puts], puts[0].args[1]
        given = (*product.args, *(None, 0.0)[len(product.args) - 3 :])
        with graph.inserting_before(node):
            cos, sin = (_reshaped(graph, origin(x), shape_of(x)[-1:]) for x in turn)
            made = graph.call_function(_TURNED, (*given, cos, sin, *slots, position))
            made.meta["val"] = product.args[1][0].meta["val"].new_empty(shape_of(product.args[1][0])[:2])
            reads = [_reshaped(graph, x, shape_of(y)) for x, y in zip((made, *slots), (query, *read), strict=True)]
        node.args = (*reads, *node.args[3:])
        graph.eliminate_dead_code()  # what showed the slots
        for put in puts:
            graph.erase_node(put)


def _rotary(node: fx.Node, puts: list[Any]) -> tuple[Any, ...]:
    """The operation that makes an attention's query, key and value and nothing else, cosines and sines; or None."""
    given: Any = node.args
    width, (key, value) = shape_of(given[2])[-1], [put.args[2] for put in puts]
    turned: list[Any] = [_turned(origin(x)) for x in (given[0], key)]
    if not all(turned):
        return (None,)
    (query, *turn), (key, *same) = turned
    heads = (query, key, value)
    parts = [origin(x) for x in heads]
    if [part.args[1] if part.target is operator.getitem else None for part in parts] != [0, 1, 2]:
        return (None,)
    product: Any = parts[0].args[0]
    known = (
        product.target is _SEVERAL
        and set(product.users) == set(parts)
        and all(_reaches(part, {node, *puts}) for part in parts)
        and [origin(x) for x in turn] == [origin(x) for x in same]
        and puts[0].args[1] == puts[1].args[1]
    )
    fits = all(
        shape_of(x)[-2:] == (1, width) and shape_of(y)[-1] % width == 0 for x, y in zip(heads, parts, strict=True)
    )
    return (product, *turn) if known and fits else (None,)


def _reaches(node: fx.Node, ends: set[Any]) -> bool:
    """Whether everything that is made of a node's values is made for these ends."""
    waiting, seen = [node], {node}
    while waiting:
        users = waiting.pop().users.keys() - ends
        if any(not user.users for user in users):
            return False
        waiting += users - seen
        seen |= users
    return True


def _put(node: Any, reader: fx.Node) -> Any:
    """The writing of one column into a slot that is an input, which nothing but `reader` sees, as `node`; or None."""
    put: Any = origin(node)
    if put.op != "call_function" or put.target is not aten.index_put_.default or len(put.args) != 3 or put.kwargs:
        return None
    slot, index, source = put.args
    *whole, position = index
    fits = slot.op == "placeholder" and slot.meta["val"].is_contiguous() and len(index) == len(shape_of(slot)) - 1
    if not fits or any(x is not None for x in whole) or shape_of(position) != (1,) or list(slot.users) != [put]:
        return None
    rows, heads, columns, width = shape_of(node)
    one = shape_of(source)[-3:] == (heads, 1, width) and shape_of(slot)[-3:] == (heads, columns, width)
    whole_slot = slot.meta["val"].numel() == node.meta["val"].numel() == rows * heads * columns * width
    types = slot.meta["val"].dtype == source.meta["val"].dtype and position.meta["val"].dtype == torch.int64
    same = source.meta["val"].numel() == rows * heads * width
    return put if one and whole_slot and types and same and _ends(put) == {reader} else None


def _turned(node: Any) -> tuple[Any, Any, Any] | None:
    """What is turned by rotary positions, and their cosines and sines; None if nothing is, or not in two halves."""
    if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        pairs: list[Any] = [
            (getattr(x, "target", None) is aten.mul.Tensor and x.args) or () for x in (straight, crossed)
        ]
        for (kept, cos), (swapped, sin) in itertools.product(*[itertools.permutations(pair, 2) for pair in pairs]):
            half = shape_of(kept)[-1] // 2 if shape_of(kept) else 0
            numbers = all(shape_of(x) and x.meta["val"].numel() == shape_of(x)[-1] == 2 * half for x in (cos, sin))
            same = half and shape_of(kept) == shape_of(node) and kept.meta["val"].dtype == node.meta["val"].dtype
            if same and numbers and _swapped(swapped, kept, half):
                return kept, cos, sin
    return None


def _swapped(node: Any, whole: fx.Node, half: int) -> bool:
    """Whether a node has the second half of the last dimension of another, negated, before the first."""
    if getattr(node, "target", None) is not aten.cat.default or len(node.args[0]) != 2:
        return False
    last = len(shape_of(whole)) - 1
    second, first = node.args[0]
    if second.target is not aten.neg.default or (node.args[1:] or (0,))[0] not in (-1, last):
        return False
    parts: list[Any] = [x.args if x.target is aten.slice.Tensor else () for x in (first, second.args[0])]
    if any(len(part) != 4 or part[0] is not whole or part[1] not in (-1, last) for part in parts):
        return False
    (begin, end), (start, stop) = (part[2:] for part in parts)
    types = node.meta["val"].dtype == whole.meta["val"].dtype
    return bool(begin == 0 and end == start == half and stop >= 2 * half and types)


def _together(graph: fx.Graph, streams: Callable[..., bool]) -> None:
    """Make one operation of products of the same row with two or three matrices, if our kernel reads them."""
    alike: dict[tuple[fx.Node, tuple[int, ...], bool, int], list[Any]] = {}
    changed = moments(graph)  # none is passed by
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _MULTIPLY:
            row, matrices, bias = node.args
            if matrices.meta["val"].is_contiguous() and _free(matrices) and (bias is None or _free(bias)):
                alike.setdefault((origin(row), shape_of(row), bias is None, changed[node]), []).append(node)
    for found in alike.values():
        for nodes in (found[first : first + 3] for first in range(0, len(found), 3)):
            if len(nodes) < 2 or not streams(*[node.args[1].meta["val"] for node in nodes]):
                continue
            with graph.inserting_before(nodes[0]):
                matrices, biases = ([_moved(graph, x) for node in nodes if (x := node.args[i])] for i in (1, 2))
                product = graph.call_function(_SEVERAL, (nodes[0].args[0], matrices, biases))
                parts = [graph.call_function(operator.getitem, (product, i)) for i in range(len(nodes))]
            for node, part in zip(nodes, parts, strict=True):
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)
                graph.erase_node(node)


def _gates(graph: fx.Graph, streams: Callable[..., bool]) -> None:
    """Make one operation of two products, the activation of the first, and their product."""
    changed = moments(graph)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.mul.Tensor or len(node.args) != 2:
            continue
        left, right = node.args
        found = _gate(left, right, shape_of(node)) or _gate(right, left, shape_of(node))
        if found is None:
            continue
        products, args = found
        gates, matrices = (x.meta["val"] for x in args[1:3])
        if len({changed[product] for product in products}) > 1 or not streams(gates, matrices):
            continue
        with graph.inserting_before(max(products, key=order.__getitem__)):
            made = graph.call_function(_GATED, args)
            made.meta["val"] = gates.new_empty(gates.shape[:2])
        with graph.inserting_before(node):
            shown = graph.call_function(aten.view.default, (made, list(shape_of(node))))
            shown.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(shown)
        graph.erase_node(node)


def _gate(active: Any, plain: Any, shape: tuple[int, ...]) -> tuple[list[Any], tuple[Any, ...]] | None:
    """The products, or their common operation, of what gates and is gated, and arguments of one operation for all."""
    active, shapes = _alone(active), {shape_of(active), shape_of(plain), shape}
    activation = None if active is None else _activation(active)
    gate, other = (_alone(active.args[0]), _alone(plain)) if activation else (None, None)
    if gate is None or other is None or len(shapes) > 1 or shape_of(gate) != shape_of(other):
        return None
    if gate.meta["val"].dtype != other.meta["val"].dtype:
        return None
    if gate.target is operator.getitem and other.target is operator.getitem and gate.args[0] is other.args[0]:
        product: Any = gate.args[0]
        if product.target is not _SEVERAL or len(product.args[1]) != 2:
            return None
        row, matrices, biases = product.args
        numbers = gate.args[1], other.args[1]
        added = [biases[number] if biases else None for number in numbers]
        return [product], (row, *[matrices[number] for number in numbers], *added, activation)
    if any(part.target is not _MULTIPLY or len(part.args) > 3 for part in (gate, other)):
        return None
    rows, matrices, biases = zip(gate.args, other.args, strict=True)
    same = shape_of(matrices[0]) == shape_of(matrices[1]) and (biases[0] is None) == (biases[1] is None)
    if not same or any(not x.meta["val"].is_contiguous() for x in matrices):
        return None
    return [gate, other], (rows[0], *matrices, *biases, activation, None, 0.0, rows[1])


def _norms(graph: fx.Graph) -> None:
    """Give products the row as it is before it is normed, and the norm, so that they do it while they read weights."""
    changed = moments(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (_SEVERAL, _GATED) or len(node.args) > 6:
            continue
        found = _norm(_alone(node.args[0]))
        if found is None or changed[found[0]] != changed[node]:
            continue
        _, row, scales, epsilon = found
        columns = shape_of(node.args[0])[-1]
        lanes = {x.meta["val"].numel() / columns for x in (row, scales)}
        if columns > NORMED or {shape_of(x)[-1] for x in (row, scales)} != {columns} or not lanes <= {1, _lanes(node)}:
            continue
        with graph.inserting_before(node):
            rows, scales = (_reshaped(graph, x, (x.meta["val"].numel() // columns, columns)) for x in (row, scales))
        node.args = (rows, *node.args[1:], scales, epsilon)


def _norm(node: Any) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """A row over the root of its mean square, times a weight: what reads the row, row, weight, what is added."""
    if node is None or node.target is not aten.mul.Tensor:
        return None
    for scales, normed in (node.args, node.args[::-1]):
        even = _uncast(normed)
        if not isinstance(scales, fx.Node) or not _free(scales) or getattr(even, "target", None) is not aten.mul.Tensor:
            continue
        for wide, root in (even.args, even.args[::-1]):
            found = _root(root, wide)
            row = _uncast(wide)
            kind = node.meta["val"].dtype
            same = found and all(x.meta["val"].dtype == kind for x in (scales, normed, row))
            if found and same and wide.meta["val"].dtype == torch.promote_types(kind, torch.float32):
                return found[0] if wide is row else wide, row, scales, found[1]
    return None


def _root(node: Any, row: Any) -> tuple[fx.Node, float] | None:
    """The squares of `row`, if a node is one over the root of their mean over the last dimension, and what is added."""
    for target in (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar):
        if getattr(node, "target", None) is not target or node.kwargs:
            return None
        if target is aten.add.Tensor:
            epsilon = node.args[1]
        elif target is aten.mean.dim and (
            list(node.args[1] or ()) not in ([-1], [len(shape_of(row)) - 1]) or not node.args[2:]
        ):
            return None
        squares, node = node, node.args[0]
    return (squares, epsilon) if node is row and squares.args[1] == 2 and isinstance(epsilon, float) else None


def _uncast(node: Any) -> Any:
    """What a change of type is made of; the node itself if it is none."""
    return node.args[0] if isinstance(node, fx.Node) and node.target is aten._to_copy.default else node


def _added(graph: fx.Graph, streams: Callable[..., bool]) -> None:
    """Give products what they are added to, where norms inside of products read the sum, or it is returned."""
    changed = moments(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        if not any(end.op == "output" or _has_norm(end) for end in _ends(node)):
            continue
        for added, plain in (node.args, node.args[::-1]):
            product = _alone(plain)
            if product is None or product.target is not _MULTIPLY or not streams(product.args[1].meta["val"]):
                continue
            *_, outputs = shape_of(product)
            rows = added.meta["val"].numel() // outputs if shape_of(added)[-1:] == (outputs,) else 0
            same = rows in (1, _lanes(product)) and added.meta["val"].dtype == plain.meta["val"].dtype
            if not same or shape_of(plain) != shape_of(node) or changed[product] != changed[node]:
                continue
            with graph.inserting_before(node):
                other = _reshaped(graph, added, (rows, outputs))
                made = graph.call_function(_MULTIPLY, (*product.args[:3], other))
                made.meta["val"] = product.meta["val"]
                shown = _reshaped(graph, made, shape_of(node))
            changed[made] = changed[shown] = changed[node]
            node.replace_all_uses_with(shown)
            graph.erase_node(node)
            break


def _lanes(node: Any) -> int:
    """How many lanes a product of ours has."""
    return shape_of(node.args[1][0] if node.target is _SEVERAL else node.args[1])[0]


def _has_norm(node: fx.Node) -> bool:
    """Whether a node is a product of ours that norms its row."""
    place = {_SEVERAL: 3, _GATED: 6, _TURNED: 3}.get(node.target)  # type: ignore[call-overload]
    return place is not None and len(node.args) > place and node.args[place] is not None


def _alone(node: Any) -> Any:
    """The node whose values a chain of changes of shape shows, if nothing else is made of any of them; else None."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.op != "call_function" or not _shows(node):
            return node
        node = node.args[0]
    return None


def _activation(node: Any) -> str | None:
    """The name that `impasto.rows.ACTIVATIONS` has for what a node computes."""
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(node.target)


def _reshaped(graph: fx.Graph, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    """A node in another shape, inserted where nodes are inserted now."""
    if shape_of(node) == shape:
        return node
    made = graph.call_function(aten.reshape.default, (node, list(shape)))
    made.meta["val"] = node.meta["val"].reshape(shape)
    return made


def _shows(node: fx.Node) -> bool:
    """Whether a node shows the values of its first argument in the same order."""
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return list(order) == sorted(order)
    if node.target is aten.transpose.int:
        shape = shape_of(node.args[0]) or (1,)  # a number has no dimensions, and can be turned all the same
        first, last = sorted(int(d) % len(shape) for d in node.args[1:])  # type: ignore[arg-type]
        return 1 in (shape[first], shape[last]) and all(size == 1 for size in shape[first + 1 : last])
    return node.target in RESHAPES or node.target is aten.alias.default


def _ends(node: fx.Node) -> set[fx.Node]:
    """What reads the values of a node, whatever shape they are shown in."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _ends(user) if user.op == "call_function" and _shows(user) else {user}
    return found


def _free(node: fx.Node) -> bool:
    """Whether a node only shows one of the graph's inputs in another shape."""
    return origin(node).op == "placeholder"


def _moved(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A copy, where nodes are inserted now, of a node that shows an input in another shape."""
    return node if node.op == "placeholder" else graph.node_copy(node, lambda inner: _moved(graph, inner))


def _sums(graph: fx.Graph, streams: Callable[..., bool]) -> None:
    """Write products with small matrices as sums over columns.

    A compiler can then make one kernel of such a product and of what stands behind it. What stands before it is best
    done once, and not again for every row of the matrix: so each row that is multiplied becomes one of the graph's
    outputs, which are kept. Products that our kernel makes stay as they are.
    """
    kept: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _MULTIPLY:
            continue
        row, matrices, bias = node.args[:3]
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
        total.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        kept[origin(row)] = None
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
        shape = shape_of(entries)
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


def moments(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node, how often a tensor was changed in place before it, itself included."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    counts = itertools.accumulate(schema is not None and schema.is_mutable for schema in schemas)
    return dict(zip(graph.nodes, counts, strict=True))


def origin(node: Any) -> fx.Node:
    """The node whose values, in the same order, a chain of changes of shape shows."""
    while node.op == "call_function" and _shows(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of what a node gives; empty where that is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()
