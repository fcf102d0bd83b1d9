"""Looped parallel: how many iterations are best for which width."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from impasto.result import Estimate
from impasto.statistics import verdict
from impasto.studies.reading import MINUS, Found, Reading, said, with_interval
from impasto.studies.table import Floats, Table, middle_of_tasks

PROPORTIONAL = 0.1
"""Iterations more for every layer of width, from which on the best number is said to grow with the width."""


@dataclass(frozen=True, eq=False)
class Loops:
    """The heat map: scores by width and iterations, the best number of iterations per width, the line through them.

    Attributes:
        table: of all cells.
        widths: columns M, ascending.
        iterations: rows k, ascending.
        places: column of the table for each [width, iterations]; -1 where nothing was measured.
        clear: widths whose best cell is clearly above guessing; only they have a best number of iterations.
        best: that number for each of `clear`.
        slope: of the least-squares line through them, with its interval; None for fewer than three.
        intercept: of the same line.
    """

    table: Table
    widths: tuple[int, ...]
    iterations: tuple[int, ...]
    places: NDArray[np.int64]
    clear: tuple[int, ...]
    best: tuple[int, ...]
    slope: Estimate | None
    intercept: float | None

    @classmethod
    def of(cls, reading: Reading) -> Loops | None:
        """The heat map of a reading; None where it was not run."""
        table = reading.loops
        counts = Counter(cell.affected for cell in table.cells)
        widths = tuple(sorted(width for width, count in counts.items() if count > 2))
        if not widths:
            return None
        cells = {(cell.affected, cell.parameter): place for place, cell in enumerate(table.cells)}
        iterations = tuple(sorted({cell.parameter or 0 for cell in table.cells if cell.affected in widths}))
        places = np.array([[cells.get((width, k), -1) for k in iterations] for width in widths])

        def choose(t: Floats) -> tuple[Floats, NDArray[np.int64]]:
            """Best score and its place among the iterations, [..., widths]; the fewest iterations of equal ones."""
            scores = np.where(places < 0, -np.inf, middle_of_tasks(t)[..., places])
            return scores.max(axis=-1), scores.argmax(axis=-1)

        tops = table.estimates(lambda t: choose(t)[0])
        rows = [row for row, top in enumerate(tops) if verdict(top) == "yes"]
        clear = tuple(widths[row] for row in rows)
        steps = np.array(iterations, np.float64)
        best = tuple(int(steps[place]) for place in choose(table.values[None])[1][0][rows])
        if len(rows) < 3:
            return cls(table, widths, iterations, places, clear, best, None, None)
        lever = np.array(clear, np.float64) - np.mean(clear)
        lever /= np.square(lever).sum()
        slope = table.estimate(lambda t: np.asarray(steps[choose(t)[1][..., rows]] @ lever, np.float64))
        intercept = float(np.mean(best) - slope.value * np.mean(clear))
        return cls(table, widths, iterations, places, clear, best, slope, intercept)


def iterations_by_width(reading: Reading) -> Found | None:
    """Whether wider groups need more iterations."""
    loops = Loops.of(reading)
    if loops is None:
        return None
    pairs = ", ".join(f"{k} for M = {width}" for width, k in zip(loops.clear, loops.best, strict=True))
    if loops.slope is None:
        effect = f"Fewer than three widths score clearly above guessing, so there is no line to fit; best k: {pairs}."
        return Found("unclear", effect if loops.clear else effect.replace("; best k: ", ""))
    intercept = loops.intercept or 0.0
    effect = (
        f"The best number of iterations k is {pairs}: {with_interval(loops.slope)} more for every layer of width "
        f"(k = {said(loops.slope.value)} M {'+' if intercept >= 0 else MINUS} {said(abs(intercept))})."
    )
    return Found(verdict(loops.slope, PROPORTIONAL), effect, loops.slope)
