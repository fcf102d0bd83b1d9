"""What all studies do on the command line: protocols, a plan in words, a page written and its answers printed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from impasto import console

if TYPE_CHECKING:
    from impasto.result import Answer, Page
    from impasto.studies.run import StudyPlan

_STYLES = {"yes": "bold green", "no": "bold red", "unclear": "bold yellow"}


class Protocol(StrEnum):
    """How much a study measures."""

    quick = "quick"
    standard = "standard"
    paper = "paper"


def write(page: Page, folder: Path) -> Path:
    """The page as files in a folder; returns the path of the page."""
    from impasto import report as pages

    return pages.write(page, folder)


def show(page: Page, path: Path) -> None:
    """Print the page's answers and where it is."""
    out = console.output()
    out.print(answers(page))
    out.print(Text.assemble("report: ", (console.printable(str(path)), "bold")), soft_wrap=True)


def answers(page: Page) -> Group:
    """Every question with its answer, what it rests on, and what the paper found; then warnings and limits."""
    columns = (console.Column("", "left"), console.Column("", "left", fold=True))
    rows = [(_verdict(answer), _reason(answer)) for answer in page.answers]
    title, subtitle = console.plain(page.title, "bold"), console.plain(page.subtitle, "dim")
    parts: list[RenderableType] = [title, subtitle, "", console.table(columns, rows, heading=False)]
    if page.notes:
        limits = [("!", console.plain(note)) for note in page.notes]
        parts += [console.table(columns, limits, heading=False), ""]
    return Group(*parts)


def _verdict(answer: Answer) -> Text:
    from impasto.report import VERDICTS

    word, sign = VERDICTS[answer.verdict]
    return Text(f"{sign} {word.lower()}", _STYLES[answer.verdict])


def _reason(answer: Answer) -> Text:
    lines = [console.plain(answer.question, "bold"), console.plain(answer.effect)]
    if answer.paper:
        lines.append(console.plain(f"the paper: {answer.paper}", "dim"))
    return Text("\n").join([*lines, Text()])


def planned(plan: StudyPlan) -> Iterator[tuple[str, str]]:
    """What a study would take, line by line."""
    yield "recipes", f"{plan.recipes:,}"
    yield "layer calls", f"{plan.shared_calls:,} shared, {plan.layer_calls:,} one by one"
    yield "tokens", f"{plan.shared_tokens:,} shared, {plan.tokens:,} one by one"
    yield "examples", ", ".join(f"{name} {count:,}" for name, count in plan.rows)
    yield "time", f"about {console.duration(plan.seconds)}; one by one {console.duration(plan.naive_seconds)}"
    yield "memory", f"about {console.size(plan.bytes)} beside the weights"
