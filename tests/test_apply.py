"""A schedule and edits together, and the model as before when they are gone."""

from __future__ import annotations

import pytest
import torch

import impasto as im
from impasto.surgery import edited
from tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_schedule_and_edits_together():
    model = tiny_model()
    before = logits(model)
    with im.applied(model, "0 2 1 3", ["1.mlp.down_proj@0.5"]) as changed:
        both = logits(changed)
    with im.applied(model, "0 2 1 3"), edited(model, ["1.mlp.down_proj@0.5"]):
        assert torch.equal(logits(model), both)
    with im.applied(model, None, ["1.mlp.down_proj@0.5"]):
        assert not torch.equal(logits(model), both)
    assert torch.equal(logits(model), before)


def test_a_loaded_model_serves_too():
    loaded = im.adopt(tiny_model(), tiny_tokenizer())
    with im.applied(loaded, "0:2") as model:
        assert model is loaded.model
        assert not torch.equal(logits(model), logits(tiny_model()))


def test_the_model_is_restored_after_an_error():
    model = tiny_model()
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), im.applied(model, "0:2", ["0.mlp.up_proj@0"]):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
