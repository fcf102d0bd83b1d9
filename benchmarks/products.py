"""How a program of `impasto.streaming.multiply` should read: every choice of outputs, block and warps, for each shape.

With one matrix per lane, and for shapes of a gate (more outputs than columns) with two, one of which gates the other.

    python benchmarks/products.py --output products.json

Times are those of `triton.testing.do_bench`, which clears the cache before every call, as a step does that reads a
model's other weights in between. `bmm` is the library's product. What the kernel takes by itself is marked.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from impasto import streaming
from impasto.hardware import machine

SHAPES = (  # lanes, outputs, columns: of twelve stacked layers and the head at width 896, and of layers at width 4,096
    (12, 896, 896),
    (12, 4864, 896),
    (12, 896, 4864),
    (1, 151936, 896),
    (1, 11008, 4096),
    (1, 4096, 11008),
    (1, 4096, 4096),
)
CHOICES = (  # outputs and columns that a program reads at once, and its warps
    *((1, 1024, warps) for warps in (1, 2, 4)),
    *((2, 1024, warps) for warps in (1, 2, 4)),
    *((4, 1024, warps) for warps in (2, 4, 8)),
    *((8, 1024, 8), (8, 512, 4), (4, 512, 2), (2, 512, 1), (16, 256, 4), (16, 128, 2)),
    *((1, 2048, 4), (2, 2048, 4), (2, 2048, 8), (1, 4096, 8), (1, 8192, 8), (4, 256, 1), (8, 256, 2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("products.json"))
    chosen = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(torch.device("cuda")), "unit": "milliseconds", "shapes": {}}
    for shape in SHAPES:
        found["shapes"]["x".join(map(str, shape))] = one = tried(shape, gated=False)
        chosen.output.write_text(json.dumps(found, indent=1))
        show(f"{shape}", one, math.prod(shape) * 2)
        if shape[1] > shape[2] and shape[1] < 10 * shape[2]:
            found["shapes"]["x".join(map(str, shape)) + ", gated"] = two = tried(shape, gated=True)
            chosen.output.write_text(json.dumps(found, indent=1))
            show(f"{shape}, gated", two, math.prod(shape) * 4)


def tried(shape: tuple[int, int, int], gated: bool) -> dict[str, list[float]]:
    """Milliseconds of every choice, of the library, and of the kernel as it is."""
    lanes, _, columns = shape
    row = torch.randn(lanes, columns, device="cuda").bfloat16()
    matrices = [torch.randn(shape, device="cuda").bfloat16() for _ in range(1 + gated)]
    found = {"bmm": timed(lambda: [torch.bmm(matrix, row[:, :, None]) for matrix in matrices])}

    def product() -> Any:
        return streaming.multiply(row, matrices, [], "silu" if gated else None)

    for each, block, warps in CHOICES:
        if block > 2 * columns:
            continue
        with mock.patch.object(streaming, "_reading", return_value=(each, block, warps)):
            found[f"{each} outputs, {block} columns, {warps} warps"] = timed(product)
    found["as it is"] = timed(product)
    return found


def show(name: str, found: dict[str, list[float]], nbytes: int) -> None:
    """The fastest choices."""
    best = sorted((samples[len(samples) // 2], choice) for choice, samples in found.items())
    print(f"{name}, {nbytes / 1e6:.0f} MB")
    for time, choice in best[:6]:
        print(f"  {time * 1e3:7.1f} us  {nbytes / time / 1e9:5.2f} TB/s  {choice}", flush=True)


def timed(call: Any) -> list[float]:
    """Milliseconds of some calls, sorted."""
    call()
    return sorted(triton.testing.do_bench(call, warmup=3, rep=12, return_mode="all"))


if __name__ == "__main__":
    main()
