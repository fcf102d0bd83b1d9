"""The break-even rank: below the count of numbers, found by timing, kept, and never guessed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from impasto import breakeven
from impasto.breakeven import break_even, fewer_numbers

torch.set_num_threads(1)
SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES)
def test_thin_matrices_hold_fewer_numbers_up_to_this_rank(rows: int, columns: int) -> None:
    rank = fewer_numbers(rows, columns)
    assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4096, 16384, 3276), (4096, 11008, 2985), (768, 3072, 614)])
def test_break_even_ranks_of_known_models(rows: int, columns: int, rank: int) -> None:
    assert fewer_numbers(rows, columns) == rank


def test_the_rank_where_the_clock_turns_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def faster(rows: int, columns: int, rank: int, *_: Any) -> bool:
        tried.append(rank)
        return rank <= 300

    monkeypatch.setattr(breakeven, "_faster", faster)
    breakeven._measured.cache_clear()
    top = fewer_numbers(1000, 3000)
    assert 300 - top / 32 <= break_even(1000, 3000) <= 300
    assert len(tried) == 5
    assert break_even(1000, 3000) == break_even(1000, 3000, device=torch.device("cpu"))
    assert len(tried) == 5
    breakeven._measured.cache_clear()
    monkeypatch.setattr(breakeven, "_faster", lambda *_: False)
    assert break_even(1000, 3000) == 0
    breakeven._measured.cache_clear()


def test_a_device_without_a_clock_gets_the_count() -> None:
    assert break_even(64, 128, device="meta") == fewer_numbers(64, 128)


def test_a_type_that_cannot_be_multiplied_gets_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> bool:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(breakeven, "_faster", fails)
    assert break_even(65, 129) == fewer_numbers(65, 129)
    breakeven._measured.cache_clear()


def test_answers_are_kept_by_device_type_shape_and_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(breakeven, "_faster", lambda *_: True)
    breakeven._measured.cache_clear()
    first = break_even(100, 200, folder=tmp_path)
    break_even(100, 200, tokens=1, folder=tmp_path)
    break_even(100, 200, dtype=torch.bfloat16, folder=tmp_path)
    break_even(200, 100, folder=tmp_path)
    [file] = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 4
    monkeypatch.setattr(breakeven, "_measured", lambda *_: -1)
    assert break_even(100, 200, folder=tmp_path) == first
    file.write_text("[1, 2")
    assert break_even(100, 200, folder=tmp_path) == -1


def test_a_folder_that_cannot_be_written_costs_time_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(breakeven, "_measured", lambda *_: 7)
    (tmp_path / "file").write_text("")
    assert break_even(10, 20, folder=tmp_path / "file" / "inside") == 7


def test_it_really_measures_and_leaves_the_generator_alone() -> None:
    """A thin product of rank 1 beats a dense one of 2048 x 2048 by far, so the answer cannot be 0."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    breakeven._measured.cache_clear()
    rank = break_even(2048, 2048, tokens=4)
    assert torch.equal(torch.rand(1), expected)
    assert 0 < rank <= fewer_numbers(2048, 2048)
