"""How `--help` looks: paragraphs as wide as the window, and flags that do not look as if they wanted a value."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperCommand, TyperGroup


def flowing(text: str | None) -> str | None:
    r"""A help text whose paragraphs are one line each, to be broken where the window ends; examples keep their lines.

    >>> flowing("Says\n    hello.\n\n    Examples:\n      impasto hello\n      impasto hello you")
    'Says hello.\n\nExamples:\n  impasto hello\n  impasto hello you'
    """
    if text is None:
        return None
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("Examples:") else part.replace("\n", " ") for part in paragraphs)


def _valueless(option: Any) -> Any:
    """The same option; a flag's type, which would stand where others have a placeholder, is not shown."""
    if getattr(option, "is_flag", False):
        option.metavar = ""
    return option


class _Readable:
    """What commands, and groups of them, have in common: such a help."""

    params: list[Any]

    def __init__(self, *args: Any, help: str | None = None, **rest: Any) -> None:
        super().__init__(*args, help=flowing(help), **rest)  # type: ignore[call-arg]
        self.params = [_valueless(option) for option in self.params]

    def get_help_option(self, ctx: Any) -> Any:
        """The option `--help` itself."""
        return _valueless(super().get_help_option(ctx))  # type: ignore[misc]


class Command(_Readable, TyperCommand):
    """A command with such a help."""


class Group(_Readable, TyperGroup):
    """Commands that have a name together, with such a help."""
