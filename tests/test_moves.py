"""The paper's schedules: exact examples, and the laws between the methods for every depth."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto import moves
from impasto.errors import UsageError
from impasto.schedule import Schedule

DEPTHS = st.integers(4, 41)
PLACES = DEPTHS.flatmap(lambda depth: st.tuples(st.just(depth), st.sampled_from(moves.starts(depth))))


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (moves.identity(32), "0:32"),
        (moves.skip_one(32, 16), "0:16 17:32"),
        (moves.skip_one(32, 0), "1:32"),
        (moves.swap_adjacent(28, 7), "0:7 8 7 9:28"),
        (moves.skip(32, 13), "0:14 19:32"),
        (moves.skip(32, 14), "0:15 18:32"),
        (moves.middle_repeat(32, 13), "0:14 16x5 19:32"),
        (moves.reverse(32, 13), "0:14 19:14 19:32"),
        (moves.random_order(32, 13, 0), "0:14 16 15 14 18 17 19:32"),
        (moves.parallel(32, 13), "0:14 {14:19} 19:32"),
        (moves.parallel(32, 13, "sum"), "0:14 sum{14:19} 19:32"),
        (moves.looped_parallel(32, 13), "0:14 {14:19}x3 19:32"),
        (moves.block_repeat(32, 13, 2), "0:14 (14:19)x2 19:32"),
        (moves.inplace_repeat(32, 13, 2), "0:14 14x2 15x2 16x2 17x2 18x2 19:32"),
        (moves.middle_repeat(31, 13), "0:14 15x4 18:31"),
    ],
)
def test_examples(schedule: Schedule, text: str) -> None:
    assert schedule == Schedule.parse(text)
    assert str(schedule) == str(Schedule.parse(text))


def test_numbers_of_the_paper() -> None:
    """Checks that the paper itself makes of the index convention (section 0 of its facts)."""
    assert [moves.affected(32, start) for start in (15, 14, 13, 0)] == [1, 3, 5, 31]
    assert [moves.affected(24, start) for start in (11, 0)] == [1, 23]
    assert moves.affected(40, 19) == 1 and moves.affected(80, 39) == 1
    assert moves.skip(32, 13).calls == 27
    assert moves.parallel(32, 8).depth == 18 and moves.affected(32, 8) == 15
    assert list(moves.middle(24, 9)) == [10, 11, 12, 13, 14]
    assert moves.centre(32) == 16 and moves.centre(24) == 12


@given(PLACES)
def test_pre_mid_post_are_the_whole_model(place: tuple[int, int]) -> None:
    depth, start = place
    mid = moves.middle(depth, start)
    assert [*range(start + 1), *mid, *range(depth - start, depth)] == list(range(depth))
    assert moves.affected(depth, start) == len(mid) == depth - 2 * start - 1 >= 1
    assert moves.centre(depth) in mid
    below, above = moves.centre(depth) - mid[0], mid[-1] - moves.centre(depth)
    assert above - below == depth % 2


@given(DEPTHS)
def test_fewest_affected_layers(depth: int) -> None:
    start = moves.starts(depth)[-1]
    full = moves.identity(depth)
    if depth % 2 == 0:
        assert moves.affected(depth, start) == 1
        for same in (
            moves.parallel(depth, start),
            moves.parallel(depth, start, "sum"),
            moves.looped_parallel(depth, start, 1),
            moves.reverse(depth, start),
            moves.random_order(depth, start, 3),
            moves.middle_repeat(depth, start),
        ):
            assert same == full and same.fingerprint == full.fingerprint
        assert moves.skip(depth, start) == moves.skip_one(depth, moves.centre(depth))
        assert moves.looped_parallel(depth, start, 3) == moves.block_repeat(depth, start, 3)
        assert moves.block_repeat(depth, start, 3) == moves.inplace_repeat(depth, start, 3)
    else:
        assert moves.affected(depth, start) == 2


@given(PLACES, st.integers(1, 5), st.integers(0, 99))
def test_laws(place: tuple[int, int], times: int, seed: int) -> None:
    depth, start = place
    width = moves.affected(depth, start)
    full = moves.identity(depth)
    assert moves.looped_parallel(depth, start, 1) == moves.parallel(depth, start)
    assert moves.block_repeat(depth, start, 1) == moves.inplace_repeat(depth, start, 1) == full
    assert moves.skip(depth, start).calls == depth - width
    assert moves.looped_parallel(depth, start, times).depth == depth - width + times
    assert moves.looped_parallel(depth, start, times).calls == depth + (times - 1) * width
    assert moves.block_repeat(depth, start, times).calls == depth + (times - 1) * width
    assert moves.inplace_repeat(depth, start, times).calls == depth + (times - 1) * width
    for shuffled in (moves.random_order(depth, start, seed), moves.reverse(depth, start)):
        assert sorted(map(str, shuffled.steps)) == sorted(map(str, full.steps))
    for method in moves.METHODS.values():
        schedule = method.build(depth, start, times) if method.parameter else method.build(depth, start)
        schedule.check(depth)
        assert Schedule.parse(str(schedule), depth) == schedule
        assert schedule.steps[: start + 1] == full.steps[: start + 1]
        assert schedule.steps[len(schedule.steps) - start :] == full.steps[depth - start :]


@given(PLACES, st.integers(0, 99))
def test_random_order_is_the_official_one_and_leaves_the_global_generator_alone(place, seed: int) -> None:
    depth, start = place
    order = list(moves.middle(depth, start))
    random.seed(seed)
    random.shuffle(order)
    state = random.getstate()
    schedule = moves.random_order(depth, start, seed)
    assert random.getstate() == state
    assert [step.layer for step in schedule.steps[start + 1 : depth - start]] == order


@given(DEPTHS)
def test_single_layers(depth: int) -> None:
    for layer in range(depth):
        assert moves.skip_one(depth, layer).layers_used == frozenset(range(depth)) - {layer}
    for layer in range(depth - 1):
        swapped = [step.layer for step in moves.swap_adjacent(depth, layer).steps]
        assert swapped[layer : layer + 2] == [layer + 1, layer]
        assert sorted(swapped) == list(range(depth))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: moves.skip(32, 16), "start layer 16 is out of range: a model of 32 layers has 0..15"),
        (lambda: moves.reverse(31, 15), "start layer 15 is out of range: a model of 31 layers has 0..14"),
        (lambda: moves.parallel(32, -1), "start layer -1 is out of range: a model of 32 layers has 0..15"),
        (lambda: moves.skip_one(28, 28), "layer 28 is out of range: a model of 28 layers has 0..27"),
        (
            lambda: moves.swap_adjacent(28, 27),
            "layer to swap with the next 27 is out of range: a model of 28 layers has 0..26",
        ),
        (lambda: moves.skip_one(1, 0), "a model of 1 layer has no layer to spare"),
        (lambda: moves.starts(1), "the paper's schedules need a model of at least 2 layers, not 1"),
        (lambda: moves.looped_parallel(32, 8, 0), "iterations is at least 1, not 0"),
        (lambda: moves.block_repeat(32, 8, 0), "times is at least 1, not 0"),
    ],
)
def test_errors(wrong, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        wrong()
    assert str(caught.value) == message


def test_table_of_methods() -> None:
    assert {name: method.title for name, method in moves.METHODS.items()} == {
        "skip": "Skip",
        "middle_repeat": "Middle repeat",
        "reverse": "Reverse",
        "random_order": "Random order",
        "parallel": "Parallel",
        "looped_parallel": "Looped parallel",
        "block_repeat": "Block repeat",
        "inplace_repeat": "In-place repeat",
    }
    for name, method in moves.METHODS.items():
        assert method.name == name and method.build is getattr(moves, name)
