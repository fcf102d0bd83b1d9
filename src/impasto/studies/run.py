"""Run a painters study of one model: score every recipe, compare hidden states, compare caches, make the page."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impasto.errors import UnsupportedModel, UsageError
from impasto.recipe import Recipe
from impasto.result import Page, Setting
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies import painters
from impasto.studies.evidence import Cached
from impasto.studies.kept import Asked, evidence, page_of
from impasto.studies.protocol import Protocol, Variant, cache_schedules, protocol, state_schedules, variants

if TYPE_CHECKING:
    from impasto.evaluate import Place
    from impasto.models import LoadedModel
    from impasto.scoring import Scorer
    from impasto.tasks import TaskSet

Progress = Callable[[str, float], None]
Note = Callable[[str], None]

WRITTEN = 12  # tokens of an answer under exact and averaged caches


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a study would take; only what its run folder does not hold already is counted.

    Attributes:
        recipes: distinct schedules.
        layer_calls: of the recipes one by one, per sequence.
        shared_calls: as they will be run.
        tokens: of all requests, each whole.
        shared_tokens: as they will be run, padding included.
        seconds: estimate from a moment's measurement on this machine.
        naive_seconds: the same with nothing shared.
        bytes: estimated memory beside the weights.
        rows: (task, examples).
    """

    recipes: int
    layer_calls: int
    shared_calls: int
    tokens: int
    shared_tokens: int
    seconds: float
    naive_seconds: float
    bytes: int
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Study:
    """One study, prepared; its scorer is made once, and only if something is to be measured."""

    loaded: LoadedModel
    setting: Setting
    asked: Asked
    protocol: Protocol
    tasks: Sequence[TaskSet]
    recipes: Sequence[Recipe]
    scorer: Callable[[], Scorer]


def run_painters(
    loaded: LoadedModel,
    *,
    store: Store,
    protocol: str = "quick",
    task_names: Sequence[str] | None = None,
    limit: int | None = None,
    seeds: int | None = None,
    methods: Sequence[str] | None = None,
    include: Sequence[Path | str] = (),
    batch_tokens: int | None = None,
    where: Place | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    noted: AbstractContextManager[None] | None = None,
) -> Page:
    """The whole painters study of one model.

        with Store("my-run") as store:
            page = run_painters(load("demo"), store=store)
        report.write(page, "my-run")

    Everything measured lands in the store at once, so that a study that was stopped goes on where it was, and one that
    is finished is a page again in seconds.

    Args:
        loaded: the model.
        store: the run folder's store.
        protocol: "quick", "standard" or "paper".
        task_names: harness tasks instead of the protocol's own.
        limit: examples of every task instead of the protocol's own numbers.
        seeds: random orders per width instead of the protocol's own number.
        methods: names of methods instead of the protocol's own.
        include: folders with the user's own task files.
        batch_tokens: tokens per batch; None starts from what suits the device.
        where: who scores the recipes; None this process, `impasto.cluster.Cluster` the workers of a cluster. Hidden
            states and caches, which are little work, are compared here.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know.
        noted: what notes the run and its time; it is left before the page is made, which tells them.

    Raises:
        UnsupportedModel: the model does not predict next tokens; the folder is left as it was.
        UsageError: unknown protocol, methods or tasks.
        ImpastoError: something could not be measured; all else is kept, and `page_of` makes a page of it.
    """
    from impasto.evaluate import evaluate

    with noted or nullcontext():
        study = _prepare(
            loaded, store, protocol, task_names, limit, seeds, methods, include, batch_tokens, progress, note
        )
        evaluate(
            loaded,
            study.recipes,
            study.tasks,
            store,
            batch_tokens=batch_tokens,
            scorer=study.scorer,
            where=where,
            progress=progress,
            note=note,
        )
        _compare_states(study, store, progress)
        _compare_caches(study, store, progress, note)
    return painters.page(evidence(store, study.setting, study.asked))


def dry_run_painters(
    loaded: LoadedModel,
    *,
    store: Store,
    protocol: str = "quick",
    task_names: Sequence[str] | None = None,
    limit: int | None = None,
    seeds: int | None = None,
    methods: Sequence[str] | None = None,
    include: Sequence[Path | str] = (),
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> StudyPlan:
    """What `run_painters` would take with the same arguments; nothing is scored and nothing kept."""
    from impasto.evaluate import plan
    from impasto.pace import pace

    study = _prepare(loaded, None, protocol, task_names, limit, seeds, methods, include, batch_tokens, progress, note)
    work = plan(loaded, study.recipes, study.tasks, store, scorer=study.scorer)
    speed = pace(study.scorer())
    return StudyPlan(
        recipes=work.recipes,
        layer_calls=work.layer_calls,
        shared_calls=work.shared_calls,
        tokens=work.tokens,
        shared_tokens=work.shared_tokens,
        seconds=speed.seconds(work),
        naive_seconds=speed.naive_seconds(work),
        bytes=speed.bytes(work, study.scorer().budget or 0),
        rows=tuple((task.name, task.n) for task in study.tasks),
    )


def _prepare(
    loaded: LoadedModel,
    store: Store | None,
    name: str,
    task_names: Sequence[str] | None,
    limit: int | None,
    seeds: int | None,
    methods: Sequence[str] | None,
    include: Sequence[Path | str],
    batch_tokens: int | None,
    progress: Progress | None,
    note: Note | None,
) -> _Study:
    from impasto.anatomy import anatomy
    from impasto.evaluate import next_scorer, setting_of

    loaded.require_head()
    if loaded.masked or not anatomy(loaded.model).cached:
        raise UnsupportedModel(f"{loaded.name} does not predict next tokens, and the painters study asks for them")
    chosen = protocol(name)
    names = tuple(task_names or chosen.tasks)
    tasks = list(_tasks(chosen, names, limit, include, progress, note))
    setting = setting_of(loaded)
    asked = Asked(
        depth=loaded.layers,
        protocol=name,
        methods=None if methods is None else tuple(methods),
        seeds=seeds,
        tasks=tuple((task.name, task.protocol) for task in tasks),
        source=loaded.source,
    )
    found = variants(loaded.layers, asked.chosen(), methods=methods, seeds=seeds)
    if store is not None:
        asked.write(store, setting)
    recipes = [Recipe(loaded.name, v.schedule) for v in found]
    scorer = functools.cache(lambda: next_scorer(loaded, batch_tokens, note=note))
    return _Study(loaded, setting, asked, chosen, tasks, recipes, scorer)


def _tasks(
    chosen: Protocol,
    names: Sequence[str],
    limit: int | None,
    include: Sequence[Path | str],
    progress: Progress | None,
    note: Note | None,
) -> Iterator[TaskSet]:
    from impasto.tasks import build

    def told(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done / total if total else 0.0)

    for i, name in enumerate(names):
        if progress is not None:
            progress("reading tasks", i / len(names))
        wanted = limit if limit is not None else chosen.limit_of(name)
        yield from build([name], limit=wanted, include=include, progress=told, notice=note)
    if progress is not None:
        progress("reading tasks", 1.0)


# Hidden states ------------------------------------------------------------------------------------------------------


def _compare_states(study: _Study, store: Store, progress: Progress | None) -> None:
    """Similarity along the full model, and along skip and middle repeat at one width (E3, E15)."""
    from impasto.similarity import MEASURES, groups, padded, similarity

    schedules = state_schedules(study.asked.depth)
    missing = {
        label: schedule
        for label, schedule in schedules.items()
        if store.measurement(study.setting, _as_recipe(study, schedule), "similarity", label) is None
    }
    if not missing:
        return
    encoder = study.scorer().encoder
    texts = [encoder.encode(text)[: encoder.window] for text in _texts(study)]
    batches = padded(texts, pad=study.loaded.tokenizer.pad_token_id or 0)
    batches = [{k: v.to(study.loaded.device) for k, v in batch.items()} for batch in batches]
    for i, (label, schedule) in enumerate(missing.items()):

        def told(done: int, total: int, before: int = i) -> None:
            if progress is not None:
                progress("comparing hidden states", (before + done / total) / len(missing))

        found = similarity(study.loaded.model, schedule, batches, progress=told)
        recipe = _as_recipe(study, schedule)
        store.put_measurement(study.setting, recipe, "similarity", label, found.to_json())
        if label == "full":
            for measure in MEASURES:
                value = asdict(groups(found.matrix(measure)))
                store.put_measurement(study.setting, recipe, "groups", measure, value)


def _texts(study: _Study) -> list[str]:
    """Texts to compare states on: LAMBADA's passages as in the paper, else the contexts of the first task."""
    tasks = sorted(study.tasks, key=lambda task: "lambada" not in task.name)
    asked = tasks[0].requests
    texts = list(dict.fromkeys(request.context + request.continuation for request in asked))
    return texts[: study.protocol.texts]


def _as_recipe(study: _Study, schedule: Schedule) -> Recipe:
    return Recipe(study.loaded.name, schedule)


# KV caches ----------------------------------------------------------------------------------------------------------


def _compare_caches(study: _Study, store: Store, progress: Progress | None, note: Note | None) -> None:
    """Text written under exact and averaged caches, beside what the same schedule says without any cache (E18)."""
    prompts = _prompts(study)
    chosen = [
        variant
        for variant in cache_schedules(study.asked.depth, study.protocol)
        if study.asked.methods is None or variant.uses[0].method in study.asked.methods
    ]
    for i, variant in enumerate(chosen if prompts else ()):
        method = variant.uses[0].method
        recipe = _as_recipe(study, variant.schedule)
        if store.measurement(study.setting, recipe, "kv", method) is not None:
            continue
        if progress is not None:
            progress("comparing KV caches", i / len(chosen))
        try:
            found = _cached(study, variant, prompts)
        except UsageError as problem:  # layers of different windows have no averaged cache
            if note is not None:
                note(f"KV caches not compared: {problem}")
            break
        store.put_measurement(study.setting, recipe, "kv", method, asdict(found))
    if progress is not None and chosen:
        progress("comparing KV caches", 1.0)


def _prompts(study: _Study) -> list[tuple[str, str, str]]:
    """(task, prompt, right answer) of the first task whose answers are short texts, arithmetic before others."""
    tasks = sorted(study.tasks, key=lambda task: "arithmetic" not in task.name)
    for task in tasks:
        questions = task.questions()
        if questions:
            return [(task.name, asked, right) for asked, right in questions[: study.protocol.prompts]]
    return []


def _cached(study: _Study, variant: Variant, prompts: Sequence[tuple[str, str, str]]) -> Cached:
    from impasto.generation import generate

    schedule, use = variant.schedule, variant.uses[0]
    encoder = study.scorer().encoder
    contexts = [encoder.encode(asked) for _, asked, _ in prompts]
    written: dict[str, list[Any]] = {
        kv: generate(
            study.loaded.model,
            study.loaded.tokenizer,
            schedule,
            contexts,
            max_new_tokens=WRITTEN,
            until=("\n",),
            kv=kv,
        )
        for kv in ("exact", "mean")
    }
    exact_first: list[int | None] = []
    mean_first: list[int | None] = []
    for context, exact, mean in zip(contexts, written["exact"], written["mean"], strict=True):
        without, sure = _without_cache(study, schedule, context, exact.new_token_ids)
        exact_first.append(_leaves(exact.new_token_ids, without, sure))
        mean_first.append(_leaves(mean.new_token_ids, without, sure))
    right = [answer.strip() for _, _, answer in prompts]
    return Cached(
        method=use.method,
        start=use.start or 0,
        affected=use.affected,
        task=prompts[0][0],
        exact=tuple(first is None for first in exact_first),
        mean=tuple(first is None for first in mean_first),
        exact_first=tuple(exact_first),
        mean_first=tuple(mean_first),
        exact_right=tuple(float(w.text.strip() == r) for w, r in zip(written["exact"], right, strict=True)),
        mean_right=tuple(float(w.text.strip() == r) for w, r in zip(written["mean"], right, strict=True)),
    )


def _without_cache(
    study: _Study, schedule: Schedule, context: Sequence[int], guess: Sequence[int]
) -> tuple[list[int], bool]:
    """What the schedule writes without a cache, found by one pass over a guess; and whether the guess was all right.

    As far as the guess agrees with the pass it is the text; the first token that differs ends what is known.
    """
    import torch

    from impasto.runtime import scheduled

    ids = torch.tensor([[*context, *guess]], device=study.loaded.device)
    with torch.no_grad(), scheduled(study.loaded.model, schedule):
        logits = study.loaded.model(ids, use_cache=False).logits[0]
    said = logits[len(context) - 1 : -1].argmax(-1).tolist()
    agreed = next((i for i, (a, b) in enumerate(zip(said, guess, strict=True)) if a != b), len(guess))
    return said[: agreed + 1], agreed == len(guess)


def _leaves(tokens: Sequence[int], without: Sequence[int], sure: bool) -> int | None:
    """The first token that is not the one without a cache; None where there is none."""
    different = next((i for i, (a, b) in enumerate(zip(tokens, without, strict=False)) if a != b), None)
    if different is None and sure and len(tokens) != len(without):
        return min(len(tokens), len(without))
    return different


__all__ = ["StudyPlan", "dry_run_painters", "page_of", "run_painters"]
