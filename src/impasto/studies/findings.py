"""Questions about scores: what the evidence says to each, or None where it was not measured.

Scores are normalised (1 the full model, 0 guessing) and summarised by the median over tasks, as in the paper, unless a
question is about kinds of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from impasto.result import Estimate
from impasto.statistics import verdict
from impasto.studies.evidence import Cell
from impasto.studies.protocol import METHODS
from impasto.studies.reading import (
    KEPT,
    PAPER_ORDER,
    SLIGHT,
    Found,
    Reading,
    contrast,
    listed,
    mean_over,
    named,
    said,
    widths_of,
    with_interval,
)
from impasto.studies.table import Floats, Statistic, middle_of_tasks

Finder = Callable[[Reading], Found | None]


# ── single layers ────────────────────────────────────────────────────────────────────────────────────────────


def single(method: str) -> Finder:
    """Whether one middle layer can be left out ("skip_one") or swapped with the next ("swap")."""
    doing = "Leaving out one layer" if method == "skip_one" else "Swapping two neighbours"

    def find(reading: Reading) -> Found | None:
        cells = reading.inner(method)
        if not cells:
            return None
        table = reading.layers
        columns = table.at(cells)
        kept = table.estimate(mean_over(columns))
        each = table.simultaneous(lambda t: middle_of_tasks(t)[..., columns])
        by_value = sorted(zip(each, cells, strict=True), key=lambda pair: pair[0].value)
        (worst, worst_cell), (best, best_cell) = by_value[0], by_value[-1]
        clear = sum(verdict(one, 1.0) == "no" for one in each)
        effect = (
            f"{doing} of the middle half keeps {with_interval(kept)} of the score on average, from {said(worst.value)} "
            f"(layer {worst_cell.parameter}) to {said(best.value)} (layer {best_cell.parameter}). "
            f"{clear} of {len(cells)} such changes are clearly below the full model."
        )
        return Found(verdict(kept, KEPT), effect, kept)

    return find


def edges(reading: Reading) -> Found | None:
    """Whether the first and the last layer matter more than the middle ones."""
    inner = reading.inner("skip_one")
    outer = [c for c in reading.layers.cells if c.method == "skip_one" and c.parameter in (0, reading.depth - 1)]
    if not inner or len(outer) < 2:
        return None
    table = reading.layers
    gap = table.estimate(contrast(table.at(inner), table.at(outer)))
    first, last = (table.estimate(mean_over(table.at([cell]))) for cell in outer)
    effect = (
        f"Without the first layer {with_interval(first)} of the score is left, without the last "
        f"{with_interval(last)}; without one of the middle half {said(gap.value)} more than that on average."
    )
    return Found(verdict(gap), effect, gap)


# ── the middle left out, repeated, parallel ──────────────────────────────────────────────────────────────────


def needed(reading: Reading) -> Found | None:
    """Whether every layer of the middle is necessary."""
    cells = reading.measured("skip")
    if not cells:
        return None
    each = _simultaneous(reading, cells)
    spare = [cell for cell, kept in zip(cells, each, strict=True) if verdict(kept, KEPT) == "yes"]
    costly = [verdict(kept, KEPT) == "no" for kept in each]
    narrow = f"Without {_layers(cells[0])} {with_interval(each[0])} of the score is left."
    if spare:
        share = spare[-1].affected / reading.depth
        effect = (
            f"{narrow} Up to {_layers(spare[-1])} of {reading.depth} ({share:.0%}) can be left out with at least "
            f"{KEPT:.0%} of the score clearly kept."
        )
        return Found("no", effect, each[0])
    if all(costly):
        return Found("yes", f"{narrow} No number of left-out layers that was tried keeps {KEPT:.0%}.", each[0])
    return Found("unclear", f"{narrow} Whether {KEPT:.0%} is kept, the examples are too few to tell.", each[0])


def keeps(method: str) -> Finder:
    """Whether a method keeps most of the score at moderate widths."""

    def find(reading: Reading) -> Found | None:
        cells = reading.compared(method).get(method)
        if not cells:
            return None
        table = reading.curves
        kept = table.estimate(mean_over(table.at(cells)))
        every = reading.measured(method)
        each = _simultaneous(reading, every)
        spare = [cell for cell, one in zip(every, each, strict=True) if verdict(one, KEPT) == "yes"]
        spare = [cell for cell in spare if cell.affected > 1]
        widest = (
            f"The widest middle that clearly keeps {KEPT:.0%} is M = {spare[-1].affected}."
            if spare
            else (f"No middle of more than one layer clearly keeps {KEPT:.0%}.")
        )
        effect = f"{with_interval(kept)} of the score is left on average over {widths_of(cells)}. {widest}"
        return Found(verdict(kept, KEPT), effect, kept)

    return find


def above(better: str, worse: str) -> Finder:
    """Whether one method keeps more of the score than another, at the same moderate widths."""

    def find(reading: Reading) -> Found | None:
        pair = reading.compared(better, worse)
        if len(pair) < 2:
            return None
        table = reading.curves
        columns = [table.at(pair[name]) for name in (better, worse)]
        gap = table.estimate(contrast(*columns))
        kept = [table.estimate(mean_over(each)) for each in columns]
        loops = reading.evidence.protocol.iterations
        first, second = (named(name, loops) for name in (better, worse))
        effect = (
            f"{first} keeps {with_interval(kept[0])} of the score, {second.lower()} {with_interval(kept[1])}, "
            f"on average over {widths_of(pair[better])}."
        )
        return Found(verdict(gap), effect, gap)

    return find


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────


def order(reading: Reading) -> Found | None:
    """Whether another order of the middle costs anything."""
    cells = _reordered(reading)
    if not cells:
        return None
    table = reading.curves
    kept = {method: mean_over(table.at(mine)) for method, mine in cells.items()}
    loss = table.estimate(lambda t: 1 - np.mean([one(t) for one in kept.values()], axis=0))
    parts = [f"{with_interval(table.estimate(one))} ({METHODS[method].lower()})" for method, one in kept.items()]
    effect = (
        f"With the middle in another order {listed(parts)} of the score is left, "
        f"on average over {widths_of(next(iter(cells.values())))}."
    )
    return Found(verdict(loss, SLIGHT), effect, loss)


def order_by_task(reading: Reading) -> Found | None:
    """Whether arithmetic and reasoning lose more by another order than other tasks."""
    cells = _reordered(reading)
    gap = _gap(reading, [cell for mine in cells.values() for cell in mine])
    if gap is None:
        return None
    estimate = reading.curves.estimate(gap)
    effect = (
        f"In another order {_tasks(reading, True)} keep {said(abs(estimate.value))} "
        f"{'less' if estimate.value >= 0 else 'more'} of their scores than {_tasks(reading, False)}, "
        f"on average over {widths_of(next(iter(cells.values())))}."
    )
    return Found(verdict(estimate), effect, estimate)


def order_itself(reading: Reading) -> Found | None:
    """Whether that gap is larger than the one that leaving out the same layers makes, in the order they have."""
    both = reading.compared("reverse", "random_order", "skip")
    skipped = both.pop("skip", ())
    reordered = _gap(reading, [cell for mine in both.values() for cell in mine])
    skip = _gap(reading, skipped)
    if reordered is None or skip is None:
        return None
    table = reading.curves
    extra = table.estimate(lambda t: reordered(t) - skip(t))
    effect = (
        f"The gap between the two kinds of tasks is {with_interval(table.estimate(reordered))} in another order and "
        f"{with_interval(table.estimate(skip))} when the same layers are left out, which changes no order."
    )
    return Found(verdict(extra), effect, extra)


# ── comparisons of all methods ───────────────────────────────────────────────────────────────────────────────


def ranking(reading: Reading) -> Found | None:
    """Whether the methods do harm in the order in which the paper found them."""
    found = reading.compared(*PAPER_ORDER)
    if len(found) < 4:
        return None
    table = reading.curves
    columns = [table.at(cells) for cells in found.values()]
    pairs = [(i, j) for i in range(len(columns)) for j in range(i + 1, len(columns))]

    def tau(t: Floats) -> Floats:
        kept = [mean_over(each)(t) for each in columns]
        return np.asarray(np.mean([np.sign(kept[j] - kept[i]) for i, j in pairs], axis=0), np.float64)

    estimate = table.estimate(tau)
    scores = [table.estimate(mean_over(each)).value for each in columns]
    loops = reading.evidence.protocol.iterations
    by_harm = sorted(zip(scores, found, strict=True))
    order_here = [f"{named(method, loops).lower()} ({said(score)})" for score, method in by_harm]
    effect = (
        f"From most to least harmful: {', '.join(order_here)}; on average over {widths_of(next(iter(found.values())))}."
    )
    return Found(verdict(estimate), effect, estimate)


def least_harm(reading: Reading) -> Found | None:
    """Whether looped parallel does the least harm of all methods."""
    found = reading.compared(*PAPER_ORDER)
    looped = found.pop("looped_parallel", ())
    if not looped or len(found) < 3:
        return None
    table = reading.curves
    mine = mean_over(table.at(looped))
    others = {method: mean_over(table.at(cells)) for method, cells in found.items()}
    lead = table.estimate(lambda t: mine(t) - np.max([other(t) for other in others.values()], axis=0))
    kept = {method: table.estimate(other) for method, other in others.items()}
    runner_up = max(kept, key=lambda method: kept[method].value)
    effect = (
        f"Looped parallel keeps {with_interval(table.estimate(mine))} of the score, the best of the others "
        f"({METHODS[runner_up].lower()}) {with_interval(kept[runner_up])}, on average over {widths_of(looped)}."
    )
    return Found(verdict(lead), effect, lead)


def repeats(reading: Reading) -> Found | None:
    """Whether running the middle two or three times ever beats the full model."""
    table = reading.repeats
    if not table.cells:
        return None
    each = table.simultaneous(lambda t: middle_of_tasks(t) - 1)
    best, cell = max(zip(each, table.cells, strict=True), key=lambda pair: pair[0].value)
    wins = [one for one in each if verdict(one) == "yes"]
    singles = table.simultaneous(lambda t: t.reshape(*t.shape[:-2], -1) - 1)
    better = sum(verdict(one) == "yes" for one in singles)
    effect = (
        f"The best of {len(each)} ({METHODS[cell.method].lower()}, {cell.parameter} times, M = {cell.affected}) "
        f"differs from the full model by {with_interval(best)}. On single tasks {better} of {len(singles)} scores are "
        "clearly higher than the full model's."
    )
    if wins:
        return Found("yes", effect, best)
    hopeless = all(one.high is not None and one.high < SLIGHT for one in each)
    return Found("no" if hopeless else "unclear", effect, best)


# ── shared pieces ────────────────────────────────────────────────────────────────────────────────────────────


def _simultaneous(reading: Reading, cells: Sequence[Cell]) -> list[Estimate]:
    table = reading.curves
    columns = table.at(cells)
    return table.simultaneous(lambda t: middle_of_tasks(t)[..., columns])


def _reordered(reading: Reading) -> dict[str, tuple[Cell, ...]]:
    """Cells of the methods that change nothing but the order, at the same moderate widths."""
    return reading.compared("reverse", "random_order")


def _gap(reading: Reading, cells: Sequence[Cell]) -> Statistic | None:
    """Mean score of the tasks that should not need the order minus that of those that should, over some cells."""
    kinds = [[row for row, task in enumerate(reading.tasks) if task.order_sensitive is kind] for kind in (True, False)]
    if not cells or not all(kinds):
        return None
    columns = reading.curves.at(cells)

    def gap(table: Floats) -> Floats:
        over_cells = table[..., columns].mean(axis=-1)
        sensitive, others = (over_cells[..., rows].mean(axis=-1) for rows in kinds)
        return np.asarray(others - sensitive, np.float64)

    return gap


def _tasks(reading: Reading, sensitive: bool) -> str:
    return listed([task.title for task in reading.tasks if task.order_sensitive is sensitive])


def _layers(cell: Cell) -> str:
    return "1 layer" if cell.affected == 1 else f"{cell.affected} layers"
