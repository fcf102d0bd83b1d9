"""A forest of tokens on the device: what a layer call needs is free again when it is done."""

from __future__ import annotations

import gc
import weakref

import impasto.levels as levels
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.scoring import Scorer
from tiny import tiny_model, tiny_tokenizer


def test_keys_and_values_are_free_before_the_garbage_collector_comes(monkeypatch):
    made: list[weakref.ref] = []

    class Watched(levels._LevelKeys):
        def __init__(self, level, above):
            super().__init__(level, above)
            made.append(weakref.ref(self))
            alive = sum(ref() is not None for ref in made)
            assert alive <= 3, "one for each level of one layer call"

    monkeypatch.setattr(levels, "_LevelKeys", Watched)
    scorer = Scorer(tiny_model(), tiny_tokenizer(), budget=200)
    requests = [Request("loglikelihood", "one beginning for both", end) for end in (" a", " bc")]
    gc.collect()
    gc.disable()
    try:
        scorer.score([Recipe.of("any", text, layers=4) for text in ("0:4", "0 {1 2}x3 3", "0 2 1 3")], requests)
        assert made and all(ref() is None for ref in made)
    finally:
        gc.enable()
