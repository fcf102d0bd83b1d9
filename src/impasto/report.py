"""A `Page` as one HTML file: answers first, then figures, then how it was made.

The file needs nothing else: no script, no font, no request. Drawings stand in it twice, for a page and for a
phone, and follow the reader's light or dark theme. Every text is escaped, since texts come from models and data.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from impasto import plots
from impasto.errors import StoreError, UsageError
from impasto.result import Answer, Estimate, Figure, Page, Row, Verdict, fixed

VERDICTS: Mapping[Verdict, tuple[str, str]] = {
    "yes": ("Yes", "\u2713"),
    "no": ("No", "\u2715"),
    "unclear": ("Unclear", "?"),
}
"""Word and sign of every verdict: the badge never speaks by colour alone."""


def render(page: Page, pictures: Mapping[str, plots.Picture] | None = None, files: str = "") -> str:
    """The page as HTML text.

    Args:
        page: what to show.
        pictures: figures that have been rendered already, by key; the others are rendered here.
        files: folder of the figures' files relative to the page, linked under each figure; none when empty.

    Raises:
        UsageError: when a figure cannot be drawn (see `impasto.plots.draw`) or two figures have one key.
    """
    _check(page)
    pictures = pictures or {}
    shown = [_show(figure, place + 1, pictures.get(figure.key)) for place, figure in enumerate(page.figures)]
    facts = {name: text for name, text in page.facts.items() if name.lower() != "command"}
    command = next((text for name, text in page.facts.items() if name.lower() == "command"), "")
    numbering = {each.figure.key: each.number for each in shown}
    sections = _sections(shown, page.tables)
    headings = {section.title for section in sections}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            answers=[_Answered.of(answer, numbering) for answer in page.answers],
            tally=_tally(page.answers),
            sections=sections,
            tables=[_table(title, rows) for title, rows in page.tables if title not in headings],
            facts=facts,
            command=command,
            light=plots.LIGHT,
            dark=plots.DARK,
            files=files,
        )
    )


def write(page: Page, folder: Path | str) -> Path:
    """Write `report.html` and, beside it, `figures/` with every figure as SVG, PNG and CSV.

    A report that is already there is replaced in one step, so that no reader sees half of one.

    Returns:
        The path of the page.

    Raises:
        StoreError: when the folder cannot be written.
    """
    _check(page)
    folder = Path(folder)
    pictures = {}
    for figure in page.figures:
        pictures[figure.key] = plots.picture(figure)
        plots.save(figure, folder / "figures", pictures[figure.key])
    target, fresh = folder / "report.html", folder / ".report.html.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(render(page, pictures, files="figures"), encoding="utf-8")
        fresh.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write the report to {folder}: {error.strerror or error}") from error
    return target


def _check(page: Page) -> None:
    seen: set[str] = set()
    for figure in page.figures:
        plots.check_key(figure)
        if figure.key in seen:
            raise UsageError(f"two figures of the page have the key {figure.key!r}")
        seen.add(figure.key)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("impasto", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )


def _printable(value: object) -> object:
    """Texts without the characters that HTML cannot hold; markup of our own is left as it is."""
    return plots.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@dataclass(frozen=True, slots=True)
class _Table:
    """A table ready to print: texts (or answers) in cells, and how its columns are set.

    `looks` has for each column "n" (numbers), "a" (answers), "t" (long texts, in lines) or nothing.
    """

    title: str
    header: tuple[str, ...]
    looks: tuple[str, ...]
    rows: tuple[tuple[str | _Answered, ...], ...]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A figure with its place on the page, its two drawings and its numbers."""

    figure: Figure
    number: int
    wide: Markup
    narrow: Markup
    tables: tuple[_Table, ...]


@dataclass(frozen=True, slots=True)
class _Section:
    """Figures under one heading, and before them the tables of that title."""

    anchor: str
    title: str
    shown: tuple[_Shown, ...]
    tables: tuple[_Table, ...]


@dataclass(frozen=True, slots=True)
class _Bar:
    """An interval as places on a line, in percent of its length."""

    value: float
    low: float
    high: float
    zero: float
    label: str


@dataclass(frozen=True, slots=True)
class _Answered:
    """An answer with what its card shows beside the texts."""

    answer: Answer
    word: str
    sign: str
    bar: _Bar | None
    effect: str
    number: int | None  # of the figure that shows it

    @classmethod
    def of(cls, answer: Answer, numbering: Mapping[str, int]) -> _Answered:
        word, sign = VERDICTS[answer.verdict]
        number = numbering.get(answer.figure) if answer.figure else None
        bar = _bar(answer.estimate) if answer.estimate is not None else None
        return cls(answer, word, sign, bar, _estimate(answer.estimate), number)


def _show(figure: Figure, number: int, rendered: plots.Picture | None) -> _Shown:
    wide, narrow = (rendered or plots.picture(figure)).inline(figure)
    # Written by our own serialiser, which escapes every text; this is the only markup the template trusts.
    return _Shown(figure, number, Markup(wide), Markup(narrow), tuple(_numbers_of(figure)))


def _sections(shown: Sequence[_Shown], tables: Sequence[tuple[str, tuple[Row, ...]]]) -> list[_Section]:
    """Figures grouped by the option `section`, each heading once, in the order of first appearance."""
    titles = dict.fromkeys(_heading(each.figure) for each in shown)
    return [
        _Section(
            anchor=f"section-{place + 1}",
            title=title,
            shown=tuple(each for each in shown if _heading(each.figure) == title),
            tables=tuple(_table(name, rows) for name, rows in tables if name == title),
        )
        for place, title in enumerate(titles)
    ]


def _heading(figure: Figure) -> str:
    return str(figure.options.get("section") or "Figures")


def _tally(answers: Sequence[Answer]) -> list[tuple[Verdict, str, str, int]]:
    """How often each verdict was given: its name, sign, word and count; without those never given."""
    counts = [(verdict, sum(answer.verdict == verdict for answer in answers)) for verdict in VERDICTS]
    return [(verdict, VERDICTS[verdict][1], VERDICTS[verdict][0], count) for verdict, count in counts if count]


def _bar(estimate: Estimate) -> _Bar | None:
    """Where value, interval and zero lie on a line that holds them all; None when there is nothing to draw."""
    ends = [estimate.value, estimate.low, estimate.high]
    known = [end for end in ends if end is not None and math.isfinite(end)]
    if not math.isfinite(estimate.value):
        return None
    low, high = min(0.0, *known), max(0.0, *known)
    room = (high - low) or 1.0

    def place(value: float | None) -> float:
        at = estimate.value if value is None or not math.isfinite(value) else value
        return round(6 + 88 * (at - low) / room, 2)

    return _Bar(place(estimate.value), place(estimate.low), place(estimate.high), place(0.0), _estimate(estimate))


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return short(estimate.value)
    scale = _scale((estimate.value, estimate.low, estimate.high))
    low, high = (short(end, scale) for end in (estimate.low, estimate.high))
    return f"{short(estimate.value, scale)} [{low}, {high}]"


def short(value: float, scale: float | None = None) -> str:
    """A number for reading: three decimals below 10, fewer above, a real minus sign, thousands apart.

    A number that rounds to nothing beside larger ones has more decimals, so that the reader sees on which side of zero
    it lies; see `impasto.result.fixed`. Scientific notation is for what lives on such a scale: a million and more, and
    numbers that stand only among others below 0.001.

    Args:
        value: the number; a whole number given as `int` stays whole.
        scale: the largest magnitude that it stands beside (its interval's ends, its column); None is its own.

    Example:
        >>> short(-0.12345), short(1234.5), short(3)
        ('\u22120.123', '1,234', '3')
        >>> short(-3.04e-4, 0.107), short(-3.04e-4)
        ('\u22120.0003', '\u22123.04e\u221204')
    """
    size = abs(value)
    if isinstance(value, int) or not math.isfinite(value):
        text = f"{value:,}"
    elif size >= 1e6 or (max(size, scale or 0.0) < 0.001 and fixed(value) != fixed(0.0)):
        text = f"{value:.2e}"
    else:
        text = fixed(value, 3 if size < 10 else 1 if size < 1000 else 0)
    return text.replace("-", "\u2212")


def _scale(values: Iterable[object]) -> float:
    """The largest magnitude of the finite numbers among some values; 0 without any."""
    sizes = (abs(float(value)) for value in values if isinstance(value, numbers.Real))
    return max((size for size in sizes if math.isfinite(size)), default=0.0)


def _cell(value: object, scale: float | None = None) -> str | _Answered:
    if value is None or value == "":
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real):
        return short(int(value) if isinstance(value, numbers.Integral) else float(value), scale)
    return _Answered.of(value, {}) if isinstance(value, Answer) else str(value)


_LONG = 40  # letters from which on a text in a table is broken into lines


def _table(title: str, rows: tuple[Row, ...]) -> _Table:
    header = tuple(plots.columns(rows))
    columns = [[row.get(field) for row in rows] for field in header]
    cells = [[_cell(value, _scale(column)) for value in column] for column in columns]
    return _Table(title, header, tuple(map(_look, columns)), tuple(zip(*cells, strict=True)))


def _look(column: Sequence[object]) -> str:
    if all(value is None or isinstance(value, numbers.Real) for value in column):
        return "n"
    if any(isinstance(value, Answer) for value in column):
        return "a"
    return "t" if any(isinstance(value, str) and len(value) > _LONG for value in column) else ""


_GRIDS = {"matrix": ("row", "column"), "heatmap": ("y", "x")}


def _numbers_of(figure: Figure) -> list[_Table]:
    """The numbers of a figure as tables: its rows, or for a drawing on a grid that grid, one for each panel."""
    if figure.kind not in _GRIDS:
        return [_table(figure.title, figure.rows)]
    down, across = _GRIDS[figure.kind]
    panels = dict.fromkeys(row.get("panel") for row in figure.rows)
    return [
        _grid(
            figure.title if panel is None else str(panel),
            down,
            across,
            [row for row in figure.rows if row.get("panel") == panel],
        )
        for panel in panels
    ]


def _grid(title: str, down: str, across: str, rows: Sequence[Row]) -> _Table:
    values: dict[tuple[Any, Any], object] = {(row.get(down), row.get(across)): row.get("value") for row in rows}
    lines, columns = (_sorted(row.get(field) for row in rows) for field in (down, across))
    header = (f"{down} \\ {across}", *(str(_cell(column)) for column in columns))
    scale = _scale(values.values())
    body = tuple((_cell(line), *(_cell(values.get((line, column)), scale) for column in columns)) for line in lines)
    return _Table(title, header, ("n",) * len(header), body)


def _sorted(values: Any) -> list[Any]:
    return sorted({value for value in values if value is not None})
