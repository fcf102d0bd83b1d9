"""Up to which rank two thin products are faster than one dense product; measured on the device."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F

TOKENS = 64  # positions in one call, if nothing else is said
_PAIRS = 7  # samples of each form for one comparison
_STEPS = 5  # halvings of the range, so the answer is known to a thirty-second of it
_SHORTEST = 2e-4  # seconds that one sample must last to be trusted


def fewer_numbers(rows: int, columns: int) -> int:
    """The largest rank at which two thin matrices hold fewer numbers than the dense one: below mn / (m + n)."""
    return (rows * columns - 1) // (rows + columns)


def break_even(
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokens: int = TOKENS,
    folder: Path | None = None,
) -> int:
    """The largest rank at which a linear layer of this shape runs faster as two thin products.

    Dense and thin products are timed in turn in this process, and medians of their ratios compared; the rank is found
    by halving, and is never above `fewer_numbers`, which is also the answer where the device cannot be timed.

    Args:
        rows: one side of the matrix.
        columns: the other side.
        dtype: type of weights and inputs.
        device: where it runs.
        tokens: positions in one call: many for prompts, one for writing word by word.
        folder: where answers are kept between runs, for each device, type, shape and number of tokens.
    """
    place = torch.device(device)
    names = (_name(place), str(dtype).removeprefix("torch."), f"{rows}x{columns}", str(tokens), torch.__version__)
    path = None if folder is None else folder / "break-even.json"
    key = " | ".join(names)
    known = _read(path)
    if key not in known:
        known = _read(path) | {key: _measured(rows, columns, dtype, place, tokens)}
        _write(path, known)
    return known[key]


@cache
def _measured(rows: int, columns: int, dtype: torch.dtype, device: torch.device, tokens: int) -> int:
    low, high = 0, fewer_numbers(rows, columns)
    if device.type == "meta":
        return high
    try:
        for _ in range(_STEPS):
            rank = (low + high + 1) // 2
            if rank in (low, 0):
                break
            if _faster(rows, columns, rank, dtype, device, tokens):
                low = rank
            else:
                high = rank - 1
    except RuntimeError:  # not enough memory, or a type that the device cannot multiply
        return fewer_numbers(rows, columns)
    return low


def _faster(rows: int, columns: int, rank: int, dtype: torch.dtype, device: torch.device, tokens: int) -> bool:
    """Whether the thin form of this rank takes less time, by interleaved samples."""
    with torch.inference_mode():
        random = torch.Generator().manual_seed(0)
        shapes = ((tokens, columns), (rows, columns), (rank, columns), (rows, rank))
        hidden, whole, first, second = (torch.randn(s, generator=random).to(device, dtype) for s in shapes)

        def dense() -> None:
            F.linear(hidden, whole)

        def thin() -> None:
            F.linear(F.linear(hidden, first), second)

        _seconds(thin, 2, device)
        once = max(_seconds(dense, 2, device) / 2, 1e-9)
        calls = max(1, round(_SHORTEST / once))
        ratios = [_seconds(thin, calls, device) / _seconds(dense, calls, device) for _ in range(_PAIRS)]
    return median(ratios) < 1


def _seconds(work: Callable[[], None], calls: int, device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    for _ in range(calls):
        work()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.machine()} {platform.processor()} {torch.get_num_threads()} threads"


def _read(path: Path | None) -> dict[str, int]:
    if path is None:
        return {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return {str(key): rank for key, rank in known.items() if type(rank) is int}
    return {}


def _write(path: Path | None, known: dict[str, int]) -> None:
    """Keep the answers; the file appears whole or not at all, and a full or read-only disk is no error."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".break-even-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=1, sort_keys=True)
        Path(draft).replace(path)
