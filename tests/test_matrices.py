"""Which matrices a model has, by which names, and where else their numbers are used."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, build, inputs, shared
from impasto.anatomy import anatomy
from impasto.calibration import calibrate
from impasto.edit import Edit
from impasto.errors import UsageError
from impasto.matrices import Site, holders, matched, place, shape, sites
from impasto.surgery import edited
from impasto.svd import decompose

torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_of_any_family_are_what_its_linear_layers_multiply_with(family: str) -> None:
    model = shared(family)
    body = anatomy(model)
    for layer in (0, 3):
        found = list(sites(body.layers[layer], layer))
        names = [site.name for site in found]
        assert len(set(names)) == len(names)
        assert not any("norm" in name or "bias" in name for name in names)
        linear = {n for n, m in body.layers[layer].named_modules() if isinstance(m, nn.Linear)}
        assert linear <= set(names)
        for site in found:
            assert matched(model, body, Edit.parse(f"{layer}.{site.name}@0.5")) == (site,)
            assert shape(model, body, site) == tuple(body.layers[layer].get_parameter(site.parameter).shape[-2:])


def test_biases_of_stacked_experts_are_no_matrices() -> None:
    block = anatomy(shared("gpt_oss")).layers[1]
    stacked = {name for name, p in block.named_parameters() if p.dim() == 2 and name.endswith("_bias")}
    assert stacked
    assert not stacked & {site.parameter for site in sites(block, 1)}


class Apart(nn.Module):
    """The experts of a stack as modules in a list, as many models keep them."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.act_fn = stack.act_fn
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(stack, name).data
            setattr(self, f"{name}s", nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
            for linear, weight in zip(getattr(self, f"{name}s"), weights, strict=True):
                linear.weight.data = weight.clone()

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert, (first, second) in enumerate(zip(self.gate_up_projs, self.down_projs, strict=True)):
            token, place = torch.where(chosen == expert)
            gate, up = first(hidden[token]).chunk(2, dim=-1)
            result.index_add_(0, token, second(self.act_fn(gate) * up) * weights[token, place, None])
        return result


def test_experts_in_a_list_and_in_a_stack_are_edited_alike() -> None:
    stacked, listed = build("mixtral"), build("mixtral")
    for block in listed.model.layers:
        block.mlp.experts = Apart(block.mlp.experts)
    given = inputs("mixtral")
    with torch.no_grad():
        assert torch.allclose(stacked(**given).logits, listed(**given).logits, atol=1e-5)
        for rule in ("0.1", "0.2w"):
            here = f"1:3.mlp.experts.down_proj.[02]@{rule}"
            there = f"1:3.mlp.experts.down_projs.[02]@{rule}"
            one, two = calibrate(stacked, [here], [given]), calibrate(listed, [there], [given])
            with (
                edited(stacked, [here], calibration=one),
                edited(listed, [there], calibration=two, form="factored") as report,
            ):
                assert len(report.touched) == 4
                assert torch.allclose(stacked(**given).logits, listed(**given).logits, atol=1e-4)


def test_transposed_layers_are_cut_like_others() -> None:
    model = shared("gpt2")
    weight = anatomy(model).layers[1].mlp.c_fc.weight
    assert tuple(weight.shape) == (64, 128)  # (in, out)
    expected = decompose(weight.mT).largest(7).dense().mT
    with edited(model, ["1.mlp.c_fc@r7"]):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_all_names_of_one_memory_are_known() -> None:
    model = build("llama", tie_word_embeddings=True)
    first, second = (model.model.layers[i].mlp.up_proj for i in (1, 2))
    second.weight.data = first.weight.data
    names = {frozenset(name for name, _ in found) for found in holders(model).values()}
    assert {"model.embed_tokens.weight", "lm_head.weight"} in names
    assert {f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2)} in names
    assert place(first.weight) == place(second.weight) != place(first.weight.data[:1])
    nowhere = [nn.Parameter(torch.zeros(2, 2, device="meta")) for _ in range(2)]
    assert place(nowhere[0]) != place(nowhere[1])


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        (
            "llama",
            "1.mlp@0.1",
            "1.mlp@0.1 matches no matrix of layer 1; nearest: mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        ),
        ("llama", "0:3.mlp.upproj@0.1", "0:3.mlp.upproj@0.1 matches no matrix of layers 0..2; nearest: mlp.up_proj"),
        (
            "mixtral",
            "1.mlp.experts.9.down_proj@r2",
            "1.mlp.experts.9.down_proj@r2 matches no matrix of layer 1; nearest: ",
        ),
        ("gpt2", "1.ln_1@0.1", "1.ln_1@0.1 matches no matrix of layer 1; nearest: "),
    ],
)
def test_names_that_match_nothing(family: str, edit: str, message: str) -> None:
    model = shared(family)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        matched(model, anatomy(model), Edit.parse(edit))


def test_sites_say_what_they_are() -> None:
    assert str(Site(3, "mlp.up_proj.weight")) == "mlp.up_proj of layer 3"
    assert str(Site(3, "attn.qkv.weight", part="k")) == "attn.qkv.k of layer 3"
    assert Site(3, "mlp.experts.up_proj", 2).names == (
        "mlp.experts.up_proj.2",
        "mlp.experts.2.up_proj",
        "mlp.experts.up_proj",
    )
