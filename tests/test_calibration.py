"""The inputs of matrices: what hooks on the modules see, for every way of multiplying; kept, and never harmful."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import build, inputs, shared
from impasto.anatomy import anatomy
from impasto.calibration import TEXTS, calibrate
from impasto.errors import UnsupportedModel, UsageError
from impasto.matrices import Site, sites
from impasto.runtime import scheduled
from impasto.surgery import edited
from impasto.svd import decompose
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)


def seen_by_hooks(model: nn.Module, modules: dict[str, nn.Module], given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs (tokens, width) of each module, caught before it runs."""
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: caught[name].append(args[0].flatten(0, -2)))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in caught.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "falcon", "phi3", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_the_inputs_that_hooks_see(family: str, dtype: torch.dtype) -> None:
    model = shared(family) if dtype is torch.float32 else build(family, dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(family).items()}
    block = anatomy(model).layers[2]
    names = [site.parameter.removesuffix(".weight") for site in sites(block, 2)]
    expected = seen_by_hooks(model, {name: block.get_submodule(name) for name in names}, given)
    heard = calibrate(model, ["2.*@0.5w"], [given])
    assert len(heard.inputs) == len(names)
    for name in names:
        found, wanted = heard.of(Site(2, f"{name}.weight")), expected[name].double()
        assert found.count == len(wanted)
        assert torch.allclose(found.moment.double(), wanted.mT @ wanted, rtol=1e-4, atol=1e-3)
        assert found.axis == (0 if family == "gpt2" else 1)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("family", "axis"), [("mixtral", 1), ("qwen3_moe", 1), ("gpt_oss", 0)])
def test_each_expert_has_the_inputs_of_the_tokens_that_were_sent_to_it(family: str, axis: int, way: str) -> None:
    model, given = build(family), inputs(family)
    model.set_experts_implementation(way)
    block = anatomy(model).layers[2]
    experts = next(m for m in block.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False)))
    path = next(name for name, module in block.named_modules() if module is experts)
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args[0], args[1])), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    handle.remove()
    [(hidden, chosen)] = caught
    hidden = hidden.flatten(0, -2)
    heard = calibrate(model, [f"2.{path}*@r3w"], [given])
    assert len(heard.inputs) == 8
    for expert in range(4):
        found = heard.of(Site(2, f"{path}.gate_up_proj", expert))
        wanted = hidden[(chosen.reshape(len(hidden), -1) == expert).any(-1)].double()
        assert (found.count, found.axis) == (len(wanted), axis)
        assert torch.allclose(found.moment.double(), wanted.mT @ wanted, rtol=1e-4, atol=1e-3)
        assert heard.of(Site(2, f"{path}.down_proj", expert)).count == len(wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox", "mixtral", "llama4_text"])
def test_edits_by_inputs_are_never_worse_on_those_inputs(family: str) -> None:
    """And they are better where inputs are far from round: the error of (W - W') X over each matrix of a layer."""
    model, given = shared(family), inputs(family)
    heard = calibrate(model, ["1.*@1w"], [given])
    block = anatomy(model).layers[1]
    before = {name: parameter.data.clone() for name, parameter in block.named_parameters()}

    def losses(rule: str) -> dict[str, float]:
        found = {}
        with edited(model, [f"1.*@{rule}"], calibration=heard):
            for site in sites(block, 1):
                change = before[site.parameter] - block.get_parameter(site.parameter).data
                change = (change if site.expert is None else change[site.expert]).double()
                seen = heard.of(site)
                change = change if seen.axis == 1 else change.mT
                found[str(site)] = float((change @ seen.moment.double() @ change.mT).trace().clamp_min(0).sqrt())
        return found

    for fraction in ("0.1", "0.5"):
        plain, weighed = losses(fraction), losses(f"{fraction}w")
        assert all(weighed[name] <= plain[name] * (1 + 1e-4) + 1e-5 for name in plain)
        assert sum(weighed.values()) < 0.97 * sum(plain.values())


def test_ranks_and_fractions_by_inputs_are_the_same_edit_and_run_thin() -> None:
    model, given = shared("llama"), inputs("llama")
    heard = calibrate(model, ["3.mlp.*@1w"], [given])
    results = []
    with torch.no_grad():
        for rule, form in (("r16w", "dense"), ("0.25w", "dense"), ("r16w", "factored")):
            with edited(model, [f"3.mlp.*@{rule}"], form=form, calibration=heard) as report:  # type: ignore[arg-type]
                results.append(model(**given).logits)
            assert {(one.rank, one.form) for one in report.touched} == {(16, form)}
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() < 1e-4


def test_parts_of_a_fused_projection_have_its_inputs() -> None:
    model, given = shared("gpt_neox"), inputs("gpt_neox")
    heard = calibrate(model, ["1.attention.query_key_value.[qk]@0.2w"], [given])
    name = "attention.query_key_value.weight"
    assert list(heard.inputs) == [Site(1, name)]
    with edited(model, ["1.attention.query_key_value.q@r3w"], calibration=heard) as report:
        assert [(one.matrix, one.rank) for one in report.touched] == [("attention.query_key_value.q", 3)]


def test_texts_are_read_and_their_number_of_tokens_kept() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    heard = calibrate(model, ["1.mlp.down_proj@0.5w"], tokenizer=tokenizer, length=40)
    assert heard.tokens == sum(min(len(tokenizer(text)["input_ids"]), 40) for text in TEXTS)
    assert heard.of(Site(1, "mlp.down_proj.weight")).count == heard.tokens
    ids = [[5, 6, 7, 8], torch.tensor([9, 10, 11])]
    other = calibrate(model, ["1.mlp.down_proj@0.5w"], ids)
    assert other.tokens == 7
    assert other.fingerprint != heard.fingerprint
    assert other.fingerprint == calibrate(model, ["1.mlp.up_proj@r3w"], ids).fingerprint


def test_the_order_of_an_applied_schedule_makes_no_difference() -> None:
    model, given = build("llama"), inputs("llama")
    plain = calibrate(model, ["1:4.mlp.*@1w"], [given])
    with scheduled(model, "3 1"):
        inside = calibrate(model, ["1:4.mlp.*@1w"], [given])
    assert all(torch.equal(plain.of(site).moment, inside.of(site).moment) for site in plain.inputs)


def test_moments_are_kept_and_the_model_runs_for_new_ones_only(tmp_path: Path) -> None:
    model, given = build("llama"), inputs("llama")
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    anatomy(model)

    def cost(edits: list[str], texts: list[Any], weights: str = "a") -> int:
        before = len(runs)
        calibrate(model, edits, texts, folder=tmp_path, weights=weights)
        return len(runs) - before

    other = {"input_ids": given["input_ids"].flip(1)}
    assert cost(["1.mlp.*@0.5w"], [given]) == 1
    assert cost(["1.mlp.*@0.1w", "1.mlp.up_proj@r3w"], [given]) == 0
    assert cost(["1:3.mlp.up_proj@0.1w"], [given]) == 1
    assert cost(["1.mlp.*@0.5w"], [given, other]) == 2
    assert cost(["1.mlp.*@0.5w"], [given], "b") == 1
    assert cost(["1.mlp.up_proj@0.5", "1.mlp.down_proj@mp"], [given]) == 0
    one = calibrate(model, ["1.mlp.up_proj@0.5w"], [given], folder=tmp_path, weights="a")
    two = calibrate(model, ["1.mlp.up_proj@0.5w"], [given])
    for site in one.inputs:
        assert torch.equal(one.of(site).moment, two.of(site).moment)
        assert (one.of(site).axis, one.of(site).count) == (two.of(site).axis, two.of(site).count) == (1, 48)
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert cost(["1.mlp.*@0.5w"], [given]) == 1


def test_an_expert_that_no_token_reached_is_cut_plainly_and_said() -> None:
    model = build("mixtral")
    name, stack = next((n, p) for n, p in anatomy(model).layers[1].named_parameters() if p.dim() == 3)
    heard = calibrate(model, [f"1.{name}@r3w"], [[5]])
    silent = [site.expert for site, found in heard.inputs.items() if not found.count]
    assert len(silent) == 2  # one token, two of four experts
    old = stack.clone()
    with edited(model, [f"1.{name}@r3w"], calibration=heard) as report:
        for expert in silent:
            assert torch.allclose(stack[expert], decompose(old[expert]).largest(3).dense(), atol=1e-5)
    assert report.notes == tuple(
        f"{name}.{expert} of layer 1 was given no input in calibration, so it is cut as without w" for expert in silent
    )


def test_mistakes() -> None:
    model, given = shared("llama"), inputs("llama")
    edits = ["1.mlp.up_proj@0.5w"]
    padded = given | {"attention_mask": torch.tensor([[1] * 24, [0] * 2 + [1] * 22])}
    for message, arguments in {
        "texts of a calibration need the model's tokenizer: calibrate(..., tokenizer=...)": {"texts": ["Hello"]},
        "a calibration needs at least one text": {"texts": []},
        "a text of a calibration is empty": {"texts": [[]]},
        "inputs of a calibration come without padding, since padding would be counted as input": {"texts": [padded]},
        "to keep a calibration, say which weights it is of: weights=loaded.setting.weights": {"folder": Path("x")},
    }.items():
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
            calibrate(model, edits, **arguments)  # type: ignore[arg-type]
    heard = calibrate(model, edits, [given])
    message = "this calibration was made without mlp.down_proj of layer 1: make one with the same edits"
    with pytest.raises(UsageError, match=f"^{message}$"), edited(model, ["1.mlp.down_proj@0.5w"], calibration=heard):
        pass
    message = "the rule 0.5w needs all singular values: use svd='exact'"
    with pytest.raises(UsageError, match=f"^{message}$"), edited(model, edits, svd="lowrank", calibration=heard):
        pass
    with pytest.raises(UsageError, match="matches no matrix of layer 1"):
        calibrate(model, ["1.mlp.oops@0.5w"], [given])


def test_a_matrix_that_is_in_no_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    linear = anatomy(model).layers[1].mlp.up_proj
    monkeypatch.setattr(linear, "forward", lambda hidden: (hidden[..., None, :] * linear.weight).sum(-1))
    message = (
        "mlp.up_proj of layer 1 was never seen in a product of two matrices, so its inputs are not known: use a rule "
        "without w for it"
    )
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        calibrate(model, ["1.mlp.*@0.5w"], [inputs("llama")])
