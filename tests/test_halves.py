"""Halves of blocks: exact where they exist, refused where a block has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import DECODERS, DEPTH, FAMILIES, build, inputs, shared
from impasto.anatomy import anatomy
from impasto.errors import UnsupportedModel
from impasto.halves import halves, members
from impasto.runtime import scheduled
from impasto.schedule import Schedule

torch.set_num_threads(1)

PARALLEL = {"phi", "gpt_neox", "cohere", "cohere2", "gptj", "falcon", "codegen"}
# Blocks whose halves are no separate steps: a third step in the block, or another stream beside the residual one.
REFUSED = {"gemma3n_text", "gemma4_text", "distilbert"}


def plain(family: str) -> dict[str, Any]:
    return {"use_cache": False} if family in DECODERS else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_make_the_block_or_are_refused(family: str) -> None:
    model, given = shared(family), inputs(family)
    body = anatomy(model)
    if family in REFUSED:
        for layer in range(DEPTH):
            with pytest.raises(
                UnsupportedModel, match=rf"^layer {layer} \(\w+\) (cannot be split into halves|has no )"
            ):
                halves(model, body, layer)
        with pytest.raises(UnsupportedModel, match="schedule it whole|has no"), scheduled(model, "0.attn 1"):
            pass
        return
    kind = "parallel" if family in PARALLEL else "sequential"
    assert [halves(model, body, layer).kind for layer in range(DEPTH)] == [kind] * DEPTH
    each = "{i}.attn {i}.mlp" if kind == "sequential" else "sum{{{i}.attn, {i}.mlp}}"
    text = " ".join(each.format(i=i) for i in range(DEPTH))
    with torch.no_grad():
        full = model(**given, **plain(family)).logits

        def run(schedule: str) -> torch.Tensor:
            with scheduled(model, schedule):
                return model(**given, **plain(family)).logits

        gap = (run(text) - full).abs().max() / full.abs().max()
        assert gap <= (0 if kind == "sequential" else 1e-5)
        without = [run(f"0:2 {half} 3:6") for half in ("2.attn", "2.mlp")]
        assert not torch.equal(without[0], without[1])
        assert all(not torch.equal(w, full) for w in without)
        assert torch.equal(model(**given, **plain(family)).logits, full)


@pytest.mark.parametrize("family", [f for f in DECODERS if f not in REFUSED])
def test_halves_with_a_cache(family: str) -> None:
    model, ids = shared(family), inputs(family, length=12)["input_ids"]
    with torch.no_grad(), scheduled(model, "0 2.attn 1 {3.mlp 3, 4.attn 2.mlp}x2 5.attn"):
        full = model(ids, use_cache=False).logits
        out = model(ids[:, :10], use_cache=True)
        pieces = [out.logits]
        for t in (10, 11):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
        assert (torch.cat(pieces, 1) - full).abs().max() <= 1e-4 * full.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", {"self_attn"}, {"mlp"}),
        ("gptj", {"attn"}, {"mlp"}),  # a parallel residual
        ("opt", {"self_attn"}, {"fc1", "fc2"}),
        ("bert", {"attention"}, {"intermediate", "output"}),
    ],
)
def test_every_child_with_matrices_belongs_to_its_half(family: str, attention: set[str], mlp: set[str]) -> None:
    model = shared(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = members(model, anatomy(model), 2)
    assert {name for name, half in found.items() if half == "attn"} == attention
    assert {name for name, half in found.items() if half == "mlp"} == mlp
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_is_heard_once_and_what_comes_behind_it_is_not_run() -> None:
    model = build("opt")
    body, calls = anatomy(model), []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in (("model", model), ("behind", body.layers[3]))
    ]
    found = members(model, body, 2)
    assert calls.count("model") == 2 and "behind" not in calls  # the halves, then the members
    assert members(model, body, 2) == found
    assert halves(model, body, 2) is halves(model, body, 2)
    assert calls.count("model") == 2
    for handle in handles:
        handle.remove()


def test_the_mlp_half_mixes_no_positions_and_the_attention_half_does() -> None:
    model, ids = shared("llama"), inputs("llama")["input_ids"]
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 200
    with torch.no_grad():
        for half, mixes in (("mlp", False), ("attn", True)):
            with scheduled(model, f"(0:6).{half}"):
                same = torch.equal(model(ids).logits[:, 1:], model(other).logits[:, 1:])
            assert same is not mixes


def test_gradients_of_a_muted_half_are_none() -> None:
    model, given = shared("llama"), inputs("llama")
    layer = anatomy(model).layers[3]
    wanted = [layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight]
    with scheduled(model, "0:3 3.attn 4:6"):
        mlp, attention = torch.autograd.grad(model(**given).logits.sum(), wanted, allow_unused=True)
    assert mlp is None
    assert attention is not None
    assert attention.abs().max() > 0


def test_text_and_value_of_a_half_are_one_computation() -> None:
    model, given = shared("gpt2"), inputs("gpt2")
    with torch.no_grad():
        results = []
        for schedule in ("(0:2).attn 5", Schedule.parse("0.attn 1.attn 5")):
            with scheduled(model, schedule):
                results.append(model(**given).logits)
    assert torch.equal(*results)
