"""Law 5: edits do what their rule says, are exact, go together with schedules, and leave no trace."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as law
from hypothesis import settings
from hypothesis import strategies as st

from families import DEPTH, FAMILIES, build, inputs, shared
from impasto.anatomy import anatomy
from impasto.edit import Edit
from impasto.errors import NotationError, UnsupportedModel, UsageError
from impasto.runtime import scheduled
from impasto.surgery import edited
from impasto.svd import (
    Factors,
    decompose,
    decompose_randomly,
    effective_rank,
    fingerprint,
    noise_rank,
    quartile_rank,
)

torch.set_num_threads(1)
DOWN = "3.mlp.down_proj"


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight(model: Any, layer: int = 3) -> torch.nn.Parameter:
    return model.model.layers[layer].mlp.down_proj.weight


# ------------------------------------------------------------------------------------------------- components


@settings(max_examples=20, deadline=None)
@law(rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0, 1))
def test_the_error_of_a_rank_is_the_tail_of_the_singular_values(rows: int, columns: int, share: float) -> None:
    matrix = random(rows, columns)
    all_of_it = decompose(matrix, precision=torch.float64)
    rank = round(share * min(rows, columns))
    best = all_of_it.largest(rank)
    left = matrix.double() - best.dense()
    tail = all_of_it.values[rank:]
    assert torch.allclose(left.norm(), tail.norm(), atol=1e-9)
    spectral = torch.linalg.matrix_norm(left, 2)
    assert torch.allclose(spectral, tail[0] if len(tail) else torch.zeros((), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(all_of_it.smallest(len(tail)).dense(), left, atol=1e-9)
    assert torch.allclose(all_of_it.dense(), matrix.double(), atol=1e-9)


def test_components_are_kept_on_disk_and_a_broken_file_is_made_anew(tmp_path: Path) -> None:
    matrix, folder = random(12, 7), tmp_path / "svd"
    first = decompose(matrix, folder=folder)
    [file] = folder.iterdir()
    assert file.name == f"{fingerprint(matrix)}-float32.safetensors"
    stamp = file.stat().st_mtime_ns
    again = decompose(matrix.clone(), folder=folder)
    assert file.stat().st_mtime_ns == stamp
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in ("left", "values", "right"))
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(decompose(matrix, folder=folder).left, first.left)
    assert [p.name for p in folder.iterdir()] == [file.name]
    decompose(matrix, precision=torch.float64, folder=folder)
    decompose(matrix + 1, folder=folder)
    assert len(list(folder.iterdir())) == 3


def test_a_fingerprint_names_numbers_type_and_shape() -> None:
    matrix = random(4, 6)
    names = {
        fingerprint(matrix),
        fingerprint(matrix.bfloat16()),
        fingerprint(matrix.reshape(6, 4)),
        fingerprint(-matrix),
    }
    assert len(names) == 4
    assert fingerprint(matrix.T) == fingerprint(matrix.T.contiguous())


def test_random_projection_is_seeded_close_and_quiet() -> None:
    matrix = random(40, 30)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, two = (decompose_randomly(matrix, 5, seed=seed).dense() for seed in (0, 0))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, decompose_randomly(matrix, 5, seed=1).dense())
    best = (matrix - decompose(matrix).largest(5).dense()).norm()
    assert best < (matrix - one).norm() < 1.1 * best
    more = decompose_randomly(matrix, 5, niter=20).dense()
    assert torch.allclose((matrix - more).norm(), best, rtol=1e-3)
    assert decompose_randomly(matrix, 0).dense().abs().sum() == 0


def test_the_edge_tells_signal_from_noise() -> None:
    noise, signal = random(300, 200), 10 * random(300, 4, 1) @ random(4, 200, 2) / 10
    values = decompose(noise).values
    assert noise_rank(noise, values) <= 2
    both = noise + signal
    assert noise_rank(both, decompose(both).values) == 4
    low, high = values.quantile(0.25).item(), values.quantile(0.75).item()
    edge = (high - low) / 1.349 * (1 + math.sqrt(200 / 300))
    assert quartile_rank(300, 200, values) == sum(v > edge for v in values.tolist())


def test_effective_rank_lies_between_one_and_all() -> None:
    assert effective_rank(torch.ones(8)) == pytest.approx(8)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert 1 < effective_rank(torch.tensor([3.0, 1, 0.1])) < 3


def test_what_has_no_components() -> None:
    with pytest.raises(UsageError, match=r"^singular values are those of a matrix; this weight has 3 dimensions$"):
        decompose(torch.zeros(2, 2, 2))
    with pytest.raises(UsageError, match="numbers that are not finite"):
        decompose(torch.full((2, 2), torch.nan))
    assert isinstance(decompose(random(3, 2).bfloat16()), Factors)


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
        f"{DOWN}@r999": old,
        f"{DOWN}@mp": exact.largest(noise_rank(old, exact.values)).dense(),
        f"{DOWN}@mpl": exact.largest(quartile_rank(64, 128, exact.values)).dense(),
    }
    ranks = [16, 5, 16, 0, 0, full, full, noise_rank(old, exact.values), quartile_rank(64, 128, exact.values)]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_can_be_edited_and_is_left_bit_for_bit(family: str) -> None:
    model, given = shared(family), inputs(family)
    body = anatomy(model)
    before = {name: (value, value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    with torch.no_grad():
        expected = model(**given).logits
        with pytest.raises(KeyboardInterrupt), edited(model, ["2:4.*@0.5"], form="factored") as report:
            assert report.touched
            assert {one.layer for one in report.touched} == {2, 3}
            assert (model(**given).logits - expected).abs().max() > 1e-3
            raise KeyboardInterrupt
        assert torch.equal(model(**given).logits, expected)
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes
    for name, value in model.state_dict().items():
        same, copy, place = before[name]
        assert torch.equal(value, copy)
        assert value.data_ptr() == place == same.data_ptr()
    assert body is anatomy(model)


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
    with edited(model, [f"1.{name}.2@r3"], form="factored") as report:
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
        assert torch.equal(weight(model, 3), weight(model, 4))
    with edited(model, ["3:5.mlp.down_proj@r4"]) as report:
        assert len(report.touched) == 1
        assert int(torch.linalg.matrix_rank(weight(model, 4).data)) == 4


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
            ["3.mlp.*@r4", "3.*.up_proj@0.1"],
            "3.mlp.*@r4 and 3.*.up_proj@0.1 both change mlp.up_proj of layer 3: keep one",
        ),
        (
            ["3.mlp.up_proj@0.1w"],
            "the rule 0.1w needs the inputs of a calibration run, which a plain edit does not have",
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
        pytest.raises(UsageError, match=r"^form is 'dense' or 'factored', not 'thin'$"),
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
    layers[3].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(64, 64, device="meta"))
    with pytest.raises(UnsupportedModel, match="its weights are offloaded"), edited(model, [f"{DOWN}@r4"]):
        pass
