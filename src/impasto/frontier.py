"""Accuracy against latency: which recipes nothing beats, and which to take for so much less time.

    points = joined(bench, case, accuracies(store, bench))
    for choice in choices(points):
        print(f"{choice.saving:.0%} less time per token: {choice.point}")

Latency is the ratio to the untouched model that `impasto.timings` computes from rounds in which both ran; accuracy is
the mean over tasks of the normalised score, 1 for the untouched model and 0 for guessing. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impasto.errors import UsageError
from impasto.recipe import Recipe
from impasto.result import Estimate, Figure, Result, Row, Setting
from impasto.statistics import LEVEL, clearly_above
from impasto.steps import Group, leaves
from impasto.store import Store
from impasto.timings import OURS, Bench, Case, Part

SAVINGS = (0.1, 0.2, 0.3, 0.5)
RESAMPLES = 4_000
FULL = "full model"
METHODS = (
    FULL,
    "skip",
    "parallel, mean",
    "parallel, sum",
    "looped parallel",
    "pairs",
    "rank cut",
    "mixture",
    "other order",
)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe: how long it takes, as a share of the untouched model's time, and how well it answers."""

    recipe: str
    label: str
    method: str
    latency: Estimate
    accuracy: Estimate

    def __str__(self) -> str:
        return f"{self.label}: {self.latency} of the time, score {self.accuracy}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The best answer to "what should I take if I want so much less time"; no point where nothing is that fast."""

    saving: float
    point: Point | None


@dataclass(frozen=True)
class Accuracies:
    """Scores of recipes on the same documents.

    Attributes:
        scores: by fingerprint.
        tasks: those that are counted, with their numbers of documents.
        left_out: tasks that are not, and why.
    """

    scores: Mapping[str, Estimate]
    tasks: Mapping[str, int]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Sheet:
    """What several recipes scored on the documents of one task, and what guessing scores."""

    task: str
    full: tuple[float | None, ...]
    recipes: Mapping[str, tuple[float | None, ...]]
    chance: float = 0.0


def pareto(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """Which of the points (cost, worth) are beaten by none.

    A point is beaten by one that costs at most as much and is worth at least as much, and differs from it.

    >>> pareto([(1.0, 1.0), (0.5, 0.8), (0.6, 0.7), (0.5, 0.9)])
    (True, False, False, True)
    """
    best: dict[tuple[float, float], bool] = {}
    worth = -math.inf
    for cost, value in sorted(set(points), key=lambda point: (point[0], -point[1])):
        best[cost, value] = value > worth
        worth = max(worth, value)
    return tuple(best[point] for point in points)


def front(points: Sequence[Point]) -> tuple[bool, ...]:
    """Which points are beaten by none in their values; intervals are not looked at."""
    return pareto([(point.latency.value, point.accuracy.value) for point in points])


def choices(points: Sequence[Point], savings: Sequence[float] = SAVINGS) -> tuple[Choice, ...]:
    """For each saving the point of the best accuracy among those that are surely as fast.

    A point is surely as fast if the upper end of its latency's interval is. Of equally good points the faster is taken.
    """
    found = []
    for saving in savings:
        fast = [
            point
            for point in points
            if (point.latency.value if point.latency.high is None else point.latency.high) <= 1 - saving
        ]
        best = max(fast, key=lambda point: (point.accuracy.value, -point.latency.value), default=None)
        found.append(Choice(saving, best))
    return tuple(found)


def joined(
    bench: Bench,
    case: Case,
    scores: Mapping[str, Estimate],
    *,
    part: Part = "tpot",
    labels: Mapping[str, str] | None = None,
    methods: Mapping[str, str] | None = None,
) -> tuple[Point, ...]:
    """The recipes of a case that have both a latency and an accuracy.

    Args:
        bench: the latencies.
        case: rows, prompt and new tokens.
        scores: accuracy by fingerprint.
        part: which time: per token, or to the first one.
        labels: what to call recipes, by fingerprint; else by their text.
        methods: which method they belong to; else what `method` finds.
    """
    labels, methods = labels or {}, methods or {}
    points = []
    for recipe in bench.recipes:
        name = recipe.fingerprint
        timing = next((t for t in bench.of(case) if t.recipe == name and t.how in OURS and t.rounds), None)
        latency = None if timing is None else bench.ratio(timing, part)
        if latency is not None and name in scores:
            kind = FULL if recipe == bench.recipes[0] else methods.get(name) or method(recipe)
            label = FULL if kind == FULL else labels.get(name) or str(recipe)
            points.append(Point(name, label, kind, latency, scores[name]))
    return tuple(points)


def method(recipe: Recipe) -> str:
    """What a recipe does to a model, in the words of the figures; one of `METHODS`."""
    steps = recipe.schedule.steps
    calls = [call.layer for call in leaves(steps)]
    groups = [step for step in steps if isinstance(step, Group)]
    every = sorted(set(calls)) == list(range(max(calls) + 1))  # as far as can be seen without the model
    if recipe.edits:
        return "rank cut" if every and not groups and calls == sorted(set(calls)) else "mixture"
    if not groups:
        return "skip" if calls == sorted(set(calls)) else "other order"
    if not every:
        return "mixture"
    if len(set(groups)) < len(groups):
        return "looped parallel"
    if len(groups) > 1 and all(len(group.branches) == 2 for group in groups):
        return "pairs"
    return f"parallel, {groups[0].merge}"


# Accuracy --------------------------------------------------------------------------------------------------------


def accuracies(store: Store, bench: Bench) -> Accuracies:
    """The scores of a bench's recipes that a store holds, for the same weights.

    Counted are tasks that all these recipes and the untouched model have answered in the same way, in which more is
    better, and in which the untouched model is clearly above guessing.

    Raises:
        UsageError: the store has no scores of these weights, or none for the untouched model.
    """
    setting = _like(store.settings(), bench.setting)
    if setting is None:
        raise UsageError(f"{store.folder} holds no scores of these weights: fill it with `impasto eval` first")
    full = bench.recipes[0].fingerprint
    results = store.results(setting, recipes=[recipe.fingerprint for recipe in bench.recipes])
    by_protocol: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        by_protocol.setdefault((result.task, result.protocol), {})[result.recipe] = result
    answered = {key: found for key, found in by_protocol.items() if full in found}
    if not answered:
        raise UsageError(f"{store.folder} holds no scores of the untouched model: `impasto eval` measures it")
    most: dict[str, tuple[str, str]] = {}
    for key, found in answered.items():
        best = most.get(key[0])
        if best is None or (len(found), found[full].n) > (len(answered[best]), answered[best][full].n):
            most[key[0]] = key
    everyone = set.union(*(set(found) for found in answered.values()))
    sheets, left_out = [], {}
    for task, key in most.items():
        sheet = sheet_of(answered[key], full)
        if isinstance(sheet, str):
            left_out[task] = sheet
        elif missing := everyone - set(answered[key]):
            left_out[task] = f"{len(missing)} of {len(everyone)} recipes have not answered it"
        else:
            sheets.append(sheet)
    return Accuracies(mean_normalised(sheets), {sheet.task: len(sheet.full) for sheet in sheets}, left_out)


def sheet_of(results: Mapping[str, Result], full: str) -> Sheet | str:
    """The scores of several recipes on one task, by fingerprint, or why they cannot be counted."""
    whole = results[full]
    metric, chance = whole.info["metric"], float(whole.info.get("chance") or 0.0)
    if not whole.info.get("higher_is_better", True):
        return "smaller is better in it"
    if not clearly_above(whole.scores[metric], chance):
        return "the untouched model is not clearly above guessing"
    return Sheet(whole.task, whole.scores[metric], {name: r.scores[metric] for name, r in results.items()}, chance)


def mean_normalised(sheets: Sequence[Sheet], *, n: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """For each recipe the mean over tasks of (score - chance) / (full - chance), with its 95 % interval.

    Documents are resampled within each task, for all recipes together. A document without a score counts as chance: a
    recipe that gives no finite answer does not answer. Recipes that a task lacks are left out.
    """
    if not sheets:
        return {}
    names = [name for name in sheets[0].recipes if all(name in sheet.recipes for sheet in sheets)]
    values, resampled = np.zeros(len(names)), np.zeros((n, len(names)))
    for stream, sheet in enumerate(sheets):
        rows = np.array([sheet.recipes[name] for name in names], np.float64)
        whole = np.array(sheet.full, np.float64)
        rows, whole = np.nan_to_num(rows, nan=sheet.chance), np.nan_to_num(whole, nan=sheet.chance)
        documents = len(whole)
        random = np.random.default_rng([seed, stream])
        weights = random.multinomial(documents, np.full(documents, 1 / documents), size=n) / documents
        values += _share(rows.mean(1), whole.mean(), sheet.chance) / len(sheets)
        resampled += _share(weights @ rows.T, (weights @ whole)[:, None], sheet.chance) / len(sheets)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: Estimate(float(value), float(bottom), float(top))
        for name, value, bottom, top in zip(names, values, low, high, strict=True)
    }


def _share(scores: Any, full: Any, chance: float) -> Floats:
    room = np.maximum(full - chance, 1e-9)
    found: Floats = (scores - chance) / room
    return found


def _like(settings: Sequence[Setting], wanted: Setting) -> Setting | None:
    """The setting that is nearest: the same weights, and if there is one, the same dtype and device."""
    same = [one for one in settings if one.weights == wanted.weights]
    near = [one.fingerprint == wanted.fingerprint for one in same]
    kind = [(one.dtype == wanted.dtype) + (one.device == wanted.device) for one in same]
    order = sorted(range(len(same)), key=lambda i: (near[i], kind[i]))
    return same[order[-1]] if order else None


# Figures ---------------------------------------------------------------------------------------------------------


def figure(panels: Mapping[str, Sequence[Point]], *, key: str = "frontier", part: Part = "tpot") -> Figure:
    """Accuracy against latency, one panel per case, the points that nothing beats joined by a line."""
    rows: list[Row] = []
    for name, points in panels.items():
        for point, best in zip(points, front(points), strict=True):
            rows.append(
                {
                    "panel": name,
                    "series": point.method,
                    "label": point.label,
                    "x": point.latency.value,
                    "x_low": point.latency.low,
                    "x_high": point.latency.high,
                    "y": point.accuracy.value,
                    "low": point.accuracy.low,
                    "high": point.accuracy.high,
                    "frontier": best,
                }
            )
    time = "time per token" if part == "tpot" else "time to first token"
    present = [name for name in METHODS if any(row["series"] == name for row in rows)]
    return Figure(
        key=key,
        title="Accuracy against latency",
        caption=(
            "Each point is a recipe: its time as a share of the untouched model's, measured in turns with it, and the "
            "mean over tasks of its normalised score. Lines are 95 % intervals. The step joins the recipes that no "
            "other one beats in both; they are numbered from left to right and listed below."
        ),
        kind="frontier",
        rows=tuple(rows),
        options={
            "x_title": f"{time}, untouched model = 1",
            "y_title": "normalised score, mean over tasks",
            "series": present,
            "rules": [{"value": 1.0, "name": ""}],
        },
    )


def ratios(bench: Bench, names: Mapping[str, str], part: Part = "tpot") -> Figure:
    """Every recipe's time as a share of the untouched model's, one panel per case.

    Args:
        bench: the latencies.
        names: what to call recipes, by fingerprint.
        part: which time.
    """
    rows: list[Row] = []
    for timing in bench.timings:
        estimate = bench.ratio(timing, part)
        if estimate is None or (timing.recipe == bench.recipes[0].fingerprint and timing.how in OURS):
            continue
        rows.append(
            {
                "panel": str(timing.case),
                "label": bench.called(timing, names),
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
            }
        )
    time = "Time per token" if part == "tpot" else "Time to first token"
    return Figure(
        key=f"{part}-ratio",
        title=f"{time}, as a share of the untouched model's",
        caption="Geometric mean over rounds in which both ran, with its 95 % interval.",
        kind="bars",
        rows=tuple(rows),
        options={
            "x_title": f"{time.lower()}, untouched model = 1",
            "rules": [{"value": 1.0, "name": "untouched model"}],
            "sort": "given",
            "x_domain": _room(rows),
        },
    )


def _room(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of an axis of ratios: all values, and intervals up to half of their range beyond them."""
    values = [1.0, *[float(row["value"]) for row in rows]]
    low, high = min(values), max(values)
    spare = max(high - low, 0.1) / 2
    ends = [float(row[end]) for row in rows for end in ("low", "high") if row[end] is not None]
    inside = [low, high, *[min(max(end, low - spare), high + spare) for end in ends]]
    pad = 0.04 * (max(inside) - min(inside))
    return min(inside) - pad, max(inside) + pad


def throughput(bench: Bench, names: Mapping[str, str]) -> Figure:
    """Tokens per second against batch size, one line per recipe and one panel per length of prompt."""
    rows: list[Row] = [
        {
            "panel": f"prompts of {timing.case.context:,} tokens",
            "series": bench.called(timing, names),
            "x": timing.case.batch,
            "y": timing.decode_rate,
            "low": None,
            "high": None,
        }
        for timing in bench.timings
        if timing.decode_rate is not None
    ]
    return Figure(
        key="throughput",
        title="Tokens per second while decoding, all rows together",
        caption="From the median time per token.",
        kind="layer_curve",
        rows=tuple(rows),
        options={"x_title": "rows in a batch", "y_title": "tokens per second"},
    )
