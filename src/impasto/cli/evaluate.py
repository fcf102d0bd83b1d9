"""`impasto eval`: benchmarks under schedules, each compared with the full model on the same examples."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from impasto import console
from impasto.cli import options
from impasto.cli.loading import Loading, check_texts, recipes, recorded, require_tokenizer, run_folder
from impasto.console import Column, Phases
from impasto.errors import UsageError

if TYPE_CHECKING:
    from impasto.evaluate import Place
    from impasto.models import LoadedModel
    from impasto.pace import Pace
    from impasto.recipe import Recipe
    from impasto.result import Estimate, Result
    from impasto.scoring import Work
    from impasto.store import Store
    from impasto.tasks import TaskSet

_ASKING = "What is asked"


def evaluate(
    model: options.Model,
    schedule: options.Schedules = [],  # noqa: B006 (the command line's own copy)
    edit: options.Edits = [],  # noqa: B006
    tasks: options.Tasks = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, rich_help_panel=_ASKING, help="Examples per prompt; else the task's own."),
    ] = None,
    limit: options.Limit = None,
    include_path: options.IncludePath = [],  # noqa: B006
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", rich_help_panel=_ASKING, help="Wrap prompts as turns of a chat.")
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=_ASKING, help="Of the choice of few-shot examples.")
    ] = 1234,
    kv: Annotated[options.KV, typer.Option(help="Cache of tasks that write text: exact, or the paper's mean.")] = (
        options.KV.exact
    ),
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
    tp_plan: options.TensorParallel = None,
    ray: options.Ray = None,
    workers: options.Workers = None,
) -> None:
    """Measure schedules on benchmarks, each paired with the full model on the same examples.

    Answers go into the run folder as they come: the same command, stopped and started again, goes on where it was.

    Examples:
      impasto eval demo -s "0:8 12:18" --tasks lambada_openai,hellaswag
      impasto eval demo -s "0:5 {5:11} 11:" -s "0:5 10:4 11:" --tasks piqa
      impasto eval demo -s "0:8 12:18" --tasks gsm8k --limit 50 --dry-run
      impasto eval ./my-model -s "0:8 12:28" --tasks hellaswag --ray local
    """
    names = options.split(tasks)
    if not names:
        raise UsageError("no tasks: name some with --tasks lambada_openai,hellaswag (`impasto tasks` lists them)")
    tokens = options.batch_tokens(batch_size)
    check_texts(schedule, edit)
    folder = run_folder(output, model, "eval")
    loading = Loading(
        device, dtype, revision, trust_remote_code, attn_implementation, device_map, tp_plan=tp_plan, masking=masking
    )
    where = loading.cluster(ray, workers)
    from impasto import tasks as benchmarks

    def asked(progress: Phases, tokenizer: Any = None) -> list[TaskSet]:
        progress.bytes("reading the tasks", 0, 0)
        return benchmarks.build(
            names,
            limit=limit,
            num_fewshot=num_fewshot,
            include=include_path,
            seed=seed,
            tokenizer=tokenizer,
            apply_chat_template=apply_chat_template,
            progress=progress.bytes,
            notice=progress.note,
        )

    with loading.store(folder, dry_run=dry_run) as store:
        with console.phases() as progress:
            # Tasks first, since a wrong name costs seconds and a model minutes; a chat template needs the model.
            questions = [] if apply_chat_template else asked(progress)
            loaded = loading.load(model, progress)
            require_tokenizer(loaded)
            from impasto.evaluate import setting_of

            setting = setting_of(loaded, kv.value)
            questions = questions or asked(progress, loaded.tokenizer)
            chosen = compared(loaded, schedule, edit)
            if dry_run:
                _print_plan(loaded, chosen, questions, store, tokens, progress)
                return
            with recorded(store, ["impasto", *sys.argv[1:]], seed=seed):
                results = _measured(loaded, chosen, questions, store, kv, tokens, where, progress)
        out = console.output()
        print_schedules(out, loaded, chosen)
        by_name = {(result.recipe, result.task): result for result in results}
        for task in questions:
            out.print()
            out.print(task_title(task))
            out.print(comparison(chosen, [by_name[r.fingerprint, task.name] for r in chosen]))
        exports = store.folder / "lm-eval"
        paths = [store.export_lm_eval(exports, setting, recipe.fingerprint) for recipe in chosen]
    out.print()
    out.print(console.plain(f"results: {store.path}"), soft_wrap=True)
    out.print(console.plain(f"lm-eval: {exports}, {len(paths)} files"), soft_wrap=True)


def compared(loaded: LoadedModel, schedules: Sequence[str], edits: Sequence[str]) -> list[Recipe]:
    """The full model, then what is measured against it, each once."""
    full = recipes(loaded, [None], [])
    asked = recipes(loaded, schedules or ([None] if edits else []), edits)
    return list({recipe.fingerprint: recipe for recipe in (*full, *asked)}.values())


def _measured(
    loaded: LoadedModel,
    chosen: Sequence[Recipe],
    questions: Sequence[TaskSet],
    store: Store,
    kv: options.KV,
    tokens: int | None,
    where: Place | None,
    progress: Phases,
) -> list[Result]:
    from impasto import evaluate as evaluation

    return evaluation.evaluate(
        loaded,
        chosen,
        questions,
        store,
        kv=kv.value,
        batch_tokens=tokens,
        where=where,
        progress=progress.share,
        note=progress.note,
    )


# What is printed -------------------------------------------------------------------------------------------------


def print_schedules(out: Console, loaded: LoadedModel, chosen: Sequence[Recipe]) -> None:
    """Every recipe expanded, once, with the letter by which the tables name it."""
    for letter, recipe in zip(letters(len(chosen) - 1), chosen[1:], strict=True):
        text = Text.assemble((f"{letter}  ", "bold"), console.plain(recipe.schedule.describe(loaded.layers)))
        out.print(Text("schedule ") + text, soft_wrap=True)
        for edit in recipe.edits:
            out.print(console.plain(f"    edit {edit}"), soft_wrap=True)


def letters(count: int) -> list[str]:
    """Short names for so many recipes: A, B, ... Z, A2, B2..."""
    return [chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else "") for i in range(count)]


def task_title(task: TaskSet) -> Text:
    """A task, what was asked of it, and what guessing would get."""
    parts = [task.metric.split(",")[0], f"{task.shots}-shot", f"{task.n:,} examples"]
    if task.chance is not None:
        parts.append(f"chance {task.chance:.3f}")
    if task.majority is not None:
        parts.append(f"majority {task.majority:.3f}")
    if not task.higher_is_better:
        parts.append("smaller is better")
    if "perplexity" in task.metric:
        parts.append("differences in nats")
    return Text.assemble((console.printable(task.name), "bold"), "\n", (", ".join(parts), "dim"))


@dataclass(frozen=True, slots=True)
class Row:
    """One recipe on one task: its score, and how far it is from the full model."""

    score: Estimate
    difference: Estimate | None = None
    p: float | None = None  # McNemar's, corrected by Holm over the recipes of the task
    nonfinite: int = 0


def rows(results: Sequence[Result]) -> list[Row]:
    """One row per result; the first one is the full model's."""
    from impasto import statistics
    from impasto.result import Estimate

    metric = results[0].info["metric"]
    full = results[0].scores[metric]
    made: list[Row] = []
    for place, result in enumerate(results):
        scores, value = result.scores[metric], result.metrics[metric]
        measured = Estimate(value)
        if not result.nonfinite:
            estimate = statistics.interval(scores)
            if math.isclose(estimate.value, value, rel_tol=1e-9, abs_tol=1e-12):
                measured = estimate
        both = bool(place) and not result.nonfinite and not results[0].nonfinite
        made.append(
            Row(
                measured,
                statistics.paired_bootstrap(scores, full) if both else None,
                statistics.mcnemar(scores, full) if both and _right_or_wrong(scores, full) else None,
                result.nonfinite,
            )
        )
    tested = [i for i, row in enumerate(made) if row.p is not None]
    for i, p in zip(tested, statistics.holm([made[i].p or 0.0 for i in tested]), strict=True):
        made[i] = Row(made[i].score, made[i].difference, float(p), made[i].nonfinite)
    return made


def _right_or_wrong(*columns: Sequence[float | None]) -> bool:
    return all(score in (0.0, 1.0) for column in columns for score in column)


def comparison(chosen: Sequence[Recipe], results: Sequence[Result]) -> Any:
    """The table of one task."""
    names = ["full model", *letters(len(chosen) - 1)]
    higher = bool(results[0].info.get("higher_is_better", True))
    lines = [
        (name, *_score(row), *_difference(row, higher=higher), _p(row.p))
        for name, row in zip(names, rows(results), strict=True)
    ]
    columns = (
        Column("", "left"),
        Column("score"),
        Column("95 % interval", "left"),
        Column("difference"),
        Column("95 % interval", "left"),
        Column("p (Holm)"),
    )
    return console.table(columns, lines)


def _score(row: Row) -> tuple[object, object]:
    if row.nonfinite:
        return Text("undefined", "yellow"), Text(f"{row.nonfinite} not finite", "yellow")
    return _number(row.score.value), _interval(row.score)


def _difference(row: Row, *, higher: bool) -> tuple[object, object]:
    """The difference, green or red where it is clearly better or worse; `higher` scores are better, or lower ones."""
    if row.difference is None:
        return "", ""
    low, high = row.difference.low, row.difference.high
    clear = low is not None and high is not None and (low > 0 or high < 0)
    style = ("green" if (row.difference.value > 0) == higher else "red") if clear else ""
    return Text(_number(row.difference.value, sign=True), style), _interval(row.difference, sign=True)


def _interval(estimate: Estimate, *, sign: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_number(estimate.low, sign=sign)} to {_number(estimate.high, sign=sign)}"


def _number(value: float, *, sign: bool = False) -> str:
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    form = ".2e" if abs(value) >= 1e5 else f",.{decimals}f"
    return f"{value:{'+' if sign else ''}{form}}".replace("-", "\u2212")


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# What it would take ----------------------------------------------------------------------------------------------


def _print_plan(
    loaded: LoadedModel,
    chosen: Sequence[Recipe],
    questions: Sequence[TaskSet],
    store: Store,
    tokens: int | None,
    progress: Phases,
) -> None:
    from impasto import evaluate as evaluation
    from impasto.pace import pace

    progress.bytes("planning", 0, 0)
    scorer = evaluation.scorer_of(loaded, tokens)
    work = evaluation.plan(loaded, chosen, questions, store, scorer=lambda: scorer)
    lines = list(planned(work, pace(scorer), scorer.budget or 0))
    progress.close()
    out = console.output()
    print_schedules(out, loaded, chosen)
    out.print(console.facts(lines))
    if written := [task.name for task in questions if task.kind == "generate_until"]:
        console.note(f"texts to be written are not counted: {', '.join(written)}")


def planned(work: Work, speed: Pace, batch_tokens: int) -> Iterator[tuple[str, str]]:
    """What a plan says, line by line."""
    yield "recipes", f"{work.recipes:,} (the full model is one)"
    yield (
        "to do",
        f"{work.requests:,} requests in {work.batches:,} batch{'es' * (work.batches != 1)}; stored ones are done",
    )
    yield "layer calls", f"{work.shared_calls:,} shared, {work.layer_calls:,} one by one"
    yield "tokens", f"{work.shared_tokens:,} shared, {work.tokens:,} one by one"
    if work.cost:
        yield "sharing", f"{work.naive_cost / work.cost:.1f} times less work"
    shared, alone = speed.seconds(work), speed.naive_seconds(work)
    yield "time", f"about {console.duration(shared)}; one by one {console.duration(alone)}"
    yield "memory", f"about {console.size(speed.bytes(work, batch_tokens))} beside the weights"
