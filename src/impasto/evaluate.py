"""Recipes times tasks to results: the one place where models, tasks, scoring and the store meet.

Every answer goes to the store as soon as its batch is done, and only what the store does not have is asked, so a run
that was stopped anywhere continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from impasto import surgery
from impasto.edit import Edit
from impasto.generation import respond
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.result import Request, Response, Result, Setting
from impasto.runtime import KV
from impasto.scoring import Batch, Scorer, Sharing, Work
from impasto.store import Store
from impasto.tasks import TaskSet

Progress = Callable[[str, float], None]
Note = Callable[[str], None]
Gap = tuple[tuple[Recipe, ...], list[Request]]  # recipes that have not answered, and the requests they lack


def evaluate(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    *,
    kv: KV = "exact",
    batch_tokens: int | None = None,
    sharing: Sharing | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[Result]:
    """Score every recipe on every task; what the store holds already is not run again.

    Args:
        loaded: the model.
        recipes: what to run; equal fingerprints are run once.
        tasks: what to ask.
        store: where every answer lands as soon as it is there, and every result in the end.
        kv: "exact", or "mean" to generate with the painters paper's shared cache slot.
        batch_tokens: tokens per batch; None starts from what suits the device.
        sharing: which kinds of sharing to use; None all.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know (a halved batch, non-finite answers).

    Returns:
        One result per recipe and task: all tasks of the first recipe, then of the second, and so on.
    """
    setting = setting_of(loaded, kv)
    recipes = list({recipe.fingerprint: recipe for recipe in recipes}.values())
    store.put_recipes(recipes)
    for task in tasks:
        store.put_task(task.name, task.protocol, describe(task))
    scored, written = _requests(tasks)
    _score(loaded, setting, recipes, scored, store, batch_tokens, sharing, progress, note)
    _write(loaded, setting, recipes, written, store, kv, progress)
    return _results(setting, recipes, tasks, store, note, progress)


def plan(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    *,
    kv: KV = "exact",
    batch_tokens: int | None = None,
) -> Work:
    """What `evaluate` would still have to score; runs nothing. Text generation is not counted in it."""
    setting = setting_of(loaded, kv)
    scored, _ = _requests(tasks)
    scorer = scorer_of(loaded, batch_tokens)
    works = [scorer.plan(who, what) for who, what in _gaps(store, setting, recipes, scored)]
    return _total(works, len({r.fingerprint for r in recipes}))


def setting_of(loaded: LoadedModel, kv: KV = "exact") -> Setting:
    """What must be equal for numbers of this model to be comparable."""
    own = loaded.setting
    return Setting(own.model, own.weights, own.dtype, own.device, kv, own.attention)


def describe(task: TaskSet) -> dict[str, object]:
    """What a report needs to know of a task when the task itself is no longer at hand."""
    return {
        "kind": task.kind,
        "version": task.version,
        "shots": task.shots,
        "n": task.n,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "chance": task.chance,
        "majority": task.majority,
        "order_sensitive": task.order_sensitive,
        "source": task.source,
        "requests": len(task.requests),
    }


def _requests(tasks: Iterable[TaskSet]) -> tuple[list[Request], list[Request]]:
    """The distinct requests of all tasks: those to score, those to answer with text."""
    distinct = {request.fingerprint: request for task in tasks for request in task.requests}
    scored = [request for request in distinct.values() if request.kind != "generate"]
    return scored, [request for request in distinct.values() if request.kind == "generate"]


def _gaps(store: Store, setting: Setting, recipes: Sequence[Recipe], requests: Sequence[Request]) -> list[Gap]:
    """What is not answered yet, in groups of requests that the same recipes lack."""
    groups: dict[tuple[str, ...], Gap] = {}
    for request, lacking in zip(requests, store.missing(setting, recipes, requests), strict=True):
        if lacking:
            key = tuple(recipe.fingerprint for recipe in lacking)
            groups.setdefault(key, (lacking, []))[1].append(request)
    return list(groups.values())


def scorer_of(
    loaded: LoadedModel,
    batch_tokens: int | None = None,
    sharing: Sharing | None = None,
    note: Note | None = None,
) -> Scorer:
    """A scorer of this model that can apply edits."""

    def wear(layer: int, edits: tuple[Edit, ...]) -> AbstractContextManager[object]:
        return surgery.edited(loaded.model, [replace(edit, layers=(layer,)) for edit in edits])

    return Scorer(
        loaded.model,
        loaded.tokenizer,
        budget=batch_tokens,
        sharing=sharing or Sharing(),
        wear=wear,
        note=note or (lambda text: None),
    )


def _score(
    loaded: LoadedModel,
    setting: Setting,
    recipes: Sequence[Recipe],
    requests: Sequence[Request],
    store: Store,
    batch_tokens: int | None,
    sharing: Sharing | None,
    progress: Progress | None,
    note: Note | None,
) -> None:
    gaps = _gaps(store, setting, recipes, requests)
    if not gaps:
        return
    scorer = scorer_of(loaded, batch_tokens, sharing, note)
    works = [scorer.plan(who, what) for who, what in gaps]
    total = sum(work.cost for work in works) or 1
    done = 0
    for (who, what), work in zip(gaps, works, strict=True):

        def keep(batch: Batch, who: tuple[Recipe, ...] = who, what: list[Request] = what) -> None:
            store.put_batch(
                setting,
                who,
                [what[i] for i in batch.requests],
                loglikelihood=batch.loglikelihood,
                is_greedy=batch.greedy,
                tokens=batch.tokens,
                truncated=batch.truncated,
            )

        def tell(share: float, before: int = done, work: Work = work) -> None:
            if progress is not None:
                progress("scoring", (before + share * work.cost) / total)

        scorer.score(who, what, on_batch=keep, progress=tell)
        done += work.cost


def _write(
    loaded: LoadedModel,
    setting: Setting,
    recipes: Sequence[Recipe],
    requests: Sequence[Request],
    store: Store,
    kv: KV,
    progress: Progress | None,
) -> None:
    gaps = _gaps(store, setting, recipes, requests)
    total = sum(len(who) * len(what) for who, what in gaps)
    done = 0
    encode = scorer_of(loaded).encoder.encode if gaps else None
    for who, what in gaps:
        for recipe in who:

            def keep(place: int, response: Response, recipe: Recipe = recipe, what: list[Request] = what) -> None:
                nonlocal done
                store.put_responses(setting, [(recipe, what[place], response)])
                done += 1
                if progress is not None:
                    progress("generating", done / total)

            with surgery.edited(loaded.model, recipe.edits):
                respond(
                    loaded.model,
                    loaded.tokenizer,
                    recipe.schedule,
                    what,
                    kv=kv,
                    encode=encode,
                    on_response=keep,
                )


def _results(
    setting: Setting,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    note: Note | None,
    progress: Progress | None,
) -> list[Result]:
    names = [task.name for task in tasks]
    known = {(r.recipe, r.task, r.protocol): r for r in store.results(setting, tasks=names)}
    results: list[Result] = []
    for i, recipe in enumerate(recipes):
        for task in tasks:
            result = known.get((recipe.fingerprint, task.name, task.protocol))
            if result is None:
                result = task.result(recipe.fingerprint, store.responses(setting, recipe, task.requests))
                store.put_result(setting, result)
                _warn(recipe, result, note)
            results.append(result)
        if progress is not None:
            progress("judging", (i + 1) / len(recipes))
    return results


def _warn(recipe: Recipe, result: Result, note: Note | None) -> None:
    if note is None:
        return
    if result.nonfinite:
        note(
            f"{recipe}: {result.nonfinite} answers on {result.task} are not finite numbers; "
            "its metrics there are undefined"
        )
    if result.truncated and recipe.schedule.is_series and not recipe.edits:
        note(
            f"{result.task}: {result.truncated} requests are longer than the model's window and were cut from the left"
        )


def _total(works: Sequence[Work], recipes: int) -> Work:
    """Several pieces of work as one; shared calls are weighed by the tokens they run on."""
    tokens = sum(work.tokens for work in works)
    shared_tokens = sum(work.shared_tokens for work in works)
    weighted = sum(work.layer_calls * work.tokens for work in works)
    shared = sum(work.cost for work in works)
    return Work(
        recipes=recipes,
        requests=sum(work.requests for work in works),
        layer_calls=round(weighted / tokens) if tokens else 0,
        shared_calls=round(shared / shared_tokens) if shared_tokens else 0,
        tokens=tokens,
        shared_tokens=shared_tokens,
        positions=sum(work.positions for work in works),
        batches=sum(work.batches for work in works),
        alive=max((work.alive for work in works), default=0),
    )
