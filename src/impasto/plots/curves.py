"""Drawings with a quantity along x and lines across: layer curves, methods, states, search traces."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from impasto.plots.frame import (
    Canvas,
    Cell,
    Chart,
    Key,
    Rows,
    Rule,
    fit,
    lines,
    look,
    names,
    number,
    numbers,
    panels,
    renamed,
    span,
    table,
    titled,
    whole_numbers,
    x_axis,
    y_axis,
)
from impasto.plots.labels import NEAR, Plane, apart, ended, reference, written
from impasto.plots.theme import LIGHT

NORMALISED: tuple[Rule, ...] = ({"value": 0.0, "name": "chance"}, {"value": 1.0, "name": "full model"})


def layer_curve(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "layer",
    y_title: str = "score",
    rules: Sequence[Rule] = (),
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
    y_domain: Sequence[float] | None = None,
    columns: int | None = None,
) -> Chart:
    """A score for every layer, such as what is left when that one layer is skipped; one panel per task.

    Along x are numbers of layers, or relative depths where models of different depth are compared.
    """
    key = Key.of(rows, canvas, series)
    layers = whole_numbers(numbers(rows, "x"))

    def build(cell: Cell, mine: Rows) -> Chart:
        ours = [rule for rule in rules if rule.get("panel") in (None, cell.name)]
        frame = fit(mine, ours, y_domain)
        y = y_axis(cell, y_title, frame)
        x = x_axis(cell, x_title, rows, pad=0.5 if layers else _share(rows, 0.02))
        under, over = reference(rules, cell, x, y, mine)
        return titled(alt.layer(*under, *lines(mine, rows, x, y, key, frame=frame, points=26), *over), cell)

    count = len(names(rows, "panel"))
    across = columns or (min(2, count) if canvas.wide and count > 1 else None)
    height = 200 if count > 1 else 260
    return panels(rows, canvas, build, height=height if canvas.wide else 180, order=panel_order, columns=across, gap=44)


def affected_curves(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "affected layers M",
    y_title: str = "normalised score",
    rules: Sequence[Rule] = NORMALISED,
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
    y_domain: Sequence[float] | None = None,
    columns: int | None = None,
) -> Chart:
    """Small multiples, one per task: a score against the number of affected layers, one line per method."""
    key = Key.of(rows, canvas, series)
    frame = fit(rows, rules, y_domain)

    def build(cell: Cell, mine: Rows) -> Chart:
        y = y_axis(cell, y_title, frame, labels=False)
        x = x_axis(cell, x_title, rows, pad=_share(rows, 0.03))
        under, over = reference(rules, cell, x, y, mine, named=cell.first)
        return titled(alt.layer(*under, *lines(mine, rows, x, y, key, frame=frame, points=18, band=0.1), *over), cell)

    count = len(names(rows, "panel"))
    if canvas.wide:
        return panels(rows, canvas, build, height=170 if count > 1 else 300, order=panel_order, columns=columns, gap=18)
    return panels(
        rows,
        canvas,
        build,
        height=150 if count > 1 else 220,
        order=panel_order,
        columns=2 if count > 2 else 1,
        gap=16,
    )


def summary_curves(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "affected layers M",
    y_title: str = "normalised score, median over tasks",
    rules: Sequence[Rule] = NORMALISED,
    series: Sequence[str] | None = None,
    y_domain: Sequence[float] | None = None,
) -> Chart:
    """All methods on one chart, each named where its line ends: right of the frame, or beside an end inside of it."""
    key = Key.of(rows, canvas, series, legend=False)
    frame = fit(rows, rules, y_domain)
    every = _ends(rows)
    left, right = span(numbers(rows, "x"))
    late = right - NEAR / canvas.width * (right - left)
    ends = [end for end in every if end[1] >= late]
    longest = max((len(name) for name, _, _ in ends), default=0)
    margin = min(round(longest * 6.6) + 24, canvas.width // 3) if len(every) > 1 else 12
    cell = Cell(
        name=None,
        width=canvas.width - 62 - margin,
        height=380 if canvas.wide else 300,
        first=True,
        left=True,
        bottom=True,
    )
    x, y = x_axis(cell, x_title, rows, pad=_share(rows, 0.02)), y_axis(cell, y_title, frame)
    under, over = reference(rules, cell, x, y, rows)
    layers = [*under, *lines(rows, rows, x, y, key, frame=frame, points=34, band=0.09), *over]
    if len(every) > 1:
        layers += _end_labels(ends, cell, frame, x, y, key, rows, margin)
        inside = ended([end for end in every if end not in ends], rules, rows, Plane.of(x, y, cell))
        layers += [layer for name in inside for layer in written(name, fontSize=12, color=LIGHT["ink"])]
    return titled(alt.layer(*layers), cell)


def _ends(rows: Rows) -> list[tuple[str, float, float]]:
    """Name and last defined point of every series."""
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        name, x, y = row.get("series"), number(row, "x"), number(row, "y")
        if name is not None and x is not None and y is not None and (name not in last or last[name][0] <= x):
            last[name] = (x, y)
    return [(name, x, y) for name, (x, y) in last.items()]


def _end_labels(
    ends: Sequence[tuple[str, float, float]],
    cell: Cell,
    frame: tuple[float, float],
    x: alt.X,
    y: alt.Y,
    key: Key,
    rows: Rows,
    margin: int,
) -> list[Chart]:
    """Names right of the frame, moved apart where lines end close together, each with a leader to its line."""
    scale = cell.height / (frame[1] - frame[0])
    pixels = [(frame[1] - min(max(end, frame[0]), frame[1])) * scale for _, _, end in ends]
    moved = apart(pixels, 15.0, 4.0, cell.height - 4.0)
    marks = [
        {"series": name, "x": at, "y": min(max(end, frame[0]), frame[1]), "to": frame[1] - place / scale}
        for (name, at, end), place in zip(ends, moved, strict=True)
    ]
    base = alt.Chart(table(marks))
    leader = base.mark_rule(strokeWidth=1, strokeDash=[1, 3]).encode(
        x=x, x2=alt.value(cell.width + 12), y=y, y2=alt.Y2(field="to"), color=key.colour(rows)
    )
    label = base.mark_text(align="left", dx=4, color=LIGHT["ink"], fontSize=12, limit=margin - 12).encode(
        x=alt.value(cell.width + 12),
        y=renamed(y, "to"),
        text=alt.Text(field="series", type="nominal"),
    )
    return [leader, label]


def _share(rows: Rows, share: float) -> float:
    low, high = span(numbers(rows, "x"))
    return (high - low) * share


def states(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "layer call",
    y_title: str = "",
    log: bool | Sequence[str] = False,
    rules: Sequence[Rule] = (),
    series: Sequence[str] | None = None,
    panel_order: Sequence[str] | None = None,
) -> Chart:
    """A statistic of the hidden state after every layer call, one panel per statistic, one line per method.

    `log` is True for logarithmic y axes everywhere, or the panels that have one. What is not positive has no
    place on such an axis and is a gap.
    """
    key = Key.of(rows, canvas, series)

    def build(cell: Cell, mine: Rows) -> Chart:
        logarithmic = log if isinstance(log, bool) else cell.name in log
        ours = [rule for rule in rules if rule.get("panel") in (None, cell.name)]
        if logarithmic:
            mine = [
                {**row, **{field: None for field in ("y", "low", "high") if (number(row, field) or 0.0) <= 0}}
                for row in mine
            ]
            low, high = span([value for value in numbers(mine, "y", "low", "high") if value > 0], (0.1, 10.0))
            frame = (low / 1.3, high * 1.3)
        else:
            frame = fit(mine, ours)
        y = y_axis(cell, y_title, frame, log=logarithmic)
        x = x_axis(cell, x_title, rows, pad=0.3)
        under, over = reference(rules, cell, x, y, mine)
        return titled(alt.layer(*under, *lines(mine, rows, x, y, key, frame=frame, points=16), *over), cell)

    count = len(names(rows, "panel"))
    return panels(
        rows,
        canvas,
        build,
        height=230 if canvas.wide else 190,
        order=panel_order,
        columns=min(2, max(count, 1)) if canvas.wide else 1,
        gap=48,
    )


def trace(
    rows: Rows,
    canvas: Canvas,
    *,
    x_title: str = "step",
    y_title: str = "score",
    rules: Sequence[Rule] = (),
    panel_order: Sequence[str] | None = None,
) -> Chart:
    """A search: a point for every trial, accepted or rejected, and the accepted score as a stepped line."""
    scale = look(domain=["accepted", "rejected"], range=[LIGHT["series1"], LIGHT["rule"]])
    shapes = look(domain=["accepted", "rejected"], range=["circle", "cross"])
    legend = look(title=None, orient="top", offset=10, symbolOpacity=1)

    def build(cell: Cell, mine: Rows) -> Chart:
        ours = [rule for rule in rules if rule.get("panel") in (None, cell.name)]
        y = y_axis(cell, y_title, fit(mine, ours))
        x = x_axis(cell, x_title, rows, pad=max(0.5, _share(rows, 0.02)))
        known = [row for row in mine if number(row, "y") is not None]
        trials = [{**row, "trial": "accepted" if row.get("accepted") else "rejected"} for row in known]
        accepted = sorted((row for row in known if row.get("accepted")), key=lambda row: number(row, "x") or 0.0)
        if accepted:  # the last accepted state holds to the end of the search
            accepted = [*accepted, {**accepted[-1], "x": max(numbers(rows, "x"))}]
        stems = alt.Chart(table(trials)).mark_rule(opacity=0.3, strokeWidth=1.5, clip=True)
        steps = alt.Chart(table(accepted)).mark_line(interpolate="step-after", color=LIGHT["series1"], strokeWidth=1.7)
        dots = alt.Chart(table(trials)).mark_point(size=42, strokeWidth=1.5, filled=True, opacity=1)
        colour = alt.Color(field="trial", type="nominal", scale=scale, legend=legend)
        shape = alt.Shape(field="trial", type="nominal", scale=shapes, legend=legend)
        under, over = reference(rules, cell, x, y, mine)
        return titled(
            alt.layer(
                *under,
                stems.encode(x=x, y=renamed(y, "low"), y2=alt.Y2(field="high"), color=colour),
                steps.encode(x=x, y=y),
                dots.encode(x=x, y=y, color=colour, shape=shape),
                *over,
            ),
            cell,
        )

    return panels(rows, canvas, build, height=260 if canvas.wide else 220, order=panel_order, gap=40)
