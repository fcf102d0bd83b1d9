"""Kernels of a decoding step for CUDA devices: imported only where one is at hand, as `triton` is.

A step of one row reads every weight and every key once and computes next to nothing, so these kernels are made to keep
memory busy: many programs, each with much to load and nothing to wait for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an early triton
    gdc_launch_dependents = gdc_wait = None

FEW, MANY = 1024, 8192  # outputs: so few take more warps for each, so many fill a large GPU with a warp for each
PROGRAMS = 264  # of attention that keep a large GPU busy: twice its multiprocessors
FULL = 8 * PROGRAMS  # of them are more than it begins at once
SHORT = 32  # columns of a part, where that makes no more programs than these
BLOCK = 64  # columns that a program reads at once, and those of a part, where there are many rows
PARTS = 128  # of a row's columns, at most
FITS = ((BLOCK, 3), (32, 3), (16, 3), (16, 1))  # columns at once and stages of loading; later ones need less memory


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, mask, mixed, peaks, masses,
    heads, shared, columns, span, masks, scale,
    query_row, query_head, key_row, key_head, key_column, value_row, value_head, value_column,
    mask_row, mask_head, mask_column,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, ONCE: tl.constexpr, MASK: tl.constexpr, ALIKE: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of one row and key head: what its heads see there, their largest scores, the sums of weights."""
    row, part = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()  # all programs are there at once, and so can be those that join what they make
        gdc_wait()
    text, group = (row // (heads // shared)).to(tl.int64), (row % (heads // shared)).to(tl.int64)
    place = tl.arange(0, PAIRS)
    head = group * shared + place
    live = place < shared
    wide, tall = tl.arange(0, WIDE), tl.arange(0, TALL)
    asked = tl.load(
        query + text * query_row + head[:, None] * query_head + wide[None, :],
        mask=live[:, None] & (wide < WIDTH)[None, :],
        other=0.0,
    )
    peak = tl.full([PAIRS], -float("inf"), tl.float32)
    mass = tl.zeros([PAIRS], tl.float32)
    total = tl.zeros([PAIRS, TALL], tl.float32)
    end = tl.minimum((part + 1) * span, columns)
    for first in range(part * span, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < end
        seen = live[:, None] & inside[None, :]
        added = tl.zeros([PAIRS, BLOCK], tl.float32)
        shown = inside  # to some head
        if ALIKE:
            at = mask + (text % masks) * mask_row + column * mask_column
            if MASK == 1:
                shown = inside & (tl.load(at, mask=inside, other=0) != 0)
                seen = live[:, None] & shown[None, :]
            else:
                added += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        elif MASK != 0:
            read = tl.load(
                mask + (text % masks) * mask_row + head[:, None] * mask_head + column[None, :] * mask_column,
                mask=seen,
                other=0,
            )
            if MASK == 1:
                seen = seen & (read != 0)
                shown = tl.max(seen.to(tl.int32), 0) > 0
            else:
                added = read.to(tl.float32)
        wanted = inside
        if not ONCE:  # a later block waits for its mask, and is not read if nobody sees it
            wanted = inside & (tl.max(shown.to(tl.int32), 0) > 0)
        keys = tl.load(
            key + text * key_row + group * key_head + column.to(tl.int64)[None, :] * key_column + wide[:, None],
            mask=wanted[None, :] & (wide < WIDTH)[:, None],
            other=0.0,
        )
        values = tl.load(
            value + text * value_row + group * value_head + column.to(tl.int64)[:, None] * value_column + tall[None, :],
            mask=wanted[:, None] & (tall < VALUES)[None, :],
            other=0.0,
        )
        if MASK == 1:  # what nobody sees may be anything, and 0 times anything is not always 0
            values = tl.where(shown[:, None], values, 0.0)
        scores = tl.dot(asked, keys.to(asked.dtype), input_precision=PRECISION) * scale + added
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        kept = tl.exp(peak - anchor)
        weights = tl.exp(scores - anchor[:, None])
        total = total * kept[:, None] + tl.dot(weights, values.to(tl.float32), input_precision=PRECISION)
        mass = mass * kept + tl.sum(weights, 1)
        peak = higher
    at = (row.to(tl.int64) * tl.num_programs(1) + part) * shared + place
    tl.store(peaks + at, peak, mask=live)
    tl.store(masses + at, mass, mask=live)
    tl.store(mixed + at[:, None] * VALUES + tall[None, :], total, mask=live[:, None] & (tall < VALUES)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    mixed, peaks, masses, out, parts, shared,
    VALUES: tl.constexpr, TALL: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of one head as one: values weighed over all columns."""
    row, pair = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_wait()
    part, tall = tl.arange(0, PARTS), tl.arange(0, TALL)
    there = part < parts
    at = (row.to(tl.int64) * parts + part) * shared + pair
    peak = tl.load(peaks + at, mask=there, other=-float("inf"))
    highest = tl.max(peak, 0)
    anchor = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp(peak - anchor)
    mass = tl.sum(weight * tl.load(masses + at, mask=there, other=0.0), 0)
    read = tl.load(
        mixed + at[:, None] * VALUES + tall[None, :], mask=there[:, None] & (tall < VALUES)[None, :], other=0.0
    )
    joined = tl.sum(read * weight[:, None], 0) / tl.where(mass == 0, 1.0, mass)  # who sees nothing gets nothing
    tl.store(out + (row * shared + pair) * VALUES + tall, joined.to(out.dtype.element_ty), mask=tall < VALUES)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """Attention of one query per row and head; arguments and result as of `impasto.rows.attend`.

    The columns of every row are split over programs, and their parts are joined by a second kernel. Blocks of columns
    that a boolean mask hides are not read, so that slots that are hardly filled cost hardly anything.

    Returns:
        The result; None where heads are too wide for the device's shared memory.
    """
    (batch, heads, _, width), (_, keys, columns, values) = query.shape, value.shape
    rows, shared = batch * keys, heads // keys
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    programs = rows * -(-columns // SHORT)
    span = SHORT if programs <= FULL else BLOCK
    span = max(span, -(-columns // PARTS))
    span += -span % 16
    # Many programs with few warps each are best; what more heads, or longer numbers, need does not fit their registers.
    light = programs > PROGRAMS and shared <= 16 and query.dtype != torch.float32
    parts = -(-columns // span)
    mixed = query.new_empty((rows, parts, shared, values), dtype=torch.float32)
    peaks, masses = (query.new_empty((rows, parts, shared), dtype=torch.float32) for _ in range(2))
    out = query.new_empty((batch, heads, 1, values))
    how, masks, strides = 0, 1, (0, 0, 0)
    if mask is not None:
        how, masks = (1 if mask.dtype == torch.bool else 2), mask.shape[0]
        mask = mask.expand(-1, heads, 1, columns)
        strides = (mask.stride(0), mask.stride(1), mask.stride(3))
        mask = mask.view(torch.uint8) if how == 1 else mask
    with torch.cuda.device(query.device):
        for most, stages in FITS:
            block = min(most, _power(span))
            read = block * max(_power(width), _power(values))
            warps = min(max(read // 4096, 1), 4) if light else 4
            with contextlib.suppress(OutOfResources):
                _attend[rows, parts](
                    query, key, value, query if mask is None else mask, mixed, peaks, masses,
                    heads, shared, columns, span, masks, scale,
                    query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], *strides,
                    WIDTH=width, VALUES=values, WIDE=_power(width), TALL=_power(values), PAIRS=_power(shared),
                    BLOCK=block, ONCE=span <= block, MASK=how, ALIKE=how > 0 and strides[1] == 0,
                    PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_stages=stages, num_warps=warps,
                    **_early(query.device),
                )  # fmt: skip
                break
        else:
            return None
        read = _power(parts) * _power(values)
        _join[rows, shared](
            mixed, peaks, masses, out, parts, shared, VALUES=values, TALL=_power(values), PARTS=_power(parts),
            num_warps=min(max(read // 2048, 1), 4), **_early(query.device),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first_outputs", "second_outputs", "third_outputs"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    row, first, second, third, first_bias, second_bias, third_bias, first_out, second_out, third_out, scales, added,
    others, cos, sin, position, slots,
    first_outputs, second_outputs, third_outputs, row_lane, matrix_lane, matrix_output, bias_lane, scale_lane,
    added_lane, other_lane, epsilon,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATE: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, TURNED: tl.constexpr,
    OTHERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some entries of one lane's product with one of several matrices, or with two of which the first is a gate.

    Where heads of a width TURNED are turned by rotary positions, the two entries of a program belong together; a key
    and a value go to their column in the slots.
    """
    lane = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if EARLY:
        gdc_wait()
    matrix, bias, out, outputs = first, first_bias, first_out, first_outputs
    which = 0
    if GATE is not None:
        matrix += lane * outputs * COLUMNS
        second += lane * outputs * COLUMNS
        bias += lane * outputs
        second_bias += lane * outputs
    elif COUNT > 1:
        blocks = tl.cdiv(first_outputs, ROWS)
        if block >= blocks:
            matrix, bias, out, outputs = second, second_bias, second_out, second_outputs
            which = 1
            block -= blocks
            if COUNT > 2:
                blocks = tl.cdiv(second_outputs, ROWS)
                if block >= blocks:
                    matrix, bias, out, outputs = third, third_bias, third_out, third_outputs
                    which = 2
                    block -= blocks
        matrix += lane * outputs * COLUMNS
        bias += lane * outputs
    else:
        matrix += lane * matrix_lane
        bias += lane * bias_lane
    number = tl.arange(0, ROWS)
    output = block.to(tl.int64) * ROWS + number
    if TURNED > 0:
        half: tl.constexpr = TURNED // 2
        output = (block // half).to(tl.int64) * TURNED + block % half + number * half
    there = output < outputs
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    gated = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in tl.static_range(0, COLUMNS, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        if COUNT > 1:
            place = output[:, None] * COLUMNS + column[None, :]
        else:
            place = output[:, None] * matrix_output + column[None, :]
        read = there[:, None] & inside[None, :]
        weight = tl.load(matrix + place, mask=read, other=0.0, eviction_policy="evict_first")
        if GATE is not None:
            other = tl.load(second + place, mask=read, other=0.0, eviction_policy="evict_first")
        factor = tl.load(row + lane * row_lane + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            squares += factor * factor
            factor *= tl.load(scales + lane * scale_lane + column, mask=inside, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * factor[None, :]
        if GATE is not None:
            if OTHERS:
                factor = tl.load(others + lane * other_lane + column, mask=inside, other=0.0).to(tl.float32)
            gated += other.to(tl.float32) * factor[None, :]
    result = tl.sum(total, 1)
    size = 1.0
    if SCALED:
        size = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + epsilon)
        result *= size
    if BIAS:
        result += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    if GATE is not None:  # every step is rounded, as it is where each is an operation of its own
        value = tl.sum(gated, 1) * (1.0 if OTHERS else size)
        if BIAS:
            value += tl.load(second_bias + output, mask=there, other=0.0).to(tl.float32)
        value = value.to(out.dtype.element_ty).to(tl.float32)
        result = result.to(out.dtype.element_ty).to(tl.float32)
        if GATE == "silu":
            result = result * tl.sigmoid(result)
        elif GATE == "gelu":
            result = 0.5 * result * (1 + tl.erf(result * 0.7071067811865476))
        elif GATE == "gelu_tanh":
            inner = 0.7978845608028654 * (result + 0.044715 * result * result * result)
            result = result * tl.sigmoid(2 * inner)
        else:
            tl.static_assert(GATE == "relu")
            result = tl.where(result < 0, 0.0, result)  # a maximum would hide what is no number
        result = result.to(out.dtype.element_ty).to(tl.float32) * value
    if ADDED:
        result = result.to(out.dtype.element_ty).to(tl.float32)
        result += tl.load(added + lane * added_lane + output, mask=there, other=0.0).to(tl.float32)
    at = lane * outputs + output
    if TURNED > 0:
        inner = output % TURNED
        result = result.to(out.dtype.element_ty).to(tl.float32)
        other = tl.sum(tl.where(number[:, None] == number[None, :], 0.0, result[None, :]), 1)
        turn = tl.load(cos + inner).to(tl.float32)
        cross = tl.load(sin + inner).to(tl.float32)
        turned = result * turn + tl.where(number == 0, -other, other) * cross
        result = tl.where(which < 2, turned, result)
        column = tl.load(position)
        column = tl.where(column < 0, column + slots, column)
        there = there & ((which == 0) | ((column >= 0) & (column < slots)))
        at = tl.where(which > 0, ((at // TURNED) * slots + column) * TURNED + inner, at)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there)


Turned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def multiply(
    rows: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    gate: str | None = None,
    scales: Tensor | None = None,
    epsilon: float = 0.0,
    added: Tensor | None = None,
    turned: Turned | None = None,
    others: Tensor | None = None,
) -> list[Tensor]:
    """Products with one to three matrices by one kernel; arguments and result as of `impasto.rows.multiply_several`.

    With a gate, one of `impasto.rows.ACTIVATIONS`, there are two matrices of one shape and one result, as of
    `impasto.rows.multiply_gated`, and the second may have other rows.

    What is turned are cosines, sines, and slots for keys and values with the position at which they are written, as of
    `impasto.rows.multiply_turned`; the result is the query.

    How a program reads follows from the shapes of matrices alone, so that all processes of a team, and all runs, take
    the same sums in the same order. On one H200 this was within 8 % of the best of some twenty choices for every shape
    tried (docs/performance.md).

    Raises:
        RuntimeError: neither one row nor one for each lane.
    """
    lanes, _, columns = matrices[0].shape
    per_lane = [x for x in (rows, scales, added, others) if x is not None]
    if any(len(x) not in (1, lanes) for x in per_lane):
        raise RuntimeError(f"{[len(x) for x in per_lane]} rows for {lanes} lanes")
    single = len(matrices) == 1
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    matrices = [x if single and x.stride(-1) == 1 else x.contiguous() for x in matrices]
    offsets = [x.contiguous() for x in biases] or [rows]
    made = [rows.new_empty(x.shape[:2]) for x in (matrices if gate is None and turned is None else matrices[:1])]
    cos, sin, keys, values, position = (
        (rows,) * 5 if turned is None else (*map(Tensor.contiguous, turned[:2]), *turned[2:])
    )
    made += [] if turned is None else [keys, values]
    width, slots = (0, 0) if turned is None else (keys.shape[-1], keys.shape[-2])
    size, plus, beside = (rows if x is None else x.contiguous() for x in (scales, added, others))
    first, second, third = ([*x, *[x[0]] * (3 - len(x))] for x in (matrices, offsets, made))
    outputs = lanes * max(x.shape[1] for x in matrices)
    each, block, warps = _reading(outputs, columns, single, gate is not None, turned is not None)
    counts = [triton.cdiv(x.shape[1], each) for x in (matrices if gate is None else matrices[:1])]
    with torch.cuda.device(rows.device):
        _multiply[sum(counts), lanes](
            rows, *first, *second, *third, size, plus, beside, cos, sin, position, slots, *[x.shape[1] for x in first],
            _lane(rows), *matrices[0].stride()[:2], offsets[0].stride(0), *map(_lane, (size, plus, beside)), epsilon,
            COUNT=len(matrices), COLUMNS=columns, BIAS=bool(biases), ROWS=each, BLOCK=block,
            GATE=gate, SCALED=scales is not None, ADDED=added is not None, TURNED=width, OTHERS=others is not None,
            num_warps=warps, **_early(rows.device),
        )  # fmt: skip
    return made


@functools.cache
def _early(device: torch.device) -> dict[str, Any]:
    """How kernels are launched: where it can be, before the one in front has ended, for whose writes they wait.

    So the way to the device is behind them when they may begin (CUDA's programmatic dependent launch). They touch no
    memory before; as every one of them waits, what stands before the one in front has ended, too. A kernel of many
    programs does not let the next one in before its own have ended: they would take each other's place.

    Hopper and Blackwell of data centres know it; `IMPASTO_EARLY=0` leaves it.
    """
    capable = gdc_wait is not None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    can = capable and os.environ.get("IMPASTO_EARLY") != "0"
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


def _lane(rows: Tensor) -> int:
    """How far one lane's row is from the next one's; one row may be all lanes'."""
    return rows.stride(0) if len(rows) > 1 else 0


def _reading(outputs: int, columns: int, single: bool, gated: bool, turned: bool) -> tuple[int, int, int]:
    """How many rows of a matrix and columns a program reads at once, and its warps.

    Args:
        outputs: of the largest matrix, in all lanes.
        columns: of each.
        single: there is one matrix.
        gated: there are two, of which a program reads the same rows.
        turned: a program makes two entries that belong together.
    """
    few, width = outputs <= FEW, min(_power(columns), 1024)
    if turned:
        return (2, width, 4) if few or columns > 1024 else (2, min(width, 512), 1)
    if columns <= 512:
        return 4, width, 1
    if gated:
        if columns > 1024:
            return 1, 2048, 8
        return (2, 512, 1) if outputs <= MANY else (1, width, 1)
    if columns > 1024:
        return (1, 4096, 8) if few and columns >= 2048 else (1, 1024, 4)
    if few and not single:
        return 1, width, 1
    return 2, width if single else 512, 1


def _power(size: int) -> int:
    """The next power of two that a matrix unit takes: at least 16."""
    return max(16, int(triton.next_power_of_2(size)))
