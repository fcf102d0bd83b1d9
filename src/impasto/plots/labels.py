"""Where the words inside a plot stand: names of reference lines and of curves, clear of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import altair as alt

from impasto.plots.frame import Cell, Chart, Rows, Rule, number, numbers, span, table
from impasto.plots.theme import LIGHT

Path = Sequence[tuple[float, float]]
"""A line in pixels of the plot, y downwards."""

LETTER = 5.7  # pixels of an average letter of a small text
LINE = 13.0  # pixels of its height
DOT = 4.0  # half the size of a point of a line
RIM = 4.0  # pixels left and right of a text that stay free
NEAR = 28.0  # pixels from the right edge within which a curve ends there


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the plot, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Square pixels that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)

    def outside(self, width: float, height: float) -> float:
        """Square pixels outside of a plot of this size."""
        return self.area - self.overlap(Box(0.0, 0.0, width, height))

    def crossed(self, path: Path) -> float:
        """Pixels of a line that lie inside.

        Example:
            >>> Box(0, 0, 10, 10).crossed([(-5, 5), (5, 5), (5, 20)])
            10.0
        """
        return sum(self._within(start, end) for start, end in pairwise(path))

    def _within(self, start: tuple[float, float], end: tuple[float, float]) -> float:
        """Of one straight piece, cut at one pair of sides after the other (Liang and Barsky 1984)."""
        first, last = 0.0, 1.0
        for at, to, low, high in ((start[0], end[0], self.left, self.right), (start[1], end[1], self.top, self.bottom)):
            if at == to:
                if not low <= at <= high:
                    return 0.0
                continue
            one, two = sorted(((low - at) / (to - at), (high - at) / (to - at)))
            first, last = max(first, one), min(last, two)
        return max(last - first, 0.0) * math.dist(start, end)

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class Name:
    """A word in a plot: where its left end, middle or right end stands, in pixels, at half its height."""

    text: str
    x: float
    y: float
    align: str
    letter: float = LETTER

    @property
    def box(self) -> Box:
        """What it covers."""
        width = len(self.text) * self.letter
        left = self.x - {"left": 0.0, "center": width / 2, "right": width}[self.align]
        return Box(left, self.y - LINE / 2, left + width, self.y + LINE / 2)


@dataclass(frozen=True, slots=True)
class Plane:
    """From numbers to pixels: the ranges of both axes and the size of a plot."""

    across: tuple[float, float]
    up: tuple[float, float]
    width: float
    height: float
    log: bool = False

    @classmethod
    def of(cls, x: alt.X, y: alt.Y, cell: Cell) -> Plane:
        """The plane of two channels with a fixed domain."""
        (left, right), (low, high) = x["scale"]["domain"], y["scale"]["domain"]
        return cls((left, right), (low, high), cell.width, cell.height, y["scale"].get("type") == "log")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        low, high = self.up
        if self.log:
            low, high, y = math.log(low), math.log(high), math.log(max(y, 1e-300))
        return (x - self.across[0]) / (self.across[1] - self.across[0]) * self.width, (high - y) / (
            high - low
        ) * self.height

    def back(self, x: float, y: float) -> tuple[float, float]:
        """The numbers of a place in pixels, inside or outside of the plot; of axes that are not logarithmic."""
        (left, right), (low, high) = self.across, self.up
        return left + x / self.width * (right - left), high - y / self.height * (high - low)

    def paths(self, rows: Rows) -> list[Path]:
        """The lines of a figure, one for each stretch of a series without a gap."""
        found: list[list[tuple[float, float]]] = []
        ordered = sorted(rows, key=lambda row: (str(row.get("series")), number(row, "x") or 0.0))
        for _, mine in groupby(ordered, key=lambda row: row.get("series")):
            found.append([])
            for row in mine:
                x, y = number(row, "x"), number(row, "y")
                if x is None or y is None:
                    found.append([])
                else:
                    found[-1].append(self.place(x, y))
        return [path for path in found if path]

    def level(self, value: float) -> Path:
        """A line across the plot."""
        _, down = self.place(self.across[0], value)
        return [(0.0, down), (self.width, down)]


def cost(
    name: Name, curves: Sequence[Path], levels: Sequence[Path], taken: Sequence[Box], plane: Plane, head: float = 0.0
) -> float:
    """How much a word covers of what it must not: lines and their points, other words, what is outside of the plot.

    Args:
        name: the word at its place.
        curves: lines with points.
        levels: lines without.
        taken: what other words cover.
        plane: of the plot.
        head: pixels above the plot that are free too.
    """
    box, free = name.box, Box(0.0, -head, plane.width, plane.height)
    rimmed = Box(box.left - RIM, box.top, box.right + RIM, box.bottom)
    covered = sum(rimmed.crossed(path) for path in (*curves, *levels))
    dots = sum(rimmed.overlap(Box(x - DOT, y - DOT, x + DOT, y + DOT)) for path in curves for x, y in path)
    return covered + (dots + sum(map(box.overlap, taken)) + box.area - box.overlap(free)) / LINE


def ruled(rules: Sequence[Rule], rows: Rows, plane: Plane) -> list[Name]:
    """The names of horizontal reference lines, each just above or below its own, clear of the curves.

    Ends are tried before the middle, and above before below; of the ends the one from which the curves keep away.
    """
    curves, levels = plane.paths(rows), [plane.level(float(rule["value"])) for rule in rules]
    found: list[Name] = []
    for place, rule in enumerate(rules):
        if not rule.get("name"):
            continue
        value, down = float(rule["value"]), levels[place][0][1]
        others = [level for i, level in enumerate(levels) if i != place]
        ends = [(2.0, "left"), (plane.width, "right")]
        if _room(rows, value, first=True) <= _room(rows, value, first=False):
            ends.reverse()
        middle = [(plane.width * share, "center") for share in (0.5, 0.35, 0.65)]
        tried = [
            Name(str(rule["name"]), x, down + side * (LINE / 2 + 1), align)
            for some in (ends, middle)
            for side in (-1, 1)
            for x, align in some
        ]
        taken = [name.box for name in found]
        found.append(min(tried, key=lambda name: round(cost(name, curves, others, taken, plane, head=LINE + 2), 6)))
    return found


def reference(
    rules: Sequence[Rule], cell: Cell, x: alt.X, y: alt.Y, rows: Rows, *, named: bool = True
) -> tuple[list[Chart], list[Chart]]:
    """Horizontal reference lines of a panel, to draw below the data, and their names, to draw above it."""
    mine = [rule for rule in rules if rule.get("panel") in (None, cell.name)]
    if not mine:
        return [], []
    data = table({"y": float(rule["value"])} for rule in mine)
    under = alt.Chart(data).mark_rule(color=LIGHT["rule"], strokeDash=[4, 3], strokeWidth=1).encode(y=y)
    names = ruled(mine, rows, Plane.of(x, y, cell)) if named else []
    return [under], [layer for name in names for layer in written(name)]


def written(name: Name, **mark: Any) -> list[Chart]:
    """A word as marks at its place."""
    text = alt.Chart(table([{"name": name.text}])).encode(
        x=alt.value(name.x), y=alt.value(name.y), text=alt.Text(field="name", type="nominal")
    )
    return haloed(text, align=name.align, baseline="middle", **mark)


def _room(rows: Rows, value: float, *, first: bool) -> float:
    """How far the nearest value of the first (or last) quarter of the x range is from a height."""
    low, high = span(numbers(rows, "x"))
    quarter = (high - low) / 4
    near = [
        abs(y - value)
        for row in rows
        if (x := number(row, "x")) is not None
        and (y := number(row, "y")) is not None
        and (x <= low + quarter if first else x >= high - quarter)
    ]
    return min(near, default=0.0)


def ended(ends: Sequence[tuple[str, float, float]], rules: Sequence[Rule], rows: Rows, plane: Plane) -> list[Name]:
    """The names of curves that end inside of the plot, each beside its end, clear of curves and reference lines.

    Args:
        ends: name and last point of each of these curves.
        rules: the reference lines, which have their names already.
        rows: of the whole plot.
        plane: of the plot.
    """
    curves, levels = plane.paths(rows), [plane.level(float(rule["value"])) for rule in rules]
    found: list[Name] = []
    for name, x, y in ends:
        taken = [one.box for one in (*ruled(rules, rows, plane), *found)]
        tried = _around(name, *plane.place(x, y))
        found.append(min(tried, key=lambda one: round(cost(one, curves, levels, taken, plane), 6)))
    return found


def _around(name: str, x: float, y: float) -> Iterator[Name]:
    """Places for the name of a curve: right of its end first, then around it, near before far."""
    letter = 6.4  # pixels, of a larger text
    for away in (9.0, 16.0, 24.0):
        yield Name(name, x + away, y, "left", letter)
        yield from (Name(name, x + away - 4, y + side * (LINE / 2 + away - 5), "left", letter) for side in (-1, 1))
        yield from (Name(name, x, y + side * (LINE / 2 + away - 3), "center", letter) for side in (-1, 1))
        yield Name(name, x - away + 4, y + LINE / 2 + away - 5, "right", letter)


def haloed(text: Chart, **mark: Any) -> list[Chart]:
    """A small text mark on a rim of paper, so that lines behind it do not strike it through."""
    look = {"fontSize": 11, "color": LIGHT["muted"], **mark}
    rim = {**look, "stroke": LIGHT["paper"], "strokeWidth": 3, "strokeOpacity": 0.85}
    return [text.mark_text(**rim), text.mark_text(**look)]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved a little, so that neighbours are `gap` apart, inside [low, high] where there is room.

    Example:
        >>> apart([10.0, 11.0, 50.0], 8.0, 0.0, 100.0)
        [6.5, 14.5, 50.0]
    """
    order = sorted(range(len(places)), key=lambda place: places[place])
    groups: list[list[int]] = []
    for place in order:
        groups.append([place])
        while len(groups) > 1 and _centre(groups[-1], places) - _centre(groups[-2], places) < (
            gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [
        _centre(members, places) + gap * (rank - (len(members) - 1) / 2)
        for members in groups
        for rank in range(len(members))
    ]
    floor = low
    for rank, wanted in enumerate(moved):
        moved[rank] = max(wanted, floor)
        floor = moved[rank] + gap
    ceiling = high
    for rank in reversed(range(len(moved))):
        moved[rank] = min(moved[rank], ceiling)
        ceiling = moved[rank] - gap
    return [moved[order.index(place)] for place in range(len(places))]


def _centre(members: Sequence[int], places: Sequence[float]) -> float:
    return sum(places[member] for member in members) / len(members)
