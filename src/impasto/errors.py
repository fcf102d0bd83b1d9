"""Every error impasto raises on purpose, as one tree.

ImpastoError                 exit code 1: the work failed, and the message says what to do
├── UsageError               exit code 2: what was asked for cannot be, whatever the machine
│   ├── NotationError        a schedule, edit or foreign layer map that cannot be read
│   ├── UnknownTask          no benchmark of that name
│   └── UnknownModel         no model of that name, folder or file
├── UnsupportedModel         the model's structure cannot be scheduled (or halved, or edited)
├── FetchError               something could not be downloaded or unpacked
├── MissingExtra             an optional package is needed
├── OutOfMemory              not even one request fits
└── StoreError               the run folder cannot be read or written
"""

from __future__ import annotations


class ImpastoError(Exception):
    """Base of all errors that impasto raises on purpose: one clear text, no traceback in the command line."""

    exit_code = 1


class UsageError(ImpastoError):
    """What was asked for cannot be: a wrong option, name or text."""

    exit_code = 2


class NotationError(UsageError):
    """A text that is not a schedule (or edit): shows the text, a caret, the rule and the nearest valid spelling.

    Args:
        problem: one sentence, what is wrong.
        text: the whole text as the user wrote it.
        start: index of the first wrong character in `text`.
        end: index one past the last wrong character.
        rule: the rule of the notation that is broken.
        suggestion: the nearest spelling that is valid, or None.
    """

    def __init__(
        self,
        problem: str,
        text: str = "",
        start: int = 0,
        end: int | None = None,
        *,
        rule: str = "",
        suggestion: str | None = None,
    ) -> None:
        self.problem = problem
        self.text = text
        self.start = start
        self.end = start + 1 if end is None else max(end, start + 1)
        self.rule = rule
        self.suggestion = suggestion
        lines = [problem]
        if text:
            lines += [f"  {text}", "  " + " " * start + "^" * (self.end - start)]
        if rule:
            lines.append(f"rule: {rule}")
        if suggestion is not None:
            lines.append(f"did you mean: {suggestion}")
        super().__init__("\n".join(lines))


class UnknownTask(UsageError):
    """No benchmark of that name is known here."""


class UnknownModel(UsageError):
    """No model of that name, folder or file."""


class UnsupportedModel(ImpastoError):
    """The model's structure cannot express what was asked; says what was looked for and what was found."""


class FetchError(ImpastoError):
    """Something could not be downloaded, verified or unpacked."""


class MissingExtra(ImpastoError):
    """An optional package is needed; says what to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'impasto[{extra}]'")


class OutOfMemory(ImpastoError):
    """Not even a single request fits into the device's memory."""


class StoreError(ImpastoError):
    """The run folder cannot be read or written, or was written by a newer impasto."""
