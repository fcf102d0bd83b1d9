"""Singular values: exact, kept, weighed by inputs, and the ranks that are read off them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.errors import UsageError
from impasto.svd import (
    Factors,
    decompose,
    decompose_randomly,
    decompose_weighed,
    effective_rank,
    fingerprint,
    noise_rank,
    quartile_rank,
)

torch.set_num_threads(1)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0, 1))
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


# ------------------------------------------------------------------------------------------- weighed by inputs


def loss(matrix: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((matrix - other).double() @ inputs.double()).norm())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    tokens=st.integers(1, 60),
    share=st.floats(0, 1),
    decay=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_weighed_components_are_never_worse_on_their_inputs(
    rows: int, columns: int, tokens: int, share: float, decay: float, seed: int
) -> None:
    """Also where the inputs leave directions open (fewer tokens than columns) or are far from round."""
    matrix = random(rows, columns, seed)
    inputs = random(columns, tokens, seed + 1) * torch.arange(1, columns + 1)[:, None] ** -decay
    rank = round(share * min(rows, columns))
    weighed = decompose_weighed(matrix, inputs @ inputs.mT)
    best, plain = weighed.largest(rank).dense(), decompose(matrix).largest(rank).dense()
    scale = loss(matrix, torch.zeros_like(matrix), inputs)
    assert loss(matrix, best, inputs) <= loss(matrix, plain, inputs) + 1e-5 * scale
    assert torch.linalg.matrix_rank(best.double(), rtol=1e-5) <= rank
    assert torch.allclose(weighed.dense(), matrix, atol=1e-4)


def test_weighed_components_are_the_best_there_are() -> None:
    """The oracle: no matrix of rank k maps X to anything nearer to W X than its own truncation does."""
    matrix, inputs = random(12, 20), random(20, 200, 1) * torch.linspace(0.1, 5, 20)[:, None]
    outputs = matrix.double() @ inputs.double()
    weighed = decompose_weighed(matrix, inputs @ inputs.mT)
    for rank in range(12):
        tail = torch.linalg.svdvals(outputs)[rank:].norm()
        assert loss(matrix, weighed.largest(rank).dense(), inputs) == pytest.approx(float(tail), rel=1e-3)
    ratio = weighed.values.double() / torch.linalg.svdvals(outputs)
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)


def test_inputs_without_direction_or_without_end() -> None:
    matrix = random(8, 5)
    plain = decompose(matrix)
    for moment in (torch.eye(5), torch.zeros(5, 5), 1e20 * torch.eye(5)):
        assert torch.allclose(decompose_weighed(matrix, moment).largest(2).dense(), plain.largest(2).dense(), atol=1e-5)
    with pytest.raises(UsageError, match=r"^inputs of a matrix with 5 columns have a moment of 5 x 5, not 8 x 8$"):
        decompose_weighed(matrix, torch.eye(8))
    with pytest.raises(UsageError, match=r"^the inputs of this weight were not finite in calibration$"):
        decompose_weighed(matrix, torch.full((5, 5), torch.inf))


def test_a_moment_that_rounding_made_indefinite_is_damped_further() -> None:
    moment = torch.ones(6, 6) - 1e-4 * torch.eye(6)
    assert torch.linalg.eigvalsh(moment)[0] < 0
    assert torch.isfinite(decompose_weighed(random(4, 6), moment).dense()).all()


def test_weighed_components_are_kept_by_weight_and_inputs(tmp_path: Path) -> None:
    matrix, moment = random(6, 4), torch.diag(torch.arange(1.0, 5))
    first = decompose_weighed(matrix, moment, folder=tmp_path)
    again = decompose_weighed(matrix, moment, folder=tmp_path)
    assert torch.equal(first.right, again.right)
    decompose_weighed(matrix, 2 * moment, folder=tmp_path)
    decompose_weighed(matrix + 1, moment, folder=tmp_path)
    decompose(matrix, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    matrix = random(6, 4)
    assert torch.equal(decompose(matrix, folder=tmp_path / "file" / "svd").left, decompose(matrix).left)
