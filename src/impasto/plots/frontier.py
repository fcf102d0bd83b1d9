"""The drawing of accuracy against latency: intervals in both directions, the front, and what is on it, in a list."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import altair as alt

from impasto.plots.frame import (
    FORMAT,
    Canvas,
    Cell,
    Chart,
    Key,
    Rows,
    Rule,
    look,
    near,
    number,
    numbers,
    panels,
    renamed,
    span,
    table,
    titled,
)
from impasto.plots.labels import LETTER, Box, Name, Path, Plane, cost, haloed
from impasto.plots.theme import LIGHT
from impasto.result import Row

DOT = 5.0  # half the size of a point
CROWD = 10  # points of a panel up to which those behind the front are numbered too
FIGURE = 6.2  # pixels of a digit of a number at a point
LED = 13.0  # pixels from which on a line leads from a point to its number
BETWEEN = 4.0  # pixels between two numbers side by side
ROW = 15.0  # pixels of a line of the list under a panel
INDENT = 24.0  # pixels of its numbers
EDGE = 48.0  # pixels left of the plot that the list may use on a phone
GUTTER = 22.0  # pixels between its columns


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list under a panel: pixels from the plot's left edge and below the list's top.

    `number` is empty where the text of the line above goes on.
    """

    number: str
    text: str
    x: float
    y: float


def frontier(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "latency",
    y_title: str = "accuracy",
    rules: Sequence[Rule] = (),
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
    columns: int | None = None,
) -> Chart:
    """Points with intervals in both directions; a step joins the rows whose `frontier` is true.

    Those are numbered from left to right, and a list under the panel says what they are: they crowd together where the
    front is steep, and their names are long. Where few points are there, all of them are numbered.
    """
    key = Key.of(rows, canvas, series)

    def build(cell: Cell, mine: Rows) -> Chart:
        known = [row for row in mine if number(row, "x") is not None and number(row, "y") is not None]
        ours = [float(rule["value"]) for rule in rules if rule.get("panel") in (None, cell.name)]
        across = _domain(numbers(known, "x"), numbers(known, "x_low", "x_high"))
        up = _domain(numbers(known, "y") + ours, numbers(known, "low", "high"))
        x = alt.X(
            field="x",
            type="quantitative",
            scale=look(domain=list(across), nice=False, zero=False),
            axis=look(title=x_title, tickCount=max(3, cell.width // 70), format=FORMAT),
        )
        y = alt.Y(
            field="y",
            type="quantitative",
            scale=look(domain=list(up), nice=False, zero=False),
            axis=look(title=y_title if cell.left else None, tickCount=6, format=FORMAT),
        )
        colour = key.colour(rows)
        best = sorted((row for row in known if row.get("frontier")), key=lambda row: number(row, "x") or 0.0)
        layers: list[Chart] = []
        if ours:
            marks = alt.Chart(table({"y": value} for value in ours))
            layers.append(marks.mark_rule(color=LIGHT["rule"], strokeDash=[4, 3]).encode(y=y))
        if len(best) > 1:
            line = alt.Chart(table(best)).mark_line(interpolate="step-after", color=LIGHT["rule"], strokeWidth=1.5)
            layers.append(line.encode(x=x, y=y))
        tall = [row for row in known if number(row, "low") is not None and number(row, "high") is not None]
        broad = [row for row in known if number(row, "x_low") is not None and number(row, "x_high") is not None]
        stem = {"opacity": 0.45, "strokeWidth": 1.5, "clip": True}
        tall, broad = near(tall, up, "low", "high"), near(broad, across, "x_low", "x_high")
        stems, arms = (alt.Chart(table(some)).mark_rule(**stem) for some in (tall, broad))
        layers.append(stems.encode(x=x, y=renamed(y, "low"), y2=alt.Y2(field="high"), color=colour))
        layers.append(arms.encode(x=renamed(x, "x_low"), x2=alt.X2(field="x_high"), y=y, color=colour))
        dots = alt.Chart(table(known)).mark_point(filled=True, size=60, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour, shape=key.shape(rows)))
        plane = Plane(across, up, cell.width, cell.height)
        places = [plane.place(number(row, "x") or 0.0, number(row, "y") or 0.0) for row in known]
        chosen = numbered(known)
        step = _step([plane.place(*_point(row)) for row in best])
        names = placed(chosen, places, step, [plane.level(value) for value in ours], plane)
        layers += _numbers(names, [places[i] for i in chosen], plane, x, y)
        left, top = (0.0 if canvas.wide else -EDGE), cell.height + 52.0
        entries = listed([str(known[i].get("label")) for i in chosen], cell.width - left)
        layers += _list([replace(entry, x=left + entry.x, y=top + entry.y) for entry in entries], plane, x, y)
        return titled(alt.layer(*layers), cell)

    return panels(
        rows,
        canvas,
        build,
        height=330 if canvas.wide else 300,
        order=panel_order,
        columns=columns or 1,
        gap=44,
        margin=60,
    )


def numbered(rows: Rows) -> list[int]:
    """Which rows have a number, from left to right: those of the front, or all where there are few."""
    some = [i for i, row in enumerate(rows) if row.get("label") and (row.get("frontier") or len(rows) <= CROWD)]
    return sorted(some, key=lambda i: _point(rows[i]))


def placed(
    chosen: Sequence[int], places: Sequence[tuple[float, float]], step: Path, rules: Sequence[Path], plane: Plane
) -> list[Name]:
    """The numbers 1, 2, 3... of some points, each near its own, where they cover least.

    Args:
        chosen: the points that are numbered.
        places: all points, in pixels.
        step: the line that joins the front, in pixels.
        rules: reference lines, which a number may hide a bit of.
        plane: of the plot.
    """
    dots = [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    found: list[Name] = []
    for count, i in enumerate(chosen, 1):
        written = [name.box for name in found]
        taken = [*dots, *(replace(box, left=box.left - BETWEEN, right=box.right + BETWEEN) for box in written)]
        tried = list(_around(str(count), *places[i]))
        costs = [
            away + 3 * cost(name, [], [step], taken, plane, head=ROW) + sum(map(name.box.crossed, rules)) / 8
            for away, name in tried
        ]
        found.append(tried[min(range(len(tried)), key=costs.__getitem__)][1])
    return found


def _around(text: str, x: float, y: float) -> Iterator[tuple[float, Name]]:
    """Places for a number, and how much worse than the best ones they are, were they all free.

    A front runs from the lower left to the upper right, so that there is room at the upper left.
    """
    for away in (12.0, 15.0, 20.0, 26.0, 33.0):
        for turn in (0, 45, -45, 90, -90, 135, -135, 180):
            angle = math.radians(135 + turn)
            reach = away + abs(math.cos(angle)) * FIGURE * (len(text) - 1) / 2
            at = Name(text, x + reach * math.cos(angle), y - reach * math.sin(angle), "center", FIGURE)
            yield (away - 12) / 2 + abs(turn) / 180, at


def listed(texts: Sequence[str], width: float) -> list[Entry]:
    """Numbered texts in as many columns as fit, one below the other; too long ones go on in the next line.

    Example:
        >>> [(entry.number, entry.x, entry.y) for entry in listed(["a", "b", "c"], 95)]
        [('1', 0.0, 0.0), ('2', 0.0, 15.0), ('3', 51.7, 0.0)]
    """
    letters = max(int((width - INDENT) / LETTER), 8)
    broken = [textwrap.wrap(text, letters) or [""] for text in texts]
    widest = INDENT + LETTER * max((len(line) for lines in broken for line in lines), default=0)
    columns = max(1, min(len(texts), int((width + GUTTER) // (widest + GUTTER))))
    tall = -(-sum(map(len, broken)) // columns)
    found: list[Entry] = []
    column = row = 0
    for count, lines in enumerate(broken, 1):
        if row and row + len(lines) > tall and column < columns - 1:
            column, row = column + 1, 0
        for place, line in enumerate(lines):
            found.append(Entry("" if place else str(count), line, round(column * (widest + GUTTER), 2), row * ROW))
            row += 1
    return found


def _step(front: Sequence[tuple[float, float]]) -> Path:
    """The line that joins the front: to the right first, then up or down."""
    corners = [(right, y) for (_, y), (right, _) in pairwise(front)]
    return [point for pair in zip(front, [*corners, *front[-1:]], strict=True) for point in pair]


def _point(row: Row) -> tuple[float, float]:
    return number(row, "x") or 0.0, number(row, "y") or 0.0


def _domain(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: all points, and intervals as far as a third of the points' range beyond them."""
    low, high = span(values)
    room = (high - low) / 3
    low, high = span([low, high, *[min(max(end, low - room), high + room) for end in ends]])
    pad = (high - low) * 0.06
    return low - pad, high + pad


def _numbers(
    names: Sequence[Name], points: Sequence[tuple[float, float]], plane: Plane, x: alt.X, y: alt.Y
) -> list[Chart]:
    """The numbers as marks on a rim of paper, and short lines to those that stand farther away from their points."""
    leaders = []
    for name, point in zip(names, points, strict=True):
        if math.dist((name.x, name.y), point) > LED + FIGURE * (len(name.text) - 1) / 2:
            (left, down), (right, up) = plane.back(*point), plane.back(name.x, name.y)
            leaders.append({"x": left, "y": down, "x_to": right, "y_to": up})
    line = alt.Chart(table(leaders)).mark_rule(color=LIGHT["rule"], strokeWidth=0.8)
    layers = [line.encode(x=x, y=y, x2=alt.X2(field="x_to"), y2=alt.Y2(field="y_to"))] if leaders else []
    text = _texts([(name.text, name.x, name.y) for name in names], plane, x, y)
    return [*layers, *haloed(text, align="center", baseline="middle", color=LIGHT["ink"], fontWeight="bold")]


def _list(entries: Sequence[Entry], plane: Plane, x: alt.X, y: alt.Y) -> list[Chart]:
    """The list as marks below the plot."""
    mark = {"baseline": "middle", "fontSize": 11, "color": LIGHT["ink"]}
    numbers = _texts([(entry.number, entry.x + INDENT - 8, entry.y) for entry in entries], plane, x, y)
    texts = _texts([(entry.text, entry.x + INDENT, entry.y) for entry in entries], plane, x, y)
    return [numbers.mark_text(align="right", fontWeight="bold", **mark), texts.mark_text(align="left", **mark)]


def _texts(texts: Sequence[tuple[str, float, float]], plane: Plane, x: alt.X, y: alt.Y) -> Chart:
    """Texts at places in pixels, to be marked."""
    rows = [dict(zip(("x", "y"), plane.back(across, down), strict=True), name=text) for text, across, down in texts]
    return alt.Chart(table(rows)).encode(x=x, y=y, text=alt.Text(field="name", type="nominal"))
