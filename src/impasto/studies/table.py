"""Normalised scores of many recipes on several tasks, with the resamples from which every interval is read.

A question about several recipes and tasks is a function of the table [tasks, cells] of normalised scores. Its
estimate is that function of the table, and its interval is the spread of that function over resamples of the table.
So any contrast (one method against another, some tasks against others, the best of a column) has a paired interval,
with no formula of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from impasto.result import Estimate
from impasto.statistics import LEVEL, Panel
from impasto.studies.evidence import Cell, Evidence, Task

RESAMPLES = 2000
LIMIT = 50.0  # a normalised score beyond this has no end on that side
_HELD = 4_000_000  # resampling weights held at once

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Takes tables [..., tasks, cells] and reduces the last two axes."""


@dataclass(frozen=True, eq=False)
class Table:
    """Normalised scores: 1 is the full model, 0 is guessing.

    Documents are resampled within each task, recipes and full model together, seeds within each cell and the same
    in every task. A resample in which the full model does not beat guessing counts as one in which it beats it by
    next to nothing, which opens the interval on the side where the recipe is.

    Attributes:
        tasks: the rows.
        cells: the columns.
        values: [tasks, cells].
        draws: [resamples, tasks, cells].
    """

    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    values: Floats
    draws: Floats

    @classmethod
    def of(cls, evidence: Evidence, tasks: Sequence[Task], cells: Sequence[Cell], n: int = RESAMPLES) -> Table:
        """The table of those cells that have finite scores on all of these tasks."""
        known = tuple(cell for cell in cells if evidence.whole(cell, tasks)) if tasks else ()
        values, draws = np.empty((len(tasks), len(known))), np.empty((n, len(tasks), len(known)))
        for row, task in enumerate(tasks if known else ()):
            panel = evidence.panel(task, known)
            room = float(panel.baseline.mean()) - panel.chance
            means = panel.rows.mean(axis=1)
            values[row] = [
                means[first:last].mean() - panel.chance for first, last in pairwise(np.cumsum([0, *panel.seeds]))
            ]
            values[row] /= room
            draws[:, row] = _resampled(panel, n, row, room)
        return cls(tuple(tasks), known, values, draws)

    def at(self, cells: Sequence[Cell]) -> list[int]:
        """Columns of some cells."""
        place = {cell: column for column, cell in enumerate(self.cells)}
        return [place[cell] for cell in cells]

    def estimate(self, statistic: Statistic) -> Estimate:
        """A single number made from the table, with its interval."""
        value, draws = statistic(self.values[None])[0], statistic(self.draws)
        return _estimate(float(value), *np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))

    def estimates(self, statistic: Statistic) -> list[Estimate]:
        """Several numbers made from the table ([..., tasks, cells] to [..., numbers]), each with its own interval."""
        values, draws = statistic(self.values[None])[0], statistic(self.draws)
        ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return [_estimate(float(value), low, high) for value, low, high in zip(values, *ends, strict=True)]

    def simultaneous(self, statistic: Statistic) -> list[Estimate]:
        """Like `estimates`, with intervals that hold for all numbers at once with 95 % confidence (max-t)."""
        values, draws = statistic(self.values[None])[0], statistic(self.draws)
        errors = draws.std(axis=0)
        varies = errors > 1e-12
        if not varies.any():
            return [_estimate(float(value), value, value) for value in values]
        largest = np.abs((draws[:, varies] - values[varies]) / errors[varies]).max(axis=1)
        reach = float(np.quantile(largest, LEVEL)) * errors
        return [_estimate(float(v), v - r, v + r) for v, r in zip(values, reach, strict=True)]


def middle_of_tasks(table: Floats) -> Floats:
    """The paper's summary: the median over tasks, [..., tasks, cells] to [..., cells]."""
    return np.asarray(np.median(table, axis=-2), np.float64)


def _resampled(panel: Panel, n: int, stream: int, room: float) -> Floats:
    """Normalised scores of resamples, [n, cells]; `stream` numbers the task."""
    documents = len(panel.baseline)
    scores, full = [], []
    rng = np.random.default_rng([0, stream])
    step = max(1, _HELD // documents)
    for start in range(0, n, step):
        weights = _weights(rng, min(step, n - start), documents)
        scores.append(weights @ panel.rows.T)
        full.append(weights @ panel.baseline)
    means, rooms = np.concatenate(scores), np.concatenate(full) - panel.chance
    columns = []
    for cell, (first, last) in enumerate(pairwise(np.cumsum([0, *panel.seeds]).tolist())):
        if last - first == 1:
            columns.append(means[:, first])
            continue
        seeds = _weights(np.random.default_rng([1, cell]), n, last - first)
        columns.append((means[:, first:last] * seeds).sum(axis=1))
    above: Floats = np.stack(columns, axis=1) - panel.chance
    return above / np.maximum(rooms, 1e-6 * room)[:, None]


def _weights(rng: np.random.Generator, n: int, units: int) -> Floats:
    """Weights of resamples, [n, units], each row of sum 1.

    The deviation of a resample is stretched as in `impasto.statistics`, so that few units give the width of
    Student's t and not a too narrow normal's.
    """
    if units < 2:
        return np.ones((n, units))
    draws = rng.integers(units, size=(n, units)) + units * np.arange(n)[:, None]
    shares = np.bincount(draws.ravel(), minlength=n * units).reshape(n, units) / units
    quantile = (1 + LEVEL) / 2
    stretch = math.sqrt(units / (units - 1)) * float(stats.t.ppf(quantile, units - 1) / stats.norm.ppf(quantile))
    return np.asarray(1 / units + stretch * (shares - 1 / units), np.float64)


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, float(low) if low > -LIMIT else None, float(high) if high < LIMIT else None)
