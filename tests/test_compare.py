"""Several studies on one page: on evidence with a known truth, the comparison says it, and names what it leaves out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import report
from impasto.errors import StoreError, UsageError
from impasto.recipe import Recipe
from impasto.result import Answer, Estimate, Page, Result, Setting
from impasto.store import Store
from impasto.studies import painters
from impasto.studies.alike import ALIKE, _spearman, _tau, difference
from impasto.studies.claims import QUESTIONS
from impasto.studies.compare import QUESTION_BY_QUESTION, compare, comparison
from impasto.studies.evidence import Evidence, Task
from impasto.studies.kept import Asked, study_of
from impasto.studies.protocol import METHODS, PROTOCOLS, Heat, Protocol, Use, variants
from impasto.studies.reading import PAPER_ORDER
from impasto.studies.sides import Curve, Number, Side, on_one_grid

SMALL = replace(
    PROTOCOLS["standard"],
    name="small",
    starts=None,
    seeds=2,
    repeat_starts=1,
    heat=Heat(widths=1, iterations=(1, 2)),
    tasks=("arithmetic", "knowledge", "lambada"),
)
BARE = replace(SMALL, methods=("skip",))
CHANCES = {"arithmetic": 0.1, "knowledge": 0.2, "lambada": 0.0}
Truth = Callable[[float, Use], float]
Pair = tuple[Evidence, Evidence]


def by_share(share: float, use: Use) -> float:
    """A model that loses by the share of layers that are changed, whatever its depth; the methods differ a little."""
    steep = 1.2 + 0.25 * PAPER_ORDER[::-1].index(use.method) if use.method in PAPER_ORDER else 1.5
    return max(0.0, 1 - steep * share)


def robust(share: float, use: Use) -> float:
    """A model that bears everything."""
    return 1.0 - 0.1 * share


def study(depth: int, truth: Truth, name: str, *, n: int = 150, protocol: Protocol = SMALL, **asked: Any) -> Evidence:
    """Right and wrong answers: a document is right when its difficulty is below the recipe's accuracy."""
    plan = variants(depth, protocol)
    rng = np.random.default_rng(depth)
    results = {}
    for task in protocol.tasks:
        difficulty = (np.arange(n) + 0.5) / n
        for variant in plan:
            use = variant.uses[0]
            kept = 1.0 if use.method == "full" else truth(use.affected / depth, use)
            accuracy = CHANCES[task] + kept * (0.9 - CHANCES[task])
            right = (difficulty + rng.normal(0, 0.005, n) < accuracy).astype(float)
            results[variant.recipe, task] = result(variant.recipe, task, right.tolist(), **asked)
    tasks = tuple(Task.of(results[plan[0].recipe, task]) for task in protocol.tasks)
    return Evidence(depth, protocol, plan, tasks, results, facts={"model": name, "computed in": "float32 on cpu"})


def result(recipe: str, task: str, scores: list[float], **asked: Any) -> Result:
    info = {"version": "1", "shots": 0, "chance": CHANCES[task], "metric": "acc,none", "higher_is_better": True}
    info["order_sensitive"] = task == "arithmetic"
    metrics = {"acc,none": sum(scores) / len(scores)}
    return Result(recipe, task, "p", len(scores), metrics, {"acc,none": tuple(scores)}, info={**info, **asked})


@pytest.fixture(scope="module")
def small() -> Evidence:
    return study(8, by_share, "small")


@pytest.fixture(scope="module")
def large() -> Evidence:
    return study(12, by_share, "large")


@pytest.fixture(scope="module")
def tough() -> Evidence:
    return study(8, robust, "tough")


@pytest.fixture(scope="module")
def bare() -> Pair:
    """Studies of one method only, which are read in no time."""
    return study(8, by_share, "small", protocol=BARE), study(14, by_share, "large", protocol=BARE)


@pytest.fixture(scope="module")
def alike(small: Evidence, large: Evidence) -> Page:
    return comparison([small, large], ["runs/a", "runs/b c"])


def card(page: Page, key: str) -> Answer:
    return next(answer for answer in page.answers if answer.key == key)


def rows(page: Page, key: str) -> Sequence[Any]:
    return next(figure for figure in page.figures if figure.key == key).rows


def table(page: Page) -> Sequence[Any]:
    return dict(page.tables)[QUESTION_BY_QUESTION]


def without(evidence: Evidence, *tasks: str) -> Evidence:
    return replace(evidence, tasks=tuple(task for task in evidence.tasks if task.name not in tasks))


# ── what the page says ───────────────────────────────────────────────────────────────────────────────────────


def test_models_that_lose_by_the_share_coincide(alike: Page) -> None:
    answer = card(alike, "same-skip")
    assert answer.verdict == "yes" and answer.estimate is not None
    assert answer.unit == "difference of mean normalised score, small minus large"
    assert answer.estimate.low is not None and -ALIKE < answer.estimate.low < answer.estimate.high < ALIKE
    assert "On average over shares from 0 to 88 % of the layers small keeps 0." in answer.effect


def test_a_model_that_bears_more_does_not(bare: Pair, small: Evidence, tough: Evidence) -> None:
    rough = study(12, robust, "rough", protocol=BARE)
    there, back = (card(comparison(pair), "same-skip") for pair in ([bare[0], rough], [rough, bare[0]]))
    assert there.verdict == back.verdict == "no"
    assert there.estimate is not None and back.estimate is not None
    assert there.estimate.value == pytest.approx(-back.estimate.value, abs=1e-12) and there.estimate.value < -0.3
    page = comparison([small, tough])
    assert card(page, "same-answers").verdict == "no"
    assert "yes for tough, no for small: " in card(page, "same-answers").effect
    assert "larger in tough than in small: " in card(page, "same-answers").effect


def test_methods_rank_alike_where_the_truth_does(alike: Page) -> None:
    answer = card(alike, "same-ranks")
    assert answer.verdict == "yes"
    order = "middle repeat, skip, parallel, reverse, random order, looped parallel (k = 3)"
    assert answer.effect.startswith("From most to least harmful, small: ") and f"large: {order}." in answer.effect


def test_the_answers_are_those_of_the_models_own_pages(alike: Page, small: Evidence, large: Evidence) -> None:
    shown = table(alike)
    own = {
        name: {a.question: a for a in painters.page(one).answers} for name, one in (("small", small), ("large", large))
    }
    assert [list(row) for row in shown] == [["Question", "small", "large", "Together", "The paper found"]] * len(shown)
    for row in shown:
        question = row["Question"].split("\n")[0]
        for name in ("small", "large"):
            mine = own[name][question]
            assert (row[name].verdict, row[name].estimate, row[name].effect) == (
                mine.verdict,
                mine.estimate,
                mine.effect,
            )
        assert row["The paper found"] == own["small"][question].paper


def test_questions_that_one_run_cannot_answer_are_named(alike: Page) -> None:
    shown = {row["Question"].split("\n")[0] for row in table(alike)}
    note = next(note for note in alike.notes if note.startswith("Left out, since fewer than two runs can answer: "))
    assert {question.text for question in QUESTIONS if question.text in note} == {q.text for q in QUESTIONS} - shown
    assert "Do the hidden states fall into a beginning, a middle and an end?" in note  # no states were measured


def test_places_are_shares_of_the_model(alike: Page, small: Evidence) -> None:
    skip = [row for row in rows(alike, "skip-share") if row["series"] == "small"]
    assert [(row["x"], row["layers"]) for row in skip] == [(100 * m / 8, m) for m in (0, 1, 3, 5, 7)]
    assert [skip[0][end] for end in ("y", "low", "high")] == [1.0, 1.0, 1.0]
    assert all(row["low"] <= row["y"] <= row["high"] for row in skip)
    titles = {row["panel"] for row in rows(alike, "methods-share")}
    assert titles == {*map(METHODS.get, PAPER_ORDER[:-1]), "Looped parallel (k = 3)"}
    one = [row["x"] for row in rows(alike, "single-layers") if row["panel"] == METHODS["skip_one"]]
    assert (min(one), max(one)) == (0.0, 1.0)
    swaps = [r["x"] for r in rows(alike, "single-layers") if r["panel"] == METHODS["swap"] and r["series"] == "small"]
    assert swaps == [pytest.approx((layer + 0.5) / 7) for layer in range(7)]


def test_curves_are_those_of_the_own_page(alike: Page, small: Evidence) -> None:
    own = next(figure for figure in painters.page(small).figures if figure.key == "summary").rows
    theirs = {(row["series"], row["x"]): row for row in own}
    for row in rows(alike, "methods-share"):
        if row["series"] == "small" and row["layers"]:
            mine = theirs[row["panel"], row["layers"]]
            assert [row[end] for end in ("y", "low", "high")] == pytest.approx([mine[e] for e in ("y", "low", "high")])


def test_what_was_not_measured_is_a_gap(bare: Pair) -> None:
    small, large = bare
    gone = next(variant for variant in large.variants if Use("skip", 4, 5) in variant.uses)
    kept = {key: one for key, one in large.results.items() if key[0] != gone.recipe}
    page = comparison([small, replace(large, results=kept)])
    gaps = {row["layers"] for row in rows(page, "skip-share") if row["y"] is None}
    assert gaps == {5} and card(page, "same-skip").verdict == "yes"
    assert "The study of large is not complete: 3 results on the common tasks are missing." in page.notes


def test_three_models(small: Evidence, large: Evidence, tough: Evidence) -> None:
    page = comparison([small, large, tough])
    assert page.subtitle == "small, large and tough, 3 tasks in common"
    answer = card(page, "same-skip")
    assert answer.verdict == "no" and answer.unit.endswith(("small minus tough", "large minus tough"))
    assert card(page, "same-ranks").unit == "Kendall's tau (mean over pairs of models)"
    assert any("tough is higher than " in row["Together"] for row in table(page))


def test_the_page_is_drawn_and_every_name_escaped(bare: Pair) -> None:
    text = report.render(comparison([replace(bare[0], facts={"model": "<script>alert(1)</script>"}), bare[1]]))
    assert text.index("Question by question") < text.index("The size of every answer")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_figures_are_whole_and_say_where_they_come_from(alike: Page) -> None:
    assert [figure.key for figure in alike.figures] == [
        "effects",
        "skip-share",
        "methods-share",
        "prices",
        "single-layers",
        "scores",
    ]
    keys = {figure.key for figure in alike.figures}
    assert {answer.figure for answer in alike.answers} <= keys
    assert alike.facts["command"] == "impasto report runs/a 'runs/b c'"
    for figure in alike.figures:
        assert all(not isinstance(v, float) or math.isfinite(v) for row in figure.rows for v in row.values())


# ── what is common ───────────────────────────────────────────────────────────────────────────────────────────


def test_only_common_tasks_count(bare: Pair) -> None:
    small, large = bare
    other = study(14, by_share, "large", protocol=BARE, shots=5)
    mixed = {key: other.results[key] if key[1] == "lambada" else one for key, one in large.results.items()}
    page = comparison([without(small, "knowledge"), replace(large, results=mixed)])
    assert page.subtitle == "small and large, 1 task in common"
    assert page.notes[0] == (
        "Tasks left out: LAMBADA (asked in different ways: version, shots or metric); knowledge (not measured for "
        "small)."
    ).replace("LAMBADA", "lambada")
    assert {row["label"] for row in rows(page, "scores")} == {"arithmetic"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"chance": 0.9}, "large not clearly above guessing"),
        ({"chance": None}, "no level of guessing, so no normalised score"),
        ({"higher_is_better": False}, "asked in different ways: version, shots or metric"),
    ],
)
def test_a_task_that_cannot_be_normalised_is_left_out(bare: Pair, broken: dict[str, Any], reason: str) -> None:
    small, large = bare
    tasks = tuple(replace(task, **broken) if task.name == "lambada" else task for task in large.tasks)
    assert f"Tasks left out: lambada ({reason})." in comparison([small, replace(large, tasks=tasks)]).notes


def test_a_run_that_is_half_finished_counts_with_what_is_finished(bare: Pair) -> None:
    small, large = bare
    kept = {key: one for key, one in large.results.items() if key[1] != "lambada" or key[0] == large.full.recipe}
    page = comparison([small, replace(large, results=kept)])
    assert "Tasks left out: lambada (not finished for large)." in page.notes
    assert card(page, "same-skip").verdict == "yes"


def test_nothing_in_common_is_an_error(bare: Pair) -> None:
    small, large = bare
    with pytest.raises(UsageError) as error:
        comparison([without(small, "lambada"), without(large, "arithmetic", "knowledge")])
    assert str(error.value) == (
        "nothing to compare: small and large have no task in common that all models do clearly better than guessing: "
        "arithmetic and knowledge (not measured for large); lambada (not measured for small). Run them on the same "
        "--tasks"
    )
    with pytest.raises(UsageError, match="none of these runs has measured a task yet"):
        comparison([replace(small, tasks=()), replace(large, tasks=())])
    with pytest.raises(UsageError, match="a comparison needs at least two runs"):
        comparison([small])


def test_another_number_of_iterations_is_another_method() -> None:
    looped = replace(BARE, methods=("looped_parallel", "skip"))
    runs = [study(8, by_share, str(k), n=60, protocol=replace(looped, iterations=k)) for k in (3, 4)]
    page = comparison(runs)
    left_out = "Left out, since only one run measured it: Looped parallel (k = 3) and Looped parallel (k = 4)."
    assert left_out in page.notes
    assert {row["panel"] for row in rows(page, "methods-share")} == {"Skip"}


def test_other_examples_and_protocols_are_named(bare: Pair) -> None:
    page = comparison([bare[0], study(8, by_share, "small", n=100, protocol=replace(BARE, name="short"))])
    assert page.subtitle.startswith("small (small) and small (short), ")
    assert any("arithmetic 150 and 100" in note for note in page.notes)
    assert any("different protocols (small (small) small and small (short) short)" in note for note in page.notes)


def test_runs_of_one_name_are_told_apart(bare: Pair) -> None:
    small = bare[0]
    half = replace(small, facts={**small.facts, "computed in": "bfloat16 on cpu"})
    assert comparison([small, half]).subtitle.startswith("small (float32) and small (bfloat16), ")
    assert comparison([small, small], ["x/a", "x/b"]).subtitle.startswith("small (a) and small (b), ")
    assert comparison([small, small]).subtitle.startswith("small (run), run 1 and small (run), run 2, ")
    file = replace(small, facts={"model": "other.gguf"})
    assert comparison([file, half]).subtitle.startswith("other and small, ")


def test_a_model_against_itself_is_the_same(bare: Pair) -> None:
    page = comparison([bare[0], bare[0]], ["a", "b"])
    assert card(page, "same-skip").verdict == "yes" and card(page, "same-answers").verdict != "no"
    assert all(row["Together"].endswith("sizes not clearly apart.") for row in table(page))


# ── from run folders ─────────────────────────────────────────────────────────────────────────────────────────


def keep(evidence: Evidence, folder: Path) -> Path:
    """The run folder that a study with this evidence would have left."""
    setting = Setting(evidence.facts["model"], evidence.facts["model"], "float32", "cpu")
    tasks = tuple((task.name, "p") for task in evidence.tasks)
    with Store(folder) as store:
        store.put_recipes(Recipe("", variant.schedule) for variant in evidence.variants)
        for one in evidence.results.values():
            store.put_result(setting, one)
        Asked(evidence.depth, "standard", None, None, tasks, "made up", evidence.protocol).write(store, setting)
    return folder


def test_folders_and_stores_give_the_page_of_their_evidence(bare: Pair, tmp_path: Path) -> None:
    first, second = (keep(each, tmp_path / name) for each, name in zip(bare, "ab", strict=True))
    page, wanted = compare([first, str(second)]), comparison(bare)
    assert page.subtitle == "small and large, 3 tasks in common"
    assert page.facts["command"] == f"impasto report {first.name} {second.name}"
    assert (page.answers, page.figures) == (wanted.answers, wanted.figures)
    with Store(first, readonly=True) as one, Store(second, readonly=True) as other:
        assert compare([one, other]) == page
    with pytest.raises(UsageError) as error:
        compare([tmp_path / "b" / ".." / "a", second, first])
    assert str(error.value) == f"{tmp_path}/b/../a is given twice: a comparison needs different runs"


def test_a_folder_without_a_study(bare: Pair, tmp_path: Path) -> None:
    with Store(tmp_path / "b") as store:
        store.put_recipes([Recipe("", bare[0].full.schedule)])
    with pytest.raises(StoreError, match="/b holds results, but not of a study"):
        compare([keep(bare[0], tmp_path / "a"), tmp_path / "b"])


def test_a_study_keeps_what_its_protocol_was(bare: Pair, tmp_path: Path) -> None:
    """A finished run stays finished when a later version changes the protocol of that name."""
    with Store(keep(bare[0], tmp_path / "a")) as store:
        assert study_of(store).protocol == BARE
        [kept] = store.measurements(store.settings()[0], "painters study")
    older = {name: value for name, value in kept.value.items() if name != "definition"}
    assert Asked.read(older).chosen() == PROTOCOLS["standard"]
    newer = {**kept.value, "definition": {**kept.value["definition"], "unheard": 1}}
    assert Asked.read(newer).chosen() == PROTOCOLS["standard"]


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────

ESTIMATES = st.tuples(st.floats(-2, 2), st.floats(0, 1), st.floats(0, 1)).map(
    lambda parts: Estimate(parts[0], parts[0] - parts[1], parts[0] + parts[2])
)


@given(ESTIMATES, ESTIMATES, st.integers(1, 10))
@settings(deadline=None)
def test_a_difference_turned_round_changes_its_sign(a: Estimate, b: Estimate, comparisons: int) -> None:
    one, other = difference(a, b, comparisons), difference(b, a, comparisons)
    assert one.value == -other.value and one.low == pytest.approx(-other.high) and one.high == pytest.approx(-other.low)
    narrow = difference(a, b)
    assert one.low <= narrow.low + 1e-12 and narrow.high <= one.high + 1e-12
    assert max(a.value - a.low, b.high - b.value) <= narrow.value - narrow.low + 1e-12


def test_a_difference_without_an_end_has_none() -> None:
    found = difference(Estimate(1.0, None, 2.0), Estimate(0.0, -1.0, 1.0))
    assert found.low is None and found.high == pytest.approx(1 + math.sqrt(2))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8, unique=True), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_curve_is_itself_at_its_own_places_and_straight_between_them(places: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    xs = np.array(sorted(places)) / 50
    curve = Curve(xs, rng.normal(size=len(xs)), rng.normal(size=(5, len(xs))))
    assert np.allclose(curve.at(xs).draws, curve.draws)
    between = np.linspace(xs[0], xs[-1], 7)
    assert np.allclose(curve.at(between).values, np.interp(between, xs, curve.values))
    assert np.allclose(curve.at(between).draws[3], np.interp(between, xs, curve.draws[3]))


def test_curves_are_read_where_all_have_points_and_one_has_the_fewest() -> None:
    def line(*places: float) -> Curve:
        return Curve(np.array(places), 1 - np.array(places), np.tile(1 - np.array(places), (3, 1)))

    fine, coarse = on_one_grid([line(*np.linspace(0, 1, 21)), line(0.0, 0.3, 0.8)])
    assert fine.places.tolist() == coarse.places.tolist() == [0.0, 0.3, 0.8]
    assert fine.mean().value == pytest.approx(coarse.mean().value) == pytest.approx(0.6)
    assert on_one_grid([line(0.0, 0.1), line(0.2, 0.3)]) == []


def test_a_number_of_several_comparisons_has_a_wider_interval() -> None:
    number = Number(0.0, np.random.default_rng(0).normal(size=2000))
    one, many = number.estimate(), number.estimate(10)
    assert many.low < one.low < one.high < many.high
    assert Number(0.0, np.array([-1e9, 0.0, 1e9])).estimate() == Estimate(0.0)


def test_rank_correlations_agree_with_the_slow_ones() -> None:
    from scipy import stats

    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (6, 9)).astype(float), rng.normal(size=(6, 9))
    assert np.allclose(_spearman(a, b), [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert _spearman(np.ones((1, 4)), np.arange(4.0)[None]).tolist() == [0.0]
    judges = [list(row) for row in rng.normal(size=(3, 5))]
    wanted = np.mean([stats.kendalltau(x, y).statistic for x, y in itertools.combinations(judges, 2)])
    assert float(_tau([[np.array(v) for v in judge] for judge in judges])) == pytest.approx(wanted)


def test_draws_of_two_models_do_not_go_together(small: Evidence) -> None:
    one, other = Side("a", 0, small), Side("b", 1, small)
    first, second = one.methods["Skip"].draws[:, 2], other.methods["Skip"].draws[:, 2]
    assert sorted(first) == sorted(second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_no_model_code_is_imported() -> None:
    import subprocess
    import sys

    program = "import sys, impasto.studies.compare; print({'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
