"""Kernels of a decoding step for CUDA devices: imported only where one is at hand, as `triton` is.

A step of one row reads every weight and every key once and computes next to nothing, so these kernels are made to keep
memory busy: many programs, each with much to load and nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # that a step of attention is split into, if it is long enough: twice the multiprocessors of a large GPU
PARTS = 128  # of a row's columns, at most
SHORTEST = 32  # columns of a part
BLOCK = 64  # columns that a program reads at once


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, mask, mixed, peaks, masses,
    heads, shared, columns, span, masks, scale,
    query_row, query_head, key_row, key_head, key_column, value_row, value_head, value_column,
    mask_row, mask_head, mask_column,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, ONCE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one row and key head: what its heads see there, their largest scores, the sums of weights."""
    row, part = tl.program_id(0), tl.program_id(1)
    text, group = (row // (heads // shared)).to(tl.int64), (row % (heads // shared)).to(tl.int64)
    place = tl.arange(0, PAIRS)
    head = group * shared + place
    live = place < shared
    wide, tall = tl.arange(0, WIDE), tl.arange(0, TALL)
    asked = tl.load(
        query + text * query_row + head[:, None] * query_head + wide[None, :],
        mask=live[:, None] & (wide < WIDTH)[None, :],
        other=0.0,
    ).to(tl.float32)
    peak = tl.full([PAIRS], -float("inf"), tl.float32)
    mass = tl.zeros([PAIRS], tl.float32)
    total = tl.zeros([PAIRS, TALL], tl.float32)
    end = tl.minimum((part + 1) * span, columns)
    for first in range(part * span, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < end
        seen = live[:, None] & inside[None, :]
        added = tl.zeros([PAIRS, BLOCK], tl.float32)
        if MASK != 0:
            read = tl.load(
                mask + (text % masks) * mask_row + head[:, None] * mask_head + column[None, :] * mask_column,
                mask=seen,
                other=0,
            )
            if MASK == 1:
                seen = seen & (read != 0)
            else:
                added = read.to(tl.float32)
        wanted = inside
        if not ONCE:  # a later block waits for its mask, and is not read if nobody sees it
            wanted = inside & (tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0)
        keys = tl.load(
            key + text * key_row + group * key_head + column[None, :] * key_column + wide[:, None],
            mask=wanted[None, :] & (wide < WIDTH)[:, None],
            other=0.0,
        )
        values = tl.load(
            value + text * value_row + group * value_head + column[:, None] * value_column + tall[None, :],
            mask=wanted[:, None] & (tall < VALUES)[None, :],
            other=0.0,
        )
        scores = tl.dot(asked, keys.to(tl.float32), input_precision=PRECISION) * scale + added
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        kept = tl.exp(peak - anchor)
        weights = tl.exp(scores - anchor[:, None])
        total = total * kept[:, None] + tl.dot(weights, values.to(tl.float32), input_precision=PRECISION)
        mass = mass * kept + tl.sum(weights, 1)
        peak = higher
    at = (row * tl.num_programs(1) + part) * shared + place
    tl.store(peaks + at, peak, mask=live)
    tl.store(masses + at, mass, mask=live)
    tl.store(mixed + at[:, None] * VALUES + tall[None, :], total, mask=live[:, None] & (tall < VALUES)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    mixed, peaks, masses, out, parts, shared,
    VALUES: tl.constexpr, TALL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of one head as one: values weighed over all columns."""
    row, pair = tl.program_id(0), tl.program_id(1)
    part, tall = tl.arange(0, PARTS), tl.arange(0, TALL)
    there = part < parts
    at = (row * parts + part) * shared + pair
    peak = tl.load(peaks + at, mask=there, other=-float("inf"))
    highest = tl.max(peak, 0)
    anchor = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp(peak - anchor)
    mass = tl.sum(weight * tl.load(masses + at, mask=there, other=0.0), 0)
    read = tl.load(
        mixed + at[:, None] * VALUES + tall[None, :], mask=there[:, None] & (tall < VALUES)[None, :], other=0.0
    )
    joined = tl.sum(read * weight[:, None], 0) / mass
    tl.store(out + (row * shared + pair) * VALUES + tall, joined.to(out.dtype.element_ty), mask=tall < VALUES)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row and head; arguments and result as of `impasto.rows.attend`.

    The columns of every row are split over programs, and their parts are joined by a second kernel. Blocks of columns
    that a boolean mask hides are not read, so that slots that are hardly filled cost hardly anything.
    """
    (batch, heads, _, width), (_, keys, columns, values) = query.shape, value.shape
    rows, shared = batch * keys, heads // keys
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    span = -(-columns // max(1, min(-(-columns // SHORTEST), -(-PROGRAMS // rows), PARTS)))
    span = min(span + -span % 16, max(BLOCK, -(-columns // PARTS)))
    parts = -(-columns // span)
    new = query.new_empty
    mixed = new((rows, parts, shared, values), dtype=torch.float32)
    peaks, masses = (new((rows, parts, shared), dtype=torch.float32) for _ in range(2))
    out = new((batch, heads, 1, values))
    how, masks, strides = 0, 1, (0, 0, 0)
    if mask is not None:
        how, masks = (1 if mask.dtype == torch.bool else 2), mask.shape[0]
        steps = mask.stride()
        strides = (steps[0], steps[1] if mask.shape[1] > 1 else 0, steps[3])
        mask = mask.view(torch.uint8) if how == 1 else mask
    with torch.cuda.device(query.device):
        _attend[rows, parts](
            query, key, value, query if mask is None else mask, mixed, peaks, masses,
            heads, shared, columns, span, masks, scale,
            query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], *strides,
            WIDTH=width, VALUES=values, WIDE=_power(width), TALL=_power(values), PAIRS=_power(shared),
            BLOCK=min(BLOCK, _power(span)), ONCE=span <= BLOCK, MASK=how,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        _join[rows, shared](
            mixed, peaks, masses, out, parts, shared, VALUES=values, TALL=_power(values), PARTS=_power(parts)
        )
    return out


@triton.jit(do_not_specialize=["first_outputs", "second_outputs", "third_outputs"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    row, first, second, third, first_bias, second_bias, third_bias, first_out, second_out, third_out,
    first_outputs, second_outputs, third_outputs, row_lane, matrix_lane, matrix_output, bias_lane,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some entries of one lane's product with one of several matrices."""
    lane = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    matrix, bias, out, outputs = first, first_bias, first_out, first_outputs
    if COUNT > 1:
        blocks = tl.cdiv(first_outputs, ROWS)
        if block >= blocks:
            matrix, bias, out, outputs = second, second_bias, second_out, second_outputs
            block -= blocks
            if COUNT > 2:
                blocks = tl.cdiv(second_outputs, ROWS)
                if block >= blocks:
                    matrix, bias, out, outputs = third, third_bias, third_out, third_outputs
                    block -= blocks
        matrix += lane * outputs * COLUMNS
        bias += lane * outputs
    else:
        matrix += lane * matrix_lane
        bias += lane * bias_lane
    output = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = output < outputs
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in tl.static_range(0, COLUMNS, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        factor = tl.load(row + lane * row_lane + column, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 1:
            place = output[:, None] * COLUMNS + column[None, :]
        else:
            place = output[:, None] * matrix_output + column[None, :]
        weight = tl.load(
            matrix + place, mask=there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
        )
        total += weight.to(tl.float32) * factor[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + lane * outputs + output, result.to(out.dtype.element_ty), mask=there)


def _brief(call: Any, quantiles: Any = None) -> Any:
    """Milliseconds of a call that finds nothing in the cache; few repetitions, since candidates are all alike."""
    return triton.testing.do_bench(call, warmup=2, rep=8, quantiles=quantiles)


_measured = triton.autotune(
    configs=[
        triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps)
        for rows, block, warps in (
            (2, 1024, 1), (2, 512, 1), (1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (2, 2048, 8), (1, 4096, 8),
        )
    ],
    key=["first_outputs", "COUNT", "COLUMNS"],
    do_bench=_brief,
)(_multiply)  # fmt: skip


def multiply(rows: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
    """The product of each row with its own matrix; arguments and result as of `impasto.rows.multiply`.

    How many outputs a program has and how it reads is chosen by measuring, once for each shape.
    """
    matrices = matrices if matrices.stride(-1) == 1 else matrices.contiguous()
    return _products(rows, [matrices], [] if biases is None else [biases])[0]


def multiply_several(rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """The products of each row with two or three matrices, by one kernel, as of `impasto.rows.multiply_several`."""
    return _products(rows, [x.contiguous() for x in matrices], biases)


def _products(rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Products with one to three matrices, which are contiguous if they are several."""
    lanes, columns = rows.shape
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    made = [rows.new_empty((lanes, x.shape[1])) for x in matrices]
    added = [x.contiguous() for x in biases] or [rows]
    three = [(*x, *[x[0]] * (3 - len(x))) for x in (matrices, added, made)]
    outputs = [x.shape[1] for x in matrices]
    with torch.cuda.device(rows.device):
        _measured[lambda chosen: (sum(triton.cdiv(n, chosen["ROWS"]) for n in outputs), lanes)](
            rows, *three[0], *three[1], *three[2], *[*outputs, 0, 0][:3],
            rows.stride(0), *matrices[0].stride()[:2], added[0].stride(0),
            COUNT=len(matrices), COLUMNS=columns, BIAS=bool(biases),
        )  # fmt: skip
    return made


def _power(size: int) -> int:
    """The next power of two that a matrix unit takes: at least 16."""
    return max(16, int(triton.next_power_of_2(size)))
