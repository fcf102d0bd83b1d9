"""Recipes times tasks to results: the one place where models, tasks, scoring and the store meet.

Every answer goes to the store as soon as its batch is done, and only what the store does not have is asked, so a run
that was stopped anywhere continues where it was. Where the questions are answered, in this process or elsewhere, is an
argument; the store is written by this process alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, cast

from impasto.apply import applied, worn
from impasto.edit import Edit
from impasto.errors import ImpastoError, UsageError
from impasto.fast import hastened
from impasto.fetch import cache_root
from impasto.generation import respond
from impasto.masked import WAYS, MaskedScorer
from impasto.masked import respond as fill_in
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.result import Request, Response, Result, Setting
from impasto.runtime import KV
from impasto.scoring import Batch, Scorer, Scoring, Sharing, Work
from impasto.store import Store
from impasto.tasks import TaskSet

Progress = Callable[[str, float], None]
Note = Callable[[str], None]
Gap = tuple[tuple[Recipe, ...], list[Request]]  # recipes that have not answered, and the requests they lack

SHOWN = 3  # how many things of a kind an error names before it counts the others


@dataclass(frozen=True)
class Questions:
    """What the store does not know yet, how to ask it, and where the answers go.

    Attributes:
        setting: what must be equal wherever an answer comes from.
        scored: log-likelihoods that are lacking.
        written: texts that are lacking.
        scorer: gives the scorer of this process; made at the first call.
        batch_tokens: tokens per batch to begin with; None leaves it to the device.
        sharing: which kinds of sharing to use.
        keep: takes the scores of recipes on requests; the batch counts these requests from 0.
        keep_text: takes one answer in text.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know.
    """

    setting: Setting
    scored: Sequence[Gap]
    written: Sequence[Gap]
    scorer: Callable[[], Scoring]
    batch_tokens: int | None
    sharing: Sharing
    keep: Callable[[Sequence[Recipe], Sequence[Request], Batch], None]
    keep_text: Callable[[Recipe, Request, Response], None]
    progress: Progress
    note: Note


@dataclass(frozen=True, slots=True)
class Lost:
    """Questions that nobody could answer, and why."""

    recipes: tuple[Recipe, ...]
    requests: tuple[Request, ...]
    reason: str


class Place(Protocol):
    """Where questions are answered."""

    def answer(self, loaded: LoadedModel, questions: Questions) -> Sequence[Lost]:
        """Hand every answer to `questions.keep` or `keep_text` as soon as it is there; says what had to be left out."""


def evaluate(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    *,
    kv: KV = "exact",
    batch_tokens: int | None = None,
    sharing: Sharing | None = None,
    scorer: Callable[[], Scoring] | None = None,
    where: Place | None = None,
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
        scorer: gives a scorer that exists already, so that none is made from `batch_tokens` and `sharing`.
        where: who answers; None this process, `impasto.cluster.Cluster` the workers of a cluster.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know (a halved batch, non-finite answers).

    Returns:
        One result per recipe and task: all tasks of the first recipe, then of the second, and so on.

    Raises:
        UsageError: a masked model and averaged caches.
        OutOfMemory: a single request does not fit; what was answered before is kept.
        ImpastoError: workers could not answer everything; names what is lacking, after all else is measured and kept.
    """
    setting = setting_of(loaded, kv)
    recipes = list({recipe.fingerprint: recipe for recipe in recipes}.values())
    store.put_recipes(recipes)
    for task in tasks:
        store.put_task(task.name, task.protocol, describe(task))
    sharing = sharing or Sharing()
    questions = unanswered(
        setting,
        recipes,
        [request for task in tasks for request in task.requests],
        store,
        scorer=functools.cache(scorer or (lambda: scorer_of(loaded, batch_tokens, sharing, note))),
        batch_tokens=batch_tokens,
        sharing=sharing,
        progress=progress,
        note=note,
    )
    lost = (where or Here()).answer(loaded, questions)
    results = _results(setting, recipes, tasks, store, note, progress, partly=bool(lost))
    if lost:
        raise ImpastoError(_unanswered(lost))
    return results


def unanswered(
    setting: Setting,
    recipes: Sequence[Recipe],
    requests: Iterable[Request],
    store: Store,
    *,
    scorer: Callable[[], Scoring],
    batch_tokens: int | None = None,
    sharing: Sharing | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Questions:
    """What the store lacks of some recipes' answers; whoever answers it fills the store."""

    def keep(who: Sequence[Recipe], what: Sequence[Request], batch: Batch) -> None:
        store.put_batch(
            setting,
            who,
            [what[i] for i in batch.requests],
            loglikelihood=batch.loglikelihood,
            is_greedy=batch.greedy,
            tokens=batch.tokens,
            truncated=batch.truncated,
            rank=-1 if batch.rank is None else batch.rank,
        )

    def keep_text(recipe: Recipe, request: Request, response: Response) -> None:
        store.put_responses(setting, [(recipe, request, response)])

    scored, written = kinds(requests)
    return Questions(
        setting=setting,
        scored=_gaps(store, setting, recipes, scored),
        written=_gaps(store, setting, recipes, written),
        scorer=scorer,
        batch_tokens=batch_tokens,
        sharing=sharing or Sharing(),
        keep=keep,
        keep_text=keep_text,
        progress=progress or (lambda phase, share: None),
        note=note or (lambda text: None),
    )


@dataclass(frozen=True, slots=True)
class Here:
    """This process, with the model that it holds."""

    def answer(self, loaded: LoadedModel, questions: Questions) -> Sequence[Lost]:
        """Answer everything, or raise what stands in the way."""
        if questions.scored:
            _score(questions)
        if questions.written:
            _write(loaded, questions)
        return ()


def plan(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    *,
    kv: KV = "exact",
    batch_tokens: int | None = None,
    scorer: Callable[[], Scoring] | None = None,
) -> Work:
    """What `evaluate` would still have to score; runs nothing. Text generation is not counted in it."""
    scored, _ = kinds(request for task in tasks for request in task.requests)
    gaps = _gaps(store, setting_of(loaded, kv), recipes, scored)
    made = scorer() if scorer else scorer_of(loaded, batch_tokens)
    works = [made.plan(who, what) for who, what in gaps]
    return _total(works, len({r.fingerprint for r in recipes}))


def setting_of(loaded: LoadedModel, kv: KV = "exact") -> Setting:
    """What must be equal for numbers of this model to be comparable.

    Raises:
        UsageError: a masked model, which keeps no keys and values, with any cache but the exact one.
    """
    if loaded.masked and kv != "exact":
        raise UsageError(f"{loaded.name} predicts masked tokens and has no KV cache: leave --kv out")
    return replace(loaded.setting, kv=kv)


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


def kinds(requests: Iterable[Request]) -> tuple[list[Request], list[Request]]:
    """Distinct requests: those to score, and those to answer with text."""
    distinct = {request.fingerprint: request for request in requests}
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
) -> Scorer | MaskedScorer:
    """A scorer that fits this model and can apply edits: of masked tokens, or of next ones.

    Raises:
        UnsupportedModel: the model predicts no tokens.
        UsageError: a tokenizer that lacks what this takes.
    """
    if not loaded.masked:
        return next_scorer(loaded, batch_tokens, sharing, note)
    masking, lengths = WAYS[loaded.setting.masking]
    return MaskedScorer(
        loaded.model,
        loaded.tokenizer,
        masking=masking,
        lengths=lengths,
        budget=batch_tokens,
        wear=_wearing(loaded),
        note=note or (lambda text: None),
    )


def next_scorer(
    loaded: LoadedModel,
    batch_tokens: int | None = None,
    sharing: Sharing | None = None,
    note: Note | None = None,
) -> Scorer:
    """A scorer of a model that predicts next tokens.

    Raises:
        UnsupportedModel: the model does not.
    """
    loaded.require_head()
    return Scorer(
        loaded.model,
        loaded.tokenizer,
        budget=batch_tokens,
        sharing=sharing or Sharing(),
        wear=_wearing(loaded),
        folder=cache_root() / "svd",
        note=note or (lambda text: None),
    )


def _wearing(loaded: LoadedModel) -> Callable[[int, tuple[Edit, ...]], AbstractContextManager[object]]:
    def wear(layer: int, edits: tuple[Edit, ...]) -> AbstractContextManager[object]:
        return worn(loaded, [replace(edit, layers=(layer,)) for edit in edits])

    return wear


def write(
    loaded: LoadedModel,
    recipe: Recipe,
    requests: Sequence[Request],
    *,
    kv: KV,
    scorer: Scoring,
    on_response: Callable[[int, Response], None],
) -> None:
    """One recipe's answers in text, each handed on with the place of its request as soon as it is there.

    A masked model writes into masks behind each context, see `impasto.masked.respond`.
    """
    if loaded.masked:
        with applied(loaded, recipe.schedule, recipe.edits):
            fill_in(loaded.model, loaded.tokenizer, requests, budget=scorer.budget, on_response=on_response)
        return
    encode = scorer.encoder.encode if isinstance(scorer, Scorer) else None
    with worn(loaded, recipe.edits):
        respond(
            loaded.model,
            loaded.tokenizer,
            recipe.schedule,
            requests,
            kv=kv,
            encode=encode,
            on_response=on_response,
            hasten=hastened,
        )


def _score(questions: Questions) -> None:
    scorer = questions.scorer()
    single = len(questions.scored) == 1  # planning encodes all texts, only to weigh one gap against another
    costs = [1 if single else scorer.plan(who, what).cost for who, what in questions.scored]
    total = sum(costs) or 1
    done = 0
    for (who, what), cost in zip(questions.scored, costs, strict=True):

        def keep(batch: Batch, who: tuple[Recipe, ...] = who, what: list[Request] = what) -> None:
            questions.keep(who, what, batch)

        def tell(share: float, before: int = done, cost: int = cost) -> None:
            questions.progress("scoring", (before + share * cost) / total)

        scorer.score(who, what, on_batch=keep, progress=tell)
        done += cost


def _write(loaded: LoadedModel, questions: Questions) -> None:
    total = sum(len(who) * len(what) for who, what in questions.written)
    done = 0
    for who, what in questions.written:
        for recipe in who:

            def keep(place: int, response: Response, recipe: Recipe = recipe, what: list[Request] = what) -> None:
                nonlocal done
                questions.keep_text(recipe, what[place], response)
                done += 1
                questions.progress("generating", done / total)

            write(
                loaded,
                recipe,
                what,
                kv=cast(KV, questions.setting.kv),
                scorer=questions.scorer(),
                on_response=keep,
            )


def _results(
    setting: Setting,
    recipes: Sequence[Recipe],
    tasks: Sequence[TaskSet],
    store: Store,
    note: Note | None,
    progress: Progress | None,
    *,
    partly: bool,
) -> list[Result]:
    """Every result there can be; with `partly`, results that lack answers are left out."""
    names = [task.name for task in tasks]
    known = {(r.recipe, r.task, r.protocol): r for r in store.results(setting, tasks=names)}
    results: list[Result] = []
    cut: set[str] = set()  # tasks of which it has been said that requests were cut
    for i, recipe in enumerate(recipes):
        for task in tasks:
            result = known.get((recipe.fingerprint, task.name, task.protocol))
            if result is None:
                responses = store.responses(setting, recipe, task.requests)
                if partly and any(request.fingerprint not in responses for request in task.requests):
                    continue
                result = task.result(recipe.fingerprint, responses)
                store.put_result(setting, result)
            _warn(recipe, result, note, cut)  # also of what an earlier run has answered
            results.append(result)
        if progress is not None:
            progress("judging", (i + 1) / len(recipes))
    return results


def _warn(recipe: Recipe, result: Result, note: Note | None, cut: set[str]) -> None:
    if note is None:
        return
    if result.nonfinite:
        note(
            f"{recipe}: {result.nonfinite} answers on {result.task} are not finite numbers; "
            "its metrics there are undefined"
        )
    if result.truncated and result.task not in cut:
        cut.add(result.task)
        note(
            f"{result.task}: {result.truncated} requests are longer than the model's window and were cut from the left"
        )


def _unanswered(lost: Sequence[Lost]) -> str:
    """What to tell the user about questions that nobody could answer."""
    lines = ["some questions could not be answered; everything else is measured and kept"]
    for part in lost[:SHOWN]:
        lines.append(f"  {part.reason}:")
        lines.append(f"    recipes: {_few([str(recipe) for recipe in part.recipes])}")
        lines.append(f"    requests: {_few([repr(_brief(request)) for request in part.requests])}")
    if len(lost) > SHOWN:
        lines.append(f"  and {len(lost) - SHOWN:,} more such parts")
    lines.append("the same command asks them again; without --ray, in this process")
    return "\n".join(lines)


def _few(texts: Sequence[str]) -> str:
    more = len(texts) - SHOWN
    return "; ".join(texts[:SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def _brief(request: Request) -> str:
    """The end of a request, where it differs from others."""
    text = request.context + request.continuation
    return text if len(text) <= 60 else "..." + text[-57:]


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
