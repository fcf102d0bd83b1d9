"""Perplexity in sliding windows: laws of the windows, and the plain computation beside the shared engine."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import DEPTH, build
from impasto import models
from impasto.apply import applied
from impasto.errors import UsageError
from impasto.evaluate import evaluate
from impasto.perplexity import METRIC, perplexity, sliding_scorer, text_task, windows
from impasto.recipe import Recipe
from impasto.store import Store
from impasto.tasks import build as build_tasks
from tiny import tiny_model, tiny_tokenizer

RNG = random.Random(5)
TEXT = "".join(RNG.choice("abcdefgh .\n") for _ in range(330))
SHORT = "hello there"


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(), tiny_tokenizer(), name="tiny")


@st.composite
def shapes(draw):
    prefix = draw(st.integers(0, 1))
    size = draw(st.integers(2 + prefix, 12))
    stride = draw(st.integers(1, size - 1))
    return draw(st.integers(0, 40)), size, stride, (99,) * prefix


@settings(max_examples=200, deadline=None)
@given(shapes())
def test_every_token_is_scored_once_with_enough_before_it(shape) -> None:
    length, size, stride, prefix = shape
    tokens, begin = list(range(length)), len(prefix)
    found = list(windows(tokens, size, stride, prefix))
    scored = [token for window in found for token in window.tokens[-window.new :]]
    assert scored == (tokens if prefix else tokens[1:])
    for place, window in enumerate(found):
        assert window.tokens[:begin] == prefix and len(window.tokens) <= size
        inside = list(window.tokens[begin:])
        assert inside == tokens[place * stride : place * stride + len(inside)]
        assert 1 <= window.new <= len(window.tokens) - 1
        if place:
            assert len(window.tokens) - window.new >= min(size - stride, len(window.tokens) - 1)
    assert len(found) == (math.ceil(max(0, length - (size - begin)) / stride) + 1 if len(scored) else 0)


def test_strides_that_leave_tokens_out_are_refused() -> None:
    assert [w.new for w in windows(range(9), 4, 3, (7,))] == [3, 3, 3]
    for size, stride, prefix, most in ((4, 4, (7,), 3), (4, 4, (), 3), (4, 0, (), 3), (2, 1, (7,), 1)):
        with pytest.raises(UsageError) as caught:
            list(windows(range(9), size, stride, prefix))
        assert (
            str(caught.value) == f"windows of {size} tokens can move by 1 to {most} tokens at a time, not by {stride}"
        )


def plainly(loaded, recipe: Recipe, text: str, size: int, stride: int) -> tuple[float, int]:
    """The oracle, as in Hugging Face's guide: labels of what was scored before are masked, one window at a time."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = loaded.tokenizer("", add_special_tokens=True)["input_ids"]
    loss, count, done = 0.0, 0, 0
    with torch.no_grad(), applied(loaded, recipe.schedule, recipe.edits) as model:
        for begin in range(0, len(ids), stride):
            end = min(begin + size - len(first), len(ids))
            inputs = torch.tensor([[*first, *ids[begin:end]]])
            labels = inputs.clone()
            labels[:, : inputs.shape[1] - (end - done)] = -100
            counted = int((labels[:, 1:] != -100).sum())
            loss += float(model(inputs, labels=labels, use_cache=False).loss) * counted
            count, done = count + counted, end
            if end == len(ids):
                return loss, count
    raise AssertionError


RECIPES = ("0:4", "0 2 1 3", "0 {1 2} 3")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_recipes_together_give_what_each_gives_alone(family: str, bos: bool) -> None:
    model = build(family, vocab_size=259) if family == "gpt2" else tiny_model(family)
    depth = DEPTH if family == "gpt2" else 4
    loaded = models.adopt(model, tiny_tokenizer(bos=bos), name="tiny")
    recipes = [Recipe.of("tiny", f"{text}{' 4:6' if depth == 6 else ''}", layers=depth) for text in RECIPES]
    recipes.append(Recipe.of("tiny", None, ["2.mlp.*@0.5"], layers=depth))
    for size, stride in ((100, 30), (64, 63)):
        results = perplexity(loaded, recipes, [TEXT, SHORT], window=size, stride=stride)
        for recipe, result in zip(recipes, results, strict=True):
            (loss, count), (short, few) = (plainly(loaded, recipe, text, size, stride) for text in (TEXT, SHORT))
            mean = (loss + short) / (count + few)
            assert result.recipe == recipe.fingerprint
            assert result.info["tokens"] == count + few == len(TEXT) + len(SHORT) - (0 if bos else 2)
            assert np.mean(result.scores[METRIC]) == pytest.approx(mean, abs=1e-5)
            assert result.metrics[METRIC] == pytest.approx(math.exp(mean), rel=1e-4)
            assert len(result.scores[METRIC]) == result.n


def test_the_models_own_window_is_taken_and_never_exceeded(loaded) -> None:
    longer = text_task(loaded, [TEXT], stride=100, window=10_000)
    assert longer.protocol == text_task(loaded, [TEXT], stride=100).protocol
    assert longer.source == "a text of your own; windows of 256 tokens, stride 100"
    assert longer.n == 2 and text_task(loaded, [TEXT], stride=10).n > 2


def test_more_text_before_a_token_does_not_change_how_many_are_scored(loaded) -> None:
    full = [Recipe.of("tiny", None, layers=4)]
    counts = {perplexity(loaded, full, [TEXT], window=60, stride=s)[0].info["tokens"] for s in (5, 30, 59)}
    assert counts == {len(TEXT)}


def test_one_run_measures_windows_and_other_tasks_and_asks_nothing_twice(loaded, tmp_path) -> None:
    tasks = [
        text_task(loaded, [TEXT], window=80, stride=40),
        *build_tasks(["impasto_tiny_choice", "impasto_tiny_rolling"]),
    ]
    recipes = [Recipe.of("tiny", text, layers=4) for text in RECIPES]
    with Store(tmp_path / "both") as store, Store(tmp_path / "apart") as apart:
        both = evaluate(loaded, recipes, tasks, store, scorer=lambda: sliding_scorer(loaded))
        others = evaluate(loaded, recipes, tasks[1:], apart)
        for result in others:
            twin = next(r for r in both if (r.recipe, r.task) == (result.recipe, result.task))
            assert twin.metrics == pytest.approx(result.metrics, rel=1e-5)

        def none():
            raise AssertionError("nothing is left to ask")

        again = evaluate(loaded, recipes, tasks, store, scorer=none)
        assert [result.scores for result in again] == [result.scores for result in both]
        stored = perplexity(loaded, recipes, [TEXT], window=80, stride=40, store=store)
        assert [result.metrics for result in stored] == [r.metrics for r in both if r.task == "text_perplexity"]


def test_a_window_without_a_finite_answer_makes_the_perplexity_undefined(loaded) -> None:
    task = text_task(loaded, [TEXT], window=80, stride=40)
    scorer = sliding_scorer(loaded)
    scores = scorer.score([Recipe.of("tiny", None, layers=4)], task.requests)
    from impasto.result import Response

    answers = {
        request.fingerprint: Response(float(value), tokens=int(count))
        for request, value, count in zip(task.requests, scores.loglikelihood[0], scores.tokens, strict=True)
    }
    good = task.result("x", answers)
    answers[task.requests[1].fingerprint] = Response(math.nan, tokens=40)
    bad = task.result("x", answers)
    assert bad.nonfinite == 1 and math.isnan(bad.metrics[METRIC]) and math.isfinite(good.metrics[METRIC])
    assert bad.scores[METRIC][1] is None and bad.scores[METRIC][0] == good.scores[METRIC][0]
    with pytest.raises(ValueError, match=r"text_perplexity: 1 of \d+ requests have no response"):
        task.result("x", dict(list(answers.items())[1:]))


def test_what_cannot_be_measured_is_refused(loaded) -> None:
    with pytest.raises(UsageError, match="the texts hold no token to score: give more text"):
        text_task(loaded, [])
    with pytest.raises(UsageError, match="text_perplexity is one text and has no part to choose on"):
        text_task(loaded, [TEXT], stride=10).parted()
    with pytest.raises(UsageError, match="windows of 256 tokens can move by 1 to 255 tokens at a time, not by 512"):
        text_task(loaded, [TEXT], stride=512)
