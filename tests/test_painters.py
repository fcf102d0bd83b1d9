"""The painters study on evidence with a known truth: verdicts follow it, gaps are named, the page is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from impasto import moves, report, tasks
from impasto.errors import UsageError
from impasto.recipe import Recipe
from impasto.result import Answer, Page, Result
from impasto.studies import painters
from impasto.studies.claims import QUESTIONS
from impasto.studies.evidence import Cached, Cell, Evidence, Task
from impasto.studies.figures import figures
from impasto.studies.loops import Loops
from impasto.studies.painters import page, summary_lines
from impasto.studies.paper import FOUND
from impasto.studies.protocol import (
    METHODS,
    PROTOCOLS,
    TASKS,
    Heat,
    Protocol,
    Use,
    Variant,
    moderate,
    spread,
    state_schedules,
    state_start,
    variants,
)
from impasto.studies.reading import PAPER_ORDER, Found, Reading, listed, said
from impasto.studies.states import averaged_cache
from impasto.studies.table import Table, middle_of_tasks

DEPTH = 12
SMALL = replace(
    PROTOCOLS["quick"],
    starts=None,
    widest=1.0,
    swap_step=1,
    seeds=3,
    repeat_starts=2,
    heat=Heat(widths=None, iterations=(1, 2, 3, 4, 6, 8)),
    tasks=("arithmetic", "reasoning", "knowledge", "lambada"),
)
PLAN = variants(DEPTH, SMALL)

# Normalised score of a method at M = 5 of 12 layers in a world that is like the paper's Llama2-7B.
LIKE_THE_PAPER = {
    "middle_repeat": 0.05,
    "skip": 0.3,
    "parallel": 0.45,
    "reverse": 0.6,
    "random_order": 0.75,
    "looped_parallel": 0.92,
}


@dataclass(frozen=True)
class World:
    """The truth that scores are drawn from: a normalised score for every use and kind of task."""

    kept: Callable[[Use, bool], float]
    full: float = 0.9
    n: int = 150


def decay(level: float, use: Use) -> float:
    """A curve through 1 at M = 1 and `level` at M = 5."""
    return float(level ** ((use.affected - 1) / 4))


def like_the_paper(use: Use, order_sensitive: bool) -> float:
    if use.method == "full":
        return 1.0
    if use.method in ("skip_one", "swap"):
        return 0.1 if use.parameter in (0, DEPTH - 1) else 0.97
    if use.method in ("block_repeat", "inplace_repeat"):
        return 0.4
    if use.method == "skip" and use.affected == 1:
        return 0.97
    if use.method == "looped_parallel" and use.parameter != SMALL.iterations:
        best = use.affected / 2
        return max(0.15, 0.95 - 0.16 * abs((use.parameter or 0) - best))
    level = LIKE_THE_PAPER[use.method]
    if use.method in ("reverse", "random_order"):
        level = level - 0.25 if order_sensitive else min(1.0, level + 0.1)
    return decay(level, use)


def indifferent(use: Use, order_sensitive: bool) -> float:
    """A model whose middle may run in any order, several times, or not at all."""
    return 1.0


def evidence(world: World, plan: tuple[Variant, ...] = PLAN, protocol: Protocol = SMALL, seed: int = 0) -> Evidence:
    """Right and wrong answers: a document is right when its difficulty is below the recipe's accuracy."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str], Result] = {}
    described = []
    for place, name in enumerate(protocol.tasks):
        sensitive = place < 2
        chance = (0.1, 0.25, 0.2, 0.0)[place]
        difficulty = rng.random(world.n)
        for variant in plan:
            kept = world.kept(variant.uses[0], sensitive)
            accuracy = chance + kept * (world.full - chance)
            right = (difficulty + rng.normal(0, 0.02, world.n) < accuracy).astype(float)
            found[variant.recipe, name] = result(variant.recipe, name, right.tolist(), chance, sensitive)
        described.append(Task.of(found[plan[0].recipe, name]))
    return Evidence(DEPTH, protocol, plan, tuple(described), found, facts={"model": "synthetic"})


def result(recipe: str, task: str, scores: list[float | None], chance: float, sensitive: bool, **more: Any) -> Result:
    known = [score for score in scores if score is not None]
    return Result(
        recipe=recipe,
        task=task,
        protocol="p",
        n=len(scores),
        metrics={"acc,none": sum(known) / len(known) if len(known) == len(scores) else math.nan},
        scores={"acc,none": tuple(scores)},
        info={
            "chance": chance,
            "majority": chance + 0.05,
            "metric": "acc,none",
            "higher_is_better": True,
            "order_sensitive": sensitive,
        },
        **more,
    )


def matrix(labels: int, alike: Callable[[int, int], float], width: float = 0.02) -> dict[str, Any]:
    value = [[1.0 if i == j else alike(min(i, j), max(i, j)) for j in range(labels)] for i in range(labels)]
    return {
        "value": value,
        "low": [[each - width for each in row] for row in value],
        "high": [[each + width for each in row] for row in value],
    }


def similar(labels: int, growth: float, alike: Callable[[int, int], float], honest: float = 1.0) -> dict[str, Any]:
    """What `Similarity.to_json` writes; `honest` scales the measures without artefacts."""
    calm = {"paper": alike} | {
        name: (lambda i, j: honest * alike(i, j) + (1 - honest) * 0.5) for name in ("tokens", "centred", "cka")
    }
    return {
        "labels": [str(i) for i in range(labels)],
        "texts": 10,
        "tokens": 400,
        "measures": {name: matrix(labels, function) for name, function in calm.items()},
        "states": {
            "norm": [growth**i for i in range(labels)],
            "variance": [growth ** (2 * i) for i in range(labels)],
            "first_norm": [1.0] * labels,
            "first_share": [0.4, *[0.9] * (labels - 1)],
        },
    }


def blocks(i: int, j: int) -> float:
    """States 2..10 of 13 make a middle."""
    return 0.96 if i >= 2 and j <= 10 else 0.2


GROUPS = {
    "threshold": 0.9,
    "blocks": [[0], [1], list(range(2, 11)), [11], [12]],
    "beginning": [0, 1],
    "middle": list(range(2, 11)),
    "end": [11, 12],
    "separation": 0.76,
    "rule": "the middle is the widest run of states that are alike",
}


def with_states(found: Evidence, honest: float = 1.0) -> Evidence:
    def drifting(i: int, j: int) -> float:
        return blocks(i, j) - 0.05 * (j - i)

    similarity = {
        "full": similar(DEPTH + 1, 1.1, blocks, honest),
        "skip": similar(DEPTH + 1 - 5 - (DEPTH % 2), 1.1, blocks, honest),
        "middle_repeat": similar(DEPTH + 1, 1.3, drifting),
    }
    return replace(found, similarity=similarity, groups={"paper": GROUPS, "tokens": GROUPS})


def answered(found: Evidence) -> Mapping[str, Answer]:
    return {answer.key: answer for answer in page(found).answers}


def verdicts(found: Evidence) -> dict[str, str]:
    return {key: answer.verdict for key, answer in answered(found).items()}


@pytest.fixture(scope="module")
def paperlike() -> Evidence:
    return with_states(evidence(World(like_the_paper)))


@pytest.fixture(scope="module")
def shown(paperlike: Evidence) -> Page:
    return page(paperlike)


# ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tasks_are_the_default_ones() -> None:
    assert TASKS == tasks.DEFAULT_TASKS


def test_the_paper_protocol_keeps_the_paper_s_books() -> None:
    """16 start layers times 5 methods and 10 seeds, 14 x 28 cells, 32 + 31 single changes (spec-painters 2.4)."""
    plan = variants(32, PROTOCOLS["paper"])
    uses = [use for variant in plan for use in variant.uses]
    sweep = [use for use in uses if use.method in PAPER_ORDER and (use.method != "looped_parallel")]
    assert len(sweep) == 16 * (4 + 10)
    assert len([use for use in uses if use == Use("looped_parallel", use.start, use.affected, 3)]) == 16
    cells = [use for use in uses if use.method == "looped_parallel" and use.affected >= 5]
    assert len(cells) == 14 * 28 and {use.parameter for use in cells} == set(range(1, 29))
    assert {use.affected for use in cells} == set(range(5, 32, 2))
    assert sum(use.method in ("skip_one", "swap") for use in uses) == 32 + 31
    assert len(plan) == 706 and len(uses) == 746


@pytest.mark.parametrize(("depth", "name", "count"), [
    (18, "quick", 54), (24, "quick", 62), (32, "quick", 74),
    (18, "standard", 188), (24, "standard", 242), (32, "standard", 314),
    (18, "paper", 265), (24, "paper", 430),
])  # fmt: skip
def test_distinct_schedules_of_a_protocol(depth: int, name: str, count: int) -> None:
    assert len(variants(depth, PROTOCOLS[name])) == count


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6, 7, 18, 19])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_schedule_is_there_once_and_every_use_belongs_to_its_own(depth: int, name: str) -> None:
    plan = variants(depth, PROTOCOLS[name])
    assert len({variant.schedule.fingerprint for variant in plan}) == len(plan)
    assert len({variant.recipe for variant in plan}) == len(plan)
    uses = [use for variant in plan for use in variant.uses]
    assert len(set(uses)) == len(uses)
    assert plan[0].schedule == moves.identity(depth) and plan[0].uses[0] == Use("full")
    for variant in plan:
        variant.schedule.check(depth)
        for use in variant.uses:
            assert rebuilt(depth, use) == variant.schedule.fingerprint
        assert variant.recipe == Recipe("any name", variant.schedule).fingerprint


def rebuilt(depth: int, use: Use) -> str:
    if use.method == "full":
        return moves.identity(depth).fingerprint
    if use.method in ("skip_one", "swap"):
        build = moves.skip_one if use.method == "skip_one" else moves.swap_adjacent
        assert use.parameter is not None
        return build(depth, use.parameter).fingerprint
    assert use.start is not None and use.affected == moves.affected(depth, use.start)
    more = () if use.parameter is None else (use.parameter,)
    return moves.METHODS[use.method].build(depth, use.start, *more).fingerprint


def test_one_schedule_serves_all_its_uses() -> None:
    plan = {use: variant for variant in variants(32, PROTOCOLS["paper"]) for use in variant.uses}
    full = plan[Use("full")]
    assert plan[Use("parallel", 15, 1)] is plan[Use("reverse", 15, 1)] is plan[Use("middle_repeat", 15, 1)] is full
    assert all(plan[Use("random_order", 15, 1, seed)] is full for seed in range(10))
    assert plan[Use("skip", 15, 1)] is plan[Use("skip_one", None, 1, 16)]
    assert plan[Use("looped_parallel", 8, 15, 1)] is plan[Use("parallel", 8, 15)]
    assert plan[Use("looped_parallel", 15, 1, 3)] is plan[Use("block_repeat", 15, 1, 3)]


def test_methods_and_seeds_can_be_chosen() -> None:
    plan = variants(18, PROTOCOLS["quick"], methods=["random_order"], seeds=2)
    uses = [use for variant in plan for use in variant.uses]
    assert {use.method for use in uses} == {"full", "random_order"}
    assert {use.parameter for use in uses if use.method == "random_order"} == {0, 1}
    with pytest.raises(UsageError, match="no method 'revers'; did you mean 'reverse'"):
        variants(18, PROTOCOLS["quick"], methods=["revers"])
    with pytest.raises(UsageError, match="at least 1 seed, not 0"):
        variants(18, PROTOCOLS["quick"], seeds=0)
    with pytest.raises(UsageError, match="no protocol 'fast'; there are quick, standard, paper"):
        painters.protocol("fast")


@pytest.mark.parametrize(("depth", "start", "affected"), [(32, 13, 5), (18, 6, 5), (24, 9, 5), (19, 6, 6), (4, 0, 3)])
def test_states_are_compared_where_the_paper_did(depth: int, start: int, affected: int) -> None:
    assert state_start(depth) == start and moves.affected(depth, start) == affected
    schedules = state_schedules(depth)
    once, looped = painters.cache_schedules(depth, PROTOCOLS["quick"])
    assert once.schedule == moves.parallel(depth, max(0, (depth - 4) // 2)) and once.uses[0].affected in (3, 4)
    assert looped.uses[0].parameter == 3 and once.uses[0].start == (14 if depth == 32 else looped.uses[0].start)
    assert schedules["skip"].calls == depth - affected and schedules["middle_repeat"].calls == depth


def test_spread_and_moderate() -> None:
    for count in range(2, 12):
        chosen = spread(range(9), count)
        assert chosen[0] == 0 and chosen[-1] == 8 and len(set(chosen)) == min(count, 9)
    assert spread(range(9), 6) == (0, 2, 4, 6, 7, 8)
    assert spread(range(9), None) == tuple(range(9)) and spread([], 3) == ()
    assert moderate(18, range(1, 18, 2)) == (3, 5) and moderate(32, range(1, 32, 2)) == (3, 5, 7, 9)
    assert moderate(4, (1, 3)) == (3,) and moderate(2, (1,)) == ()


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_world_like_the_paper_s_gets_the_paper_s_answers(shown: Page) -> None:
    assert {answer.key: answer.verdict for answer in shown.answers} == {
        "skip-one": "yes",
        "swap": "yes",
        "edges": "yes",
        "three-groups": "yes",
        "without-artefacts": "yes",
        "all-necessary": "no",
        "same-function": "no",
        "repeat-worse-than-skip": "yes",
        "repeat-drifts": "yes",
        "order-matters": "yes",
        "random-beats-reverse": "yes",
        "order-by-task": "yes",
        "order-itself": "yes",
        "parallel": "no",
        "loops-help": "yes",
        "iterations-by-width": "yes",
        "looped-best": "yes",
        "ranking": "yes",
        "repeats-help": "no",
        "averaged-cache": "unclear",
    }


def test_a_world_without_order_gets_other_answers() -> None:
    found = verdicts(evidence(World(indifferent, n=400)))
    assert found["order-matters"] == "no"
    assert found["same-function"] == found["parallel"] == "yes"
    assert found["order-by-task"] in ("unclear", "no", "yes") and found["iterations-by-width"] == "unclear"
    assert found["all-necessary"] == "no" and found["repeats-help"] in ("no", "unclear")


def test_the_opposite_truth_gets_the_opposite_answer() -> None:
    def upside_down(use: Use, order_sensitive: bool) -> float:
        if use.method in PAPER_ORDER:
            level = 1.0 - LIKE_THE_PAPER[use.method]
            extra = -0.3 if use.method in ("reverse", "random_order") and not order_sensitive else 0.0
            return decay(max(level + extra, 0.02), use)
        return 1.0 if use.method == "full" else 0.2 if use.parameter not in (0, DEPTH - 1) else 0.9

    found = verdicts(evidence(World(upside_down)))
    for key in ("skip-one", "swap", "edges", "repeat-worse-than-skip", "random-beats-reverse", "order-by-task"):
        assert found[key] == "no", key
    for key in ("order-itself", "loops-help", "looped-best", "ranking"):
        assert found[key] == "no", key


def test_with_few_examples_most_answers_are_unclear() -> None:
    found = verdicts(evidence(World(lambda use, kind: 1.0 if use.method == "full" else 0.8, n=12)))
    assert found["skip-one"] == found["parallel"] == found["random-beats-reverse"] == found["ranking"] == "unclear"


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    """Reverse and random order are equally good, and no task needs order: 5 % of the worlds may say otherwise."""
    plan = variants(DEPTH, SMALL, methods=["reverse", "random_order"])
    alarms = 0
    for seed in range(20):
        found = evidence(World(lambda use, kind: 1.0 if use.method == "full" else 0.7, n=60), plan, seed=seed)
        results = verdicts(found)
        alarms += (results["random-beats-reverse"] != "unclear") + (results["order-by-task"] != "unclear")
    assert alarms <= 7  # of 40; two are expected


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────


def test_normalised_scores_of_the_table_are_those_of_the_definition(paperlike: Evidence) -> None:
    cell = Cell("reverse", 3, 5)
    table = Table.of(paperlike, paperlike.usable, [cell])
    variant = paperlike.cells[cell][0]
    for row, task in enumerate(paperlike.usable):
        full, mine = paperlike.metric(paperlike.full, task), paperlike.metric(variant, task)
        assert full is not None and mine is not None and task.chance is not None
        assert table.values[row, 0] == pytest.approx((mine - task.chance) / (full - task.chance))
    own = Table.of(paperlike, paperlike.usable, [Cell("full", None, 0)])
    assert own.values == pytest.approx(1) and own.draws == pytest.approx(1)


def test_simultaneous_intervals_are_wider(paperlike: Evidence) -> None:
    table = Reading(paperlike).layers
    one, all_at_once = table.estimates(middle_of_tasks), table.simultaneous(middle_of_tasks)
    width = np.mean([each.high - each.low for each in one if each.high is not None and each.low is not None])
    wider = np.mean([each.high - each.low for each in all_at_once if each.high is not None and each.low is not None])
    assert wider > width


def test_random_order_has_all_its_seeds(paperlike: Evidence) -> None:
    assert len(paperlike.cells[Cell("random_order", 1, 9)]) == 3


def test_the_line_through_the_best_iterations(paperlike: Evidence) -> None:
    loops = Loops.of(Reading(paperlike))
    assert loops is not None and loops.widths == (5, 7, 9, 11) and loops.slope is not None
    assert dict(zip(loops.clear, loops.best, strict=True))[5] in (2, 3)
    assert 0.2 < loops.slope.value < 1.0


# ── gaps ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_at_chance_is_undefined_and_named(paperlike: Evidence) -> None:
    results = dict(paperlike.results)
    lost = paperlike.tasks[1]
    for variant in PLAN:
        scores = [1.0, 0.0, 0.0, 0.0] * (lost.n // 4) + [0.0, 0.0]
        results[variant.recipe, lost.name] = result(variant.recipe, lost.name, list(scores), 0.25, True)
    found = replace(paperlike, results=results)
    assert lost not in found.usable
    shown = page(found)
    assert any("reasoning: the full model (0.25) is not clearly above guessing (0.25)" in note for note in shown.notes)
    drawn = {figure.key: figure for figure in shown.figures}
    assert "reasoning" not in {row["panel"] for row in drawn["methods"].rows}
    assert {"panel": "arithmetic and reasoning", "label": "reasoning", "value": None} in drawn["order"].rows
    assert {answer.key: answer.verdict for answer in shown.answers}["order-by-task"] == "yes"


def test_scores_that_are_not_finite_are_gaps_and_named(paperlike: Evidence) -> None:
    variant = paperlike.cells[Cell("reverse", 3, 5)][0]
    task = paperlike.tasks[0]
    old = paperlike.results[variant.recipe, task.name]
    broken = result(variant.recipe, task.name, [None, *old.scores["acc,none"][1:]], 0.1, True, nonfinite=1)
    found = replace(paperlike, results={**paperlike.results, (variant.recipe, task.name): broken})
    shown = page(found)
    assert any("not every score is finite under 1 recipe" in note and "N = 3" in note for note in shown.notes)
    drawn = {figure.key: figure for figure in shown.figures}
    gaps = [row for row in drawn["summary"].rows if row["y"] is None]
    assert [(row["series"], row["x"]) for row in gaps] == [("Reverse", 5)]
    for figure in shown.figures:
        assert all(not (isinstance(v, float) and not math.isfinite(v)) for row in figure.rows for v in row.values())


def test_an_interrupted_study_says_what_is_missing(paperlike: Evidence) -> None:
    kept = {key: value for place, (key, value) in enumerate(paperlike.results.items()) if place < len(PLAN) * 2.5}
    found = replace(paperlike, results=kept, similarity={}, groups={})
    shown = page(found)
    assert found.complete == paperlike.tasks[:2] and len(found.usable) == 3
    assert any(note.startswith("The study is not complete: ") for note in shown.notes)
    assert any(
        "similarity of states was not measured for: full, skip and middle repeat" in note for note in shown.notes
    )
    answers = {answer.key: answer for answer in shown.answers}
    assert answers["three-groups"].effect == "Not measured: this needs the similarity of the full model's states."
    assert answers["order-by-task"].verdict == "unclear"  # both finished tasks are of one kind
    assert answers["skip-one"].verdict == "yes"


def test_scores_at_chance_are_not_said_to_be_unmeasured(paperlike: Evidence) -> None:
    hard = tuple(replace(task, chance=1.0) for task in paperlike.tasks)
    answers = {answer.key: answer for answer in page(replace(paperlike, tasks=hard, similarity={})).answers}
    told = "No answer: on no task that was asked is the full model clearly above guessing."
    assert (answers["parallel"].verdict, answers["parallel"].effect) == ("unclear", told)
    assert answers["three-groups"].effect == "Not measured: this needs the similarity of the full model's states."


def test_nothing_measured_still_makes_a_page() -> None:
    empty = Evidence(DEPTH, SMALL, PLAN, (), {})
    shown = page(empty)
    assert {answer.verdict for answer in shown.answers} == {"unclear"} and len(shown.answers) == len(QUESTIONS)
    assert "No task was measured." in shown.notes and not shown.figures
    assert "<html" in report.render(shown)


def test_only_the_full_model_measured(paperlike: Evidence) -> None:
    full = paperlike.full.recipe
    found = replace(paperlike, results={key: one for key, one in paperlike.results.items() if key[0] == full})
    assert set(verdicts(replace(found, similarity={}, groups={})).values()) == {"unclear"}


def test_results_of_another_protocol_are_strangers(paperlike: Evidence) -> None:
    variant, task = PLAN[5], paperlike.tasks[0]
    other = replace(paperlike.results[variant.recipe, task.name], protocol="another")
    found = replace(paperlike, results={**paperlike.results, (variant.recipe, task.name): other})
    assert found.result(variant, task) is None
    assert any("1 results belong to another version" in note for note in page(found).notes)


def test_a_task_without_a_level_of_guessing_has_curves_but_no_part_in_answers(paperlike: Evidence) -> None:
    perplexity = replace(paperlike.tasks[3], chance=None, majority=None, higher_is_better=False)
    found = replace(paperlike, tasks=(*paperlike.tasks[:3], perplexity))
    assert perplexity not in found.usable
    shown = page(found)
    assert any("has no level of guessing" in note for note in shown.notes)
    layers = next(figure for figure in shown.figures if figure.key == "layers")
    assert perplexity.title in {row["panel"] for row in layers.rows}


# ── states and caches ────────────────────────────────────────────────────────────────────────────────────────


def test_a_middle_that_is_an_artefact_does_not_survive(paperlike: Evidence) -> None:
    assert verdicts(with_states(paperlike, honest=0.0))["without-artefacts"] == "no"
    alone = replace(paperlike, groups={"paper": {**GROUPS, "middle": [], "beginning": list(range(13)), "end": []}})
    found = verdicts(alone)
    assert found["three-groups"] == "no" and found["without-artefacts"] == "unclear"


def test_averaged_caches(paperlike: Evidence) -> None:
    def row(same: int, n: int, affected: int = 5) -> Cached:
        return Cached(
            "parallel", 3, affected, "t", (True,) * n, (True,) * same + (False,) * (n - same), mean_first=(3,)
        )

    def found(*rows: Cached) -> Found | None:
        return averaged_cache(Reading(replace(paperlike, kv=rows)))

    for rows, verdict in ((row(0, 12), "yes"), (row(12, 12), "unclear"), (row(150, 150), "no")):
        said_so = found(rows)
        assert said_so is not None and said_so.verdict == verdict
    assert found(row(12, 12, affected=1)) is None
    both = found(row(0, 12), row(6, 12, affected=7))
    assert both is not None and "The first other token is number 4 in the median." in both.effect


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_answer_is_complete(shown: Page) -> None:
    keys = {figure.key for figure in shown.figures}
    assert len({answer.key for answer in shown.answers}) == len(QUESTIONS) >= 18
    assert [question.key for question in QUESTIONS] == list(FOUND)
    for answer in shown.answers:
        assert answer.question.endswith("?") and answer.effect.endswith(".") and answer.paper.endswith(".")
        assert answer.rule.endswith(".") and (answer.figure is None or answer.figure in keys)
        assert "nan" not in answer.effect and "None" not in answer.effect
        if answer.estimate is not None:
            assert math.isfinite(answer.estimate.value) and answer.unit


def test_every_recipe_stands_in_the_table_with_its_schedule(shown: Page) -> None:
    tables = dict(shown.tables)
    assert len(tables["Recipes"]) == len(PLAN)
    assert {row["schedule"] for row in tables["Recipes"]} == {str(variant.schedule) for variant in PLAN}
    assert [row["task"] for row in tables["Tasks"]] == ["arithmetic", "reasoning", "knowledge", "lambada"]


def test_a_line_for_every_answer(shown: Page) -> None:
    lines = summary_lines(shown)
    assert len(lines) == len(shown.answers)
    assert lines[0].startswith("yes      Can one middle layer be left out at little cost?  0.9")


def test_the_page_is_drawn(paperlike: Evidence) -> None:
    row = Cached("parallel", 3, 5, "t", (True,) * 8, (False,) * 8, (None,) * 8, (2,) * 8, (1.0,) * 8, (0.0,) * 8)
    found = page(replace(paperlike, kv=(row,), tasks=paperlike.tasks[1:3]))
    assert {figure.key for figure in found.figures} == {question.figure for question in QUESTIONS} | {
        "methods",
        "scores",
    }
    text = report.render(found)
    for question in QUESTIONS:
        assert question.text.split("'")[0] in text


def test_figures_of_any_depth_have_finite_numbers() -> None:
    for depth in (2, 3, 5):
        plan = variants(depth, SMALL)
        found = replace(evidence(World(indifferent, n=40), plan), depth=depth)
        for figure in figures(Reading(found)):
            for row in figure.rows:
                assert all(not isinstance(v, float) or math.isfinite(v) for v in row.values())
        assert len(page(found).answers) == len(QUESTIONS)


def test_numbers_and_lists_in_sentences() -> None:
    assert (
        said(-0.125) == "\u22120.12"
        and said(-0.001) == "\u22120.001"
        and said(-1e-17) == "0.00"
        and said(2.0, 1) == "2.0"
    )
    assert listed([]) == "" and listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["x"] * 10, 2) == "x, x and 8 more"
    assert set(METHODS) >= set(PAPER_ORDER)
