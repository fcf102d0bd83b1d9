"""What a decoding step does most, as operations of their own: attention of one query, products of one row.

A compiler writes both as plain sums, which is right and, where they are not tiny, slow. As operations they
stay whole in a traced graph, can be mapped over the branches of a group, and run on a GPU by kernels written for them
(`impasto.streaming`). Everywhere else, and wherever a compiler does better, they are the sums that they stand for.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations of a gate that our kernel knows.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
LEAST = 2**17  # bytes of a matrix from which our kernel reads it: smaller ones are a compiler's, with all around them


@functools.cache
def _kernels() -> bool:
    """Whether there are kernels for CUDA devices: `triton` comes with most of torch's builds for them."""
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def _taken(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and _kernels()


def streamed(*matrices: Tensor) -> bool:
    """Whether products of the same single rows with these matrices (lanes, outputs, columns) are made by our kernel.

    One of them must not be tiny: what a compiler makes of tiny ones together with their surroundings is as fast.
    """
    return all(map(_taken, matrices)) and max(x.numel() * x.element_size() for x in matrices) >= LEAST


def attended(query: Tensor) -> bool:
    """Whether attention of such queries is made by our kernel."""
    return _taken(query)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` computes, for a decoding step.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, key heads, columns, width), where heads is a multiple of key heads.
        value: (batch, key heads, columns, width of a value).
        attn_mask: True where a query sees a column, or what is added to its score; broadcast over heads and batch.
        dropout_p: must be 0.
        is_causal: must be False.
        scale: what scores are multiplied with; 1 / sqrt(width) where it is None.
        enable_gqa: heads may share keys.

    Raises:
        RuntimeError: dropout, or queries that must not see one another.
    """
    if dropout_p or is_causal:
        raise RuntimeError("a decoding step has neither dropout nor queries that must not see one another")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch, heads, queries, width = query.shape
    if heads % key.shape[1] or key.shape[:3] != value.shape[:3] or len(key) != batch:
        sizes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
        raise RuntimeError(f"{heads} heads of {batch} texts cannot share {sizes}")
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())].expand(-1, -1, -1, key.shape[2])
        if queries > 1 and attn_mask.shape[1:3] != (1, 1):
            return _attend(query, key, value, attn_mask, factor)
    # Queries that see the same columns are to the keys what heads that share them are.
    mixed: Tensor = attend(query.reshape(batch, heads * queries, 1, width), key, value, attn_mask, factor)
    return mixed.view(batch, heads, queries, value.shape[-1])


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention written out, in float32 at least; keys shared by several heads are not copied."""
    batch, heads, queries, width = query.shape
    shared = heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, key.shape[1], shared, queries, 1, width).to(wide) * scale
    scores = (grouped * key[:, :, None, None].to(wide)).sum(-1).reshape(batch, heads, queries, -1)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    if mask is not None and mask.dtype == torch.bool:  # who sees nothing gets nothing; what nobody sees may be anything
        weights = torch.where(mask, weights, 0)
        value = torch.where(mask.any(1, keepdim=True).any(2)[..., None], value, 0)
    weights = weights.reshape(batch, key.shape[1], shared, queries, -1, 1)
    mixed = (weights * value[:, :, None, None].to(wide)).sum(-2)
    return mixed.reshape(batch, heads, queries, value.shape[-1]).to(query.dtype)


@torch.library.custom_op("impasto::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row and head.

    Args:
        query: (batch, heads, 1, width).
        key: (batch, key heads, columns, width), where heads is a multiple of key heads.
        value: (batch, key heads, columns, width of a value).
        mask: (rows, 1 or heads, 1, columns) that is True where a query sees a column, or is added to its score; rows
            is a divisor of batch, and text b is masked by row b modulo rows.
        scale: what scores are multiplied with.

    Returns:
        (batch, heads, 1, width of a value), in the type of `query`.
    """
    if _taken(query):
        from impasto import streaming

        mixed = streaming.attend(query, key, value, mask, scale)
        if mixed is not None:
            return mixed
    if mask is not None:
        mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    return _attend(query, key, value, mask, scale)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


@attend.register_vmap
def _(info, in_dims, query, key, value, mask, scale):  # type: ignore[no-untyped-def]
    lanes = info.batch_size
    merged = [_merged(x, dim, lanes) for x, dim in zip((query, key, value), in_dims[:3], strict=True)]
    if mask is not None and in_dims[3] is not None:
        own = mask.movedim(in_dims[3], 0)  # rows of each lane, as often as its batch has them
        mask = own.repeat(1, merged[0].shape[0] // lanes // own.shape[1], 1, 1, 1).flatten(0, 1)
    mixed = attend(*merged, mask, scale)
    return mixed.unflatten(0, (lanes, -1)), 0


@torch.library.custom_op("impasto::multiply", mutates_args=())
def multiply(rows: Tensor, matrices: Tensor, biases: Tensor | None, added: Tensor | None = None) -> Tensor:
    """The product of each row with its own matrix, and what is added to it; sums are taken in float32 at least.

    Args:
        rows: (lanes, columns), or (1, columns) for all lanes.
        matrices: (lanes, outputs, columns).
        biases: (lanes, outputs).
        added: (lanes or 1, outputs), added to the result, which is rounded to its type before.

    Returns:
        (lanes, outputs), in the type of `rows`.
    """
    if streamed(matrices):
        from impasto import streaming

        return streaming.multiply(rows, [matrices], [] if biases is None else [biases], added=added)[0]
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = (rows[:, None].to(wide) * matrices.to(wide)).sum(-1)
    result = (total if biases is None else total + biases).to(rows.dtype)
    return result if added is None else result + added


@multiply.register_fake
def _(rows, matrices, *rest):  # type: ignore[no-untyped-def]
    return rows.new_empty(matrices.shape[:2])


@multiply.register_vmap
def _(info, in_dims, rows, matrices, biases, added=None):  # type: ignore[no-untyped-def]
    lanes = info.batch_size
    given = (rows, matrices, biases, added)[: len(in_dims)]
    merged = [None if x is None else _merged(x, dim, lanes) for x, dim in zip(given, in_dims, strict=True)]
    count = lanes * matrices.shape[in_dims[1] == 0]
    # what all lanes of a branch have in common is repeated
    merged = [x if x is None or len(x) == count else x.repeat_interleave(count // len(x), 0) for x in merged]
    return multiply(*merged).unflatten(0, (lanes, -1)), 0


@torch.library.custom_op(
    "impasto::multiply_several",
    mutates_args=(),
    # torch 2.6 reads no list[Tensor]
    schema="(Tensor rows, Tensor[] matrices, Tensor[] biases, Tensor? scales=None, float epsilon=0.) -> Tensor[]",
)
def multiply_several(
    rows: Tensor, matrices: list[Tensor], biases: list[Tensor], scales: Tensor | None = None, epsilon: float = 0.0
) -> list[Tensor]:
    """The products of each row with two or three matrices of its own, as `multiply` makes them.

    Args:
        rows: (lanes, columns), or (1, columns) for all lanes.
        matrices: (lanes, outputs, columns) each.
        biases: (lanes, outputs) each, or none at all.
        scales: (lanes or 1, columns), by which rows are multiplied once they are divided by the root of their mean
            square (arXiv 1910.07467); None takes them as they are.
        epsilon: what is added to the mean square.

    Returns:
        (lanes, outputs) for each matrix, in the type of `rows`.
    """
    if streamed(*matrices):
        from impasto import streaming

        return streaming.multiply(rows, matrices, biases, scales=scales, epsilon=epsilon)
    rows = _normed(rows, scales, epsilon)
    added = [*biases, *[None] * (len(matrices) - len(biases))]
    return [multiply(rows, matrix, bias) for matrix, bias in zip(matrices, added, strict=True)]


def _normed(rows: Tensor, scales: Tensor | None, epsilon: float) -> Tensor:
    if scales is None:
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return scales * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(rows.dtype)


@multiply_several.register_fake
def _(rows, matrices, *rest):  # type: ignore[no-untyped-def]
    return [rows.new_empty(x.shape[:2]) for x in matrices]


@torch.library.custom_op(
    "impasto::multiply_turned",
    mutates_args=("keys", "values"),
    schema="(Tensor rows, Tensor[] matrices, Tensor[] biases, Tensor? scales, float epsilon, Tensor cos, Tensor sin,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor position) -> Tensor",
)
def multiply_turned(
    rows: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor],
    scales: Tensor | None,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> Tensor:
    """The query of each row, turned by rotary positions; its key, turned as well, and its value go into their slots.

    Args:
        rows: as of `multiply_several`.
        matrices: of queries, keys and values, as there.
        biases: as there.
        scales: as there.
        epsilon: as there.
        cos: (width of a head), of rotary positions that turn one half of the width by the other.
        sin: (width), with `cos`.
        keys: (..., key heads, columns, width), contiguous, where ... stands for the lanes; changed in place.
        values: (..., key heads, columns, width), the same.
        position: (1), the column that is written, from the end if it is negative.

    Returns:
        (lanes, heads times width), in the type of `rows`.

    Raises:
        RuntimeError: slots that are not contiguous.
    """
    if not keys.is_contiguous() or not values.is_contiguous():
        raise RuntimeError("slots that are written in place must be contiguous")
    if streamed(*matrices):
        from impasto import streaming

        turned = (cos, sin, keys, values, position)
        return streaming.multiply(rows, matrices, biases, scales=scales, epsilon=epsilon, turned=turned)[0]
    position = torch.where(position < 0, position + keys.shape[-2], position)
    query, key, value = multiply_several(rows, matrices, biases, scales, epsilon)
    lanes, width = matrices[0].shape[0], keys.shape[-1]
    query, key = (_turned(x.view(lanes, -1, width), cos, sin) for x in (query, key))
    for slots, new in ((keys, key), (values, value)):
        slots.view(lanes, -1, *slots.shape[-2:]).index_copy_(2, position, new.view(lanes, -1, 1, width))
    return query.flatten(1)


@multiply_turned.register_fake
def _(rows, matrices, *rest):  # type: ignore[no-untyped-def]
    return rows.new_empty(matrices[0].shape[:2])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to (..., width), as transformers does it, but rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, -1)
    return (x.to(wide) * cos.to(wide) + torch.cat([-second, first], -1) * sin.to(wide)).to(x.dtype)


@torch.library.custom_op("impasto::multiply_gated", mutates_args=())
def multiply_gated(
    rows: Tensor,
    gates: Tensor,
    matrices: Tensor,
    gate_biases: Tensor | None,
    biases: Tensor | None,
    activation: str,
    scales: Tensor | None = None,
    epsilon: float = 0.0,
    others: Tensor | None = None,
) -> Tensor:
    """The product of each row with its own matrix, times what an activation makes of its product with another one.

    Args:
        rows: (lanes, columns), or (1, columns) for all lanes.
        gates: (lanes, outputs, columns), whose products are activated.
        matrices: (lanes, outputs, columns).
        gate_biases: (lanes, outputs), with `gates`.
        biases: (lanes, outputs), with `matrices`; none without the other.
        activation: one of `ACTIVATIONS`.
        scales: as of `multiply_several`.
        epsilon: with it.
        others: the rows of `matrices`, which are not normed, where they are not those of `gates`; shaped as `rows`.

    Returns:
        (lanes, outputs), in the type of `rows`, to which both products and the activated one are rounded, too.

    Raises:
        RuntimeError: one bias without the other.
    """
    added = [x for x in (gate_biases, biases) if x is not None]
    if len(added) == 1:
        raise RuntimeError("a gate and what it gates have biases both, or neither has")
    if streamed(gates, matrices):
        from impasto import streaming

        return streaming.multiply(rows, [gates, matrices], added, activation, scales, epsilon, others=others)[0]
    rows = _normed(rows, scales, epsilon)
    gate: Tensor = multiply(rows, gates, gate_biases)
    product: Tensor = multiply(rows if others is None else others, matrices, biases)
    return ACTIVATIONS[activation](gate) * product


@multiply_gated.register_fake
def _(rows, gates, *rest):  # type: ignore[no-untyped-def]
    return rows.new_empty(gates.shape[:2])


def _merged(x: Tensor, dim: int | None, lanes: int) -> Tensor:
    """Lanes and the first dimension as one, of a tensor that has lanes in `dim`, or is the same for all."""
    x = x.expand(lanes, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)
