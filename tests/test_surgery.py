"""Law 5: edits do what their rule says, are exact, go together with schedules, and leave no trace."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given as law
from hypothesis import settings
from hypothesis import strategies as st

from families import DEPTH, FAMILIES, build, inputs, shared
from impasto import surgery
from impasto.anatomy import anatomy
from impasto.calibration import calibrate
from impasto.edit import Edit, in_order
from impasto.errors import NotationError, UnsupportedModel, UsageError
from impasto.runtime import scheduled
from impasto.surgery import edited
from impasto.svd import decompose, decompose_randomly, noise_rank, quartile_rank

torch.set_num_threads(1)
DOWN = "3.mlp.down_proj"


def weight(model: Any, layer: int = 3) -> torch.nn.Parameter:
    return model.model.layers[layer].mlp.down_proj.weight


# ------------------------------------------------------------------------------------------------- rules


def test_each_rule_writes_what_it_says() -> None:
    model = build("llama")
    old = weight(model).data.clone()
    exact = decompose(old)
    full = 64
    expected = {
        f"{DOWN}@0.25": exact.largest(16).dense(),
        f"{DOWN}@r5": exact.largest(5).dense(),
        f"{DOWN}@tail0.25": exact.smallest(16).dense(),
        f"{DOWN}@0": torch.zeros_like(old),
        f"{DOWN}@0.001": torch.zeros_like(old),
        f"{DOWN}@1": old,
        f"{DOWN}@mp": exact.largest(noise_rank(old, exact.values)).dense(),
        f"{DOWN}@mpl": exact.largest(quartile_rank(64, 128, exact.values)).dense(),
    }
    ranks = [16, 5, 16, 0, 0, full, noise_rank(old, exact.values), quartile_rank(64, 128, exact.values)]
    for (text, new), rank in zip(expected.items(), ranks, strict=True):
        with edited(model, [text]) as report:
            assert torch.equal(weight(model), new), text
            [one] = report.touched
            assert (one.layer, one.matrix, one.shape, one.rank) == (3, "mlp.down_proj", (64, 128), rank)
            assert one.parameters == 64 * 128
        assert torch.equal(weight(model), old)
    with edited(model, [f"{DOWN}@prune0.9"]) as report:
        new, count = weight(model), math.floor(0.9 * old.numel())
        assert int((new == 0).sum()) == count
        assert new[new != 0].abs().min() >= old[new == 0].abs().max()
        assert torch.equal(new[new != 0], old[new != 0])
        assert report.touched[0].rank is None


def test_the_components_written_out_in_full_are_the_weight_to_rounding() -> None:
    for name in ("llama", "gpt2", "bert"):
        block = anatomy(shared(name)).layers[1]
        for parameter in block.parameters():
            if parameter.dim() == 2:
                assert torch.allclose(decompose(parameter).dense(), parameter, atol=1e-5)


ALL_RULES = ["2:4.*@0.5", "2.*@tail0.9", "3.*@prune0.1", "4.*@mp", "5.*@0.4w", "5.*@r20w", "0.*@1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_can_be_edited_and_is_left_bit_for_bit(family: str) -> None:
    model, given = shared(family), inputs(family)
    body = anatomy(model)
    before = {name: (value, value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    calibration = calibrate(model, ALL_RULES, [given])
    with torch.no_grad():
        expected = model(**given).logits
        with edited(model, ["0.*@1"]):
            assert torch.equal(model(**given).logits, expected)
        with (
            pytest.raises(KeyboardInterrupt),
            edited(model, ALL_RULES, form="factored", calibration=calibration) as report,
        ):
            assert {one.layer for one in report.touched} == {0, 2, 3, 4, 5}
            assert (model(**given).logits - expected).abs().max() > 1e-3
            raise KeyboardInterrupt
        assert torch.equal(model(**given).logits, expected)
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes
    for name, value in model.state_dict().items():
        same, copy, place = before[name]
        assert torch.equal(value, copy)
        assert value.data_ptr() == place == same.data_ptr()
    assert body is anatomy(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_any_family_errs_by_the_tail_of_its_singular_values(family: str) -> None:
    model = shared(family)
    block = anatomy(model).layers[1]
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with edited(model, ["1.*@0.3"]) as report:
        for one in report.touched:
            name, _, expert = one.matrix.rpartition(".")
            stack = f"{name}.weight" if f"{name}.weight" in before else name
            plain = next((n for n in (one.matrix, f"{one.matrix}.weight") if n in before), None)
            old = before[plain] if plain else before[stack][int(expert)]
            new = block.get_parameter(plain) if plain else block.get_parameter(stack)[int(expert)]
            tail = torch.linalg.svdvals(old.double())[one.rank :].norm()
            assert torch.allclose((old - new).double().norm(), tail, rtol=1e-4)
            assert one.rank == math.floor(min(one.shape) * 0.3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bert", "phi"])
def test_two_thin_matrices_compute_what_the_dense_one_does(family: str) -> None:
    model, given = shared(family), inputs(family)
    edits = ["1:4.*@0.3", "0.*@r3"]
    with torch.no_grad():
        with edited(model, edits) as dense:
            one = model(**given).logits
        with edited(model, edits, form="factored") as factored:
            two = model(**given).logits
    assert (one - two).abs().max() < 1e-4
    linear = [t for t in factored.touched if t.form == "factored"]
    assert len(linear) >= 0.8 * len(dense.touched)
    assert all(t.parameters == (t.rank or 0) * sum(t.shape) for t in linear)
    assert all(t.parameters < t.shape[0] * t.shape[1] for t in linear if t.rank == 3)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_an_edit_inside_another_one_is_heard_through_it(form: Any) -> None:
    model, given = shared("llama"), inputs("llama")
    with torch.no_grad():
        with edited(model, [f"{DOWN}@r20", f"{DOWN}@r3"]):
            expected = model(**given).logits
        with edited(model, [f"{DOWN}@r20"], form="factored"):
            outer = model(**given).logits
            with edited(model, [f"{DOWN}@r3"], form=form):
                assert (model(**given).logits - expected).abs().max() < 1e-4
            assert torch.equal(model(**given).logits, outer)
    assert "forward" not in vars(anatomy(model).layers[3].mlp.down_proj)


def test_hooks_of_a_thin_layer_run_and_its_bias_stays() -> None:
    model = build("gpt2")
    anatomy(model)
    heard: list[int] = []
    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias.add_(1)
        with edited(model, ["1.mlp.c_fc@r4"]):
            one = model(**inputs("gpt2")).logits
        with edited(model, ["1.mlp.c_fc@r4"], form="factored"):
            two = model(**inputs("gpt2")).logits
    handle.remove()
    assert heard == [1, 1]
    assert (one - two).abs().max() < 1e-4


def test_the_order_of_edits_does_not_matter() -> None:
    model, given = shared("llama"), inputs("llama")
    edits = ["5.mlp.up_proj@0.1", "2.self_attn.*@r7", "0:2.mlp.gate_proj@prune0.5"]
    results = []
    with torch.no_grad():
        for order in (edits, edits[::-1]):
            with edited(model, order):
                results.append(model(**given).logits)
        with edited(model, edits[:1]), edited(model, edits[1:2]), edited(model, edits[2:]):
            results.append(model(**given).logits)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=15, deadline=None)
@law(
    rules=st.lists(
        st.sampled_from(["prune0.3", "tail0.9", "mp", "0.5", "r20", "0.25w", "r9w", "0"]), min_size=1, max_size=4
    ),
    random=st.randoms(),
)
def test_edits_of_one_matrix_are_carried_out_in_the_order_of_their_rules(rules: list[str], random: Random) -> None:
    """The oracle applies them one after the other, each to what the one before has left."""
    model = shared("llama")
    edits = in_order(Edit.parse(f"{DOWN}@{rule}") for rule in set(rules))
    calibration = calibrate(model, [f"{DOWN}@1w"], [inputs("llama")])
    with edited(model, random.sample(edits, len(edits)), calibration=calibration) as report:
        together = weight(model).clone()
    assert report.touched[0].edits == edits
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edited(model, [edit], calibration=calibration))
        assert torch.allclose(together, weight(model), atol=1e-4)
    rank = report.touched[0].rank
    assert rank is None or torch.linalg.matrix_rank(together.double(), rtol=1e-5) <= rank


def test_a_band_of_components_is_two_edits() -> None:
    model = shared("llama")
    exact = decompose(weight(model))
    with edited(model, [f"{DOWN}@r16", f"{DOWN}@tail0.75"]) as report:
        assert torch.equal(weight(model), exact.part(16, 32).dense())
    assert [str(edit.rule) for edit in report.touched[0].edits] == ["tail0.75", "r16"]
    assert report.touched[0].rank == 16
    assert report.count(Edit.parse(f"{DOWN}@r16")) == 1


def test_the_whole_of_a_projection_is_edited_before_its_parts() -> None:
    model = shared("gpt_neox")
    name = "attention.query_key_value"
    weight = anatomy(model).layers[2].get_parameter(f"{name}.weight")
    queries = torch.tensor([48 * head + i for head in range(4) for i in range(16)])
    whole = decompose(weight).largest(30).dense()
    expected = whole.clone()
    expected[queries] = decompose(whole[queries]).largest(5).dense()
    with edited(model, [f"2.{name}.q@r5", f"2.{name}@r30"], form="factored") as report:
        assert torch.equal(weight, expected)
    assert [(one.matrix, one.shape, one.rank, one.form) for one in report.touched] == [
        (name, (192, 64), 30, "dense"),
        (f"{name}.q", (64, 64), 5, "dense"),
    ]


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_edits_and_schedules_nest_either_way_round(form: Any) -> None:
    model, given = shared("llama"), inputs("llama")
    schedule, edits = "0 2x2 {3 4}x2 3.attn 5", ["2:4.mlp.*@r6"]
    with torch.no_grad():
        expected = model(**given).logits
        with scheduled(model, schedule), edited(model, edits, form=form):
            inner = model(**given).logits
        with edited(model, edits, form=form), scheduled(model, schedule):
            outer = model(**given).logits
        changed = build("llama")
        with edited(changed, edits) as report:
            state = {k: v.clone() for k, v in changed.state_dict().items()}
        assert report.count(Edit.parse(edits[0])) == 6
        changed.load_state_dict(state)
        with scheduled(changed, schedule):
            plain = changed(**given).logits
        assert torch.equal(model(**given).logits, expected)
    assert torch.equal(inner, outer)
    assert (inner - plain).abs().max() < 1e-4


def test_stacked_experts_are_matrices_of_their_own() -> None:
    model = build("mixtral")
    name, stack = next((n, p) for n, p in anatomy(model).layers[1].named_parameters() if p.dim() == 3)
    old = stack.data.clone()
    apart = f"{name.rpartition('.')[0]}.2.{name.rpartition('.')[2]}"
    for spelling in (f"{name}.2", apart):
        with edited(model, [f"1.{spelling}@r3"], form="factored") as report:
            assert [(t.matrix, t.form) for t in report.touched] == [(f"{name}.2", "dense")]
            assert torch.equal(stack[2], decompose(old[2]).largest(3).dense())
            assert all(torch.equal(stack[i], old[i]) for i in (0, 1, 3))
    with edited(model, [f"1.{name}@r3"]) as report:
        assert len(report.touched) == 4
        assert all(int(torch.linalg.matrix_rank(stack[i])) == 3 for i in range(4))
    assert torch.equal(stack, old)


def test_a_tensor_that_the_model_uses_twice_is_said() -> None:
    model = build("llama")
    model.model.layers[4].mlp.down_proj.weight = model.model.layers[3].mlp.down_proj.weight
    with edited(model, [f"{DOWN}@r4", "5.mlp.down_proj@r4"]) as report:
        assert [one.also for one in report.touched] == [("model.layers.4.mlp.down_proj.weight",), ()]
        assert report.shared == report.touched[:1]
        assert report.notes == (
            "mlp.down_proj of layer 3 is also model.layers.4.mlp.down_proj.weight, which changes with it",
        )
        assert torch.equal(weight(model, 3), weight(model, 4))
    with edited(model, ["3:5.mlp.down_proj@r4"]) as report:
        assert len(report.touched) == 1
        assert int(torch.linalg.matrix_rank(weight(model, 4).data)) == 4


def test_two_parameters_of_one_memory_change_together() -> None:
    model = build("llama")
    one, other = weight(model, 3), weight(model, 4)
    other.data = one.data
    place = one.data_ptr()
    with edited(model, ["4.mlp.down_proj@r4", "3.mlp.down_proj@r9"]) as report:
        assert [t.also for t in report.touched] == [("model.layers.4.mlp.down_proj.weight",)]
        assert one.data_ptr() == other.data_ptr() != place
        assert int(torch.linalg.matrix_rank(one.data)) == report.touched[0].rank == 4
    assert one.data_ptr() == other.data_ptr() == place


def test_what_came_out_as_nothing_or_as_everything_is_said() -> None:
    model = shared("mixtral")
    with edited(model, ["2.mlp.gate@0.1", "3.mlp.*@r20"]) as report:
        assert report.notes == (
            "mlp.gate of layer 2 (4 x 64) is left with rank 0, which is all zeros",
            "mlp.gate of layer 3 (4 x 64) has fewer than 20 components and keeps all of them",
        )
    with edited(model, ["2.mlp.gate@0"]) as report:
        assert report.notes == ()


def test_auto_is_thin_up_to_the_measured_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def measured(rows: int, columns: int, **options: Any) -> int:
        asked.append((rows, columns, options))
        return 10

    monkeypatch.setattr(surgery, "break_even", measured)
    model, given = shared("llama"), inputs("llama")
    edits = ["3.mlp.down_proj@r10", "3.mlp.up_proj@r11", "3.mlp.gate_proj@0"]
    with torch.no_grad():
        with edited(model, edits):
            one = model(**given).logits
        with edited(model, edits, form="auto", folder=tmp_path) as report:
            two = model(**given).logits
    assert {t.matrix: t.form for t in report.touched} == {
        "mlp.down_proj": "factored",
        "mlp.up_proj": "dense",
        "mlp.gate_proj": "dense",
    }
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "folder": tmp_path}
    assert sorted(asked, key=str) == [(128, 64, options), (64, 128, options)]
    assert (one - two).abs().max() < 1e-4


def test_random_projection_as_an_edit() -> None:
    model = build("llama")
    old = weight(model).data.clone()
    for seed in (0, 1):
        with edited(model, [f"{DOWN}@0.1"], svd="lowrank", niter=2, seed=seed):
            assert torch.equal(weight(model), decompose_randomly(old, 6, seed=seed).dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model, given = build("llama", dtype), inputs("llama")
    old = weight(model).data.clone()
    for form in ("dense", "factored"):
        with torch.no_grad(), edited(model, [f"{DOWN}@r5"], form=form, folder=tmp_path):  # type: ignore[arg-type]
            assert torch.equal(weight(model), decompose(old).largest(5).dense().to(dtype))
            assert model(**given).logits.dtype == dtype
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["3.mlp.down_porj@r4"], "3.mlp.down_porj@r4 matches no matrix of layer 3; nearest: mlp.down_proj"),
        (["1:3.down_proj@r4"], "1,2.down_proj@r4 matches no matrix of layers 1..2; nearest: mlp.down_proj"),
        (["0.input_layernorm@r4"], "0.input_layernorm@r4 matches no matrix of layer 0; nearest: "),
        (
            ["3.mlp.*@r4", "3.mlp.up_proj@r999"],
            "3.mlp.up_proj@r999 asks for 999 components, but mlp.up_proj of layer 3 (128 x 64) has 64; @1 keeps all of "
            "them",
        ),
        (["3.*@r65"], "3.*@r65 asks for 65 components, but self_attn.q_proj of layer 3 (64 x 64) has 64; @1 keeps"),
        (
            ["3.mlp.up_proj@r4w"],
            "the rule r4w needs the matrix's inputs: make them with impasto.calibration.calibrate and hand them over as "
            "calibration",
        ),
    ],
)
def test_edits_that_cannot_be(edits: list[str], message: str) -> None:
    model = shared("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"), edited(model, edits):
        pass
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_options_that_cannot_be() -> None:
    model = shared("llama")
    with (
        pytest.raises(UsageError, match=r"^form is 'dense', 'factored' or 'auto', not 'thin'$"),
        edited(model, [], form="thin"),
    ):  # type: ignore[arg-type]
        pass
    with pytest.raises(UsageError, match=r"^svd is 'exact' or 'lowrank', not 'fast'$"), edited(model, [], svd="fast"):  # type: ignore[arg-type]
        pass
    with pytest.raises(UsageError, match="needs all singular values: use svd='exact'"):
        with edited(model, [f"{DOWN}@mp"], svd="lowrank"):
            pass
    with pytest.raises(NotationError), edited(model, [f"{DEPTH}.mlp.up_proj@r3"]):
        pass


def test_weights_that_are_not_plain_numbers_in_memory() -> None:
    model = build("llama")
    packed = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    layers = anatomy(model).layers
    layers[3].mlp.down_proj.weight = packed
    message = "mlp.down_proj of layer 3 is stored packed or quantised (uint8): load the model unquantised to edit it"
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"), edited(model, [f"{DOWN}@r4"]):
        pass
    layers[3].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 64).to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModel, match=r"packed or quantised \(float8_e4m3fn\)"), edited(model, [f"{DOWN}@r4"]):
        pass
    layers[3].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(64, 64, device="meta"))
    with pytest.raises(UnsupportedModel, match="its weights are offloaded"), edited(model, [f"{DOWN}@r4"]):
        pass


def test_packed_weights_that_are_no_parameters_are_refused_by_name() -> None:
    model = build("llama")
    linear = anatomy(model).layers[3].mlp.down_proj
    del linear.weight
    linear.register_buffer("qweight", torch.zeros(16, 64, dtype=torch.int32))
    message = "mlp.down_proj of layer 3 is stored packed or quantised (int32): load the model unquantised to edit it"
    for name in ("mlp.down_proj", "mlp.down_proj.qweight", "*.down_*"):
        with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"), edited(model, [f"3.{name}@r4"]):
            pass
