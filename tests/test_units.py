"""Units of work: everything exactly once, evenly, with little done twice, and always the same."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import impasto
from impasto import units
from impasto.forest import batches, grow, lay_out
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.schedule import Call, Group, Schedule
from impasto.studies.protocol import protocol, variants
from impasto.trie import count, plant
from impasto.units import SLACK, TWICE, Unit, shards, subtries, to_score, to_write

few = settings(max_examples=40, deadline=None)

# ── what is cut ──────────────────────────────────────────────────────────────────────────────────────────────────────

calls = st.builds(Call, st.integers(0, 3), st.sampled_from(["whole", "whole", "whole", "attn"]))
series = st.recursive(
    st.lists(calls, min_size=1, max_size=4).map(tuple),
    lambda inner: st.lists(
        st.one_of(
            calls,
            st.builds(Group, st.lists(inner, min_size=2, max_size=3).map(tuple), st.sampled_from(["mean", "sum"])),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    max_leaves=6,
)
edits = st.sampled_from([(), (), (), ("1.mlp.*@0",), ("0:2.mlp.*@0.5", "1.mlp.*@0")])
recipes = st.builds(lambda steps, worn: Recipe.of("m", Schedule(steps), worn), series, edits)
recipe_lists = st.lists(recipes, min_size=1, max_size=12, unique_by=lambda recipe: recipe.fingerprint)

# Sequences with common beginnings, and the request that each belongs to (a long text is several sequences).
sequence_lists = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)),
    min_size=1,
    max_size=25,
)


def asked(number: int, kind: str = "loglikelihood") -> list[Request]:
    return [Request(kind, f"question {i}" + "?" * (i * 7 % 5), f" {i}") for i in range(number)]


def pairs(made: Sequence[Unit]) -> Counter[tuple[str, str]]:
    return Counter((r.fingerprint, q.fingerprint) for unit in made for r in unit.recipes for q in unit.requests)


def once(who: Sequence[Recipe], what: Sequence[Request]) -> Counter[tuple[str, str]]:
    return Counter((r.fingerprint, q.fingerprint) for r in who for q in what)


# ── everything once ──────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(recipe_lists, sequence_lists, st.integers(1, 60), st.integers(0, 5), st.integers(0, 12))
def test_every_recipe_meets_every_request_once(
    who: list[Recipe], texts: list[tuple[int, tuple[int, ...]]], budget: int, workers: int, wanted: int
) -> None:
    what, owners = asked(8), [owner for owner, _ in texts]
    trees = grow([tokens for _, tokens in texts])
    made = to_score(who, what, trees, owners, budget=budget, workers=workers, wanted=wanted)
    assert pairs(made) == once(who, what)
    assert all(unit.recipes and unit.requests and not unit.writes and unit.cost >= 0 for unit in made)
    assert made == to_score(who, what, trees, owners, budget=budget, workers=workers, wanted=wanted)


@few
@given(recipe_lists, st.integers(1, 9), st.integers(0, 40))
def test_every_recipe_writes_to_every_request_once(who: list[Recipe], number: int, wanted: int) -> None:
    made = to_write(who, asked(number, "generate"), wanted=wanted)
    assert pairs(made) == once(who, asked(number, "generate"))
    assert all(unit.writes and len(unit.recipes) == 1 for unit in made)


def test_nothing_to_do_is_no_unit() -> None:
    assert to_score([], asked(2), [], [], budget=8, workers=2, wanted=4) == []
    assert to_write([Recipe.of("m", "0 1")], [], wanted=4) == []


@given(st.sets(st.integers(0, 9)))
def test_what_is_left_of_a_unit(answered: set[int]) -> None:
    unit = Unit((Recipe.of("m", "0 1"),), tuple(asked(10)), 1000)
    left = unit.without(answered)
    if left is None:
        assert len(answered) == 10
        return
    assert left.requests == tuple(q for i, q in enumerate(unit.requests) if i not in answered)
    assert left.cost == 100 * len(left.requests) and left.recipes == unit.recipes


def test_a_unit_travels() -> None:
    unit = Unit((Recipe.of("m", "0 {1, 2 3.attn}x2", ["1.mlp.*@0.25"]),), tuple(asked(3)), 7)
    assert pickle.loads(pickle.dumps(unit)) == unit
    assert pickle.loads(pickle.dumps(unit)).recipes[0].fingerprint == unit.recipes[0].fingerprint


# ── cuts between recipes ─────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(recipe_lists)
def test_calls_are_counted_as_the_engine_makes_them(who: list[Recipe]) -> None:
    """The planner's sum over a run of recipes is the walk's own count, whichever recipe the run begins with."""
    before = units._made_before(who)
    for first in range(len(who)):
        new = [sum(last < first for last in before[item]) for item in range(first, len(who))]
        assert sum(new) == count(plant(who[first:])).calls


def cuts(items: int) -> list[list[tuple[int, int]]]:
    """Every way to cut a row into runs."""
    found = []
    for marks in itertools.product([False, True], repeat=items - 1):
        places = [0, *(i + 1 for i, mark in enumerate(marks) if mark), items]
        found.append(list(itertools.pairwise(places)))
    return found


@few
@given(recipe_lists.filter(lambda who: len(who) <= 8), st.integers(1, 5))
def test_no_other_cut_is_better(who: list[Recipe], parts: int) -> None:
    """Against all cuts there are: the largest part within the slack of the evenest cut, and the least work in all."""

    def cost(low: int, high: int) -> int:
        return count(plant(ordered[low:high])).calls

    made = subtries(who, parts)
    ordered = [recipe for part in made for recipe in part]
    assert Counter(ordered) == Counter(who)
    sizes = [count(plant(part)).calls for part in made]
    every = cuts(len(ordered))
    evenest = min(max(cost(*run) for run in cut) for cut in every if len(cut) <= parts)
    limit = int((1 + SLACK) * evenest) if parts > 1 else evenest
    assert max(sizes) <= limit
    assert sum(sizes) == min(sum(cost(*run) for run in cut) for cut in every if max(cost(*run) for run in cut) <= limit)


def study(depth: int, name: str) -> list[Recipe]:
    return [Recipe("m", variant.schedule) for variant in variants(depth, protocol(name))]


@pytest.mark.parametrize(
    ("depth", "name", "parts", "twice"),
    [
        (18, "quick", 2, 0.02),
        (18, "quick", 8, 0.10),
        (18, "quick", 16, 0.20),
        (32, "standard", 2, 0.002),
        (32, "standard", 8, 0.01),
        (32, "standard", 16, 0.02),
    ],
)
def test_a_study_is_cut_evenly_and_little_is_done_twice(depth: int, name: str, parts: int, twice: float) -> None:
    """How many more layer calls the parts make than the whole, when a study is cut between recipes alone."""
    who = study(depth, name)
    sizes = [count(plant(part)).calls for part in subtries(who, parts)]
    whole = count(plant(who)).calls
    assert whole <= sum(sizes) <= (1 + twice) * whole
    assert max(sizes) <= 1.2 * whole / parts + depth


def test_more_units_than_workers_only_where_that_is_cheap() -> None:
    """One batch, so that only recipes can be cut: as many parts as spare double work, but one for each worker."""
    who, what = study(18, "quick"), asked(3)
    trees = grow([(1, 2, 3), (1, 2, 4), (5,)])
    whole = to_score(who, what, trees, [0, 1, 2], budget=99, workers=1, wanted=1)
    assert len(whole) == 1
    for workers in (2, 4):
        made = to_score(who, what, trees, [0, 1, 2], budget=99, workers=workers, wanted=8 * workers)
        assert len(made) >= workers
        assert len(made) <= 2 * workers or sum(u.cost for u in made) <= (1 + TWICE) * whole[0].cost


# ── cuts between requests ────────────────────────────────────────────────────────────────────────────────────────────


def exams(worked: int, questions: int, choices: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Token sequences of multiple-choice questions below common worked examples; every choice is a request."""
    head = tuple(range(1000, 1000 + worked))
    sequences = [
        (*head, *range(100 * q, 100 * q + 30 + q % 17), 9000 + c, 9100 + c)
        for q in range(questions)
        for c in range(choices)
    ]
    return sequences, list(range(len(sequences)))


@pytest.mark.parametrize(("worked", "questions", "choices"), [(0, 40, 4), (300, 60, 4), (20, 30, 1)])
@pytest.mark.parametrize("parts", [1, 3, 8, 100])
def test_shards_cost_nothing(worked: int, questions: int, choices: int, parts: int) -> None:
    """Run by themselves, the shards take the tokens that one process would take for all."""
    sequences, owners = exams(worked, questions, choices)
    budget = 800
    trees = grow(sequences)
    whole = sum(lay_out(batch).padded for batch in batches(trees, budget))
    made = shards(len(sequences), trees, owners, budget=budget, parts=parts)
    assert sum(shard.tokens for shard in made) == whole
    alone = [
        sum(lay_out(b).padded for b in batches(grow([sequences[i] for i in shard.requests]), budget)) for shard in made
    ]
    assert sum(alone) <= 1.02 * whole
    assert 1 <= len(made) <= max(parts, 1)
    largest = max(lay_out(batch).padded for batch in batches(trees, budget))
    assert max(shard.tokens for shard in made) <= (1 + SLACK) * (whole / min(parts, len(made)) + largest)


def test_the_choices_of_a_question_stay_together() -> None:
    sequences, owners = exams(0, 40, 4)
    for shard in shards(len(sequences), grow(sequences), owners, budget=120, parts=100):
        assert {4 * (i // 4) + c for i in shard.requests for c in range(4)} == set(shard.requests)


@given(sequence_lists, st.integers(1, 40), st.integers(1, 9))
def test_a_request_is_never_cut(texts: list[tuple[int, tuple[int, ...]]], budget: int, parts: int) -> None:
    made = shards(8, grow([tokens for _, tokens in texts]), [owner for owner, _ in texts], budget=budget, parts=parts)
    assert sorted(place for shard in made for place in shard.requests) == list(range(8))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 6))
def test_a_plain_row_is_cut_as_evenly_as_can_be(weights: list[int], parts: int) -> None:
    found = units._runs(lambda first, item: weights[item], len(weights), parts)
    assert [i for low, high in found for i in range(low, high)] == list(range(len(weights)))
    cost: Callable[[tuple[int, int]], int] = lambda run: sum(weights[slice(*run)])  # noqa: E731
    evenest = min(max(map(cost, cut)) for cut in cuts(len(weights)) if len(cut) <= parts)
    assert max(map(cost, found)) <= (1 + SLACK) * evenest


# ── the same everywhere ──────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
from impasto.forest import grow
from impasto.recipe import Recipe
from impasto.result import Request, digest
from impasto.studies.protocol import protocol, variants
from impasto.units import to_score, to_write
who = [Recipe("m", v.schedule) for v in variants(12, protocol("quick"))]
what = [Request("loglikelihood", f"q{i // 3}", f" {i}") for i in range(60)]
trees = grow([(1, 2, i // 3, i) for i in range(60)])
made = to_score(who, what, trees, range(60), budget=40, workers=3, wanted=24) + to_write(who[:3], what, wanted=9)
print(digest([[r.fingerprint for r in u.recipes] + [q.fingerprint for q in u.requests] + [u.cost] for u in made]))
import sys
assert not {"torch", "ray", "transformers"} & set(sys.modules)
"""


def test_units_are_the_same_in_every_process_and_need_neither_torch_nor_ray() -> None:
    found = set()
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(Path(impasto.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
