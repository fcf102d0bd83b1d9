"""`impasto corpus count`: how often facts are mentioned in a corpus of texts."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from impasto import console
from impasto.cli import options
from impasto.cli.helping import Command, Group
from impasto.errors import UsageError

if TYPE_CHECKING:
    from impasto.corpus import Counts, Pair, Plan

corpus = typer.Typer(
    name="corpus", cls=Group, rich_markup_mode="rich", help="How often facts are mentioned in a corpus."
)

FACTS = "laser_counterfact"
_BANDS = ((0, 0, "never"), (1, 49, "1 to 49"), (50, 1000, "50 to 1,000"), (1001, None, "more than 1,000"))


class Matching(StrEnum):
    """How a subject is mentioned."""

    phrase = "phrase"
    all_words = "all_words"


class Documents(StrEnum):
    """What a document of plain text is."""

    block = "block"
    line = "line"
    file = "file"


@corpus.callback(invoke_without_command=True)
def _corpora(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@corpus.command("count", cls=Command)
def count(
    shards: Annotated[
        list[str], typer.Argument(metavar="SHARDS...", help="Files, folders or quoted globs: jsonl, txt, parquet.")
    ],
    pairs: Annotated[
        str,
        typer.Option(metavar="FILE", help=f"Subjects and answers (JSON lines or tab-separated), or `{FACTS}`."),
    ] = FACTS,
    match: Annotated[
        Matching, typer.Option(help="phrase: the subject as it stands; all_words: its words anywhere in the document.")
    ] = Matching.phrase,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Compare A to Z without case.")] = False,
    field: Annotated[str, typer.Option(metavar="NAME", help="Where JSON lines and Parquet hold the text.")] = "text",
    documents: Annotated[
        Documents, typer.Option(help="What a document of plain text is; a block stands between blank lines.")
    ] = Documents.block,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes that count; else one for each core.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where counts go: .json, or .jsonl for rows alone."),
    ] = Path("counts.json"),
    dry_run: options.DryRun = False,
) -> None:
    """Count the documents in which a subject stands together with its answer.

    What finished files gave is kept beside the output: the same command, stopped and started again or given more
    shards, counts only what is lacking.

    Examples:
      impasto corpus count "pile/*.jsonl.zst" --workers 8
      impasto corpus count "pile/*.jsonl.zst" --dry-run
      impasto corpus count wiki.parquet --pairs facts.jsonl -o facts.json
    """
    if output.suffix not in (".json", ".jsonl"):
        raise UsageError(f"counts are written as .json or .jsonl, not as {output.name}")
    from impasto import corpus as counting

    files = tuple(file for file in counting.files(shards) if file != output.resolve())  # it may lie among them
    rules = counting.Rules(match.value, ignore_case, field, documents.value)
    processes = workers or _cores()
    kept = output.with_name(output.name + ".kept")
    out = console.output()
    with console.phases() as progress:
        progress.bytes("reading the pairs", 0, 0)
        asked = _asked(pairs)
        if dry_run:
            progress.bytes("counting in a sample", 0, 0)
            plan = counting.plan(files, asked, rules=rules, kept=kept)
            out.print(console.facts(planned(plan, processes)))
            return

        def tell(done: int, total: int) -> None:
            progress.share(f"counting in {console.size(total)}", done / total if total else 1.0)

        counts = counting.count(
            files, asked, rules=rules, workers=processes, kept=kept, progress=tell, note=progress.note
        )
    counting.write(counts, output)
    out.print(console.facts(summary(counts)))
    out.print(console.plain(f"counts: {output}"), soft_wrap=True)


def planned(plan: Plan, workers: int) -> list[tuple[str, object]]:
    """What a count would take, line by line."""
    left = plan.seconds(workers)
    speed = f"{plan.speed:.1f} MB/s on disk per core, measured on {console.size(plan.sampled)}"
    kept = f", {console.size(plan.kept)} counted by an earlier run" if plan.kept else ""
    return [
        ("shards", f"{plan.files:,} {'file' if plan.files == 1 else 'files'}, {console.size(plan.bytes)}{kept}"),
        ("documents", f"about {console.amount(plan.documents)}, {plan.broken:.2%} of the lines broken"),
        ("speed", speed),
        ("time", f"about {console.duration(left)} on {workers} free {'core' if workers == 1 else 'cores'}"),
    ]


def summary(counts: Counts) -> list[tuple[str, object]]:
    """What was found and how fast, line by line."""
    speed = f"{counts.speed:.1f} MB/s on disk per core, {console.duration(counts.seconds)} of one core"
    rows: list[tuple[str, object]] = [
        ("corpus", f"{console.size(counts.bytes)}, {counts.documents:,} documents, {counts.broken:,} broken lines"),
        ("speed", speed),
        ("pairs", f"{len(counts.pairs):,}"),
    ]
    for low, high, name in _BANDS:
        found = sum(number >= low and (high is None or number <= high) for number in counts.together)
        rows.append((f"  {name}", f"{found:,}"))
    return rows


def _cores() -> int:
    """How many cores this process may use."""
    own = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(own(0)) if own else os.cpu_count() or 1


def _asked(pairs: str) -> tuple[Pair, ...]:
    """The pairs of a file, or of the task of facts."""
    from impasto import corpus as counting

    if pairs != FACTS:
        return counting.read_pairs(pairs)
    from impasto.benchmarks.laser import data

    rows = data.rows("counterfact")
    return counting.distinct(counting.Pair(row["subject"], row["target_true"]) for row in rows)
