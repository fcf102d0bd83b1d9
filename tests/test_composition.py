"""The search over layers: what it accepts and in which order, and what the authors' script does in its place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.composition import Edits, Rung, Step, Trace, Verdict, authors, greedy, ladder
from impasto.edit import Edit
from impasto.errors import UsageError

FRACTIONS = ("0.9", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05", "0.01")


def grid(layers: int, matrices: tuple[str, ...] = ("mlp.up", "mlp.down"), rules: tuple[str, ...] = FRACTIONS):
    return ladder(Edit.parse(f"{i}.{matrix}@{rule}") for i in range(layers) for matrix in matrices for rule in rules)


def texts(edits: Edits) -> tuple[str, ...]:
    return tuple(map(str, edits))


def arbitrary(seed: int, levels: int = 5) -> Callable[[Edits], Verdict]:
    """A judge with a will of its own: the same set gets the same verdict, in whatever order."""

    def judge(edits: Edits) -> Verdict:
        draw = random.Random(f"{seed} {sorted(map(str, edits))}")
        accuracy = draw.randrange(levels) / levels
        return Verdict(math.nan if draw.random() < 0.1 else accuracy, draw.random())

    return judge


JUDGES = st.builds(arbitrary, st.integers(0, 10_000), st.sampled_from([1, 3, 50]))
GRIDS = st.builds(
    grid, st.integers(1, 5), rules=st.lists(st.sampled_from(FRACTIONS), min_size=1, unique=True).map(tuple)
)


# ------------------------------------------------------------------------------------------------ the ladder


def test_a_ladder_goes_from_the_last_layer_down_and_from_the_strongest_cut_up() -> None:
    rungs = grid(3, ("mlp.up", "mlp.down"))
    assert [(rung.layer, rung.matrix) for rung in rungs] == [
        (2, "mlp.up"),
        (2, "mlp.down"),
        (1, "mlp.up"),
        (1, "mlp.down"),
        (0, "mlp.up"),
        (0, "mlp.down"),
    ]
    assert texts(rungs[0].edits) == tuple(f"2.mlp.up@{value}" for value in reversed(FRACTIONS))
    mixed = ["prune0.5", "r40", "mp", "0.5", "r3", "0", "0.1", "tail0.2"]
    [rung] = ladder(Edit.parse(f"0.a@{rule}") for rule in mixed)
    assert [str(edit.rule) for edit in rung.edits] == ["0", "0.1", "0.5", "r3", "r40", "prune0.5", "mp", "tail0.2"]


@given(st.permutations([f"{i}.m@{f}" for i in range(3) for f in FRACTIONS[:3]]))
def test_the_order_in_which_candidates_are_given_makes_no_difference(given_order: list[str]) -> None:
    assert ladder(map(Edit.parse, given_order * 2)) == grid(3, ("m",), FRACTIONS[:3])


def test_an_edit_of_several_layers_has_no_place_on_a_ladder() -> None:
    with pytest.raises(
        UsageError, match=r"3:6.mlp.up@0.1 names 3 layers: a search over layers takes edits of one each"
    ):
        ladder([Edit.parse("3:6.mlp.up@0.1")])
    assert ladder([]) == ()


# ------------------------------------------------------------------------------------------------ greedy


@given(GRIDS, JUDGES, st.booleans())
def test_what_greedy_accepts_never_gets_worse_and_is_what_the_judge_said(
    rungs: tuple[Rung, ...], judge: Callable[[Edits], Verdict], first: bool
) -> None:
    asked: list[Edits] = []

    def noting(edits: Edits) -> Verdict:
        asked.append(edits)
        return judge(edits)

    trace = greedy(rungs, noting, first=first)
    assert [(step.layer, step.matrix) for step in trace.steps] == [(rung.layer, rung.matrix) for rung in rungs]
    state: Edits = ()
    now = trace.start
    assert_same(now, judge(()))
    for step, rung in zip(trace.steps, rungs, strict=True):
        assert_same(step.before, now)
        for trial in step.tried:
            assert_same(trial.verdict, judge((*state, trial.edit)))
        if step.accepted:
            assert step.edit in rung.edits and step.after.beats(step.before)
            state = (*state, step.edit)
            assert not first or step.tried[-1].edit == step.edit
        else:
            assert_same(step.after, step.before)
            assert not any(trial.verdict.beats(step.before) for trial in step.tried)
        if not (first and step.accepted):
            assert tuple(trial.edit for trial in step.tried) == rung.edits
        assert not any(trial.verdict.beats(step.after) for trial in step.tried)
        now = step.after
    assert trace.edits == state and trace.states == tuple(state[:n] for n in range(len(state) + 1))
    assert_same(trace.end, judge(state))
    assert len(asked) == trace.judged <= 1 + sum(len(rung.edits) for rung in rungs)
    assert not first or trace.judged <= greedy(rungs, judge).judged


def assert_same(one: Verdict, other: Verdict) -> None:
    assert not one.beats(other) and not other.beats(one)


@given(GRIDS, JUDGES)
def test_greedy_tells_what_it_will_ask_and_each_step_it_takes(
    rungs: tuple[Rung, ...], judge: Callable[[Edits], Verdict]
) -> None:
    announced: set[Edits] = {()}
    steps: list[Step] = []

    def known(edits: Edits) -> Verdict:
        assert edits in announced
        return judge(edits)

    for search in (greedy, authors):
        if search is authors and len({rung.layer for rung in rungs}) < 2:
            continue
        steps.clear()
        trace = search(rungs, known, ahead=announced.update, tell=steps.append)
        assert tuple(steps) == trace.steps


def test_greedy_takes_the_more_accurate_one_and_of_equals_the_one_with_the_lower_loss() -> None:
    verdicts = {
        (): Verdict(0.5, 2.0),
        ("1.a@0.1",): Verdict(0.5, 1.9),  # as accurate, and a little surer
        ("1.a@0.2",): Verdict(0.6, 3.0),
        ("1.a@0.4",): Verdict(0.6, 2.5),
        ("1.a@0.4", "0.a@0.1"): Verdict(0.6, 2.5),  # no better
        ("1.a@0.4", "0.a@0.2"): Verdict(0.59, 0.1),
        ("1.a@0.4", "0.a@0.4"): Verdict(math.nan, 0.0),
        ("1.a@0.1", "0.a@0.1"): Verdict(0.7, 1.0),
    }

    def judge(edits: Edits) -> Verdict:
        return verdicts[texts(edits)]

    rungs = grid(2, ("a",), ("0.4", "0.2", "0.1"))
    trace = greedy(rungs, judge)
    assert texts(trace.edits) == ("1.a@0.4",)
    assert [step.accepted for step in trace.steps] == [True, False]
    assert (trace.start, trace.end, trace.judged) == (Verdict(0.5, 2.0), Verdict(0.6, 2.5), 7)
    quick = greedy(rungs, judge, first=True)
    assert texts(quick.edits) == ("1.a@0.1", "0.a@0.1") and quick.judged == 3
    assert greedy((), judge) == Trace(Verdict(0.5, 2.0), ())


def test_a_model_that_is_broken_without_edits_can_be_mended() -> None:
    trace = greedy(grid(1, ("a",), ("0.1",)), lambda edits: Verdict(0.1, 1) if edits else Verdict(math.nan, math.nan))
    assert texts(trace.edits) == ("0.a@0.1",)


# ------------------------------------------------------------------------------------------------ the authors' script


@given(st.integers(2, 12), JUDGES)
def test_the_authors_end_is_the_same_whatever_the_judge_says(layers: int, judge: Callable[[Edits], Verdict]) -> None:
    trace = authors(grid(layers), judge)
    assert texts(trace.edits) == tuple(f"{layer}.mlp.up@0.02" for layer in range(layers - 2, -1, -1))
    assert trace.judged == 5 * (layers - 1) + 1
    assert all(step.accepted for step in trace.steps)


def as_written(layers: int, accuracy: Callable[[tuple[float, ...]], float]) -> list[tuple[float, ...]]:
    """The control flow of the script, with its aliased state and its comparison with the smallest; what it asks."""
    asked: list[tuple[float, ...]] = []
    cut = [0.0] * layers

    def judged() -> float:
        asked.append(tuple(cut))
        return accuracy(tuple(cut))

    now = judged()
    seen = {"start": now}
    for layer in reversed(range(layers - 1)):
        stop = False
        while now >= min(seen.values()) and not stop:
            earlier = cut
            if cut[layer] < 0.9:
                cut[layer] += 0.45
            elif cut[layer] < 0.98:
                cut[layer] += 0.04
            else:
                stop = True
            now = judged()
            seen[f"{layer}-{cut[layer]}"] = now
        if now < min(seen.values()):
            cut = earlier
    return asked


@given(st.integers(2, 30), st.integers(0, 1000))
def test_it_asks_what_the_script_asks_in_the_same_order(layers: int, seed: int) -> None:
    draw = random.Random(seed)
    expected = as_written(layers, lambda cut: draw.random())
    asked: list[tuple[float, ...]] = []

    def judge(edits: Edits) -> Verdict:
        kept = {edit.layers[0]: edit.rule.value for edit in edits}
        asked.append(tuple(1 - float(kept.get(layer) or Decimal(1)) for layer in range(layers)))
        return Verdict(draw.random(), draw.random())

    trace = authors(grid(layers), judge)
    assert len(asked) == len(expected) == trace.judged
    assert all(one == pytest.approx(other) for one, other in zip(asked, expected, strict=True))
    assert layers != 28 or trace.judged == 136


def test_the_authors_procedure_needs_two_layers() -> None:
    for rungs in ((), grid(1)):
        with pytest.raises(
            UsageError, match="the authors' procedure leaves out the last layer, so it needs at least two"
        ):
            authors(rungs, arbitrary(0))
