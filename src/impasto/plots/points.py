"""Drawings of single points with intervals: comparisons by name, and accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import altair as alt

from impasto.plots.frame import (
    FORMAT,
    Canvas,
    Cell,
    Chart,
    Key,
    Look,
    Rows,
    Rule,
    look,
    names,
    near,
    number,
    numbers,
    panels,
    renamed,
    span,
    table,
    titled,
)
from impasto.plots.labels import haloed
from impasto.plots.theme import LIGHT


def bars(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "normalised score",
    rules: Sequence[Rule] = (),
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
    sort: Literal["value", "given"] = "value",
    x_domain: Sequence[float] | None = None,
) -> Chart:
    """A dot with its interval for every label, the largest on top; several series side by side in one row.

    An interval that reaches beyond the axis ends in an arrow there. Panels are stacked: each has its own labels, and
    all share the x axis.
    """
    key = Key.of(rows, canvas, series)
    shown, _, _ = key.shown(rows)
    everything = numbers(rows, "value", "low", "high") + [float(rule["value"]) for rule in rules]
    low, high = (float(x_domain[0]), float(x_domain[1])) if x_domain is not None else _padded(everything)
    labels = names(rows, "label")
    longest = max((len(label) for label in labels), default=4)
    margin = min(round(longest * 6.3) + 16, 230 if canvas.wide else 130)
    step = max(22, 12 * len(shown) + 8)

    def build(cell: Cell, mine: Rows) -> Chart:
        order = _order(mine, sort)
        cell = Cell(cell.name, cell.width, step * max(len(order), 1), cell.first, cell.left, cell.bottom)
        scale = look(domain=[low, high], nice=False, zero=False)
        axis = look(
            title=x_title if cell.bottom else None,
            labels=cell.bottom,
            tickCount=max(3, cell.width // 80),
            grid=True,
            domain=False,
            ticks=False,
            format=FORMAT,
        )
        y = alt.Y(
            field="label",
            type="nominal",
            sort=order,
            scale=look(domain=order, paddingInner=0.25, paddingOuter=0.15),
            axis=look(title=None, grid=False, labelLimit=margin - 8, labelColor=LIGHT["ink"], labelFontSize=12),
        )
        x = alt.X(field="value", type="quantitative", scale=scale, axis=axis)
        known = [row for row in mine if number(row, "value") is not None]
        whole = [row for row in known if number(row, "low") is not None and number(row, "high") is not None]
        colour = key.colour(rows)
        offset = {"yOffset": alt.YOffset(field="series", type="nominal", scale=look(domain=shown))} if shown else {}
        stems = alt.Chart(table(near(whole, (low, high), "low", "high"))).mark_rule(
            strokeWidth=2, opacity=0.55, clip=True
        )
        dots = alt.Chart(table(known)).mark_point(filled=True, size=58, opacity=1)
        arrows = [
            alt.Chart(table({**row, "end": end} for row in cut))
            .mark_point(shape=shape, filled=True, size=44, opacity=0.55, xOffset=inwards)
            .encode(x=renamed(x, "end"), y=y, color=colour, **offset)
            for field, end, side, shape, inwards in (
                ("low", low, -1, "triangle-left", 4),
                ("high", high, 1, "triangle-right", -4),
            )
            if (cut := [row for row in whole if (number(row, field) or 0.0) * side > end * side])
        ]
        return titled(
            alt.layer(
                *_uprights(rules, cell, scale),
                stems.encode(x=renamed(x, "low"), x2=alt.X2(field="high"), y=y, color=colour, **offset),
                *arrows,
                dots.encode(x=x, y=y, color=colour, shape=key.shape(rows), **offset),
                *_undefined(mine, order, y),
            ),
            cell,
        )

    return panels(rows, canvas, build, height=1, order=panel_order, columns=1, margin=margin)


def _undefined(rows: Rows, order: Sequence[str], y: alt.Y) -> list[Chart]:
    """A word in the place of labels that have no value at all, so that a gap is not taken for a zero."""
    known = {row.get("label") for row in rows if number(row, "value") is not None}
    words = [{"label": label, "word": "undefined"} for label in order if label not in known]
    if not words:
        return []
    text = alt.Chart(table(words)).encode(x=alt.value(6), y=y, text=alt.Text(field="word", type="nominal"))
    return haloed(text, align="left")


def _order(rows: Rows, sort: str) -> list[str]:
    """Labels from the largest mean value to the smallest, those without a value last; or as given."""
    labels = names(rows, "label")
    if sort == "given":
        return labels

    def place(label: str) -> float:
        values = numbers([row for row in rows if row.get("label") == label], "value")
        return -sum(values) / len(values) if values else float("inf")

    return sorted(labels, key=place)


def _uprights(rules: Sequence[Rule], cell: Cell, scale: Look) -> list[Chart]:
    """Vertical reference lines, named above the first panel."""
    mine = [
        {"value": float(rule["value"]), "name": str(rule.get("name") or "")}
        for rule in rules
        if rule.get("panel") in (None, cell.name)
    ]
    if not mine:
        return []
    base = alt.Chart(table(mine))
    x = alt.X(field="value", type="quantitative", scale=scale)
    layers = [base.mark_rule(color=LIGHT["rule"], strokeDash=[4, 3]).encode(x=x)]
    if cell.first:
        text = base.mark_text(baseline="bottom", dy=-3, fontSize=11, color=LIGHT["muted"])
        layers.append(text.encode(x=x, y=alt.value(0), text=alt.Text(field="name", type="nominal")))
    return layers


def _padded(values: Sequence[float], share: float = 0.04) -> tuple[float, float]:
    low, high = span(values)
    pad = (high - low) * share
    return low - pad, high + pad


def scatter(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "latency",
    y_title: str = "accuracy",
    rules: Sequence[Rule] = (),
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
    frontier_name: str = "frontier",
) -> Chart:
    """Points with intervals in both directions; a stepped line joins the rows whose `frontier` is true."""
    key = Key.of(rows, canvas, series)

    def build(cell: Cell, mine: Rows) -> Chart:
        known = [row for row in mine if number(row, "x") is not None and number(row, "y") is not None]
        ours = [float(rule["value"]) for rule in rules if rule.get("panel") in (None, cell.name)]
        across = look(domain=list(_padded(numbers(known, "x", "x_low", "x_high"), 0.06)), nice=False, zero=False)
        up = look(domain=list(_padded(numbers(known, "y", "low", "high") + ours, 0.06)), nice=False, zero=False)
        x_look = look(title=x_title if cell.bottom else None, tickCount=max(3, cell.width // 80), format=FORMAT)
        y_look = look(title=y_title if cell.left else None, tickCount=6, format=FORMAT)
        x = alt.X(field="x", type="quantitative", scale=across, axis=x_look)
        y = alt.Y(field="y", type="quantitative", scale=up, axis=y_look)
        left, low = renamed(x, "x_low"), renamed(y, "low")
        colour = key.colour(rows)
        frontier = sorted((row for row in known if row.get("frontier")), key=lambda row: number(row, "x") or 0.0)
        tall = [row for row in known if number(row, "low") is not None and number(row, "high") is not None]
        broad = [row for row in known if number(row, "x_low") is not None and number(row, "x_high") is not None]
        layers: list[Chart] = []
        tail: list[Chart] = []
        if ours:
            marks = alt.Chart(table({"y": value} for value in ours))
            layers.append(marks.mark_rule(color=LIGHT["rule"], strokeDash=[4, 3]).encode(y=y))
        if frontier:
            line = alt.Chart(table(frontier)).mark_line(interpolate="step-after", color=LIGHT["rule"], strokeWidth=1.5)
            layers.append(line.encode(x=x, y=y))
            end = alt.Chart(table([{**frontier[-1], "name": frontier_name}]))
            name = end.encode(x=x, y=y, text=alt.Text(field="name", type="nominal"))
            tail = haloed(name, align="right", baseline="top", dy=12, dx=6)
        layers += [
            alt.Chart(table(tall)).mark_rule(opacity=0.5).encode(x=x, y=low, y2=alt.Y2(field="high"), color=colour),
            alt.Chart(table(broad)).mark_rule(opacity=0.5).encode(x=left, x2=alt.X2(field="x_high"), y=y, color=colour),
            alt.Chart(table(known))
            .mark_point(filled=True, size=60, opacity=1)
            .encode(x=x, y=y, color=colour, shape=key.shape(rows)),
        ]
        layers += _labels([row for row in known if row.get("label")], across["domain"], x, y)
        return titled(alt.layer(*layers, *tail), cell)

    return panels(rows, canvas, build, height=340 if canvas.wide else 280, order=panel_order, gap=44)


def _labels(rows: Rows, domain: Sequence[float], x: alt.X, y: alt.Y) -> list[Chart]:
    """The rows' labels beside their points: to the right, but to the left in the last quarter of the x axis."""
    turn = domain[0] + 0.75 * (domain[1] - domain[0])
    layers = []
    for align, dx, late in (("left", 6, False), ("right", -6, True)):
        mine = [row for row in rows if ((number(row, "x") or 0.0) > turn) == late]
        if mine:
            text = alt.Chart(table(mine)).mark_text(
                align=align, baseline="bottom", dx=dx, dy=-4, fontSize=11, color=LIGHT["ink"], limit=150
            )
            layers.append(text.encode(x=x, y=y, text=alt.Text(field="label", type="nominal")))
    return layers
