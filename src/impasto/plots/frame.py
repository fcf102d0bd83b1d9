"""Pieces that several drawings share: canvas, panels, axes, legend, lines with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from impasto.plots.theme import looks
from impasto.result import Row

FORMAT = ",~r"  # numbers on axes: no more digits than the step between labels needs
Chart = Any  # any of altair's chart types: single, layered, concatenated
Rows = Sequence[Row]
Look = dict[str, Any]
Rule = Mapping[str, Any]
"""A reference line: `value`, optional `name` written above it, optional `panel` that it belongs to."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """The room for one figure: its width in CSS pixels and whether panels may stand side by side."""

    width: int
    wide: bool


WIDE = Canvas(820, wide=True)
NARROW = Canvas(360, wide=False)


@dataclass(frozen=True, slots=True)
class Cell:
    """The place of one panel in a figure: name, plot size in pixels, and which edges of the grid it touches."""

    name: str | None
    width: int
    height: int
    first: bool  # the first panel of all
    left: bool  # in the first column
    bottom: bool  # nothing below it


def names(rows: Rows, field: str, order: Sequence[str] | None = None) -> list[str]:
    """The distinct texts in a field: first all of `order`, then others as they first appear."""
    seen = dict.fromkeys(order or ())
    seen.update(dict.fromkeys(row[field] for row in rows if row.get(field) is not None))
    return list(seen)


def panels(
    rows: Rows,
    canvas: Canvas,
    build: Callable[[Cell, Rows], Chart],
    *,
    height: int,
    order: Sequence[str] | None = None,
    columns: int | None = None,
    margin: int = 56,
    gap: int = 26,
    aspect: float | None = None,
) -> Chart:
    """One chart per value of the field `panel`, in a grid that fills the canvas.

    Args:
        rows: rows of the whole figure; without a `panel` there is one panel without a name.
        canvas: the room.
        build: draws one panel from its cell and its rows.
        height: plot height of a panel in pixels.
        order: names of panels in the order wanted; those without rows are left out.
        columns: panels in a row; by default as many as read well on the canvas.
        margin: pixels left of the grid for the axis of the first column.
        gap: pixels between columns.
        aspect: when given, the plot height is at most the plot width divided by this.
    """
    present = [name for name in names(rows, "panel", order) if any(row.get("panel") == name for row in rows)]
    if not present:
        cell = _cell(None, 0, 1, 1, canvas, height, margin, gap, aspect)
        return alt.concat(build(cell, rows))
    across = columns or (_columns(len(present)) if canvas.wide else 1)
    across = min(across, len(present))
    charts = []
    for place, name in enumerate(present):
        cell = _cell(name, place, len(present), across, canvas, height, margin, gap, aspect)
        charts.append(build(cell, [row for row in rows if row.get("panel") == name]))
    return alt.concat(*charts, columns=across, spacing={"row": 20, "column": gap}, align="each")


def _columns(count: int) -> int:
    """Panels in a row of a wide figure, so that the last row is as full as can be."""
    if count <= 3:
        return count
    return 3 if count in (5, 6, 9) else 4


def _cell(
    name: str | None,
    place: int,
    count: int,
    across: int,
    canvas: Canvas,
    height: int,
    margin: int,
    gap: int,
    aspect: float | None,
) -> Cell:
    width = (canvas.width - margin - 12 - gap * (across - 1)) // across
    return Cell(
        name=name,
        width=width,
        height=height if aspect is None else min(height, round(width / aspect)),
        first=place == 0,
        left=place % across == 0,
        bottom=place + across >= count,
    )


def titled(chart: Chart, cell: Cell) -> Chart:
    """The chart at its cell's size, with the panel's name above it."""
    chart = chart.properties(width=cell.width, height=cell.height)
    if cell.name is None:
        return chart
    return chart.properties(title=look(text=cell.name, limit=cell.width))


def look(**properties: Any) -> Look:
    """Properties of an axis, scale, legend or title, as Vega-Lite names them.

    A plain mapping, for altair copies its own classes, with every property that is not set, at every step.
    """
    return properties


def table(rows: Iterable[Row]) -> alt.Data:
    """Rows as the data of a chart.

    As one JSON text: altair copies and validates nested values again and again (three quarters of the time of a
    report), but leaves a text alone.
    """
    return alt.Data(values=json.dumps([dict(row) for row in rows]), format=alt.JsonDataFormat(type="json"))


def number(row: Row, field: str) -> float | None:
    """A finite number of a row, or None where it is missing or undefined."""
    value = row.get(field)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def numbers(rows: Rows, *fields: str) -> list[float]:
    """All finite numbers in some fields."""
    return [value for row in rows for field in fields if (value := number(row, field)) is not None]


def near(rows: Rows, domain: Sequence[float], *fields: str) -> list[Row]:
    """Rows in which some numbers lie at most as far outside a domain as it is long: enough to be cut off there.

    Programs that make pictures of drawings leave out whole layers in which something lies millions of pixels away.
    """
    low, high = domain[0] - (domain[1] - domain[0]), domain[1] + (domain[1] - domain[0])
    return [{**row, **{f: min(max(x, low), high) for f in fields if (x := number(row, f)) is not None}} for row in rows]


def span(values: Sequence[float], fallback: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Smallest and largest value, drawn apart where they are equal."""
    if not values:
        return fallback
    low, high = min(values), max(values)
    if low < high:
        return low, high
    pad = abs(low) / 2 or 0.5
    return low - pad, high + pad


def fit(rows: Rows, rules: Sequence[Rule], given: Sequence[float] | None = None) -> tuple[float, float]:
    """The y range of a chart: all values and reference lines, and intervals up to a quarter beyond them.

    A very wide interval of one doubtful point would squeeze everything else flat, so it is cut at the frame. Where all
    values are equal, their intervals make the range, or where there are none a tenth of the value on either side.
    """
    if given is not None:
        return float(given[0]), float(given[1])
    values, known = numbers(rows, "y") + [float(rule["value"]) for rule in rules], numbers(rows, "low", "high")
    if values and _flat(values):
        values += known
        if _flat(values):
            around = abs(values[0]) / 10 or 0.5
            values += [values[0] - around, values[0] + around]
    low, high = span(values)
    room = (high - low) / 4
    ends = [value for value in known if low - room <= value <= high + room]
    beyond = [value for value in known if not low - room <= value <= high + room]
    edges = [min(max(value, low - room), high + room) for value in beyond]
    low, high = span([low, high, *ends, *edges])
    pad = (high - low) * 0.04
    return low - pad, high + pad


def _flat(values: Sequence[float]) -> bool:
    """Whether values differ by no more than sums of floating-point numbers do."""
    return max(values) - min(values) <= 1e-9 * max(map(abs, values)) + 1e-12


def x_axis(cell: Cell, title: str, rows: Rows, *, pad: float = 0.0) -> alt.X:
    """The x axis (field `x`) for all rows of a figure; labelled under the lowest panel of a column only."""
    low, high = span(numbers(rows, "x"))
    ticks = x_ticks(numbers(rows, "x"), max(2, min(10, cell.width // 26)))
    axis = look(
        title=title if cell.bottom else None,
        labels=cell.bottom,
        values=ticks,
        format=",d" if whole_numbers(ticks) else FORMAT,
        labelOverlap=False,
    )
    scale = look(domain=[low - pad, high + pad], nice=False, zero=False)
    return alt.X(field="x", type="quantitative", axis=axis, scale=scale)


def x_ticks(values: Sequence[float], most: int) -> list[float]:
    """Where to label an axis: whole values that there are, or round steps where they follow each other or are broken.

    Example:
        >>> x_ticks([1, 3, 5, 7, 9, 11, 13, 15, 17], 5)
        [1, 5, 9, 13, 17]
        >>> x_ticks([5.6, 16.7, 27.8, 94.4], 5)
        [20.0, 40.0, 60.0, 80.0]
        >>> x_ticks([1, 3, 10, 30, 100, 300, 1000], 10)
        [1, 100, 300, 1000]
    """
    distinct = sorted(set(values))
    if not whole_numbers(distinct):
        return round_ticks(distinct[0], distinct[-1], most)
    if len(distinct) > 1 and distinct == [distinct[0] + place for place in range(len(distinct))]:
        return list(whole_ticks(distinct[0], distinct[-1], most))
    chosen: list[float] = []
    for value in thin(distinct, most):
        if not chosen or value - chosen[-1] >= (distinct[-1] - distinct[0]) / (2 * most):
            chosen.append(value)
    return chosen


def whole_numbers(values: Sequence[float]) -> bool:
    """Whether no value is broken, as numbers of layers are and shares of them are not."""
    return all(float(value).is_integer() for value in values)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most `most + 1` of them.

    Example:
        >>> round_ticks(0.0, 1.0, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not low < high:
        return [low]
    least = (high - low) / max(most, 1)
    power = math.floor(math.log10(least))
    steps = ((digit, power + more) for more in (0, 1) for digit in (1, 2, 5))
    digit, power = next((d, p) for d, p in (*steps, (1, power + 2)) if d * 10.0**p >= least * (1 - 1e-9))
    first, last = (low / (digit * 10.0**power), high / (digit * 10.0**power))
    return [
        round(count * digit * 10.0**power, max(0, -power))
        for count in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
    ]


def thin(values: Sequence[float], most: int) -> list[float]:
    """Every n-th value, so that at most `most` are left."""
    return list(values[:: -(-len(values) // max(most, 1))]) if values else []


def whole_ticks(low: float, high: float, most: int) -> list[int]:
    """Whole numbers from low to high in equal steps of 1, 2, 4, 5, 10..., at most `most + 1` of them.

    Example:
        >>> whole_ticks(1, 17, 8)
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    first, last = math.ceil(low), math.floor(high)
    for step in (1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 500, 1000):
        if (last - first) / step <= most:
            start = first if step < 4 else math.ceil(first / step) * step
            return list(range(start, last + 1, step))
    return [first, last]


def decades(domain: Sequence[float]) -> list[float]:
    """The powers of ten inside a range of positive numbers."""
    first, last = math.ceil(math.log10(domain[0])), math.floor(math.log10(domain[1]))
    return [10.0**power for power in range(first, last + 1)]


def y_axis(
    cell: Cell,
    title: str,
    domain: Sequence[float],
    *,
    field: str = "y",
    log: bool = False,
    labels: bool = True,
) -> alt.Y:
    """A quantitative y axis; titled and labelled in the first column only, unless `labels` forces it."""
    axis = look(
        title=title if cell.left else None,
        labels=cell.left or labels,
        tickCount=max(3, cell.height // 40),
        format="~s" if log else FORMAT,
        **({"values": powers} if log and len(powers := decades(domain)) > 1 else {}),
    )
    scale = look(domain=list(domain), nice=False, zero=False, type="log" if log else "linear")
    return alt.Y(field=field, type="quantitative", axis=axis, scale=scale)


@dataclass(frozen=True, slots=True)
class Key:
    """Colours and shapes of a figure's series, and whether a legend names them."""

    series: tuple[str, ...]
    legend: bool
    columns: int

    @classmethod
    def of(cls, rows: Rows, canvas: Canvas, order: Sequence[str] | None, *, legend: bool = True) -> Key:
        """The key for the series in rows; `order` fixes places (and so colours) even of absent ones."""
        series = names(rows, "series", order)
        present = {row.get("series") for row in rows}
        shown = [name for name in series if name in present]
        fits = [n for n in range(2, len(shown) + 1) if _legend_width(shown, n) <= canvas.width - 60] or [1]
        lines = math.ceil(len(shown) / fits[-1])
        across = next(n for n in fits if math.ceil(len(shown) / n) == lines)  # so that lines are filled evenly
        return cls(tuple(series), legend and len(shown) > 1, across)

    def shown(self, rows: Rows) -> tuple[list[str], list[str], list[str]]:
        """Names, colours and shapes of the series that have rows."""
        present = {row.get("series") for row in rows}
        every = zip(self.series, *looks(self.series), strict=True)
        chosen = [each for each in every if each[0] in present]
        return [name for name, _, _ in chosen], [c for _, c, _ in chosen], [s for _, _, s in chosen]

    def colour(self, rows: Rows) -> Any:
        """Colour by series, or the first colour where there are none."""
        series, colours, _ = self.shown(rows)
        if not series:
            return alt.value(looks(["series"])[0][0])
        return alt.Color(
            field="series",
            type="nominal",
            scale=look(domain=series, range=colours),
            legend=self._legend(),
        )

    def shape(self, rows: Rows) -> Any:
        """Point shape by series."""
        series, _, shapes = self.shown(rows)
        if not series:
            return alt.value("circle")
        return alt.Shape(
            field="series",
            type="nominal",
            scale=look(domain=series, range=shapes),
            legend=self._legend(),
        )

    def _legend(self) -> Look | None:
        if not self.legend:
            return None
        return look(title=None, orient="top", columns=self.columns, symbolOpacity=1, offset=10)


def _legend_width(names: Sequence[str], columns: int) -> float:
    """Pixels that a legend of so many columns takes, each as wide as its longest name."""
    return sum(max(len(name) for name in names[column::columns]) * 6.4 + 36 for column in range(columns))


def lines(
    rows: Rows,
    everything: Rows,
    x: alt.X,
    y: alt.Y,
    key: Key,
    *,
    frame: tuple[float, float],
    points: int = 22,
    band: float = 0.13,
) -> list[Chart]:
    """Layers of lines with interval bands; a missing value is a gap, a lone point has its interval as a stem.

    Args:
        rows: rows of one panel.
        everything: rows of the whole figure, so that all panels share one legend.
        x: the x channel.
        y: the y channel.
        key: colours and shapes.
        frame: the y range; what leaves it is cut (and only then, since cutting makes PNG slow).
        points: size of the points in square pixels.
        band: opacity of the bands.
    """
    colour = key.colour(everything)
    ordered = sorted(rows, key=lambda row: (str(row.get("series")), number(row, "x") or 0.0))
    bands: list[list[Row]] = []
    stems: list[list[Row]] = []
    for run in _runs(ordered):
        (bands if len(run) > 1 else stems).append(run)
    ends = numbers(rows, "y", "low", "high")
    clip = bool(ends) and (min(ends) < frame[0] or max(ends) > frame[1])
    layers: list[Chart] = []
    # One layer for all bands: `run` keeps stretches apart that a gap divides.
    spread = [{**row, "run": str(place)} for place, run in enumerate(bands) for row in run]
    detail = alt.Detail(field="run", type="nominal")
    if spread:
        layers.append(
            alt.Chart(table(spread))
            .mark_area(fillOpacity=band, opacity=1, clip=clip)
            .encode(x=x, y=renamed(y, "low"), y2=alt.Y2(field="high"), color=colour, detail=detail)
        )
    alone = [row for run in stems for row in run]
    if alone:
        layers.append(
            alt.Chart(table(alone))
            .mark_rule(strokeOpacity=0.45, opacity=1, strokeWidth=2, clip=clip)
            .encode(x=x, y=renamed(y, "low"), y2=alt.Y2(field="high"), color=colour)
        )
    line = alt.Chart(table(ordered)).mark_line(strokeWidth=1.7, clip=clip, invalid="break-paths-show-domains")
    layers.append(line.encode(x=x, y=y, color=colour))
    known = [row for row in ordered if number(row, "y") is not None]
    dots = alt.Chart(table(known)).mark_point(filled=True, size=points, opacity=1, clip=clip)
    layers.append(dots.encode(x=x, y=y, color=colour, shape=key.shape(everything)))
    return layers


def renamed(channel: Any, field: str) -> Any:
    """The same channel, axis and scale for another field."""
    other = channel.copy()
    other.field = field
    return other


def _runs(ordered: Rows) -> list[list[Row]]:
    """Stretches of neighbouring rows of one series with a whole interval; a missing one ends the stretch."""
    runs: list[list[Row]] = []
    last: object = None
    for row in ordered:
        if any(number(row, field) is None for field in ("y", "low", "high")):
            last = None
            continue
        mark = ("series", row.get("series"))
        if last == mark:
            runs[-1].append(row)
        else:
            runs.append([row])
        last = mark
    return runs
