"""How fast this machine runs a model's layers and its head: measured in a moment, to say how long work will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from impasto.anatomy import quietly
from impasto.forest import grow, lay_out
from impasto.head import SLICE
from impasto.levels import call_layer, prepare
from impasto.scoring import HEAD_ROWS, Scoring, Work

WIDTH = 64
ROUNDS = 3
TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Pace:
    """What one unit of work takes here.

    Attributes:
        layer: seconds of one layer on one token.
        head: seconds of the head on one scored position.
        state: bytes of one token's hidden state.
        slice: bytes of one slice of logits, with the temporaries beside it.
    """

    layer: float
    head: float
    state: int
    slice: int

    def seconds(self, work: Work) -> float:
        """How long the work will take, shared as it will be."""
        return self.layer * work.cost + self.head * work.positions * work.recipes

    def naive_seconds(self, work: Work) -> float:
        """How long its layer calls and scored positions would take with nothing shared."""
        return self.layer * work.naive_cost + self.head * work.positions * work.recipes

    def bytes(self, work: Work, batch_tokens: int) -> int:
        """Memory beside the weights, at the most."""
        return self.state * batch_tokens * (work.alive + 8) + self.slice


def pace(scorer: Scoring) -> Pace:
    """Run one middle layer and the head a few times on random tokens and take the fastest."""
    generator = torch.Generator().manual_seed(0)
    rows = max(4, min(256, (scorer.budget or 0) // (4 * WIDTH)))  # a batch of a size that the device will see
    words = torch.randint(3, 256, (rows, WIDTH), generator=generator).tolist()
    forest = lay_out(grow([tuple(row) for row in words], share=False))
    with quietly(scorer.model):
        levels = prepare(scorer.model, scorer.body, forest, scorer.device)
        states = [level.hidden for level in levels]
        layer = _fastest(scorer, lambda: call_layer(scorer.body, scorer.body.depth // 2, levels, states))
        flat = states[0].flatten(-3, -2)
        places = torch.arange(min(HEAD_ROWS, flat.shape[-2]), device=scorer.device)
        few = flat[..., : len(places), :]
        head = _fastest(scorer, lambda: scorer.head.score(few, places, places % 256))
    size = states[0].element_size()
    return Pace(
        layer=layer / (rows * WIDTH),
        head=head / len(places),
        state=states[0].numel() // (rows * WIDTH) * size,
        slice=3 * 4 * SLICE.get(scorer.device.type, SLICE["cuda"]),
    )


def _fastest(scorer: Scoring, work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        _wait(scorer.device)
        began = time.perf_counter()
        work()
        _wait(scorer.device)
        best = min(best, time.perf_counter() - began)
    return max(best, TINY)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
