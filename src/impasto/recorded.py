"""Layer calls of one batch, recorded at their third run and replayed from then on.

A study calls each layer on the same batch hundreds of times, always with the same masks, shapes and weights; only the
hidden states differ. On a GPU a small layer is over long before the CPU has launched its kernels, one by one. So its
kernels are recorded as a CUDA graph, which is launched as a whole. Results are those of the same kernels; libraries may
choose others while they are recorded, which moves a result by rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from impasto import memory
from impasto.graphs import Backend, Work

AT = 3  # the run at which a call is recorded: recording takes about as long as two runs

Call = Callable[[Sequence[Tensor]], list[Tensor]]
Key = tuple[int, str]  # a layer, and which half of it


class Recorder:
    """Runs layer calls, the frequent ones as recordings.

    All recordings read one set of input tensors and write one set of output tensors, so that they need little memory of
    their own. Where something cannot be recorded, everything is run as it is from then on.

    Args:
        backend: how kernels are recorded; None runs everything as it is.
        note: told why recording was given up.
    """

    def __init__(self, backend: Backend | None, note: Callable[[str], None] = lambda text: None) -> None:
        self.backend = backend
        self.note = note
        self.runs: Counter[Key] = Counter()
        self.replays: dict[Key, Work] = {}
        self.entry: list[Tensor] = []
        self.exit: list[Tensor] = []

    def call(self, key: Key, call: Call, states: Sequence[Tensor]) -> list[Tensor]:
        """What `call` makes of the states, one tensor per level; equal keys stand for equal calls."""
        if self.backend is None:
            return call(states)
        if key not in self.replays:
            self.runs[key] += 1
            if self.runs[key] < AT or not self._record(key, call, states):
                return call(states)
        for place, state in zip(self.entry, states, strict=True):
            place.copy_(state)
        self.replays[key]()
        return [place.clone() for place in self.exit]

    def _record(self, key: Key, call: Call, states: Sequence[Tensor]) -> bool:
        assert self.backend is not None
        if not self.entry:
            self.entry = [state.clone() for state in states]
            self.exit = [torch.empty_like(state) for state in states]

        def work() -> None:
            for place, state in zip(self.exit, call(self.entry), strict=True):
                place.copy_(state)

        try:
            self.replays[key] = self.backend.record(work, lambda: None)
        except Exception as error:
            self.backend, self.replays, self.entry, self.exit = None, {}, [], []
            memory.free()
            why = "memory does not suffice" if memory.ran_out(error) else "this model's code cannot be recorded"
            self.note(f"layer calls are launched kernel by kernel: {why}")
            return False
        return True
