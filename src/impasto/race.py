"""Racing: the best few of many recipes, for far less than measuring all of them.

    found = race(loaded, recipes, build(["lambada_openai", "winogrande"]), keep=5)
    print(found.text())                       # who was dropped, when and why; what it cost
    found.best[0].recipe

All recipes answer a few documents, the clearly weaker ones are dropped, the others answer more, and so on; who is
dropped, and with which error rate, is decided by `impasto.elimination`. A race chooses, it does not measure: the scores
of its winners are those of lucky documents too. Ask the winners again, on other documents, before a number is shown.
No study uses it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from impasto.elimination import Course, Drop, Floats, Place, Rules, contest
from impasto.errors import UsageError
from impasto.evaluate import Here, kinds, scorer_of, setting_of, unanswered
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.result import Request, Response, Setting
from impasto.runtime import KV
from impasto.scoring import Scoring
from impasto.standings import Dropped, Effort, Race, Round, Survivor
from impasto.store import Store
from impasto.tasks import TaskSet

Score = Callable[[Request, Response], float]
Progress = Callable[[str, float], None]
Note = Callable[[str], None]


def race(
    model: LoadedModel,
    recipes: Sequence[Recipe],
    requests: Sequence[TaskSet] | Sequence[Request],
    *,
    keep: int,
    error: float = 0.05,
    first: int = 32,
    growth: float = 2.0,
    reach: float | None = None,
    halve: bool = False,
    seed: int = 0,
    score: Score | None = None,
    store: Store | None = None,
    kv: KV = "exact",
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Race:
    """Choose the best `keep` of many recipes.

    Tasks count the same, however many documents they have, and each gives the same number of documents to a round
    for as long as it has some. The score of a document is that of the task's first metric, with its sign turned where
    less is better.

    Args:
        model: a loaded model.
        recipes: the competitors; equal fingerprints race once.
        requests: tasks, or single requests, of which each is a document.
        keep: how many to choose.
        error: the probability that one of the truly best `keep` is dropped is at most this.
        first: documents of the first round.
        growth: how many times the documents each round has.
        reach: the largest difference of two scores of one document. None takes the largest seen so far between two
            recipes that are still in the race, which is right for scores of 0 and 1; see `impasto.elimination`.
        halve: also drop the worse half after each round, which is cheaper and has no error rate.
        seed: of the order of the documents.
        score: makes a number of an answer to a single request, larger is better; None takes the log-likelihood.
        store: keeps every answer as soon as it is there. Answers that it has already are not asked again, so a race
            that was interrupted goes on where it was, and a later evaluation finds what the race has asked.
        kv: see `impasto.runtime.scheduled`; for tasks that generate text.
        batch_tokens: tokens per batch; None starts from what suits the device.
        progress: told the round and the share of it that is done.
        note: told in a sentence what the user should know.

    Raises:
        UsageError: nothing to choose, nothing to ask, or numbers that cannot be.
        NotationError: a recipe that does not fit the model.
    """
    rules = Rules(keep, error, first, growth, reach, halve)
    competitors = list({recipe.fingerprint: recipe for recipe in recipes}.values())
    for recipe in competitors:
        recipe.check(model.layers)
    exam = _exam(requests, score)
    with contextlib.ExitStack() as stack:
        if store is None:
            store = Store(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(store.close)
        asker = _Asker(model, setting_of(model, kv), scorer_of(model, batch_tokens, note=note), store, progress)
        efforts: list[Effort] = []
        seen: set[str] = set()

        def ask(who: Sequence[int], places: Sequence[Place]) -> Floats:
            sheet = exam.at(places)
            racing = [competitors[i] for i in who]
            efforts.append(asker.effort(racing, [one for one in sheet.requests if one.fingerprint not in seen]))
            seen.update(one.fingerprint for one in sheet.requests)
            answers = asker.answers(f"round {len(efforts)}: {len(racing)} recipes", racing, sheet.requests)
            rows = [sheet.judge(recipe, given) for recipe, given in zip(racing, answers, strict=True)]
            return np.array(rows, np.float64)  # None becomes NaN

        course = contest(ask, exam.strata, len(competitors), rules, seed=seed)
        whole = asker.effort(competitors, exam.at(exam.everything).requests)
    return _race(course, competitors, rules, seed, sum(exam.strata), efforts, whole)


def _race(
    course: Course,
    competitors: Sequence[Recipe],
    rules: Rules,
    seed: int,
    documents: int,
    efforts: Sequence[Effort],
    whole: Effort,
) -> Race:
    """The course of a contest in terms of recipes."""

    def dropped(drop: Drop) -> Dropped:
        against = None if drop.against is None else competitors[drop.against]
        return Dropped(
            competitors[drop.who],
            drop.round,
            drop.documents,
            drop.reason,
            against,
            drop.difference,
            drop.low,
            drop.high,
        )

    rounds = enumerate(zip(course.rounds, course.racing, efforts, strict=True), 1)
    return Race(
        rules=rules,
        seed=seed,
        documents=documents,
        survivors=tuple(Survivor(competitors[i], s) for i, s in zip(course.survivors, course.scores, strict=True)),
        dropped=tuple(map(dropped, course.dropped)),
        rounds=tuple(
            Round(end, len(racing), sum(drop.round == number for drop in course.dropped), effort)
            for number, (end, racing, effort) in rounds
        ),
        whole=whole,
        level=course.level,
    )


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Sheet:
    """Some documents: what to ask, and what a recipe's answers (by fingerprint) score on each of them in turn."""

    requests: tuple[Request, ...]
    judge: Callable[[Recipe, Mapping[str, Response]], list[float | None]]


@dataclass(frozen=True)
class _Exam:
    """All documents: how many each stratum has, and any of them as a sheet."""

    strata: tuple[int, ...]
    at: Callable[[Sequence[Place]], _Sheet]

    @property
    def everything(self) -> list[Place]:
        return [(stratum, document) for stratum, size in enumerate(self.strata) for document in range(size)]


def _exam(asked: Sequence[TaskSet] | Sequence[Request], score: Score | None) -> _Exam:
    tasks = [one for one in asked if isinstance(one, TaskSet)]
    requests = list({one.fingerprint: one for one in asked if isinstance(one, Request)}.values())
    if tasks and requests:
        raise UsageError("a race asks either tasks or single requests, not both")
    if tasks and score is not None:
        raise UsageError("tasks have scores of their own; a score function is for single requests")
    if score is None and any(request.kind == "generate" for request in requests):
        raise UsageError("requests that generate text need a score function")
    if tasks:
        return _exam_of_tasks(tasks)
    return _exam_of_requests(requests, score or (lambda request, response: response.loglikelihood))


def _exam_of_requests(requests: Sequence[Request], score: Score) -> _Exam:
    def at(places: Sequence[Place]) -> _Sheet:
        chosen = tuple(requests[document] for _, document in places)

        def judge(recipe: Recipe, answers: Mapping[str, Response]) -> list[float | None]:
            return [score(request, answers[request.fingerprint]) for request in chosen]

        return _Sheet(chosen, judge)

    return _Exam((len(requests),) if requests else (), at)


def _exam_of_tasks(tasks: Sequence[TaskSet]) -> _Exam:
    numbers = [tuple(task.documents) for task in tasks]

    def at(places: Sequence[Place]) -> _Sheet:
        parts: dict[int, TaskSet] = {}
        columns: dict[int, dict[int, int]] = {}  # of each task: its documents, in their order, to their place in it
        for stratum in sorted({stratum for stratum, _ in places}):
            documents = sorted(document for one, document in places if one == stratum)
            parts[stratum] = tasks[stratum].part("round", {numbers[stratum][document] for document in documents})
            columns[stratum] = {document: column for column, document in enumerate(documents)}

        def judge(recipe: Recipe, answers: Mapping[str, Response]) -> list[float | None]:
            rows = {stratum: _scores(part, recipe, answers) for stratum, part in parts.items()}
            return [rows[stratum][columns[stratum][document]] for stratum, document in places]

        distinct = {request.fingerprint: request for part in parts.values() for request in part.requests}
        return _Sheet(tuple(distinct.values()), judge)

    return _Exam(tuple(map(len, numbers)), at)


def _scores(task: TaskSet, recipe: Recipe, answers: Mapping[str, Response]) -> list[float | None]:
    """The score of every document of a task, larger is better."""
    scores = task.result(recipe.fingerprint, answers).scores.get(task.metric)
    if scores is None:
        raise UsageError(f"task {task.name} has no score per document for its metric {task.metric}")
    sign = 1 if task.higher_is_better else -1
    return [None if score is None else sign * score for score in scores]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Asker:
    """Gets answers from the store, and what the store lacks from the model."""

    loaded: LoadedModel
    setting: Setting
    scorer: Scoring
    store: Store
    progress: Progress | None

    def effort(self, recipes: Sequence[Recipe], requests: Sequence[Request]) -> Effort:
        """What asking takes if the store is empty."""
        scored, _ = kinds(requests)
        cost = self.scorer.plan(recipes, scored).cost if scored else 0
        return Effort(len(recipes) * len(requests), cost)

    def answers(
        self, phase: str, recipes: Sequence[Recipe], requests: Sequence[Request]
    ) -> Iterator[dict[str, Response]]:
        """For each recipe its answers by the request's fingerprint, all of them in the store by then."""
        questions = unanswered(
            self.setting,
            recipes,
            requests,
            self.store,
            scorer=lambda: self.scorer,
            progress=self._telling(phase, requests),
        )
        Here().answer(self.loaded, questions)
        return (self.store.responses(self.setting, recipe, requests) for recipe in recipes)

    def _telling(self, phase: str, requests: Sequence[Request]) -> Progress:
        """Progress of one round, in which texts are written when all else is scored."""
        scored = sum(request.kind != "generate" for request in requests)

        def tell(what: str, share: float) -> None:
            if self.progress is not None:
                done = share * scored if what == "scoring" else scored + share * (len(requests) - scored)
                self.progress(phase, done / len(requests))

        return tell
