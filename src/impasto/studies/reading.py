"""Evidence read as tables of normalised scores, and the words that answers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from impasto.result import Estimate, Verdict, fixed
from impasto.studies.evidence import Cell, Evidence, Task
from impasto.studies.protocol import METHODS, moderate
from impasto.studies.table import Floats, Statistic, Table, middle_of_tasks

PAPER_ORDER = ("middle_repeat", "skip", "parallel", "reverse", "random_order", "looped_parallel")
"""The methods as the paper found them on its 32-layer model, from the most to the least harmful."""

KEPT = 0.8
"""What counts as a small cost: at least four fifths of what the full model has above guessing are kept."""

SLIGHT = 0.05
"""A difference of normalised scores that nobody would care about."""


MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Found:
    """What the evidence says to a question."""

    verdict: Verdict
    effect: str
    estimate: Estimate | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """Evidence with the tables that questions and figures are read from."""

    evidence: Evidence

    @property
    def depth(self) -> int:
        """The model's number of layers."""
        return self.evidence.depth

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that scores are summarised over."""
        return self.evidence.complete

    def cells(self, *methods: str) -> tuple[Cell, ...]:
        """All points of some methods, but of looped parallel only those with the curves' number of iterations."""
        loops = self.evidence.protocol.iterations
        return tuple(
            cell
            for method in methods
            for cell in self.evidence.cells
            if cell.method == method and (method != "looped_parallel" or cell.parameter == loops)
        )

    @cached_property
    def curves(self) -> Table:
        """The six methods that the paper draws over the number of affected layers."""
        return self.table(self.cells(*PAPER_ORDER))

    @cached_property
    def layers(self) -> Table:
        """One layer left out, and neighbours swapped."""
        return self.table(self.cells("skip_one", "swap"))

    @cached_property
    def repeats(self) -> Table:
        """The middle run several times, as a block and layer by layer."""
        return self.table(self.cells("block_repeat", "inplace_repeat"))

    @cached_property
    def loops(self) -> Table:
        """Looped parallel with every number of iterations."""
        return self.table([cell for cell in self.evidence.cells if cell.method == "looped_parallel"])

    def table(self, cells: Sequence[Cell]) -> Table:
        """Normalised scores of cells on the tasks that are summarised."""
        return Table.of(self.evidence, self.tasks, cells)

    def inner(self, method: str) -> tuple[Cell, ...]:
        """Measured cells of one layer left out (or swapped with the next) inside the middle half of the depth."""
        edge = self.depth // 4
        stop = self.depth - edge - (method == "swap")
        return tuple(
            cell
            for cell in self.layers.cells
            if cell.method == method and cell.parameter is not None and edge <= cell.parameter < stop
        )

    def measured(self, method: str) -> list[Cell]:
        """Measured cells of one of the six methods, from the narrowest middle to the widest."""
        return sorted((cell for cell in self.curves.cells if cell.method == method), key=lambda cell: cell.affected)

    def compared(self, *methods: str) -> dict[str, tuple[Cell, ...]]:
        """Cells of methods at the moderate widths at which all of them were measured, in the same order.

        Methods without any measured cell are left out.
        """
        by_width = {
            method: {cell.affected: cell for cell in self.curves.cells if cell.method == method} for method in methods
        }
        by_width = {method: found for method, found in by_width.items() if found}
        if not by_width:
            return {}
        shared = set.intersection(*(set(found) for found in by_width.values()))
        widths = moderate(self.depth, shared)
        return {method: tuple(found[width] for width in widths) for method, found in by_width.items()} if widths else {}


def mean_over(columns: Sequence[int]) -> Statistic:
    """The median over tasks, averaged over some columns."""

    def statistic(table: Floats) -> Floats:
        kept: Floats = middle_of_tasks(table[..., list(columns)]).mean(axis=-1)
        return kept

    return statistic


def contrast(better: Sequence[int], worse: Sequence[int]) -> Statistic:
    """By how much some columns are above others, each side as in `mean_over`."""
    first, second = mean_over(better), mean_over(worse)
    return lambda table: first(table) - second(table)


def said(value: float, digits: int = 2) -> str:
    """A number in a sentence, with a real minus sign; one that is not zero never looks like zero.

    Example:
        >>> said(-0.125), said(-0.001)
        ('−0.12', '−0.001')
    """
    return fixed(value, digits).replace("-", MINUS)


def with_interval(estimate: Estimate) -> str:
    """A number with its interval in a sentence; an end that does not exist is infinite."""
    low = MINUS + "\u221e" if estimate.low is None else said(estimate.low)
    high = "\u221e" if estimate.high is None else said(estimate.high)
    return f"{said(estimate.value)} [{low}, {high}]"


def listed(words: Sequence[str], most: int = 8) -> str:
    """Words in a sentence: "a", "a and b", "a, b and c"; beyond so many only their number is given."""
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def named(method: str, iterations: int) -> str:
    """A method's title in figures."""
    return f"{METHODS[method]} (k = {iterations})" if method == "looped_parallel" else METHODS[method]


def widths_of(cells: Sequence[Cell]) -> str:
    """The widths of some cells in a sentence: "M = 5 and 7"."""
    return f"M = {listed([str(width) for width in sorted({cell.affected for cell in cells})], 20)}"
