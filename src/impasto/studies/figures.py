"""The figures of the painters study: their numbers, and captions that say what one sees and how it was computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from impasto import moves, statistics
from impasto.result import Estimate, Figure, Row
from impasto.studies.evidence import Cell, Task
from impasto.studies.loops import Loops
from impasto.studies.protocol import FULL, METHODS, state_start
from impasto.studies.reading import PAPER_ORDER, Reading, listed, named, widths_of
from impasto.studies.states import MEASURES, cache_label, interval_of_rows, middle_groups
from impasto.studies.table import middle_of_tasks

LAYERS, MIDDLE, ORDER, WHY = "Single layers", "The middle changed", "Order", "States and caches"

_BAND = "Bands are 95 % intervals of a paired bootstrap over examples."
RULES = ({"value": 0.0, "name": "guessing"}, {"value": 1.0, "name": "full model"})


def figures(reading: Reading) -> tuple[Figure, ...]:
    """All figures for which something was measured, in the order of the page."""
    drawn = (draw(reading) for draw in _FIGURES)
    return tuple(figure for figure in drawn if figure is not None and figure.rows)


def scores(reading: Reading) -> Figure:
    """What the full model scores, beside what guessing does."""
    evidence = reading.evidence
    rows: list[Row] = []
    for task in evidence.tasks:
        found = evidence.scores(evidence.full, task)
        if found is None:
            continue
        value, interval = evidence.metric(evidence.full, task), statistics.interval(found)
        # A perplexity is no mean of its examples' scores, so their interval is not its own.
        rows.append(
            {"label": task.title, "series": "full model", **bar(interval)}
            if value is None or abs(value - interval.value) < 1e-9
            else {"label": task.title, "series": "full model", "value": value, "low": None, "high": None}
        )
        rows.append({"label": task.title, "series": "guessing", "value": task.chance})
        rows.append({"label": task.title, "series": "most frequent position", "value": task.majority})
    sizes = [f"{task.title} {task.n:,}" for task in evidence.tasks]
    caption = (
        "The untouched model on each task, beside guessing and always choosing the position that is right most often. "
        f"Where its interval (95 %) reaches guessing, the task teaches nothing. Examples: {listed(sizes, 20)}."
    )
    options = {
        "series": ["full model", "guessing", "most frequent position"],
        "sort": "given",
        "x_title": "score",
        "section": "The tasks",
    }
    return Figure("scores", "What the model can do", caption, "bars", tuple(rows), options)


def layers(reading: Reading) -> Figure:
    """One layer left out, and neighbours swapped, task by task."""
    evidence = reading.evidence
    rows: list[Row] = []
    rules: list[Mapping[str, Any]] = []
    for task in evidence.tasks:
        cells = reading.cells("skip_one", "swap")
        known = [cell for cell in cells if evidence.whole(cell, (task,))]
        full = evidence.scores(evidence.full, task)
        if full is None or not known:
            continue
        level = float(full.mean())
        each = statistics.simultaneous_differences(evidence.panel(task, known), n=2000)
        found = dict(zip(known, each, strict=True))
        for cell in cells:
            series = METHODS[cell.method]
            rows.append({"panel": task.title, "series": series, "x": cell.parameter, **point(found.get(cell), level)})
        rules.append({"panel": task.title, "value": level, "name": "full model"})
        if task.chance is not None:
            rules.append({"panel": task.title, "value": task.chance, "name": "guessing"})
    caption = (
        "Score when one layer is left out, or trades places with the next. Bands are 95 % intervals of the paired "
        "difference to the full model (max-t bootstrap, all points of a panel at once): where a band does not touch "
        f"the upper dashed line, the change does harm. {_examples(reading, evidence.tasks)}"
    )
    options = {"rules": rules, "series": [METHODS["skip_one"], METHODS["swap"]], "section": LAYERS}
    return Figure("layers", "One layer left out or swapped", caption, "layer_curve", tuple(rows), options)


def similarity(reading: Reading) -> Figure | None:
    """The full model's states against each other, by every measure."""
    full = reading.evidence.similarity.get(FULL)
    if full is None:
        return None
    rows = tuple(
        {"panel": title, "row": i, "column": j, "value": value}
        for measure, title in MEASURES.items()
        for i, line in enumerate(full["measures"].get(measure, {}).get("value", ()))
        for j, value in enumerate(line)
    )
    groups = {title: middle_groups(reading.evidence.groups.get(measure)) for measure, title in MEASURES.items()}
    rule = next((str(found["rule"]) for found in reading.evidence.groups.values()), "")
    caption = (
        "How alike the hidden states are: state 0 is the embeddings, state s what layer s - 1 leaves. The first matrix "
        "is the paper's cosine of whole texts laid end to end, padding included; the others leave padding and first "
        "tokens out, then also what all tokens have in common, or compare the geometry only. "
        f"{full['texts']} texts, {full['tokens']:,} tokens.{f' Boxes: {rule}.' if rule else ''}"
    )
    options = {"groups": groups, "panel_order": list(MEASURES.values()), "value_title": "similarity", "section": LAYERS}
    return Figure("similarity", "How alike the states are", caption, "matrix", rows, options)


def summary(reading: Reading) -> Figure:
    """All six methods on one chart."""
    rows = _curve(reading, reading.cells(*PAPER_ORDER), lambda cell: named(cell.method, _iterations(reading)))
    caption = (
        "Median over tasks of the normalised score (0 is guessing, 1 the full model) against the number of affected "
        f"middle layers. {_BAND} Random order is the mean over its seeds, which are "
        f"resampled too. Tasks: {_titles(reading)}. {_examples(reading, reading.tasks)}"
    )
    options = {"rules": RULES, "series": _series(reading), "section": MIDDLE}
    return Figure("summary", "All methods together", caption, "summary_curves", tuple(rows), options)


def methods(reading: Reading) -> Figure:
    """The six methods task by task."""
    evidence = reading.evidence
    rows: list[Row] = []
    for task in evidence.usable:
        cells = [cell for cell in reading.cells(*PAPER_ORDER) if evidence.whole(cell, (task,))]
        panel = evidence.panel(task, cells) if cells else None
        each = statistics.normalised_scores(panel, n=2000) if panel is not None else []
        found = dict(zip(cells, each, strict=True))
        for cell in reading.cells(*PAPER_ORDER):
            series = named(cell.method, _iterations(reading))
            rows.append({"panel": task.title, "series": series, "x": cell.affected, **point(found.get(cell))})
    left_out = [task.title for task in evidence.tasks if task not in evidence.usable]
    lacking = f" Left out, since the full model is not clearly above guessing: {listed(left_out)}." if left_out else ""
    caption = (
        f"Normalised score (0 is guessing, 1 the full model) against the number of affected middle layers. {_BAND}"
        f"{lacking} {_examples(reading, evidence.usable)}"
    )
    options = {"rules": RULES, "series": _series(reading), "section": MIDDLE}
    return Figure("methods", "Every method, task by task", caption, "affected_curves", tuple(rows), options)


def loops(reading: Reading) -> Figure | None:
    """Iterations against width, the best of each width and the line through them."""
    found = Loops.of(reading)
    if found is None:
        return None
    values = middle_of_tasks(found.table.values)
    best = dict(zip(found.clear, found.best, strict=True))
    rows = tuple(
        {
            "x": width,
            "y": k,
            "value": float(values[found.places[i, j]]) if found.places[i, j] >= 0 else None,
            "best": best.get(width) == k,
        }
        for i, width in enumerate(found.widths)
        for j, k in enumerate(found.iterations)
    )
    line = "" if found.slope is None else " The dashed line is fitted through the best ones."
    caption = (
        "Looped parallel: M middle layers in parallel, their mean fed back, k times in all. Median over tasks of the "
        "normalised score; outlined is the best number of iterations of every width that is clearly above guessing "
        f"(the fewest of equal ones).{line} Tasks: {_titles(reading)}. {_examples(reading, reading.tasks)}"
    )
    options: dict[str, Any] = {"section": MIDDLE}
    if found.slope is not None and found.intercept is not None:
        options["fit"] = (found.slope.value, found.intercept)
    return Figure("loops", "Iterations against width", caption, "heatmap", rows, options)


def repeats(reading: Reading) -> Figure:
    """The middle run two and three times."""
    cells = reading.cells("block_repeat", "inplace_repeat")
    rows = _curve(reading, cells, lambda cell: f"{METHODS[cell.method]}, {cell.parameter} times")
    caption = (
        "Median over tasks of the normalised score when the middle runs several times: as a block (8 9 10 8 9 10) or "
        f"layer by layer (8 8 9 9 10 10). {_BAND} Tasks: {_titles(reading)}. {_examples(reading, reading.tasks)}"
    )
    options = {"rules": RULES, "y_title": "normalised score, median over tasks", "section": MIDDLE}
    return Figure("repeats", "The middle two and three times", caption, "affected_curves", tuple(rows), options)


def order(reading: Reading) -> Figure | None:
    """Tasks that should need the order, and the others, in another order and without the middle."""
    found = reading.compared("reverse", "random_order", "skip")
    kinds = {True: "arithmetic and reasoning", False: "other tasks", None: "not classified"}
    rows: list[Row] = []
    for place, task in enumerate(reading.tasks):
        for method, cells in found.items():
            columns = reading.curves.at(cells)
            kept = reading.curves.estimate(lambda t, row=place, at=columns: t[..., row, at].mean(axis=-1))  # type: ignore[misc]
            panel = kinds[task.order_sensitive]
            rows.append({"panel": panel, "label": task.title, "series": METHODS[method], **bar(kept)})
    undefined = [task for task in reading.evidence.tasks if task not in reading.evidence.usable]
    rows += [{"panel": kinds[task.order_sensitive], "label": task.title, "value": None} for task in undefined]
    if not found:
        return None
    caption = (
        "Normalised score of each task with the middle reversed, in random order, and left out, on average over "
        f"{widths_of(next(iter(found.values())))}. Leaving layers out changes no order, so it shows how fragile a task "
        f"is anyway. Intervals: 95 %, paired bootstrap. {_examples(reading, reading.tasks)}"
    )
    options = {
        "rules": RULES,
        "series": _series(reading),
        "panel_order": list(kinds.values()),
        "section": ORDER,
    }
    return Figure("order", "Who needs the order", caption, "bars", tuple(rows), options)


def seeds(reading: Reading) -> Figure | None:
    """Every random order by itself."""
    evidence = reading.evidence
    rows: list[Row] = []
    tasks = reading.tasks
    room = [float(np.mean(evidence.panel(task, ()).baseline)) - (task.chance or 0.0) for task in tasks]
    for cell in reading.curves.cells:
        if cell.method != "random_order":
            continue
        for variant in evidence.cells[cell]:
            means = [evidence.scores(variant, task) for task in tasks]
            each = [
                (float(found.mean()) - (task.chance or 0.0)) / above
                for found, task, above in zip(means, tasks, room, strict=True)
                if found is not None
            ]
            rows.append({"series": "one random order", "x": cell.affected, "y": float(np.median(each))})
    if not rows:
        return None
    rows += _curve(reading, reading.cells("random_order", "reverse"), lambda cell: METHODS[cell.method])
    caption = (
        "Median over tasks of the normalised score for every random order by itself, beside their mean and the "
        "reversed order. The interval of the mean holds for other seeds and other examples. "
        f"Tasks: {_titles(reading)}. {_examples(reading, tasks)}"
    )
    options = {
        "rules": RULES,
        "x_title": "affected layers M",
        "y_title": "normalised score, median over tasks",
        "series": [*_series(reading), "one random order"],
        "section": ORDER,
    }
    return Figure("seeds", "Random orders one by one", caption, "scatter", tuple(rows), options)


def states(reading: Reading) -> Figure | None:
    """Length, variance and direction of the states, of the full model, without the middle, and with it repeated."""
    start = state_start(reading.depth)
    width = moves.affected(reading.depth, start)
    titles = {FULL: "full model", "skip": METHODS["skip"], "middle_repeat": METHODS["middle_repeat"]}
    rows: list[Row] = []
    for label, title in titles.items():
        found = reading.evidence.similarity.get(label)
        if found is None:
            continue
        cosines = found["measures"].get("tokens", {}).get("value") or []
        entering = cosines[start + 1] if len(cosines) > start + 1 else []
        for name, values in (
            ("length of the state", found["states"]["norm"]),
            ("variance of its entries", found["states"]["variance"]),
            ("cosine to the state before the middle", entering),
        ):
            for place, value in enumerate(values):
                x = place + width if label == "skip" and place > start + 1 else place
                rows.append({"panel": name, "series": title, "x": x, "y": value})
    if not rows:
        return None
    last, centre = start + width, moves.centre(reading.depth)
    caption = (
        f"The states when layers {start + 1} to {last} are left out, or replaced by layer {centre} run {width} times, "
        "beside the full model's. State 0 is the embeddings; states behind the left-out layers stand "
        f"at their places in the full model. The middle ends at state {last + 1}. Lengths and cosines are means over "
        "tokens without padding and first tokens; variances are over all entries and tokens but padding."
    )
    options = {
        "series": [titles[FULL], *_series(reading)],
        "log": ["length of the state", "variance of its entries"],
        "x_title": "state",
        "section": WHY,
    }
    return Figure("states", "Why repeating is worse than leaving out", caption, "states", tuple(rows), options)


def kv(reading: Reading) -> Figure:
    """Texts under exact and averaged caches."""
    rows: list[Row] = []
    for row in reading.evidence.kv:
        pairs = {
            "same text as without a cache": (row.exact, row.mean),
            "right answers": (row.exact_right, row.mean_right),
        }
        for panel, both in pairs.items():
            for series, values in zip(("exact cache", "averaged cache"), both, strict=True):
                if values:
                    found = bar(interval_of_rows([values]))
                    rows.append({"panel": panel, "label": cache_label(row), "series": series, **found})
    prompts = max((len(row.exact) for row in reading.evidence.kv), default=0)
    tasks = dict.fromkeys(row.task for row in reading.evidence.kv)
    caption = (
        "Greedy texts with a cache slot for every layer call (exact) and with one averaged slot for a parallel group, "
        "as in the paper's code, against the texts of full passes without a cache. Where the group has one layer both "
        f"are the same by definition. {prompts} prompts of {listed(list(tasks))}; 95 % intervals over prompts."
    )
    options = {
        "series": ["exact cache", "averaged cache"],
        "sort": "given",
        "x_title": "share of prompts",
        "x_domain": [-0.02, 1.02],
        "section": WHY,
    }
    return Figure("kv", "Exact and averaged caches", caption, "bars", tuple(rows), options)


_FIGURES: tuple[Callable[[Reading], Figure | None], ...] = (
    summary,
    methods,
    loops,
    repeats,
    layers,
    similarity,
    order,
    seeds,
    states,
    kv,
    scores,
)


# ── rows and captions ────────────────────────────────────────────────────────────────────────────────────────


def _curve(reading: Reading, cells: Sequence[Cell], series: Callable[[Cell], str]) -> list[Row]:
    """Median normalised scores over the number of affected layers; a cell that was not measured is a gap."""
    table = reading.table(cells)
    found = dict(zip(table.cells, table.estimates(middle_of_tasks), strict=True)) if table.cells else {}
    if not found:
        return []
    return [{"series": series(cell), "x": cell.affected, **point(found.get(cell))} for cell in cells]


def point(estimate: Estimate | None, above: float = 0.0) -> Row:
    """A point with its interval, moved up by a level; without an estimate a gap."""
    if estimate is None:
        return {"y": None, "low": None, "high": None}
    ends = {"y": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if end is None else end + above for name, end in ends.items()}


def bar(estimate: Estimate) -> Row:
    """An estimate as a row of a drawing of bars."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _iterations(reading: Reading) -> int:
    return reading.evidence.protocol.iterations


def _series(reading: Reading) -> list[str]:
    """The methods in one fixed order, so that each has its colour in every figure."""
    return [named(method, _iterations(reading)) for method in PAPER_ORDER]


def _titles(reading: Reading) -> str:
    return listed([task.title for task in reading.tasks], 20) or "none"


def _examples(reading: Reading, tasks: Sequence[Task]) -> str:
    """How many examples stand behind a figure."""
    counts = sorted({task.n for task in tasks})
    if not counts:
        return ""
    return f"{counts[0]:,} to {counts[-1]:,} examples a task." if len(counts) > 1 else f"{counts[0]:,} examples a task."
