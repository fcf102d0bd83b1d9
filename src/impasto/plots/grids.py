"""Drawings of numbers on a grid: similarity matrices and heat maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import altair as alt

from impasto.plots.frame import (
    FORMAT,
    Canvas,
    Cell,
    Chart,
    Rows,
    look,
    names,
    number,
    numbers,
    panels,
    renamed,
    round_ticks,
    span,
    table,
    thin,
    titled,
    whole_ticks,
)
from impasto.plots.theme import LIGHT, SCHEME
from impasto.result import Row

BAR = 200  # pixels of a colour bar
LETTER = 6.2  # pixels of a digit of its labels
APART = 8.0  # pixels between two of them at least

Group = Sequence[object]
"""`[start, stop, name]`: a stretch of rows and columns, half-open like a slice."""


def matrix(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "state",
    y_title: str = "state",
    value_title: str = "cosine similarity",
    domain: Sequence[float] | None = None,
    groups: Sequence[Group] | Mapping[str, Sequence[Group]] = (),
    panel_order: Sequence[str] | None = None,
) -> Chart:
    """Square matrices side by side, on one colour scale; row 0 is on top.

    `groups` are boxes on the diagonal with their names at the right; a mapping gives each panel its own.
    """
    low, high = domain if domain is not None else span(numbers(rows, "value"))
    colour = _colour(value_title, low, high, canvas)
    count = len(names(rows, "panel"))
    names_room = 74 if groups else 12

    def build(cell: Cell, mine: Rows) -> Chart:
        last = max([*numbers(mine, "row", "column"), 0.0])
        size = whole(cell.width - names_room, last + 1)
        square = Cell(cell.name, size, size, cell.first, cell.left, cell.bottom)
        ticks = whole_ticks(0, last, max(2, size // 24))
        axis = look(values=ticks, format="d", domain=False, grid=False, labelOverlap=False)
        across = look(domain=[-0.5, last + 0.5], nice=False, zero=False)
        down = look(domain=[last + 0.5, -0.5], nice=False, zero=False)
        x = alt.X(field="x0", type="quantitative", scale=across, axis={**axis, "title": x_title})
        up_title = y_title if cell.left else None
        y = alt.Y(field="y0", type="quantitative", scale=down, axis={**axis, "title": up_title})
        layers = [_cells([_box(row, "column", "row", half=0.5) for row in mine], x, y, colour)]
        mine_groups = groups.get(cell.name or "", ()) if isinstance(groups, Mapping) else groups
        if mine_groups:
            layers += _groups(mine_groups, x, renamed(y, "x0"), square, names_room)
        return titled(alt.layer(*layers), square)

    columns = min(max(count, 1), 2 if groups else 3) if canvas.wide else 1
    if canvas.wide and count <= 1:  # one matrix need not fill the page
        canvas = Canvas(min(canvas.width, 520), wide=True)
    return panels(rows, canvas, build, height=1, order=panel_order, columns=columns, margin=52, gap=34)


def whole(length: int, cells: float) -> int:
    """A length cut down to a whole number of pixels for each cell, so that no seam shows between two of them."""
    count = max(round(cells), 1)
    return length - length % count if length >= 3 * count else length


def _groups(groups: Sequence[Group], x: alt.X, y: alt.Y, cell: Cell, room: int) -> list[Chart]:
    """Boxes on the diagonal, and at the right a stroke and a name for each."""
    boxes = [
        {"x0": float(str(start)) - 0.5, "x1": float(str(stop)) - 0.5, "name": str(name)} for start, stop, name in groups
    ]
    marks = [{**box, "middle": (float(str(box["x0"])) + float(str(box["x1"]))) / 2} for box in boxes]
    base = alt.Chart(table(marks))
    frame = base.encode(x=x, x2=alt.X2(field="x1"), y=y, y2=alt.Y2(field="x1"))
    return [
        frame.mark_rect(filled=False, stroke=LIGHT["paper"], strokeWidth=3.5, strokeOpacity=0.9),
        frame.mark_rect(filled=False, stroke=LIGHT["accent"], strokeWidth=1.6),
        base.mark_rule(color=LIGHT["rule"], strokeWidth=1.5).encode(
            x=alt.value(cell.width + 5), y=y, y2=alt.Y2(field="x1")
        ),
        base.mark_text(align="left", dx=9, fontSize=11, color=LIGHT["ink"], limit=room - 8).encode(
            x=alt.value(cell.width + 2),
            y=renamed(y, "middle"),
            text=alt.Text(field="name", type="nominal"),
        ),
    ]


def heatmap(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "width M (layers in parallel)",
    y_title: str = "iterations k",
    value_title: str = "normalised score",
    domain: Sequence[float] | None = None,
    fit: tuple[float, float] | None = None,
    best: bool = True,
    even: bool = False,
    columns: int | None = None,
    panel_order: Sequence[str] | None = None,
) -> Chart:
    """A value for every width (x) and number of iterations (y); the best y of each column is outlined.

    With `even` the values of y stand evenly spaced, whatever lies between them. `fit` is slope and intercept of a
    line drawn over it. Rows may mark the best cells themselves in the field `best`; otherwise it is the largest value
    of a column, the smaller y where two are equal.
    """
    low, high = domain if domain is not None else span(numbers(rows, "value"))
    colour = _colour(value_title, low, high, canvas)

    def build(cell: Cell, mine: Rows) -> Chart:
        places, lines = sorted(set(numbers(mine, "x"))), sorted(set(numbers(mine, "y")))
        across, up = _edges(places), _evenly(lines) if even else _edges(lines)
        cells = [
            {**row, "x0": across[x][0], "x1": across[x][1], "y0": up[y][0], "y1": up[y][1]}
            for row in mine
            if (x := number(row, "x")) is not None and (y := number(row, "y")) is not None
        ]
        cell = replace(cell, width=whole(cell.width, len(places)), height=whole(cell.height, len(lines)))
        left, right = _reach(across)
        bottom, top = _reach(up)
        x_scale = look(domain=[left, right], nice=False, zero=False)
        y_scale = look(domain=[bottom, top], nice=False, zero=False)
        x_look = look(title=x_title, values=thin(places, cell.width // 26), format=FORMAT, domain=False)
        y_look = look(
            title=y_title if cell.left else None,
            values=thin([sum(up[line]) / 2 for line in lines] if even else lines, cell.height // 15),
            **(
                {"labelExpr": f"{json.dumps([f'{line:g}' for line in lines])}[datum.value]"}
                if even
                else {"format": FORMAT}
            ),
            grid=False,
            domain=False,
        )
        x = alt.X(field="x0", type="quantitative", scale=x_scale, axis=x_look)
        y = alt.Y(field="y0", type="quantitative", scale=y_scale, axis=y_look)
        layers = [_cells(cells, x, y, colour)]
        if best:
            chosen = alt.Chart(table(_best(cells)))
            layers.append(
                chosen.mark_rect(filled=False, stroke=LIGHT["accent"], strokeWidth=2).encode(
                    x=x, x2=alt.X2(field="x1"), y=y, y2=alt.Y2(field="y1")
                )
            )
        if fit is not None:
            layers += _fitted(fit, (left, right), (bottom, top), x, y)
        return titled(alt.layer(*layers), cell)

    count = len(names(rows, "panel"))
    across = columns if columns and canvas.wide else min(max(count, 1), 2) if canvas.wide else 1
    height = 16 * len({number(row, "y") for row in rows}) + 40
    height = max(160, min(height, 440 if canvas.wide else 380))
    if canvas.wide and count <= 1:
        wanted = 56 + 34 * len({number(row, "x") for row in rows}) + 60
        canvas = Canvas(max(420, min(canvas.width, wanted)), wide=True)
    return panels(rows, canvas, build, height=height, order=panel_order, columns=across, gap=40)


def _fitted(
    fit: tuple[float, float],
    width: tuple[float, float],
    height: tuple[float, float],
    x: alt.X,
    y: alt.Y,
) -> list[Chart]:
    """The line y = slope x + intercept inside the frame, dark on light so that it shows on any cell."""
    slope, intercept = fit
    ends = [(at, slope * at + intercept) for at in width]
    if slope:
        ends += [((at - intercept) / slope, at) for at in height]
    inside = sorted(
        end
        for end in ends
        if width[0] - 1e-9 <= end[0] <= width[1] + 1e-9 and height[0] - 1e-9 <= end[1] <= height[1] + 1e-9
    )
    if len(inside) < 2:
        return []
    data = [{"x": end[0], "y": end[1]} for end in (inside[0], inside[-1])]
    base = alt.Chart(table(data)).encode(x=renamed(x, "x"), y=renamed(y, "y"))
    return [
        base.mark_line(stroke="#ffffff", strokeWidth=4, opacity=0.75),
        base.mark_line(stroke="#111111", strokeWidth=1.8, strokeDash=[6, 4]),
    ]


def _best(cells: Rows) -> list[Row]:
    if any(cell.get("best") is not None for cell in cells):
        return [cell for cell in cells if cell.get("best")]
    found: dict[float, Row] = {}
    for cell in sorted(cells, key=lambda cell: number(cell, "y") or 0.0):
        x, value = number(cell, "x"), number(cell, "value")
        if x is None or value is None:
            continue
        if x not in found or value > (number(found[x], "value") or 0.0):
            found[x] = cell
    return list(found.values())


def _edges(values: Sequence[float]) -> dict[float, tuple[float, float]]:
    """The stretch of axis that belongs to each value: half way to its neighbours."""
    if len(values) == 1:
        return {values[0]: (values[0] - 0.5, values[0] + 0.5)}
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    if not middles:
        return {}
    borders = [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]
    return {value: (borders[place], borders[place + 1]) for place, value in enumerate(values)}


def _evenly(values: Sequence[float]) -> dict[float, tuple[float, float]]:
    """A stretch of axis of length 1 for each value, around its place in the list."""
    return {value: (place - 0.5, place + 0.5) for place, value in enumerate(values)}


def _reach(edges: Mapping[float, tuple[float, float]]) -> tuple[float, float]:
    return span([end for pair in edges.values() for end in pair])


def _box(row: Row, x: str, y: str, half: float) -> dict[str, object]:
    across, up = number(row, x) or 0.0, number(row, y) or 0.0
    return {
        "value": row.get("value"),
        "x0": across - half,
        "x1": across + half,
        "y0": up - half,
        "y1": up + half,
    }


def _cells(cells: Rows, x: alt.X, y: alt.Y, colour: alt.Color) -> Chart:
    """Coloured cells; those without a value are shaded as missing, so that they cannot be read as small."""
    known = [cell for cell in cells if number(cell, "value") is not None]
    unknown = [cell for cell in cells if number(cell, "value") is None]
    ends = {"x2": alt.X2(field="x1"), "y2": alt.Y2(field="y1")}
    layers = [alt.Chart(table(known)).mark_rect().encode(x=x, y=y, color=colour, **ends)]
    if unknown:
        base = alt.Chart(table(unknown)).encode(x=x, y=y, **ends)
        layers.append(base.mark_rect(color=LIGHT["shade"], stroke=LIGHT["paper"], strokeWidth=1))
        centres = [
            {"x0": (left + right) / 2, "y0": (bottom + top) / 2}
            for left, right, bottom, top in (
                [number(cell, end) or 0.0 for end in ("x0", "x1", "y0", "y1")] for cell in unknown
            )
        ]
        sign = alt.Chart(table(centres)).mark_text(text="\u2013", fontSize=11, color=LIGHT["muted"])
        layers.append(sign.encode(x=x, y=y))
    return alt.layer(*layers)


def bar_ticks(low: float, high: float, length: float = BAR) -> list[float]:
    """Where a colour bar is labelled: round values, so few that no label comes near the next.

    Example:
        >>> bar_ticks(-0.016, 0.016), bar_ticks(0.0, 1.0)
        ([-0.01, 0.0, 0.01], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    for most in (6, 5, 4, 3, 2, 1):
        ticks = round_ticks(low, high, most)
        widest = max((len(f"{tick:.12f}".rstrip("0").rstrip(".")) for tick in ticks), default=0)
        between = length * (ticks[1] - ticks[0]) / (high - low) if len(ticks) > 1 else length
        if widest * LETTER + APART <= between:
            return ticks
    return [tick for tick in (low, high) if tick == 0] or [high]


def _colour(title: str, low: float, high: float, canvas: Canvas) -> alt.Color:
    legend = look(
        title=title,
        orient="top",
        gradientLength=BAR,
        gradientThickness=10,
        values=bar_ticks(low, high),
        format=FORMAT,
        offset=12,
        titleOrient="left" if canvas.wide else "top",
        titleLimit=320,
        labelColor=LIGHT["muted"],
        labelFontSize=11,
    )
    scale = look(scheme=SCHEME, domain=[low, high], clamp=True)
    return alt.Color(field="value", type="quantitative", scale=scale, legend=legend)
