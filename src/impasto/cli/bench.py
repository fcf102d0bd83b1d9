"""`impasto bench`: how fast schedules are, in turns with the untouched model and with other ways to run it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from impasto import console
from impasto.cli import options
from impasto.cli.evaluate import compared, letters, print_schedules
from impasto.cli.loading import Loading, check_texts, recorded, run_folder
from impasto.console import Column
from impasto.errors import ImpastoError, StoreError, UsageError

if TYPE_CHECKING:
    from impasto.result import Estimate, Figure
    from impasto.timings import Bench, Case, How, Timing

FILE, FIGURES = "bench.json", "figures"
DRAWN = ("frontier", "tpot-ratio", "ttft-ratio", "throughput")
OWN = ("plain", "fast")
TIMES = 6  # columns about times; those behind them are about rates and memory
_TIMING = "What is timed"


class Mode(StrEnum):
    """How recipes run."""

    auto = "auto"
    plain = "plain"
    fast = "fast"


def bench(
    model: options.Model,
    schedule: options.Schedules = [],  # noqa: B006 (the command line's own copy)
    edit: options.Edits = [],  # noqa: B006
    batch_sizes: Annotated[
        str, typer.Option(metavar="LIST", rich_help_panel=_TIMING, help="Rows that are decoded together: 1,8,32,256.")
    ] = "1,32",
    contexts: Annotated[
        str,
        typer.Option(
            metavar="LIST", rich_help_panel=_TIMING, help="Tokens of the prompts: 128,1024,32000 (or --input-len)."
        ),
    ] = "128,1024",
    new_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            rich_help_panel=_TIMING,
            help="Tokens that every row writes, the first one included (or --output-len).",
        ),
    ] = 64,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=_TIMING,
            help="Turns of each contender; intervals need two at least (or --num-iters).",
        ),
    ] = 5,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=_TIMING,
            help="Other ways to run the model: hf, hf-compiled, vllm (schedules too); or none.",
        ),
    ] = "hf",
    mode: Annotated[
        Mode,
        typer.Option(rich_help_panel=_TIMING, help="auto is fast on a CUDA device that takes it, else plain."),
    ] = Mode.auto,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", rich_help_panel=_TIMING, help="Under fast: compile layers, or only record them."
        ),
    ] = True,
    accuracy: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A run folder with scores of these recipes: draws the frontier."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Run folder: samples, store and figures."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
) -> None:
    """Time schedules: first token and following ones apart, in turns with the untouched model, with intervals.

    Ctrl-C ends it: what is finished is kept and shown.

    Examples:
      impasto bench demo -s "0:8 12:18" --batch-sizes 1 --contexts 128
      impasto bench ./my-model -s "0:8 {8:16} 16:24" --peers hf,hf-compiled,vllm
      impasto bench ./my-model -e "8:16.mlp.*@0.1" --mode plain --rounds 10
      impasto bench demo -s "0:8 12:18" --accuracy impasto-runs/demo-eval
    """
    sizes, lengths = numbers("--batch-sizes", batch_sizes), numbers("--contexts", contexts)
    others = peer_names(peers)
    check_texts(schedule, edit)
    from impasto.store import Store

    if accuracy is not None:
        with Store(accuracy, readonly=True):  # a wrong folder is told before minutes go into timing
            pass
    folder, found = run_folder(output, model, "bench"), None
    loading = Loading(device, dtype, revision, trust_remote_code, attn_implementation, device_map)
    with Store(folder) as store:
        with console.phases() as progress:
            loaded = loading.load(model, progress)
            chosen = compared(loaded, schedule, edit)
            from impasto import latency
            from impasto.timings import cases

            with contextlib.suppress(KeyboardInterrupt), recorded(store, ["impasto", *sys.argv[1:]]):
                found = latency.measure(
                    loaded,
                    chosen[1:],
                    batch_sizes=sizes,
                    contexts=lengths,
                    new_tokens=new_tokens,
                    rounds=rounds,
                    peers=others,
                    mode=mode.value,
                    compile=compile,
                    progress=progress.share,
                    aside=lambda what, detail: progress.aside(what, detail, 0, 0),
                )
                if found.timings:
                    latency.keep(found, store)
                    set_aside(folder)
                    latency.save(found, folder / FILE)
                if not found.complete:
                    raise KeyboardInterrupt  # to be noted in the store; told at the end
        if found is None or not found.timings:
            raise KeyboardInterrupt  # before anything was measured
        out = console.output()
        print_schedules(out, loaded, chosen)
        show(out, found)
    for line in unfinished(found, list(cases(sizes, lengths, new_tokens)), rounds):
        console.note(line)
    for path in drawn(found, folder, accuracy):
        out.print(console.plain(f"figure: {path}"), soft_wrap=True)
    out.print(console.plain(f"samples: {folder / FILE}"), soft_wrap=True)
    if not found.complete:
        raise KeyboardInterrupt


def set_aside(folder: Path) -> None:
    """Move the samples and figures of an earlier bench in this run folder to a folder of their own."""
    if not (folder / FILE).exists():
        return
    try:
        written = datetime.fromtimestamp((folder / FILE).stat().st_mtime, UTC)
        target = folder / "earlier" / f"{written:%Y-%m-%dT%H-%M-%S.%f}"
        (target / FIGURES).mkdir(parents=True, exist_ok=True)
        (folder / FILE).rename(target / FILE)
        for path in (folder / FIGURES).glob("*"):
            if path.stem in DRAWN:
                path.rename(target / FIGURES / path.name)
    except OSError as error:
        raise StoreError(
            f"cannot move the bench that was in {folder} before ({error.strerror}): what was measured now is in its "
            "store, and not in its bench.json"
        ) from error
    console.note(f"samples and figures of the bench that was here before are in {target}")


def unfinished(bench: Bench, asked: Sequence[Case], rounds: int) -> Iterator[str]:
    """What a bench that was stopped did not measure, or not as often as was asked."""
    for case in () if bench.complete else asked:
        made = [rounds if timing.problem else len(timing.rounds) for timing in bench.of(case)]
        least = min(made) if len(made) >= len(bench.recipes) else 0  # some were not even begun
        if not made:
            yield f"{case}: not measured"
        elif least < rounds:
            yield f"{case}: {least} of {rounds} rounds"


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers in a list with commas between."""
    names = options.split(text)
    if not names or not all(name.isdecimal() and int(name) for name in names):
        raise UsageError(f"{option} is a list of whole numbers from 1 on, such as 1,32, not {text!r}")
    return [int(name) for name in names]


def peer_names(text: str) -> list[How]:
    """The peers in a list with commas between; `none` is nobody."""
    known = ("hf", "hf-compiled", "vllm")
    names = options.split(text)
    if names == ["none"]:
        return []
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--peers knows {', '.join(known)} and none, not {unknown[0]!r}")
    return cast("list[How]", names)


# What is printed -------------------------------------------------------------------------------------------------


def show(out: Console, bench: Bench) -> None:
    """The tables of all cases, then what is to be said of the run."""
    for case in bench.cases:
        out.print()
        out.print(Text(str(case), "bold"))
        if any(timing.rounds for timing in bench.of(case)):
            whole = table(bench, case)
            if out.measure(whole, options=out.options.update_width(console.PIPE_WIDTH)).maximum <= out.width:
                out.print(whole)
            else:  # numbers are never cut
                out.print(table(bench, case, slice(TIMES)))
                out.print()
                out.print(table(bench, case, slice(TIMES, None)))
        for problem in problems(bench, case):
            out.print(console.plain(problem, "yellow"), soft_wrap=True)
    out.print()
    for line in remarks(bench):
        out.print(console.plain(line, "dim"))


def named(bench: Bench) -> dict[str, str]:
    """What tables and figures call the recipes, by fingerprint."""
    names = ["untouched", *letters(len(bench.recipes) - 1)]
    return {recipe.fingerprint: name for recipe, name in zip(bench.recipes, names, strict=True)}


def table(bench: Bench, case: Case, part: slice = slice(None)) -> Any:
    """One case: a line for each contender that has samples; of the columns behind its name, those of `part`."""
    columns = [
        Column("TTFT ms"),
        Column("ratio"),
        Column("TPOT ms"),
        Column("p95"),
        Column("ratio"),
        Column("95 % interval", "left"),
        Column("tokens/s"),
        Column("memory"),
        Column("roofline"),
    ]
    lines = [_line(bench, timing) for timing in bench.of(case) if timing.rounds]
    return console.table([Column("", "left"), *columns[part]], [(line[0], *line[1:][part]) for line in lines])


def problems(bench: Bench, case: Case) -> list[str]:
    """What could not be measured in one case, and why; what holds for everybody is said once."""
    timings = bench.of(case)
    reasons = {timing.problem for timing in timings}
    if len(timings) > 1 and len(reasons) == 1:
        return [f"{reason}" for reason in reasons if reason]
    return [f"{_title(bench, timing)}: {timing.problem}" for timing in timings if timing.problem]


def _title(bench: Bench, timing: Timing) -> str:
    """What a line is called: the recipe's letter, or the peer's name; and how it ran, if not as the untouched model."""
    name = bench.called(timing, named(bench))
    base = bench.baseline(timing.case)
    same = timing.how not in OWN or base is None or base.how == timing.how
    return name if same else f"{name} ({timing.how})"


def _line(bench: Bench, timing: Timing) -> tuple[object, ...]:
    first, following = timing.ttft, timing.tpot
    assert first is not None and following is not None
    other = bench.baseline(timing.case) is not timing
    share, memory = bench.share(timing), timing.memory
    return (
        _title(bench, timing),
        _milliseconds(first.median),
        _ratio(bench.ratio(timing, "ttft") if other else None)[0],
        _milliseconds(following.median),
        _milliseconds(following.q95),
        *_ratio(bench.ratio(timing) if other else None),
        _rate(timing.decode_rate or 0.0),
        "" if memory is None else console.size(memory),
        "" if share is None else f"{100 * share:.2g} %",
    )


def _milliseconds(value: float) -> str:
    """Three digits that say something."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(decimals, 3)}f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def _ratio(ratio: Estimate | None) -> tuple[object, object]:
    if ratio is None:
        return "", ""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}", ""
    style = "green" if ratio.high < 1 else "red" if ratio.low > 1 else ""
    return Text(f"{ratio.value:.3f}", style), f"{_bound(ratio.low)} to {_bound(ratio.high)}"


def _bound(ratio: float) -> str:
    """An end of an interval; of two rounds that differ much it says only how little is known."""
    if ratio > 1000:
        return ">1,000"
    return "<0.001" if ratio < 0.001 else f"{ratio:.3f}"


def remarks(bench: Bench) -> list[str]:
    """The device, its state and its limits, and what is to be said of single recipes."""
    lines = []
    if (best := bench.roofline) is not None:
        device = bench.machine.get("gpu") or "CPU"
        rates = f"copies {console.size(best.copy)}/s, reads {console.size(best.read)}/s"
        lines.append(f"{device}: {rates}, multiplies {console.amount(best.matmul / 1e9)} GFLOP/s;")
        lines.append("  roofline is the share of that which TPOT reaches")
    clocks = [value for one in bench.readings if isinstance(value := one.facts.get("sm_mhz"), float)]
    heat = [value for one in bench.readings if isinstance(value := one.facts.get("celsius"), float)]
    if clocks and heat:
        lines.append(
            f"clock {min(clocks):.0f} to {max(clocks):.0f} MHz, {min(heat):.0f} to {max(heat):.0f} °C "
            f"in {len(bench.readings)} readings"
        )
    for reason, count in bench.throttled.items():
        lines.append(f"held back by {reason} in {count} of {len(bench.readings)} readings")
    build = [(sum(timing.build.values()), timing) for timing in bench.timings if timing.how == "fast" and timing.rounds]
    if build:
        seconds, slowest = max(build, key=lambda pair: pair[0])
        lines.append(f"getting ready took at most {console.duration(seconds)} ({named(bench)[slowest.recipe]})")
    names = named(bench)
    said = {
        f"{names[timing.recipe]}: {note}" if timing.how in OWN else note: None
        for timing in bench.timings
        for note in timing.notes
    }
    return [*lines, *said, *bench.notes]


def drawn(bench: Bench, folder: Path, accuracy: Path | None) -> list[Path]:
    """Draw what there is; returns the images."""
    from impasto import frontier, plots

    names = {r.fingerprint: f"{named(bench)[r.fingerprint]}  {r}" for r in bench.recipes}
    names[bench.recipes[0].fingerprint] = frontier.FULL
    figures: list[Figure] = []
    if any(timing.rounds for timing in bench.timings):
        figures = [frontier.ratios(bench, names, "tpot"), frontier.ratios(bench, names, "ttft")]
    if len({case.batch for case in bench.cases}) > 2:
        figures.append(frontier.throughput(bench, names))
    if accuracy is not None:
        try:
            figures.insert(0, _frontier(bench, accuracy))
        except ImpastoError as problem:
            console.note(f"no frontier: {problem}")
    return [plots.save(figure, folder / FIGURES)["png"] for figure in figures if figure.rows]


def _frontier(bench: Bench, accuracy: Path) -> Figure:
    from impasto import frontier
    from impasto.store import Store

    with Store(accuracy, readonly=True) as store:
        scores = frontier.accuracies(store, bench)
    for task, reason in scores.left_out.items():
        console.note(f"{task} is not counted: {reason}")
    panels = {str(case): frontier.joined(bench, case, scores.scores) for case in bench.cases}
    return frontier.figure({name: points for name, points in panels.items() if points})
