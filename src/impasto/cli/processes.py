"""One command in several processes, as torchrun starts them, each with its part of every layer (`--tp-plan`).

All of them run the whole command, since each must make the same calls of the model; the first one alone speaks, and
writes where others will look.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

OPTION = "--tp-plan"


def number(arguments: Sequence[str]) -> int:
    """Which of the processes this is, by what a command line asks; 0 is the first, or the only one.

    >>> number(["run", "demo", "hello"])
    0
    """
    return rank() if asked(arguments) else 0


def asked(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for several processes."""
    return any(argument.partition("=")[0] == OPTION for argument in takewhile("--".__ne__, arguments))


def rank() -> int:
    """The number that torchrun has given to this process; 0 where it was not started so."""
    return int(os.environ.get("RANK", "0"))


def together() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Inside, nothing that is printed arrives anywhere."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def leave() -> None:
    """Leave the group of processes when all is done.

    Not after an error: the others may be waiting for this process then, and leaving may wait for them. torchrun ends
    them as soon as this one has ended.
    """
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
