"""The drawing of accuracy against latency: intervals in both directions, the front, and labels that keep apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    number,
    numbers,
    panels,
    renamed,
    span,
    table,
    titled,
)
from impasto.plots.theme import LIGHT

LETTER = 5.7  # pixels of an average letter of a label
LINE = 13.0  # pixels of its height
DOT = 5.0  # half the size of a point
CROWD = 10  # points of a panel up to which those behind the front are labelled too, where there is room
MOST = 44  # letters of a label


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

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class Label:
    """Where a text stands: the middle of its left or right end in pixels, and whether a line leads to its point."""

    row: int
    text: str
    x: float
    y: float
    align: str
    led: bool

    @property
    def box(self) -> Box:
        """What the text covers."""
        width = len(self.text) * LETTER
        left = self.x if self.align == "left" else self.x - width if self.align == "right" else self.x - width / 2
        return Box(left, self.y - LINE / 2, left + width, self.y + LINE / 2)


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
    """Points with intervals in both directions; a step joins the rows whose `frontier` is true, and names them.

    Other points are named where few are there and a label finds room.
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
            axis=look(title=x_title if cell.bottom else None, tickCount=max(3, cell.width // 70), format=FORMAT),
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
        stems, arms = (alt.Chart(table(some)).mark_rule(**stem) for some in (tall, broad))
        layers.append(stems.encode(x=x, y=renamed(y, "low"), y2=alt.Y2(field="high"), color=colour))
        layers.append(arms.encode(x=renamed(x, "x_low"), x2=alt.X2(field="x_high"), y=y, color=colour))
        dots = alt.Chart(table(known)).mark_point(filled=True, size=60, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour, shape=key.shape(rows)))
        places = [_pixels(row, across, up, cell) for row in known]
        labels = placed(known, places, cell.width, cell.height)
        layers += _written(labels, places, across, up, cell, x, y)
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


def placed(
    rows: Rows, places: Sequence[tuple[float, float]], width: float, height: float, most: int = MOST
) -> list[Label]:
    """Labels of points such that none covers another label, a point, or the edge of the plot.

    Points of the front come first and are always labelled, at the least bad place if there is no good one; others are
    left without a label then.

    Args:
        rows: with `label` and `frontier`.
        places: the points in pixels.
        width: of the plot.
        height: of the plot.
        most: letters after which a label is cut.
    """
    dots = [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    step = _steps([place for row, place in zip(rows, places, strict=True) if row.get("frontier")])
    longest = min(most, max(6, int(0.6 * width / LETTER)))
    found: list[Label] = []

    def cost(label: Label) -> tuple[float, float]:
        """What the label covers that it must not, and what it had better not."""
        box, way = label.box, _way(*places[label.row], label)
        bad = sum(box.overlap(other.box) for other in found) + box.outside(width, height)
        bad += sum(box.overlap(dot) for place, dot in enumerate(dots) if place != label.row or label.led)
        bad += 20 * sum(other.box.overlap(bit) > 0 for other in found for bit in way)
        bad += 20 * sum(dot.overlap(bit) > 0 for place, dot in enumerate(dots) for bit in way if place != label.row)
        bad += 20 * sum(box.overlap(bit) > 0 for other in found for bit in _way(*places[other.row], other))
        return bad, sum(box.overlap(part) for part in step)

    for i in sorted(range(len(rows)), key=lambda i: (not rows[i].get("frontier"), places[i][1], places[i][0])):
        text, best = str(rows[i].get("label") or ""), bool(rows[i].get("frontier"))
        if not text or (not best and len(rows) > CROWD):
            continue
        text = text if len(text) <= longest else text[: longest - 1] + "…"
        near: list[tuple[float, Label]] = []
        far: list[tuple[float, Label]] = []
        for distance, label in _candidates(i, text, *places[i]):
            (far if label.led else near).append((distance, label))
        tried = [(*cost(label), distance, label) for distance, label in near]
        if best and all(bad for bad, *_ in tried):
            for distance, label in far:
                tried.append((*cost(label), distance, label))
                if not tried[-1][0]:
                    break
        bad, _, _, label = min(tried, key=lambda one: one[0] * 10 + one[1] + one[2])
        if best or not bad:
            found.append(label)
    return found


def _steps(front: Sequence[tuple[float, float]]) -> list[Box]:
    """The line that joins the front, as thin rectangles."""
    ordered = sorted(front)
    return [
        part
        for (x, y), (right, up) in pairwise(ordered)
        for part in (Box(x, y - 1, right, y + 1), Box(right - 1, min(up, y), right + 1, max(up, y)))
    ]


def _way(x: float, y: float, label: Label) -> list[Box]:
    """Dots along the line that leads from a point to its label; none where the label stands beside it."""
    if not label.led:
        return []
    bits = 8
    middle = [((bits - i) / bits, i / bits) for i in range(1, bits)]
    return [
        Box(at - 1, down - 1, at + 1, down + 1)
        for at, down in ((a * x + b * label.x, a * y + b * label.y) for a, b in middle)
    ]


def _candidates(row: int, text: str, x: float, y: float) -> Iterator[tuple[float, Label]]:
    """Places for a label and how far they are: beside its point, above and below it, and farther away with a line.

    A front runs from the lower left to the upper right, so that the upper left is where there is room.
    """
    beside = DOT + 4
    yield 0.0, Label(row, text, x - beside, y - LINE / 2 - 3, "right", led=False)
    yield 1.0, Label(row, text, x + beside, y + LINE / 2 + 3, "left", led=False)
    yield 2.0, Label(row, text, x + beside, y - LINE / 2 - 3, "left", led=False)
    yield 3.0, Label(row, text, x - beside, y + LINE / 2 + 3, "right", led=False)
    for down in (-1, 1):
        yield 4.0, Label(row, text, x, y + down * (DOT + LINE / 2 + 2), "center", led=False)
    for away in range(20, 140, 15):
        for side, align in ((-1, "right"), (1, "left")):
            for slant in (0.3, 0.8, 2.0):
                place = x + side * slant * away
                for down in (-1, 1):
                    yield float(10 + away * (1 + slant)), Label(row, text, place, y + down * away, align, led=True)


def _domain(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: all points, and intervals as far as a third of the points' range beyond them."""
    low, high = span(values)
    room = (high - low) / 3
    low, high = span([low, high, *[min(max(end, low - room), high + room) for end in ends]])
    pad = (high - low) * 0.06
    return low - pad, high + pad


def _pixels(row: object, across: tuple[float, float], up: tuple[float, float], cell: Cell) -> tuple[float, float]:
    x, y = (number(row, field) or 0.0 for field in ("x", "y"))  # type: ignore[arg-type]
    return (
        (x - across[0]) / (across[1] - across[0]) * cell.width,
        (up[1] - y) / (up[1] - up[0]) * cell.height,
    )


def _written(
    labels: Sequence[Label],
    places: Sequence[tuple[float, float]],
    across: tuple[float, float],
    up: tuple[float, float],
    cell: Cell,
    x: alt.X,
    y: alt.Y,
) -> list[Chart]:
    """The labels as text marks on a rim of paper, and the lines that lead to them."""

    def back(at: float, down: float) -> tuple[float, float]:
        return (
            across[0] + at / cell.width * (across[1] - across[0]),
            up[1] - down / cell.height * (up[1] - up[0]),
        )

    layers: list[Chart] = []
    leaders = []
    for label in labels:
        if label.led:
            (px, py), (tx, ty) = places[label.row], (label.x, label.y)
            one, two = back(px, py), back(tx - (3 if label.align == "left" else -3), ty)
            leaders.append({"x": one[0], "y": one[1], "x_to": two[0], "y_to": two[1]})
    if leaders:
        line = alt.Chart(table(leaders)).mark_rule(color=LIGHT["rule"], strokeWidth=0.8, opacity=0.8)
        layers.append(line.encode(x=x, y=y, x2=alt.X2(field="x_to"), y2=alt.Y2(field="y_to")))
    for align in ("left", "right", "center"):
        mine = [
            dict(zip(("x", "y"), back(label.x, label.y), strict=True), name=label.text)
            for label in labels
            if label.align == align
        ]
        if mine:
            base = alt.Chart(table(mine)).encode(x=x, y=y, text=alt.Text(field="name", type="nominal"))
            mark = {"align": align, "baseline": "middle", "fontSize": 11}
            layers.append(base.mark_text(stroke=LIGHT["paper"], strokeWidth=3, strokeOpacity=0.85, **mark))
            layers.append(base.mark_text(color=LIGHT["ink"], **mark))
    return layers
