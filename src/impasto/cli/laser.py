"""`impasto study laser`: which matrices can be cut down to a low rank, and does that help on unseen questions?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto import console
from impasto.cli import options
from impasto.cli.loading import Loading, check_tasks, looking, recorded, require_tokenizer, run_folder
from impasto.cli.pages import Protocol, planned, show, write
from impasto.errors import UsageError

if TYPE_CHECKING:
    from impasto.studies.laser.run import LaserPlan

_ASKING = "What is asked"
_EDITS = "Which edits are tried"
_BESIDE = "What is measured beside accuracy"


class Select(StrEnum):
    """How a candidate is chosen."""

    race = "race"
    full = "full"


class Compose(StrEnum):
    """How several edits are put together."""

    greedy = "greedy"
    authors = "authors"
    none = "none"


def laser(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A hub id (org/name), a folder, a .gguf file, or `demo`.")
    ] = "demo",
    protocol: Annotated[
        Protocol,
        typer.Option(rich_help_panel=_ASKING, help="quick: minutes on two cores; paper: everything the paper ran."),
    ] = Protocol.quick,
    tasks: options.Tasks = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, rich_help_panel=_ASKING, help="Documents to choose on; four times as many are held out."
        ),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=_EDITS,
            help="Matrices, with commas between: mlp, attention, all, or names in a block such as '*.down_proj'.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="TEXT", rich_help_panel=_EDITS, help="Layers, such as 9:18 or 0,4,-1.")
    ] = None,
    rhos: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", rich_help_panel=_EDITS, help="Shares of the full rank that are kept, 0 to 1."),
    ] = None,
    screen: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=0, rich_help_panel=_EDITS, help="Candidates that a backward pass leaves; 0 is all."
        ),
    ] = None,
    select: Annotated[
        Select | None,
        typer.Option(rich_help_panel=_EDITS, help="race drops the clearly worse early; full measures all."),
    ] = None,
    compose: Annotated[
        Compose | None,
        typer.Option(rich_help_panel=_EDITS, help="Several edits: greedy search, the authors' procedure, or none."),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=_EDITS, help="Of the order in which a race asks.")
    ] = 0,
    frequencies: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            rich_help_panel=_BESIDE,
            help="A count of `impasto corpus count`: do rare facts gain more? May be repeated.",
        ),
    ] = [],  # noqa: B006
    text: Annotated[
        list[str],
        typer.Option(metavar="FILE", rich_help_panel=_BESIDE, help="A plain text: its perplexity. May be repeated."),
    ] = [],  # noqa: B006
    include_path: options.IncludePath = [],  # noqa: B006 (the command line's own copy)
    masking: options.Masks = None,
    batch_size: options.BatchSize = "auto",
    output: options.Output = None,
    dry_run: options.DryRun = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
    ray: options.Ray = None,
    workers: options.Workers = None,
) -> None:
    """Ask of a model what LASER asked: does one matrix of low rank, or several, answer better than the whole model?

    Edits are chosen on one part of each task and reported on another, which no choice has seen, beside guessing and
    always giving the most frequent answer. The page, its figures and all results land in the run folder. Ctrl-C loses
    nothing: the same command goes on.

    Examples:
      impasto study laser
      impasto study laser demo --layers 9:18 --dry-run
      impasto study laser ./my-model --protocol standard
      impasto study laser ./my-model --screen 0 --select full
      impasto study laser ./my-model --text novel.txt --frequencies counts.json
    """
    tokens = options.batch_tokens(batch_size)
    folder = run_folder(output, model, f"laser-{protocol.value}")
    loading = Loading(device, dtype, revision, trust_remote_code, attn_implementation, device_map, masking=masking)
    where = loading.cluster(ray, workers)
    asked: dict[str, Any] = {
        "protocol": protocol.value,
        "task_names": options.split(tasks) or None,
        "limit": limit,
        "types": options.split(types) or None,
        "layers": layers,
        "rhos": options.split(rhos) or None,
        "select": select and select.value,
        "screen": screen,
        "compose": compose and compose.value,
    }
    _check(asked)
    check_tasks(options.split(tasks), include_path)
    for named in (*frequencies, *text):
        if not Path(named).is_file():
            raise UsageError(f"no file {named}")
    from impasto.store import Store

    with looking(folder) if dry_run else Store(folder) as store, console.phases() as progress:
        loaded = loading.load(model, progress)
        require_tokenizer(loaded)
        progress.bytes("preparing", 0, 0)
        from impasto.studies.laser.run import dry_run_laser, run_laser

        asked |= {
            "seed": seed,
            "include": tuple(include_path),
            "store": store,
            "progress": progress.share,
            "note": progress.note,
            "batch_tokens": tokens,
        }
        if dry_run:
            plan = dry_run_laser(loaded, **asked)
            progress.close()
            console.output().print(console.facts(_planned(plan)))
            return
        noted = recorded(store, ["impasto", *sys.argv[1:]], seed=seed)
        page = run_laser(loaded, where=where, counts=frequencies, texts=text, noted=noted, **asked)
        progress.bytes("drawing the page", 0, 0)
        path = write(page, folder)
    show(page, path)


def _check(asked: dict[str, Any]) -> None:
    """Refuse what fits no model, before minutes go into loading one."""
    from impasto.studies.laser.protocol import adapted, protocol

    changes = {name: asked[name] for name in ("limit", "types", "rhos", "select", "screen", "compose")}
    adapted(protocol(asked["protocol"]), **changes)


def _planned(plan: LaserPlan) -> Iterator[tuple[str, str]]:
    yield (
        "candidates",
        f"{plan.candidates:,} cuts of {plan.matrices:,} matrices, {plan.measured:,} measured for each task",
    )
    yield from planned(plan.scoring)
