"""Figures drawn: from the numbers of a `Figure` to a chart, to SVG and PNG, and to CSV.

Nothing is measured or estimated here. Which drawings there are, and which fields their rows have, stands in
`DRAWINGS`; the options of a drawing are the keyword arguments of its function. `Figure.options` may add
`section`, the heading that the report puts the figure under.
"""

from __future__ import annotations

import csv
import difflib
import inspect
import io
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from impasto.errors import StoreError, UsageError
from impasto.plots import curves, frontier, grids, points, render
from impasto.plots.frame import NARROW, WIDE, Canvas, Chart, table
from impasto.plots.theme import DARK, LIGHT, config
from impasto.result import Figure, Row

__all__ = [
    "DARK",
    "DRAWINGS",
    "LIGHT",
    "NARROW",
    "WIDE",
    "Canvas",
    "Drawing",
    "Picture",
    "check_key",
    "columns",
    "draw",
    "picture",
    "plain",
    "save",
    "to_csv",
]


@dataclass(frozen=True, slots=True)
class Drawing:
    """One way to draw: its function, and the fields of its rows.

    `numbers` and `texts` may be None or missing in a row (a gap), but every name in `required` must be a
    field of at least one row. Fields that are not named here are not drawn, but written to CSV.
    """

    function: Callable[..., Chart]
    numbers: tuple[str, ...]
    texts: tuple[str, ...]
    required: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that this drawing takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


_LINE = ("x", "y", "low", "high")
_BY = ("series", "panel")

DRAWINGS: Mapping[str, Drawing] = MappingProxyType(
    {
        "layer_curve": Drawing(curves.layer_curve, _LINE, _BY, ("x", "y")),
        "affected_curves": Drawing(curves.affected_curves, _LINE, _BY, ("x", "y", "series")),
        "summary_curves": Drawing(curves.summary_curves, _LINE, ("series",), ("x", "y", "series")),
        "states": Drawing(curves.states, _LINE, _BY, ("x", "y")),
        "trace": Drawing(curves.trace, _LINE, ("panel",), ("x", "y", "accepted"), ("accepted",)),
        "matrix": Drawing(grids.matrix, ("row", "column", "value"), ("panel",), ("row", "column", "value")),
        "heatmap": Drawing(grids.heatmap, ("x", "y", "value"), ("panel",), ("x", "y", "value"), ("best",)),
        "bars": Drawing(points.bars, ("value", "low", "high"), ("label", *_BY), ("label", "value")),
        "frontier": Drawing(frontier.frontier, (*_LINE, "x_low", "x_high"), ("label", *_BY), ("x", "y"), ("frontier",)),
        "scatter": Drawing(points.scatter, (*_LINE, "x_low", "x_high"), ("label", *_BY), ("x", "y"), ("frontier",)),
    }
)
_SHARED_OPTIONS = ("section",)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def draw(figure: Figure, canvas: Canvas = WIDE) -> Chart:
    """The chart of a figure.

    Args:
        figure: what to show; `kind` is a key of `DRAWINGS`.
        canvas: the room, `WIDE` (a page) or `NARROW` (a phone).

    Raises:
        UsageError: for an unknown kind, an option that the drawing does not have, or rows without a field
            that it needs.
    """
    drawing = _drawing(figure)
    options = {name: _shown(value) for name, value in figure.options.items() if name not in _SHARED_OPTIONS}
    for name in options:
        if name not in drawing.options:
            raise UsageError(
                f"figure {figure.key!r}: the drawing {figure.kind!r} has no option {name!r}; "
                f"it has {', '.join(sorted((*drawing.options, *_SHARED_OPTIONS)))}"
            )
    rows = [_clean(row, drawing, figure) for row in figure.rows]
    if not rows:
        return _empty(canvas)
    for field in drawing.required:
        if not any(field in row for row in figure.rows):
            raise UsageError(
                f"figure {figure.key!r}: no row has the field {field!r}; "
                f"the drawing {figure.kind!r} needs {', '.join(drawing.required)}"
            )
    return drawing.function(rows, canvas, **options).configure(**config())


def _drawing(figure: Figure) -> Drawing:
    if figure.kind in DRAWINGS:
        return DRAWINGS[figure.kind]
    near = difflib.get_close_matches(figure.kind, DRAWINGS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"figure {figure.key!r}: no drawing is called {figure.kind!r}{hint} (there are {', '.join(sorted(DRAWINGS))})"
    )


def _clean(row: Row, drawing: Drawing, figure: Figure) -> Row:
    """The fields that are drawn: finite numbers or None, printable texts, flags."""
    clean: dict[str, Any] = {}
    for field in drawing.numbers:
        value = row.get(field)
        if value is not None and not isinstance(value, numbers.Real):
            raise UsageError(f"figure {figure.key!r}: {field!r} must be a number or None, not {value!r}")
        clean[field] = float(value) if value is not None and math.isfinite(value) else None
    clean.update({field: plain(str(row[field])) for field in drawing.texts if row.get(field) is not None})
    clean.update({field: bool(row[field]) for field in drawing.flags if row.get(field) is not None})
    return clean


def _shown(option: Any) -> Any:
    """An option with all its texts printable; the renderer ends the whole process over a NUL character."""
    if isinstance(option, str):
        return plain(option)
    if isinstance(option, Mapping):
        return {_shown(name): _shown(value) for name, value in option.items()}
    if isinstance(option, (list, tuple)):
        return [_shown(value) for value in option]
    return option


def plain(text: str) -> str:
    """The text with control characters (which SVG and HTML cannot hold) shown as replacement characters."""
    return _CONTROL.sub("\ufffd", text)


def _empty(canvas: Canvas) -> Chart:
    note = alt.Chart(table([{"note": "nothing was measured for this figure"}])).mark_text(
        fontSize=12, color=LIGHT["muted"], align="left"
    )
    chart = note.encode(text=alt.Text(field="note", type="nominal"), x=alt.value(8), y=alt.value(30))
    return chart.properties(width=canvas.width - 16, height=60).configure(**config())


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure rendered: SVG text for a page and for a phone, both in the light colours."""

    wide: str
    narrow: str

    def inline(self, figure: Figure) -> tuple[str, str]:
        """Both drawings ready to stand in a page, as SVG elements that follow its theme."""
        label = plain(figure.title)
        return (
            render.inline(self.wide, f"{figure.key}-wide", label),
            render.inline(self.narrow, f"{figure.key}-narrow", label),
        )


def picture(figure: Figure) -> Picture:
    """Render a figure at both widths."""
    with debug_mode(False):  # altair's check of every part costs more time than drawing; tests do it
        return Picture(render.svg(draw(figure, WIDE)), render.svg(draw(figure, NARROW)))


def save(figure: Figure, folder: Path | str, rendered: Picture | None = None) -> dict[str, Path]:
    """Write a figure as KEY.svg, KEY.png (twice the size) and KEY.csv (its rows) into a folder.

    Args:
        figure: what to show; its key names the files.
        folder: made when it is missing.
        rendered: the figure's picture, when it has been rendered already.

    Returns:
        The paths written, by "svg", "png" and "csv".
    """
    check_key(figure)
    source = (rendered or picture(figure)).wide
    folder = Path(folder)
    paths = {suffix: folder / f"{figure.key}.{suffix}" for suffix in ("svg", "png", "csv")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths["svg"].write_text(source, encoding="utf-8")
        paths["png"].write_bytes(render.png(source))
        paths["csv"].write_text(to_csv(figure), encoding="utf-8", newline="")
    except OSError as error:
        raise StoreError(f"cannot write figure {figure.key!r} to {folder}: {error.strerror or error}") from error
    return paths


def check_key(figure: Figure) -> None:
    """Refuse a key that cannot be a file name and an HTML id."""
    if not _KEY.fullmatch(figure.key):
        raise UsageError(f"figure key {figure.key!r} must be letters, digits, '.', '_' and '-' only")


def columns(rows: tuple[Row, ...]) -> list[str]:
    """The fields of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(field for row in rows for field in row))


def to_csv(figure: Figure) -> str:
    """A figure's rows as CSV text with a header; None is empty, numbers are in full precision."""
    target = io.StringIO()
    writer = csv.DictWriter(target, columns(figure.rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(figure.rows)
    return target.getvalue().encode("utf-8", "replace").decode("utf-8")
