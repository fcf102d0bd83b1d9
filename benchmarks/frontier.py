"""Which recipe to take for so much less latency: accuracy and latency of many recipes of one model, measured together.

    python benchmarks/frontier.py MODEL --limit 200 --batch-sizes 1,32 --output frontier
    python benchmarks/frontier.py MODEL --recipes skip,pairs --no-compile --rounds 3 --output frontier

Recipes are made for the model's depth: middle layers skipped, run in parallel (averaged, and summed), as a looped
group, as pairs, their MLPs cut in rank, and mixtures of these, at several widths. Each is scored on two halves of every
task's documents (a hash of the document decides which half it is in) and timed in turns with the untouched model.

On the first half the best recipe is chosen for 10, 20, 30 and 50 % less time per token; what is printed of it, and what
the figure shows of all, was measured on the other half, and the chosen ones are timed anew, by themselves. The folder
gets the run's store, `bench.json` and `again.json` with every sample, `frontier.json` with points and choices, and the
figure as SVG, PNG and CSV. Started again, it scores nothing twice; interrupted while it times, it ends with what there
is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto import frontier, latency, plots
from impasto.evaluate import evaluate
from impasto.models import LoadedModel, load
from impasto.recipe import Recipe
from impasto.result import Estimate, Result
from impasto.store import Store
from impasto.tasks import TaskSet, build
from impasto.timings import Bench, Case

TASKS = "basic_skills_arithmetic,basic_skills_logical_reasoning,basic_skills_common_knowledge,lambada_openai"
WIDTHS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 5 / 12, 1 / 2, 2 / 3)  # shares of the layers
RANKS = ("0.25", "0.1")


def made(depth: int) -> Iterator[tuple[str, str, list[str]]]:
    """Method, schedule and edits of every recipe, around the middle of a model of so many layers."""
    for width in sorted({max(2, round(share * depth / 2) * 2) for share in WIDTHS}):
        if width > depth - 2:
            continue
        a = (depth - width) // 2
        b = a + width
        before, behind = f"0:{a}", f"{b}:{depth}"
        yield "skip", f"{before} {behind}", []
        yield "parallel, mean", f"{before} {{{a}:{b}}} {behind}", []
        yield "parallel, sum", f"{before} sum{{{a}:{b}}} {behind}", []
        if width > 2:
            yield "looped parallel", f"{before} {{{a}:{b}}}x2 {behind}", []
            yield "pairs", f"{before} {pairs(a, b)} {behind}", []
            yield "pairs", f"{before} {pairs(a, b, 'sum')} {behind}", []
        if width % 4 == 0:
            middle = (a + b) // 2
            yield "mixture", f"{before} {pairs(a, middle)} {behind}", []  # one half in pairs, the other one skipped
            yield "mixture", f"{before} {pairs(a, middle, 'sum')} {behind}", []
    a, b = depth // 4, depth - depth // 4
    for rank in RANKS:
        yield "rank cut", f"0:{depth}", [f"{a}:{b}.mlp.*@{rank}"]
    few = (depth - max(2, depth // 12 * 2)) // 2
    yield "mixture", f"0:{few} {depth - few}:{depth}", [f"{few // 2}:{few}.mlp.*@0.25"]


def pairs(a: int, b: int, merge: str = "") -> str:
    """Layers a to b two by two: the two of a pair on the same input."""
    return " ".join(f"{merge}{{{i},{i + 1}}}" for i in range(a, b, 2))


def recipes(loaded: LoadedModel, wanted: Sequence[str]) -> tuple[list[Recipe], dict[str, str]]:
    """The recipes of the methods that are asked for, and the method of each by fingerprint."""
    methods: dict[str, str] = {}
    found = {}
    for name, schedule, edits in made(loaded.layers):
        if "all" in wanted or name.split(",")[0].replace(" ", "-") in wanted:
            recipe = Recipe.of(loaded.name, schedule, edits, layers=loaded.layers)
            if recipe.fingerprint not in found:
                found[recipe.fingerprint], methods[recipe.fingerprint] = recipe, name
    return list(found.values()), methods


def halves(tasks: Sequence[TaskSet]) -> tuple[list[TaskSet], list[TaskSet]]:
    """Every task in two: to choose on, and to report on."""
    parts = [task.parted(0.5) for task in tasks]
    return [first for first, _ in parts], [second for _, second in parts]


def scores(results: Sequence[Result], tasks: Sequence[TaskSet], full: str) -> dict[str, Estimate]:
    """The mean normalised score of every recipe on some tasks; says which tasks cannot be counted."""
    sheets = []
    for task in tasks:
        mine = {result.recipe: result for result in results if result.protocol == task.protocol}
        sheet = frontier.sheet_of(mine, full)
        if isinstance(sheet, str):
            print(f"{task.name} ({task.n} documents) is not counted: {sheet}", flush=True)
        else:
            sheets.append(sheet)
    if not sheets:
        raise SystemExit("the untouched model is above guessing in no task: take others, or more documents")
    return frontier.mean_normalised(sheets)


def timed(loaded: LoadedModel, chosen: Sequence[Recipe], options: argparse.Namespace) -> Bench:
    """The latencies of some recipes."""
    began = time.monotonic()

    def tell(what: str, detail: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {what} {detail}", flush=True)

    return latency.measure(
        loaded,
        chosen,
        batch_sizes=[int(size) for size in options.batch_sizes.split(",")],
        contexts=[int(length) for length in options.contexts.split(",")],
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        peers=[name for name in options.peers.split(",") if name != "none"],
        mode=options.mode,
        compile=options.compile,
        aside=tell if options.verbose else None,
    )


def choices(
    bench: Bench, choose: Mapping[str, Estimate], methods: Mapping[str, str]
) -> dict[Case, tuple[frontier.Choice, ...]]:
    """What to take in each case, by the documents that choose."""
    return {
        case: frontier.choices(points)
        for case in bench.cases
        if (points := frontier.joined(bench, case, choose, methods=methods))
    }


def printed(
    chosen: Mapping[Case, Sequence[frontier.Choice]],
    again: Bench,
    report: Mapping[str, Estimate],
    methods: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Print the table of what to take, in numbers that took no part in choosing; returns its rows."""
    rows = []
    for case, picks in chosen.items():
        print(f"\n{case}")
        print(f"{'less time':>10}  {'time, untouched model = 1':28} {'score, untouched model = 1':28} take")
        known = {point.recipe: point for point in frontier.joined(again, case, report, methods=methods)}
        for pick in picks:
            point = None if pick.point is None else known.get(pick.point.recipe)
            row = {
                "case": str(case),
                "saving": pick.saving,
                "point": None if point is None else dataclasses.asdict(point),
            }
            rows.append(row)
            if point is None:
                print(f"{pick.saving:>9.0%}   nothing is that fast")
            else:
                print(
                    f"{pick.saving:>9.0%}   {point.latency!s:28} {point.accuracy!s:28} {point.label}  ({point.method})"
                )
    return rows


def by_method(points: Mapping[Case, Sequence[frontier.Point]]) -> None:
    """Print the best score of every method at each saving; all recipes are looked at, so these numbers flatter."""
    for case, mine in points.items():
        names = [name for name in frontier.METHODS if any(point.method == name for point in mine)]
        print(f"\n{case}: best score of each method (chosen and shown on the same documents)")
        print(f"{'':18}" + "".join(f"{saving:>10.0%}" for saving in frontier.SAVINGS))
        for name in names[1:]:
            best = frontier.choices([point for point in mine if point.method == name])
            cells = ["–" if pick.point is None else f"{pick.point.accuracy.value:.3f}" for pick in best]
            print(f"{name:18}" + "".join(f"{cell:>10}" for cell in cells))


def main() -> None:
    """Score, time, choose, time the chosen again, and write it all down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=200, help="documents of each task, both halves together")
    parser.add_argument(
        "--recipes", default="all", help="skip, parallel, looped-parallel, pairs, rank-cut, mixture; or all"
    )
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--contexts", default="128")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="none")
    parser.add_argument("--mode", default="auto", choices=("auto", "plain", "fast"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("frontier"))
    options = parser.parse_args()
    began = time.monotonic()

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)

    loaded = load(options.model, dtype=options.dtype)
    chosen, methods = recipes(loaded, options.recipes.split(","))
    untouched = Recipe.of(loaded.name, layers=loaded.layers)
    choose_tasks, report_tasks = halves(build(options.tasks.split(","), limit=options.limit))
    with Store(options.output) as store:
        stage(f"scoring {len(chosen)} recipes and the untouched model")
        everything = [*choose_tasks, *report_tasks]
        results = evaluate(loaded, [untouched, *chosen], everything, store)
        choose = scores(results, choose_tasks, untouched.fingerprint)
        report = scores(results, report_tasks, untouched.fingerprint)
        stage("timing them")
        bench = timed(loaded, chosen, options)
        latency.save(bench, options.output / "bench.json")
        latency.keep(bench, store)
        picks = choices(bench, choose, methods)
        names = {pick.point.recipe for found in picks.values() for pick in found if pick.point is not None}
        again = bench
        if names and bench.complete:
            stage(f"timing the {len(names)} chosen ones again")
            again = timed(loaded, [recipe for recipe in chosen if recipe.fingerprint in names], options)
            latency.save(again, options.output / "again.json")
    points = {case: frontier.joined(bench, case, report, methods=methods) for case in bench.cases}
    by_method({case: frontier.joined(bench, case, choose, methods=methods) for case in bench.cases})
    rows = printed(picks, again, report, methods)
    paths = plots.save(frontier.figure({str(case): found for case, found in points.items() if found}), options.output)
    found = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": dict(bench.machine),
        "setting": dataclasses.asdict(bench.setting),
        "roofline": bench.to_dict()["roofline"],
        "throttled": [dict(bench.throttled), dict(again.throttled)],
        "documents": {"choose": {t.name: t.n for t in choose_tasks}, "report": {t.name: t.n for t in report_tasks}},
        "points": {str(case): [dataclasses.asdict(point) for point in found] for case, found in points.items()},
        "choices": rows,
        "problems": sorted({f"{t.how}, {t.case}: {t.problem}" for t in bench.timings if t.problem}),
        "complete": bench.complete and again.complete,
        "seconds": time.monotonic() - began,
    }
    (options.output / "frontier.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for problem in found["problems"]:
        print(problem)
    stage(f"done: {paths['png']}")


if __name__ == "__main__":
    main()
