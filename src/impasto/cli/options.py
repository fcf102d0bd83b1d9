"""Arguments and options that several commands share; named as lm-evaluation-harness and vLLM name theirs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from impasto.errors import UsageError
from impasto.result import MASKINGS


class KV(StrEnum):
    """How the KV cache is laid out under a schedule."""

    exact = "exact"
    mean = "mean"


class TPPlan(StrEnum):
    """How layers are split over processes."""

    auto = "auto"


def _masking(name: str) -> str:
    if name not in MASKINGS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, MASKINGS))}.")
    return name


_LOADING = "How the model is loaded"
_ASKING = "What is asked"
_SHARING = "Who does the work"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id (org/name), a folder, a .gguf file, or `demo`.")]
ScheduleText = Annotated[
    str | None,
    typer.Option("--schedule", "-s", metavar="TEXT", help="Which layers run, in what order: '0:8 12:28'."),
]
Schedules = Annotated[
    list[str],
    typer.Option("--schedule", "-s", metavar="TEXT", help="A schedule to measure; give several with several -s."),
]
Edits = Annotated[
    list[str],
    typer.Option("--edit", "-e", metavar="TEXT", help="A change of weights: '20:28.mlp.*@0.1'; may be repeated."),
]

Device = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=_LOADING, help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=_LOADING, help="auto, float32, bfloat16 or float16."),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_LOADING, help="Branch, tag or commit of a hub model."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=_LOADING, help="Let code from the model's repository run."),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_LOADING, help="sdpa, eager, flash_attention_2..."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_LOADING, help="`auto` spreads the model over several devices."),
]
TensorParallel = Annotated[
    TPPlan | None,
    typer.Option(
        "--tp-plan",
        rich_help_panel=_LOADING,
        help="Split every layer over the processes of a `torchrun -m impasto ...`, as the family's plan says.",
    ),
]

Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        rich_help_panel=_ASKING,
        help="Benchmarks, with commas between; `impasto tasks` lists them.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, rich_help_panel=_ASKING, help="Only the first N examples of each task."),
]
IncludePath = Annotated[
    list[Path],
    typer.Option(
        metavar="FOLDER",
        rich_help_panel=_ASKING,
        help="A folder with harness YAML files of your own; may be repeated.",
    ),
]
Masks = Annotated[
    str | None,
    typer.Option(
        "--masking",
        metavar=f"[{'|'.join(MASKINGS)}]",
        parser=_masking,
        rich_help_panel=_ASKING,
        help="Encoders: mask an answer's tokens together, or each in turn; `authors` counts one token too many.",
    ),
]
BatchSize = Annotated[str, typer.Option(metavar="TOKENS", help="Tokens per batch: auto, or a number to start from.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Run folder; the same one continues.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take in work, time and memory; run nothing.")
]

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        rich_help_panel=_SHARING,
        help="Share the scoring out with Ray: `local` for this host, `auto` or HOST:PORT for a cluster.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=_SHARING,
        help="Workers under --ray; else one for each GPU, or for each machine without.",
    ),
]


def split(names: str | None) -> list[str]:
    """The names in a text with commas between; none for no text."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def batch_tokens(text: str) -> int | None:
    """The number that `--batch-size` gives; None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size is `auto` or a number of tokens, at least 1, not {text!r}")
    return int(text)
