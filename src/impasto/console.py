"""What the command line says: tables, notes, progress with time left, errors.

Results go to standard output, everything else to standard error. Texts from models and data are never read as
markup, and their control characters are replaced, so that nothing they contain can colour or steer a terminal.
"""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200  # columns where nobody looks: a pipe or a file
LONG_WORD = 24  # columns after which a word no longer waits for its end
QUIET_SECONDS = 10.0  # between two plain progress lines of one phase

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def output() -> Console:
    """Standard output, as it is now; wide where it is no terminal."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error, as it is now."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def printable(text: str) -> str:
    """`text` with every control character but tab and line feed replaced by a visible sign."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def plain(text: object, style: str = "") -> Text:
    """Any text as it stands: no markup, no control characters."""
    return Text(printable(str(text)), style)


def fail(text: str) -> None:
    """Print an error in red; indented lines are never wrapped, so that a caret stays below what it points at."""
    screen = messages()
    for number, line in enumerate(printable(text).split("\n")):
        start = Text("" if number else "error: ", "bold red")
        screen.print(start + Text(line, "red"), soft_wrap=not screen.is_terminal or line.startswith("  "))


def note(text: str) -> None:
    """Print a sentence that the user should know."""
    _note(messages(), text)


def _note(console: Console, text: str) -> None:
    console.print(Text.assemble(("note: ", "yellow"), printable(text)), soft_wrap=not console.is_terminal)


class Stream:
    """Writes a text as it comes; in a terminal, lines break between words, so the last word waits until it is whole."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self._column = 0
        self._word = Text()

    def write(self, text: str, style: str = "") -> None:
        """The next piece of the text."""
        if not self.screen.is_terminal:
            self._put(plain(text, style))
            return
        for part in re.split(r"(\s)", printable(text)):
            if not part:
                continue
            if part.isspace():
                self._flush()
                self._put(Text(part))
                self._column = 0 if part == "\n" else self._column + len(part.expandtabs())
            else:
                self._word.append(part, style)
                if self._word.cell_len > LONG_WORD:  # a script without spaces, say
                    self._flush()

    def end(self) -> None:
        """The text is complete: write what waits, and end the line."""
        self._flush()
        self.screen.print()

    def _flush(self) -> None:
        width = self._word.cell_len
        if self._column and self._column + width > self.screen.width:
            self.screen.print()
            self._column = 0
        self._put(self._word)
        self._column += width
        self._word = Text()

    def _put(self, text: Text) -> None:
        self.screen.print(text, end="", soft_wrap=True)


Justify = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, and whether it holds numbers or a text that may be folded."""

    title: str
    justify: Justify = "right"
    fold: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, heading: bool = True) -> Table:
    """A table without frame; cells are texts, or `Text` where they have a style."""
    made = Table(box=None, show_header=heading, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(
            plain(column.title),
            justify=column.justify,
            overflow="fold" if column.fold else "ellipsis",
            no_wrap=not column.fold,
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and what they are, one pair a line."""
    columns = (Column("", "left"), Column("", "left", fold=True))
    return table(columns, [(plain(name, "dim"), value) for name, value in pairs], heading=False)


# Numbers as people read them -------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time as people say it: `0.4 s`, `45 s`, `12 min`, `2.5 h`."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """Bytes as people say them: `512 B`, `18 kB`, `253 MB`, `1.4 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= 0.9995 * factor:
            scaled = amount / factor
            return f"{scaled:.1f} {unit}" if scaled < 9.95 else f"{scaled:,.0f} {unit}"
    return f"{amount:.0f} B"


def amount(number: float) -> str:
    """A count as people say it: `640`, `5.57 M`, `1.24 B`."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 9995 and number >= 0.9995 * factor:
            scaled = number / factor
            return f"{scaled:.2f} {unit}" if scaled < 99.95 else f"{scaled:.1f} {unit}"
    return f"{number:,.0f}"


# Progress --------------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """How far a phase is, and when it will be done if it goes on like this."""

    began: float
    first: float  # share when it was first heard of: what an earlier run had done
    share: float = 0.0
    told: float = 0.0
    ended: float | None = None

    def tell(self, share: float, now: float) -> None:
        self.share, self.told = share, now
        if share >= 1 and self.ended is None:
            self.ended = now

    def left(self, now: float) -> float | None:
        """Seconds, or None where it is too early to say."""
        done = self.share - self.first
        if done <= 0:
            return None
        whole = (self.told - self.began) / done * (1 - self.share)
        return max(0.0, whole - (now - self.told))

    def text(self, now: float) -> str:
        if self.ended is not None:
            return duration(self.ended - self.began)
        left = self.left(now)
        return "" if left is None else f"{duration(max(left, 1))} left"


class Phases(ABC):
    """Progress of a command, phase by phase; to be used in a `with` block.

    `share` and `bytes` are the callbacks that the rest of impasto asks for.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.now = now
        self.clocks: dict[str, _Clock] = {}
        self._heard = now()  # when something was last reported: then the next phase began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def share(self, phase: str, share: float) -> None:
        """`phase` is done to `share`, 0 to 1."""
        now = self.now()
        share = min(max(share, 0.0), 1.0)
        known = self.clocks.get(phase)
        if known is None or (known.ended is not None and share < 1):
            at_once = now - self._heard < 1 and share < 1  # no work of this process: an earlier one's
            self.clocks[phase] = known = _Clock(self._heard, share if at_once else 0.0)
        known.tell(share, now)
        self._heard = now
        self.show(phase, known)

    def bytes(self, what: str, done: int, total: int) -> None:
        """Something on the side (a download, a check) has done so many bytes; a total of 0 is unknown."""
        self._heard = self.now()
        self.aside(what, f"{size(done)} of {size(total)}" if total and done else "", done, total)

    @abstractmethod
    def aside(self, what: str, text: str, done: int, total: int) -> None:
        """Show what happens on the side: its name, how far it is in words, in bytes, and the bytes in all."""

    @abstractmethod
    def show(self, phase: str, clock: _Clock) -> None:
        """Show how far a phase is."""

    def note(self, text: str) -> None:
        """A sentence that the user should know, above the bars."""
        _note(self.console, text)

    @abstractmethod
    def close(self) -> None:
        """Leave the lines as they are and stop."""


def phases() -> Phases:
    """Progress on standard error: bars in a terminal, now and then a line elsewhere."""
    console = messages()
    return Bars(console) if console.is_terminal else Lines(console)


class Lines(Phases):
    """Plain lines: one when a phase begins, one when it ends, and not too many between."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, now)
        self._last: dict[str, float] = {}

    def show(self, phase: str, clock: _Clock) -> None:
        """A line, unless there was one a moment ago."""
        now = self.now()
        if clock.ended is None and now - self._last.get(phase, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        if clock.ended is not None and self._last.get(phase) == clock.ended:
            return
        self._last[phase] = now if clock.ended is None else clock.ended
        self._line(f"{phase}: {clock.share:.0%}", clock.text(now))

    def aside(self, what: str, text: str, done: int, total: int) -> None:
        """A line when something new begins, and now and then how far it is."""
        now = self.now()
        if now - self._last.get(what, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        self._last[what] = now
        self._line(what, text)

    def close(self) -> None:
        """Nothing to do: every line is complete."""

    def _line(self, *parts: str) -> None:
        self.console.print(plain(", ".join(part for part in parts if part)), soft_wrap=True)


class Bars(Phases):
    """A bar for every phase; what happens on the side has one line at the bottom that comes and goes."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task

        super().__init__(console, now)

        class Name(ProgressColumn):
            def render(self, task: Task) -> Text:
                return plain(task.description)

        class Status(ProgressColumn):
            max_refresh = 0.5

            def render(self, task: Task) -> Text:
                shown: Callable[[], str] = task.fields["status"]
                return plain(shown(), "dim")

        bar = BarColumn(bar_width=24, complete_style="cyan", finished_style="green", pulse_style="cyan")
        # Streams are left alone: others redirect them while they work, and the two would undo each other.
        self._bars = Progress(
            Name(),
            bar,
            Status(),
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks: dict[str, Any] = {}
        self._side: Any = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bars.start()
        return self

    def show(self, phase: str, clock: _Clock) -> None:
        """Move the phase's bar."""
        self._clear()
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=1.0, status=lambda: self._status(phase))
        self._bars.update(self._tasks[phase], completed=clock.share)

    def _status(self, phase: str) -> str:
        clock = self.clocks[phase]
        text = clock.text(self.now())
        return text if clock.ended is not None else f"{clock.share:4.0%}  {text}"

    def aside(self, what: str, text: str, done: int, total: int) -> None:
        """A bar at the bottom that comes and goes."""
        if self._side is None:
            self._side = self._bars.add_task(what, total=None, status=lambda: "")
        self._bars.update(self._side, description=what, completed=done, total=total or None, status=lambda: text)

    def _clear(self) -> None:
        if self._side is not None:
            self._bars.remove_task(self._side)
            self._side = None

    def close(self) -> None:
        """Stop drawing; the bars of the phases stay."""
        self._clear()
        self._bars.stop()


def forgive() -> None:
    """Let both streams print a `?` for what their encoding cannot say, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
