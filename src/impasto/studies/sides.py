"""One run as a comparison sees it: its scores as curves along the model, each point and mean with its resamples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from impasto.result import Estimate
from impasto.statistics import LEVEL
from impasto.studies.evidence import Cell, Evidence
from impasto.studies.protocol import METHODS
from impasto.studies.reading import PAPER_ORDER, Reading, named
from impasto.studies.table import LIMIT, Floats, Table, middle_of_tasks


@dataclass(frozen=True, eq=False)
class Number:
    """A number with its resamples, [resamples]."""

    value: float
    draws: Floats

    def estimate(self, comparisons: int = 1) -> Estimate:
        """With its interval; the intervals of so many comparisons hold for all of them at once (Bonferroni)."""
        tail = (1 - LEVEL) / 2 / comparisons
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return Estimate(self.value, float(low) if low > -LIMIT else None, float(high) if high < LIMIT else None)

    def __sub__(self, other: Number) -> Number:
        return Number(self.value - other.value, self.draws - other.draws)


@dataclass(frozen=True, eq=False)
class Curve:
    """A score along the model.

    Attributes:
        places: ascending shares of the model, [points].
        values: [points].
        draws: resamples, [resamples, points].
    """

    places: Floats
    values: Floats
    draws: Floats

    def at(self, places: Floats) -> Curve:
        """The same curve at other places inside its own, straight between its points."""
        weights = np.stack([np.interp(places, self.places, one) for one in np.eye(len(self.places))])
        return Curve(places, self.values @ weights, self.draws @ weights)

    def mean(self) -> Number:
        """Average height: the area under the curve divided by its length."""
        length = self.places[-1] - self.places[0]
        area, areas = (np.trapezoid(each, self.places, axis=-1) for each in (self.values, self.draws))
        return Number(float(area / length), np.asarray(areas / length, np.float64))

    def points(self) -> list[Estimate]:
        """Every point with its interval."""
        return [Number(float(v), d).estimate() for v, d in zip(self.values, self.draws.T, strict=True)]


def on_one_grid(curves: Sequence[Curve]) -> list[Curve]:
    """Curves at the same places: those of the curve with the fewest, as far as all of them reach.

    A mean over a coarse grid and one over a fine grid differ by the grids alone; on one grid they do not.
    """
    first, last = max(one.places[0] for one in curves), min(one.places[-1] for one in curves)
    grid = min((one.places[(one.places >= first) & (one.places <= last)] for one in curves), key=len)
    return [one.at(grid) for one in curves] if len(grid) > 1 else []


@dataclass(frozen=True, eq=False)
class Side:
    """One run of a comparison.

    Attributes:
        name: what the page calls it.
        place: among the runs, from 0.
        evidence: what it measured on the common tasks.
    """

    name: str
    place: int
    evidence: Evidence

    @cached_property
    def reading(self) -> Reading:
        """The evidence read as tables."""
        return Reading(self.evidence)

    @property
    def depth(self) -> int:
        """The model's number of layers T."""
        return self.evidence.depth

    def title(self, method: str) -> str:
        """A method's title; other numbers of iterations are another method."""
        return named(method, self.evidence.protocol.iterations)

    def share(self, cell: Cell) -> float:
        """The layers that a cell affects, in percent of all."""
        return 100 * cell.affected / self.depth

    def along(self, cell: Cell) -> float:
        """Where the layer of a cell lies, from 0 (the first) to 1 (the last); two swapped ones at their middle."""
        return ((cell.parameter or 0) + (0.5 if cell.method == "swap" else 0.0)) / (self.depth - 1)

    @cached_property
    def methods(self) -> Mapping[str, Curve]:
        """By title, the score against the share of affected layers in percent; at 0 it is the full model's."""
        found = {}
        for method in PAPER_ORDER:
            if cells := self.reading.measured(method):
                curve = self._curve(self.reading.curves, cells, map(self.share, cells))
                untouched = np.ones((len(curve.draws), 1))
                found[self.title(method)] = Curve(
                    np.append(0.0, curve.places), np.append(1.0, curve.values), np.hstack([untouched, curve.draws])
                )
        return found

    @cached_property
    def layers(self) -> Mapping[str, Curve]:
        """By title, the score against the relative depth of the layer that is left out, or of the pair swapped."""
        found = {}
        for method in ("skip_one", "swap"):
            cells = [cell for cell in self.reading.layers.cells if cell.method == method]
            cells.sort(key=self.along)
            if len(cells) > 1:
                found[METHODS[method]] = self._curve(self.reading.layers, cells, map(self.along, cells))
        return found

    def _curve(self, table: Table, cells: Sequence[Cell], places: Iterable[float]) -> Curve:
        columns = table.at(cells)
        values, draws = middle_of_tasks(table.values)[columns], middle_of_tasks(table.draws)[:, columns]
        # In another order, so that no draw of one model goes with a draw of another.
        order = np.random.default_rng([2, self.place]).permutation(len(draws))
        return Curve(np.array(list(places), np.float64), values, draws[order])


def mean_scores(sides: Sequence[Side]) -> dict[str, dict[str, Number]]:
    """By method and model, the mean score over the common shares; only methods that two models have."""
    found = {}
    for title in titles_of(sides):
        mine = [side for side in sides if title in side.methods]
        curves = on_one_grid([side.methods[title] for side in mine]) if len(mine) > 1 else []
        if curves:
            found[title] = {side.name: curve.mean() for side, curve in zip(mine, curves, strict=True)}
    return found


def titles_of(sides: Sequence[Side]) -> list[str]:
    """Titles of all methods over a share of the layers, in the paper's order."""
    return list(dict.fromkeys(side.title(method) for method in PAPER_ORDER for side in sides))
