"""One decoded token in batches: recorded modules with attention of ours and without it, compiled, and as they are.

    python benchmarks/attention.py --cases 32x4096,256x1024 --output attention.json

A model of the given shape with random weights, bfloat16, its own order of layers. A case is rows x columns: a prompt
that leaves 64 columns is read, then steps are timed, each between two CUDA events. What is compared is built one after
another and measured in turns; every sample is kept, and the file is written anew behind every case.

    ours      `fast`, modules recorded, attention by `impasto.attention`
    theirs    the same with transformers' own attention
    compiled  `fast` through torch's compiler
    eager     the model called as `generate` calls it, with a growing cache, not compiled
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import decode
from decode import CUDA, DEVICE, TAIL, quantiles, timed
from impasto import rows
from impasto.fast import fast
from impasto.hardware import machine

MODES = ("ours", "theirs", "compiled", "eager")
ROUNDS, STEPS, WARM = 3, 12, 3


@contextlib.contextmanager
def attention_of(mode: str) -> Iterator[None]:
    """Leave attention to transformers while what is to be compared with ours is recorded."""
    own = rows.attended
    if mode == "theirs":
        rows.attended = lambda query: False
    try:
        yield
    finally:
        rows.attended = own


class Decoded:
    """A decoder, recorded or compiled; what was recorded can be replayed when its model is free again."""

    def __init__(self, model: Any, ids: Tensor, context: int, mode: str) -> None:
        with (
            attention_of(mode),
            fast(
                model,
                batch=len(ids),
                context=context,
                buckets=[context],
                prompt_sizes=[],
                compile="inductor" if mode == "compiled" else "off",
            ) as self.decoder,
        ):
            self.decoder.prefill(ids)
            self.decoder.step()
        self.step = self.decoder.step

    def restart(self) -> None:
        """Back to the end of the prompt."""
        self.decoder.filled = self.decoder.begun
        self.decoder.program.clock.position.fill_(self.decoder.begun)


class Eager:
    """The model with a growing cache and a mask of ones, token by token."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.length = model, ids.shape[1]
        self.cache = DynamicCache(config=model.config)
        self.ids = ids
        self.mask = ids.new_ones(len(ids), 0)
        self.step()

    def restart(self) -> None:
        """Back to the end of the prompt."""
        if beyond := self.cache.get_seq_length() - self.length:
            self.cache.crop(-beyond)
        self.mask = self.mask[:, : self.length]

    @torch.no_grad()
    def step(self) -> None:
        """One token more in every row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        asked = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        self.ids = self.model(input_ids=self.ids, **asked).logits[:, -1].argmax(-1, keepdim=True)


def compare(model: Any, batch: int, context: int, modes: list[str]) -> dict[str, Any]:
    """Milliseconds per step of every mode in one case, or why there are none."""
    ids = torch.randint(10, model.config.vocab_size - 10, (batch, context - TAIL)).to(DEVICE)
    found: dict[str, Any] = {}
    ready: dict[str, Any] = {}
    for mode in modes:
        began = time.perf_counter()
        try:
            ready[mode] = Eager(model, ids) if mode == "eager" else Decoded(model, ids, context, mode)
            found[mode] = {"build_seconds": time.perf_counter() - began, "samples": []}
        except Exception as problem:  # what one of them cannot do must not cost the others' numbers
            found[mode] = {"failed": f"{type(problem).__name__}: {problem}"[:600]}
    for _ in range(ROUNDS):
        for mode, one in ready.items():
            one.restart()
            found[mode]["samples"] += timed(one.step, WARM + STEPS)[WARM:]
    for mode in ready:
        found[mode]["ms"] = quantiles(found[mode]["samples"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", choices=decode.SHAPES)
    parser.add_argument("--cases", default="32x4096,32x1024,256x1024", help="rows x columns")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--output", type=Path, default=Path("attention.json"))
    chosen = parser.parse_args()
    model = decode.build(chosen.shape, torch.bfloat16)
    found: dict[str, Any] = {"machine": machine(DEVICE), "shape": chosen.shape, "cases": {}}
    for case in chosen.cases.split(","):
        batch, context = map(int, case.split("x"))
        found["cases"][case] = here = compare(model, batch, context, chosen.modes.split(","))
        chosen.output.write_text(json.dumps(found, indent=1))
        for mode, result in here.items():
            ms = result.get("ms")
            text = f"{ms['median']:8.2f} [{ms['q05']:.2f}, {ms['q95']:.2f}] ms" if ms else result["failed"]
            print(f"{case:10} {mode:10} {text}", flush=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
