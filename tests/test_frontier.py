"""Laws of the frontier: who is beaten by nobody, what is chosen, how sure scores are, numbers that keep apart."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import frontier, plots
from impasto.errors import UsageError
from impasto.frontier import FULL, METHODS, Choice, Point, Sheet, choices, front, mean_normalised, method, pareto
from impasto.plots.frontier import INDENT, listed, numbered, placed
from impasto.plots.labels import LETTER, Box, Plane
from impasto.recipe import Recipe
from impasto.result import Estimate, Result, Setting
from impasto.store import Store
from impasto.timings import Bench, Case, Round, Timing

LAYERS = 12
CASE = Case(1, 128, 4)
SETTING = Setting("m", "w", "bfloat16", "cuda")
numbers = st.integers(0, 9).map(lambda n: n / 10)  # few values, so that ties are common
clouds = st.lists(st.tuples(numbers, numbers), max_size=30)


# ── the front ────────────────────────────────────────────────────────────────────────────────────────────────────


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] >= b[1]


@given(clouds)
def test_the_front_is_what_nobody_beats(cloud: list[tuple[float, float]]) -> None:
    assert pareto(cloud) == tuple(not any(beats(other, point) for other in cloud) for point in cloud)


@given(clouds, st.randoms())
def test_the_front_does_not_depend_on_the_order(cloud: list[tuple[float, float]], chance: random.Random) -> None:
    order = list(range(len(cloud)))
    chance.shuffle(order)
    whole = pareto(cloud)
    assert pareto([cloud[i] for i in order]) == tuple(whole[i] for i in order)


@given(clouds)
def test_the_front_is_its_own_front_and_rises(cloud: list[tuple[float, float]]) -> None:
    best = sorted({point for point, is_best in zip(cloud, pareto(cloud), strict=True) if is_best})
    assert all(pareto(best)) and bool(best) == bool(cloud)
    assert [worth for _, worth in best] == sorted({worth for _, worth in best})


@given(clouds, st.tuples(numbers, numbers))
def test_a_new_point_only_takes_others_off_the_front(
    cloud: list[tuple[float, float]], new: tuple[float, float]
) -> None:
    before, after = pareto(cloud), pareto([*cloud, new])[:-1]
    assert all(was or not is_now for was, is_now in zip(before, after, strict=True))


def point(x: float, y: float, name: str = "a", high: float | None = None) -> Point:
    return Point(name, name, "skip", Estimate(x, None if high is None else x, high), Estimate(y))


@given(clouds, st.sampled_from([0.1, 0.2, 0.3, 0.5]))
def test_what_is_chosen_is_fast_enough_and_nobody_as_fast_is_better(
    cloud: list[tuple[float, float]], saving: float
) -> None:
    points = [point(x, y, str(i)) for i, (x, y) in enumerate(cloud)]
    (choice,) = choices(points, [saving])
    fast = [one for one in points if one.latency.value <= 1 - saving]
    assert (choice.point is None) == (not fast)
    if choice.point is not None:
        assert choice.point in fast and front(points)[points.index(choice.point)]
        assert choice.point.accuracy.value == max(one.accuracy.value for one in fast)


def test_only_what_is_surely_fast_enough_is_chosen() -> None:
    doubtful, sure = point(0.79, 0.9, "doubtful", high=0.81), point(0.75, 0.8, "sure", high=0.76)
    assert choices([doubtful, sure], [0.2, 0.3]) == (Choice(0.2, sure), Choice(0.3, None))
    assert choices([doubtful, sure], [0.1]) == (Choice(0.1, doubtful),)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

answers = st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=20).filter(lambda row: sum(row) > 1)


@given(answers, answers)
def test_the_untouched_model_is_one_and_guessing_is_nothing(a: list[float], b: list[float]) -> None:
    sheets = [
        Sheet(name, tuple(row), {"full": tuple(row), "zero": (0.0,) * len(row), "none": (None,) * len(row)})
        for name, row in (("a", a), ("b", b))
    ]
    found = mean_normalised(sheets, n=50)
    assert found["full"].value == pytest.approx(1.0) and found["zero"].value == found["none"].value == 0.0
    assert found["zero"] == Estimate(0.0, 0.0, 0.0)


def test_scores_are_means_over_tasks_of_shares_above_chance() -> None:
    sheets = [
        Sheet("a", (1.0, 1.0, 1.0, 1.0), {"r": (1.0, 1.0, 1.0, 0.0)}, chance=0.5),
        Sheet("b", (1.0, 0.0, 1.0, 0.0), {"r": (1.0, 0.0, 0.0, 0.0), "other": (1.0,) * 4}),
    ]
    found = mean_normalised(sheets)
    assert set(found) == {"r"} and found["r"].value == pytest.approx((0.5 + 0.5) / 2)
    assert mean_normalised([]) == {}


def test_intervals_of_scores_cover_the_truth_as_often_as_they_say() -> None:
    chance, hits, trials = random.Random(3), 0, 300
    for trial in range(trials):
        full = tuple(float(chance.random() < 0.8) for _ in range(120))
        row = tuple(float(one and chance.random() < 0.75) for one in full)  # three in four of what the full one knows
        found = mean_normalised([Sheet("a", full, {"r": row})], n=400, seed=trial)["r"]
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.75 <= found.high
    assert 0.91 < hits / trials < 0.985


# ── from a bench and a store ─────────────────────────────────────────────────────────────────────────────────────

FULL_RECIPE = Recipe.of("m", layers=LAYERS)
SKIP = Recipe.of("m", "0:4 8:12", layers=LAYERS)
PAIRS = Recipe.of("m", "0:4 {4,5} {6,7} 8:12", layers=LAYERS)


def bench() -> Bench:
    rows = [(FULL_RECIPE, 10.0), (SKIP, 7.0), (PAIRS, 8.0)]
    return Bench(
        SETTING,
        tuple(recipe for recipe, _ in rows),
        tuple(
            Timing(recipe.fingerprint, "fast", CASE, tuple(Round(i, (50.0,), (ms * (1 + i / 9),)) for i in range(3)))
            for recipe, ms in rows
        ),
    )


def stored(folder: Path, *, weights: str = "w", without: str = "", tasks: Any = None) -> Store:
    store = Store(folder)
    setting = Setting("m", weights, "bfloat16", "cuda")
    store.put_recipes([FULL_RECIPE, SKIP, PAIRS])
    rows = {FULL_RECIPE: [1.0] * 18 + [0.0] * 2, SKIP: [1.0] * 9 + [0.0] * 11, PAIRS: [1.0] * 12 + [0.0] * 8}
    for task, options in (tasks or {"easy": {}, "hard": {}}).items():
        for recipe, scores in rows.items():
            if recipe.fingerprint != without and recipe.fingerprint not in options.get("lacks", ()):
                info = {
                    "metric": "acc,none",
                    "higher_is_better": options.get("up", True),
                    "chance": options.get("c", 0),
                }
                values = tuple(options.get("all", 1.0) * one for one in scores)
                store.put_result(
                    setting,
                    Result(recipe.fingerprint, task, "p", 20, {"acc,none": 0.5}, {"acc,none": values}, info=info),
                )
    return store


def test_latencies_and_scores_meet(tmp_path: Path) -> None:
    with stored(tmp_path) as store:
        found = frontier.accuracies(store, bench())
    assert found.tasks == {"easy": 20, "hard": 20} and found.left_out == {}
    points = frontier.joined(bench(), CASE, found.scores)
    assert [(one.label, one.method) for one in points] == [
        (FULL, FULL),
        ("0:4 8:12", "skip"),
        ("0:4 {4 5} {6 7} 8:12", "pairs"),
    ]
    assert [one.latency.value for one in points] == pytest.approx([1.0, 0.7, 0.8])
    assert [one.accuracy.value for one in points] == pytest.approx([1.0, 0.5, 2 / 3])
    assert str(points[1]).startswith("0:4 8:12: 0.700 [0.700, 0.700] of the time, score 0.500 [")
    assert frontier.joined(bench(), CASE, found.scores, part="ttft")[1].latency.value == pytest.approx(1.0)
    assert frontier.joined(bench(), Case(2, 128, 4), found.scores) == ()


def test_tasks_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    tasks = {
        "good": {},
        "perplexity": {"up": False},
        "guessed": {"c": 0.9},
        "partly": {"lacks": (SKIP.fingerprint,)},
    }
    with stored(tmp_path, tasks=tasks) as store:
        found = frontier.accuracies(store, bench())
    assert found.tasks == {"good": 20}
    assert found.left_out == {
        "perplexity": "smaller is better in it",
        "guessed": "the untouched model is not clearly above guessing",
        "partly": "1 of 3 recipes have not answered it",
    }


def test_scores_of_other_weights_or_without_the_untouched_model_are_none(tmp_path: Path) -> None:
    with (
        stored(tmp_path / "a", weights="others") as store,
        pytest.raises(UsageError, match="no scores of these weights"),
    ):
        frontier.accuracies(store, bench())
    with stored(tmp_path / "b", without=FULL_RECIPE.fingerprint) as store:
        with pytest.raises(UsageError, match="no scores of the untouched model"):
            frontier.accuracies(store, bench())


@pytest.mark.parametrize(
    ("schedule", "edits", "expected"),
    [
        ("0:4 8:12", [], "skip"),
        ("0:4 {4:8} 8:12", [], "parallel, mean"),
        ("0:4 sum{4:8} 8:12", [], "parallel, sum"),
        ("0:4 {4:8}x2 8:12", [], "looped parallel"),
        ("0:4 {4,5} {6,7} 8:12", [], "pairs"),
        ("0:4 sum{4,5} sum{6,7} 8:12", [], "pairs"),
        ("0:12", ["4:8.mlp.*@0.1"], "rank cut"),
        ("0:4 8:12", ["1.mlp.*@0.1"], "mixture"),
        ("0:4 {4:8} 8:12", ["1.mlp.*@0.1"], "mixture"),
        ("0:2 {4 5} {6 7} 8:12", [], "mixture"),
        ("0:2 {4:8} 8:12", [], "mixture"),
        ("0:4 8:4 8:12", [], "other order"),
        ("0:12 11", [], "other order"),
    ],
)
def test_every_recipe_has_a_method(schedule: str, edits: list[str], expected: str) -> None:
    assert method(Recipe.of("m", schedule, edits, layers=LAYERS)) == expected
    assert expected in METHODS


# ── the figure ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_figure_has_all_numbers_and_draws(tmp_path: Path) -> None:
    points = [
        Point("f", FULL, FULL, Estimate(1.0, 1.0, 1.0), Estimate(1.0, 1.0, 1.0)),
        Point("a", "0:4 8:12", "skip", Estimate(0.7, 0.69, 0.71), Estimate(0.6, 0.5, 0.7)),
        Point("b", "0:12 + 3.mlp.*@0.1", "rank cut", Estimate(0.8), Estimate(0.5)),
    ]
    figure = frontier.figure({"batch 1": points, "batch 32": points[:1]})
    assert [row["frontier"] for row in figure.rows] == [True, True, False, True]
    assert figure.options["series"] == [FULL, "skip", "rank cut"]
    paths = plots.save(figure, tmp_path)
    assert all(path.stat().st_size > 100 for path in paths.values())
    assert paths["csv"].read_text().splitlines()[2] == "batch 1,skip,0:4 8:12,0.7,0.69,0.71,0.6,0.5,0.7,True"
    chart = json.dumps(plots.draw(figure).to_dict())
    for text in ("0:4 8:12", "normalised score, mean over tasks", "time per token, untouched model = 1"):
        assert text in chart


def test_figures_of_times_and_rates() -> None:
    names = {FULL_RECIPE.fingerprint: FULL, SKIP.fingerprint: "A", PAIRS.fingerprint: "B"}
    ratios = frontier.ratios(bench(), names)
    assert [(row["label"], row["value"]) for row in ratios.rows] == [
        ("A", pytest.approx(0.7)),
        ("B", pytest.approx(0.8)),
    ]
    low, high = ratios.options["x_domain"]
    assert low < 0.7 and 1.0 < high < 1.2
    rates = frontier.throughput(bench(), names)
    assert [row["series"] for row in rates.rows] == [FULL, "A", "B"]
    for figure in (ratios, rates):
        plots.draw(figure).to_dict()


plot = st.tuples(st.floats(0, 700), st.floats(0, 300))
PLANE = Plane((0.0, 1.0), (0.0, 1.0), 700, 300)


@settings(max_examples=30, deadline=None)
@given(st.lists(plot, max_size=14))
def test_every_number_stands_near_its_point(cloud: list[tuple[float, float]]) -> None:
    names = placed(range(len(cloud)), cloud, sorted(cloud), [], PLANE)
    assert [name.text for name in names] == [str(i + 1) for i in range(len(cloud))]
    for name, place in zip(names, cloud, strict=True):
        assert math.dist((name.x, name.y), place) < 45


def test_numbers_of_a_front_keep_apart() -> None:
    places = [(40.0 + 60 * i, 280 - 25.0 * i) for i in range(10)]
    boxes = [name.box for name in placed(range(10), places, places, [], PLANE)]
    assert not any(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.overlap(Box(x - 5, y - 5, x + 5, y + 5)) for box in boxes for x, y in places)


@pytest.mark.parametrize(("count", "expected"), [(8, 8), (30, 3)])
def test_the_front_is_numbered_and_the_rest_where_few_are_there(count: int, expected: int) -> None:
    rows = [{"x": float(-i), "y": 0.5, "label": f"r{i}", "frontier": i < 3} for i in range(count)]
    assert numbered(rows) == list(range(expected))[::-1]


texts = st.lists(st.text("0:{} ", min_size=1, max_size=60).map(str.strip).filter(bool), min_size=1, max_size=20)


@given(texts, st.floats(200, 900))
def test_the_list_has_every_text_whole_and_none_on_another(labels: list[str], width: float) -> None:
    entries = listed(labels, width)
    said: list[str] = []
    for entry in entries:
        if entry.number:
            assert entry.number == str(len(said) + 1)
            said.append(entry.text)
        else:
            said[-1] += entry.text
    assert ["".join(text.split()) for text in said] == ["".join(label.split()) for label in labels]
    assert len({(entry.x, entry.y) for entry in entries}) == len(entries)
    for entry in entries:
        assert INDENT + entry.x + LETTER * len(entry.text) <= width + 1e-6
