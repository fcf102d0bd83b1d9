"""The command line: `impasto show`, `run`, `eval`, `bench`, `study`, `corpus`, `report`, `tasks`, `fetch`.

Commands import what is heavy when they run, so that help is there at once. Whatever goes wrong ends in `main`, as
one line on standard error and an exit code: 2 for what was asked, 1 for what failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from impasto import __version__, console
from impasto.cli import processes
from impasto.cli.bench import bench
from impasto.cli.corpus import corpus
from impasto.cli.evaluate import evaluate
from impasto.cli.helping import Command, Group
from impasto.cli.run import run
from impasto.cli.show import show
from impasto.cli.study import report, study
from impasto.cli.tasks import fetch, tasks
from impasto.errors import ImpastoError

INTERRUPTED = 130
_CONTINUES = ("eval", "study", "corpus")  # commands that find what they measured before
_ALSO = {"--input-len": "--contexts", "--output-len": "--new-tokens", "--num-iters": "--rounds"}  # vLLM's names
_CHECKER = "Value error, "  # what the parser's checks begin with


class _InOrder(Group):
    """Lists the commands as one meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["study", "show", "run", "eval", "bench", "corpus", "report", "tasks", "fetch"]


app = typer.Typer(
    name="impasto", cls=_InOrder, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.command("show", cls=Command)(show)
app.command("run", cls=Command)(run)
app.command("eval", cls=Command)(evaluate)
app.command("bench", cls=Command)(bench)
app.add_typer(study)
app.add_typer(corpus)
app.command("report", cls=Command)(report)
app.command("tasks", cls=Command)(tasks)
app.command("fetch", cls=Command)(fetch)


def _version(wanted: bool) -> None:
    if wanted:
        console.output().print(f"impasto {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _everything(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand after the command too.")
    ] = False,
) -> None:
    """Surgery on the layers of frozen transformers: run any schedule of them, measure what it costs.

    Examples:
      impasto study painters                        the whole study, as a page
      impasto show demo                             what a model is made of
      impasto run demo -s "0:8 12:18" "Once upon"   text with four layers left out
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    tidy, debug = understood(given)
    console.forgive()
    number = processes.number(tidy)
    try:
        with processes.hushed() if number else contextlib.nullcontext():
            code = app(args=tidy, prog_name="impasto", standalone_mode=False)
        if processes.asked(tidy):
            processes.leave()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as problem:
        if debug:
            traceback.print_exception(problem)
        text, code = explained(problem)
        console.fail(f"process {number}: {text}" if number else text)  # it may have failed in this process alone
    if code == INTERRUPTED and not number:
        console.messages().print(console.plain(_farewell(given)), soft_wrap=True)
    return code if isinstance(code, int) else 0


def understood(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments with option names as they are here, and whether `--debug` is among them.

    Underscores become dashes, and what vLLM's own benchmark calls the options of `bench` what they are called here.
    What stands behind `--` is left alone.

    >>> understood(["run", "demo", "--max_new_tokens=3", "--debug"])
    (['run', 'demo', '--max-new-tokens=3'], True)
    >>> understood(["bench", "demo", "--input-len", "16"])
    (['bench', 'demo', '--contexts', '16'], False)
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    tidy = []
    for argument in arguments[:end]:
        name, sign, value = argument.partition("=")
        is_option = name.startswith("--") and " " not in name
        if is_option:
            name = name.replace("_", "-")
            name = _ALSO.get(name, name) if "bench" in arguments[:end] else name
        tidy.append(name + sign + value)
    return [argument for argument in tidy if argument != "--debug"] + list(arguments[end:]), "--debug" in tidy


def explained(problem: Exception) -> tuple[str, int]:
    """What to tell the user about an exception, and the exit code."""
    if isinstance(problem, ImpastoError):
        return str(problem), problem.exit_code
    if callable(say := getattr(problem, "format_message", None)):  # what the parser did not understand
        context = getattr(problem, "ctx", None)
        path = context.command_path if context is not None else "impasto"
        return f"{say().rstrip('.').replace(_CHECKER, '')} (`{path} --help` says what there is)", 2
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return "out of memory: try --dtype bfloat16, a smaller model or another device", 1
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror}" + (f": {problem.filename}" if problem.filename else ""), 1
    first = next(iter(str(problem).strip().splitlines()), "")
    kind = type(problem).__name__
    return f"unexpected {kind}{f': {first}' if first else ''} (--debug shows the traceback)", 1


def _farewell(arguments: Sequence[str]) -> str:
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command not in _CONTINUES:
        return "stopped"
    line = shlex.join(["impasto", *arguments])
    if processes.asked(understood(arguments)[0]):
        line = f"torchrun --nproc-per-node {processes.together()} -m {line}"
    return f"stopped; everything measured is kept. To continue: {line}"
