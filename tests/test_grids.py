"""Grids of edits through the scorer: as each recipe alone, and no weight decomposed twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import DEPTH, build
from impasto.anatomy import anatomy
from impasto.evaluate import scorer_of
from impasto.matrices import sites
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.result import Request, Setting
from impasto.scoring import Scorer, Sharing
from impasto.surgery import edited
from tiny import tiny_tokenizer

torch.set_num_threads(1)
RULES = ("0.9", "0.4", "0.1", "r3", "0", "1", "tail0.5", "prune0.5")


def questions() -> list[Request]:
    draw = random.Random(0)

    def words(count: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(count)).strip() or "a"

    start = words(12)
    asked = []
    for _ in range(4):
        question = f"{start}\n{words(draw.randrange(3, 9))}"
        asked += [Request("loglikelihood", question, " " + words(draw.randrange(1, 5))) for _ in range(3)]
    return [*asked, Request("loglikelihood", "", words(5)), Request("rolling", "", words(40))]


def alone(model: Any, recipe: Recipe, requests: list[Request]) -> np.ndarray:
    """The oracle: edited weights, one sequence at a time, all logits."""
    pieces = Scorer(model, tiny_tokenizer()).encoder.pieces(requests)
    values = np.zeros(len(requests))
    with torch.no_grad(), edited(model, recipe.edits):
        for piece in pieces:
            logits = model(torch.tensor([piece.tokens]), use_cache=False).logits[0, -len(piece.targets) :].float()
            values[piece.request] += logits.log_softmax(-1).gather(1, torch.tensor(piece.targets)[:, None]).sum().item()
    return values


def loaded(model: Any) -> Any:
    setting = Setting("tiny", "weights", "float32", "cpu")
    return LoadedModel("tiny", model, tiny_tokenizer(), setting, anatomy(model).depth, "made here")


def grid(model: Any, layers: tuple[int, ...]) -> list[Recipe]:
    """Many single edits, most of them several rules for one matrix, and some edits together."""
    blocks = anatomy(model).layers
    names = {
        layer: [
            s.name for s in sites(blocks[layer], layer) if min(blocks[layer].get_parameter(s.parameter).shape[-2:]) > 4
        ]
        for layer in layers
    }
    edits = [f"{layer}.{name}@{rule}" for layer in layers for name in names[layer] for rule in RULES]
    chosen = [[edit] for edit in random.Random(0).sample(edits, min(40, len(edits)))]
    chosen += [["0:6.*@0.9"], edits[:2], [edits[0], edits[-1]], [edits[1], edits[-1]], [edits[2], edits[-1]], []]
    return [Recipe.of("any", None, some, layers=DEPTH) for some in chosen]


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi3", "falcon", "gemma3_text", "mixtral", "lfm2", "gemma3n_text"]
)
def test_a_grid_scores_as_each_of_its_recipes_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path))
    layered = {"vocab_size_per_layer_input": 259} if family == "gemma3n_text" else {}
    model = build(family, vocab_size=259, **layered)
    recipes, requests = grid(model, (0, 3, 5)), questions()
    shared = scorer_of(loaded(model), 100).score(recipes, requests).loglikelihood
    apart = scorer_of(loaded(model), 100, Sharing(ranks=False)).score(recipes, requests).loglikelihood
    np.testing.assert_allclose(shared, apart, rtol=0, atol=1e-4)
    for i in range(0, len(recipes), 6):
        np.testing.assert_allclose(shared[i], alone(model, recipes[i], requests), rtol=0, atol=1e-4)


def test_a_schedule_that_runs_an_edited_layer_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path))
    model, requests = build("llama", vocab_size=259), questions()
    recipes = [
        Recipe.of("any", schedule, [f"3.mlp.{name}@{rule}"], layers=DEPTH)
        for schedule in ("0:4 3:6", "0 {1:4} 3.mlp 4 5", "0 3.attn 3.mlp 5")
        for name in ("down_proj", "up_proj")
        for rule in ("0.9", "0.1", "0")
    ]
    shared = scorer_of(loaded(model)).score(recipes, requests).loglikelihood
    apart = scorer_of(loaded(model), sharing=Sharing(ranks=False)).score(recipes, requests).loglikelihood
    np.testing.assert_allclose(shared, apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_decomposed_twice(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path))
    model, made = build("llama", dtype, vocab_size=259), []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    edits = [f"{layer}.mlp.{name}@{r}" for layer in (1, 4) for name in ("up_proj", "down_proj") for r in (0.5, 0.1)]
    recipes = [Recipe.of("any", None, [edit], layers=DEPTH) for edit in edits]
    recipes.append(Recipe.of("any", None, edits[::2], layers=DEPTH))
    for _ in range(2):
        scorer_of(loaded(model), 60).score(recipes, questions())
    assert len(made) == 4
