"""The parts of fused projections: found by what they do, whatever their order; refused where they are not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from families import build, inputs, shared
from impasto.anatomy import anatomy
from impasto.errors import UnsupportedModel
from impasto.fused import PARTS, fused
from impasto.runtime import scheduled
from impasto.surgery import edited

torch.set_num_threads(1)

# Family, changes of its config, projection, and the roles of its outputs in order: a letter for every 16 of them.
LAYOUTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "contiguous, transposed": ("gpt2", {}, "attn.c_attn", "qqqqkkkkvvvv"),
    "contiguous, fewer keys": ("phi3", {}, "self_attn.qkv_proj", "qqqqkkvv"),
    "contiguous": ("mpt", {}, "attn.Wqkv", "qqqqkkkkvvvv"),
    "contiguous, both ways": ("modernbert", {}, "attn.Wqkv", "qqqqkkkkvvvv"),
    "by head": ("gpt_neox", {}, "attention.query_key_value", "qkvqkvqkvqkv"),
    "by head, other family": ("bloom", {}, "self_attention.query_key_value", "qkvqkvqkvqkv"),
    "by head, normalised": ("persimmon", {}, "self_attn.query_key_value", "qkvqkvqkvqkv"),
    "by shard, values second": ("codegen", {}, "attn.qkv_proj", "qvkqvkqvkqvk"),
    "one key for all": ("falcon", {}, "self_attention.query_key_value", "qqqqkv"),
    "by group": ("falcon", {"new_decoder_architecture": True}, "self_attention.query_key_value", "qqkvqqkv"),
    "without queries": ("deepseek_v3", {}, "self_attn.kv_b_proj", "kvkvkvkv"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(layout: str) -> None:
    family, changes, name, roles = LAYOUTS[layout]
    model = build(family, **changes) if changes else shared(family)
    found = fused(model, anatomy(model), 2, f"{name}.weight")
    for part in PARTS:
        expected = [16 * i + j for i, role in enumerate(roles) if role == part for j in range(16)]
        assert found.outputs.get(part, torch.tensor([])).tolist() == expected
    assert found.axis == (1 if family == "gpt2" else 0)


@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_numbers_tell_the_parts_as_well(family: str, dtype: torch.dtype) -> None:
    _, _, name, _ = next(one for one in LAYOUTS.values() if one[0] == family)
    fine, coarse = shared(family), build(family, dtype)
    one, other = (fused(model, anatomy(model), 0, f"{name}.weight").outputs for model in (fine, coarse))
    assert all(torch.equal(one[part], other[part]) for part in PARTS)


@pytest.mark.parametrize("layout", ["contiguous, transposed", "contiguous, fewer keys", "by head", "by group"])
def test_values_alone_carry_and_queries_alone_stay_where_they_are(layout: str) -> None:
    """Without queries the weights are even, without values nothing is carried: seen on the attention's own output."""
    family, changes, name, _ = LAYOUTS[layout]
    model, given = build(family, **changes), inputs(family)
    block = anatomy(model).layers[1]
    heard: list[torch.Tensor] = []
    block.get_submodule(name.partition(".")[0]).register_forward_hook(
        lambda module, args, output: heard.append(output[0])
    )
    last: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for bias in (b for n, b in block.named_parameters() if n == f"{name}.bias"):
            bias.zero_()
        for part in PARTS:
            with edited(model, [f"1.{name}.{part}@0"]) as report:
                model(**given)
            assert [one.matrix for one in report.touched] == [f"{name}.{part}"]
            last[part] = heard[-1]
    queries, keys, values = last.values()
    assert torch.allclose(queries, keys, atol=1e-5)  # either way every position has the same weight
    assert torch.equal(values, values[:1, :1].expand_as(values))  # what the output's bias alone gives
    assert (queries - values).abs().max() > 1e-3


def test_looking_changes_nothing_and_is_done_once() -> None:
    model, given = build("gpt_neox"), inputs("gpt_neox")
    before = model(**given).logits
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    name = "attention.query_key_value.weight"
    with torch.inference_mode():
        first = fused(model, anatomy(model), 3, name)
    assert torch.equal(torch.rand(1), expected)
    assert fused(model, anatomy(model), 3, name) is first
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(**given).logits, before)


def test_a_schedule_that_is_applied_already_does_not_disturb() -> None:
    edits, given = ["1:4.attention.query_key_value.[qk]@r3"], inputs("gpt_neox")
    results = []
    with torch.no_grad():
        for inside in (True, False):
            model = build("gpt_neox")
            first, second = scheduled(model, "0 2 {1 3} 3 5"), edited(model, edits)
            with first if inside else second, second if inside else first:
                results.append(model(**given).logits)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        (
            "llama",
            "1.self_attn.q_proj.q@r3",
            "self_attn.q_proj of layer 1 has no parts q, k and v that can be told apart (of its 64 outputs 64 act as "
            "queries, 0 as keys and 0 as values): edit it whole",
        ),
        (
            "llama",
            "1.mlp.down_proj.v@r3",
            "mlp.down_proj of layer 1 has no parts q, k and v that can be told apart (of its 64 outputs 0 act as "
            "queries, 0 as keys and 0 as values): edit it whole",
        ),
        (
            "lfm2",
            "0.conv.in_proj.v@r3",
            "conv.in_proj of layer 0 has no parts q, k and v that can be told apart (of its 192 outputs 0 act as "
            "queries, 0 as keys and 128 as values): edit it whole",
        ),
        (
            "deepseek_v3",
            "1.self_attn.kv_a_proj_with_mqa.k@r3",
            "self_attn.kv_a_proj_with_mqa of layer 1 has no parts q, k and v that can be told apart (of its 40 outputs "
            "0 act as queries, 8 as keys and 32 as values): edit it whole",
        ),
        (
            "mixtral",
            "1.mlp.gate.q@r3",
            "mlp.gate of layer 1 is not a plain linear layer, so it has no parts q, k and v: edit it whole",
        ),
        (
            "gpt_neox",
            "1.attention.query_key_value.w@r3",
            "1.attention.query_key_value.w@r3 matches no matrix of layer 1; nearest: attention.query_key_value",
        ),
    ],
)
def test_what_has_no_such_part(family: str, edit: str, message: str) -> None:
    model = shared(family)
    with pytest.raises(Exception, match=f"^{re.escape(message)}") as caught, edited(model, [edit]):
        pass
    assert isinstance(caught.value, UnsupportedModel) or edit.endswith(".w@r3")


def test_a_star_means_the_projection_and_its_parts_are_named() -> None:
    model = shared("gpt_neox")
    for pattern, expected in {
        "attention.*": ["attention.query_key_value", "attention.dense"],
        "attention.query_key_value.*": [f"attention.query_key_value.{part}" for part in PARTS],
        "*.[qv]": ["attention.query_key_value.q", "attention.query_key_value.v"],
    }.items():
        with edited(model, [f"2.{pattern}@r3"]) as report:
            assert [one.matrix for one in report.touched] == expected


def test_an_attention_that_is_none_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that also reach the result past the weights matter to a single token: refused, not guessed."""
    model = build("gpt_neox")
    attention = anatomy(model).layers[1].attention
    plain = attention.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        output, *rest = plain(*args, **kwargs)
        projected = attention.query_key_value(args[0] if args else kwargs["hidden_states"])
        return output + 1e-3 * projected[..., :64], *rest

    monkeypatch.setattr(attention, "forward", leaking)
    with pytest.raises(UnsupportedModel, match=r"^attention\.query_key_value of layer 1 has no parts"):
        fused(model, anatomy(model), 1, "attention.query_key_value.weight")
