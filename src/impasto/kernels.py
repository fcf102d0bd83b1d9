"""Kernels for CUDA devices; imported only where one is at hand, since `triton` comes with torch's CUDA builds alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words that a program reads at once
SPAN = 32768  # words of a row that one program reads


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(logits, peaks, masses, words, stride, span, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((part + 1) * span, words)
    peak = -float("inf")
    mass = 0.0
    for start in range(part * span, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        read = tl.load(logits + row * stride + place, mask=place < end, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(read, 0))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        mass = mass * tl.exp(peak - anchor) + tl.sum(tl.exp(read - anchor), 0)
        peak = higher
    tl.store(peaks + row * tl.num_programs(1) + part, peak)
    tl.store(masses + row * tl.num_programs(1) + part, mass)


def weigh(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m of each row, and the sum of exp(x - m): (rows, words) of any floating type to two (rows,) of float32.

    One pass over the logits as they are; torch's own operations copy them to float32 and pass over the copy five times.
    """
    rows, words = logits.shape
    parts = -(-words // SPAN)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    peaks = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    masses = torch.empty_like(peaks)
    if rows:
        with torch.cuda.device(logits.device):
            _weigh[rows, parts](logits, peaks, masses, words, logits.stride(0), SPAN, BLOCK=BLOCK)
    top = peaks.amax(1)
    anchor = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    return top, (masses * torch.exp(peaks - anchor[:, None])).sum(1)
