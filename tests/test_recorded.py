"""Laws of recorded.py: recordings give what plain runs give, and giving up loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from impasto.graphs import Eager
from impasto.recipe import Recipe
from impasto.recorded import AT, Recorder
from impasto.result import Request
from impasto.scoring import Scorer, Sharing
from tiny import tiny_model, tiny_tokenizer


class Tape(Eager):
    """Records by remembering; counts recordings."""

    def __init__(self) -> None:
        self.recordings = 0

    def record(self, work: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        return work


class Broken(Eager):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def record(self, work: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        raise self.error


def double(states: Sequence[Tensor]) -> list[Tensor]:
    return [2 * state for state in states]


def states(value: float) -> list[Tensor]:
    return [torch.full((2, 3), value), torch.full((1, 2), value + 1)]


def test_the_third_run_is_recorded_and_later_ones_replayed() -> None:
    tape, runs = Tape(), []

    def counted(given: Sequence[Tensor]) -> list[Tensor]:
        runs.append(1)
        return double(given)

    recorder = Recorder(tape)
    kept = []
    for value in range(6):
        kept.append((value, recorder.call((0, "whole"), counted, states(value))))
        assert tape.recordings == (value + 1 >= AT)
    for value, found in kept:  # no result is written over by a later one
        assert all(torch.equal(a, b) for a, b in zip(found, double(states(value)), strict=True))
    recorder.call((1, "whole"), counted, states(0))
    assert tape.recordings == 1 and recorder.runs[1, "whole"] == 1


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory does not suffice"),
        (RuntimeError("operation not permitted when stream is capturing"), "this model's code cannot be recorded"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(error: Exception, why: str) -> None:
    notes: list[str] = []
    recorder = Recorder(Broken(error), notes.append)
    for value in range(2 * AT):
        found = recorder.call((0, "whole"), double, states(value))
        assert all(torch.equal(a, b) for a, b in zip(found, double(states(value)), strict=True))
    assert notes == [f"layer calls are launched kernel by kernel: {why}"]
    assert recorder.backend is None and not recorder.entry


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_scores_are_those_of_plain_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    asked = [
        Request("loglikelihood", "a question and more", text) for text in (" x", " sun", "q", " one longer answer")
    ]
    asked += [Request("rolling", "", "some text " * n) for n in (1, 2)]
    chosen = [
        Recipe.of("tiny", text, layers=4)
        for text in ("0:4", "0 2 1 3", "0 {1 2}x3 3", "3:0", "0 1x5 2", "0.attn 1:4", "0.attn 0.mlp 3", "0:3")
    ]
    if family != "llama":  # halves of a block are not found in every tiny model
        chosen = [recipe for recipe in chosen if "attn" not in str(recipe)]
    plain = Scorer(model, tokenizer, budget=80).score(chosen, asked)
    tape = Tape()
    monkeypatch.setattr(Scorer, "backend", lambda self: tape)
    recorded = Scorer(model, tokenizer, budget=80).score(chosen, asked)
    assert tape.recordings
    np.testing.assert_array_equal(plain.loglikelihood, recorded.loglikelihood)
    np.testing.assert_array_equal(plain.greedy, recorded.greedy)


def test_nothing_is_recorded_on_a_cpu_or_against_the_wish() -> None:
    assert Scorer(tiny_model(), tiny_tokenizer()).backend() is None
    assert Scorer(tiny_model(), tiny_tokenizer(), sharing=Sharing(launches=False)).backend() is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_recordings_on_a_gpu(family: str) -> None:
    model, tokenizer = tiny_model(family).cuda(), tiny_tokenizer()
    asked = [Request("loglikelihood", "a question and more", text) for text in (" x", " sun", "q", " a longer answer")]
    chosen = [Recipe.of("tiny", text, layers=4) for text in ("0:4", "0 2 1 3", "0 {1 2}x9 3", "3:0", "0 1x5 2")]
    notes: list[str] = []
    plain = Scorer(model, tokenizer, sharing=Sharing(launches=False)).score(chosen, asked)
    recorded = Scorer(model, tokenizer, note=notes.append).score(chosen, asked)
    np.testing.assert_allclose(plain.loglikelihood, recorded.loglikelihood, atol=1e-4)
    assert not notes or family == "mixtral"
