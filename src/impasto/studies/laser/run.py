"""Run a LASER study of one model: screen, choose, compose, report, make the page.

For each task: a backward pass over right answers orders all candidates, a race over the validation part chooses one, a
search puts several together there, and what came of it is measured on the test part. Every answer lands in the store
at once and every decision is kept, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from impasto import composition
from impasto.composition import Rung, Verdict
from impasto.edit import Edit
from impasto.errors import ImpastoError, UsageError
from impasto.evaluate import Place, evaluate, plan, scorer_of, setting_of
from impasto.models import LoadedModel
from impasto.perplexity import METRIC, sliding_scorer
from impasto.recipe import Recipe
from impasto.result import Page, Result
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies.laser import asides
from impasto.studies.laser.evidence import BASE, CHOSEN, Point, Step, title_of
from impasto.studies.laser.kept import Asked, Book, evidence, page_of, step_json
from impasto.studies.laser.page import page
from impasto.studies.laser.parts import Pair, items, matrices, pairs, point, rights, sheet
from impasto.studies.laser.protocol import (
    Changes,
    Matrix,
    Protocol,
    Report,
    adapted,
    candidates,
    composed_of,
    layers_of,
    promising,
    spaced,
)
from impasto.studies.laser.protocol import protocol as named
from impasto.studies.run import StudyPlan
from impasto.tasks import TaskSet

if TYPE_CHECKING:
    from impasto.corpus import Counted
    from impasto.scoring import Scoring

Progress = Callable[[str, float], None]
Note = Callable[[str], None]

__all__ = ["LaserPlan", "dry_run_laser", "page_of", "run_laser"]


@dataclass(frozen=True, slots=True)
class LaserPlan:
    """What a study would take; only what its run folder does not hold already is counted.

    Attributes:
        matrices: in the grid.
        candidates: single edits of the grid.
        measured: how many of them screening leaves for each task.
        scoring: the work, as if the race dropped nobody and the middle candidate were chosen; composition, which
            depends on what is found, and singular values are not in it.
    """

    matrices: int
    candidates: int
    measured: int
    scoring: StudyPlan


class _Asked(Changes, total=False):
    """What a dry run may be asked, see `run_laser`."""

    protocol: str
    task_names: Sequence[str] | None
    seed: int
    include: Sequence[Path | str]
    batch_tokens: int | None
    progress: Progress | None
    note: Note | None


@dataclass(frozen=True)
class _Study:
    """One study, prepared; its scorer is made once, and only if something is to be measured."""

    loaded: LoadedModel
    store: Store
    book: Book
    pairs: Sequence[Pair]
    grid: tuple[Edit, ...]
    scorer: Callable[[], Scoring]
    batch_tokens: int | None
    where: Place | None
    counts: Sequence[tuple[str, Counted]]
    texts: Sequence[TaskSet]
    progress: Progress
    note: Note

    @property
    def protocol(self) -> Protocol:
        return self.book.asked.protocol

    def recipe(self, *edits: Edit) -> Recipe:
        return Recipe(self.loaded.name, Schedule.identity(self.loaded.layers), edits)


def run_laser(
    loaded: LoadedModel,
    *,
    store: Store,
    protocol: str = "quick",
    task_names: Sequence[str] | None = None,
    seed: int = 0,
    include: Sequence[Path | str] = (),
    counts: Sequence[Path | str] = (),
    texts: Sequence[Path | str] = (),
    batch_tokens: int | None = None,
    where: Place | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    noted: AbstractContextManager[None] | None = None,
    **changes: Unpack[Changes],
) -> Page:
    """The whole LASER study of one model.

        with Store("my-run") as store:
            page = run_laser(load("demo"), store=store)
        report.write(page, "my-run")

    Args:
        loaded: a causal or a masked language model, its weights not quantised.
        store: the run folder's store.
        protocol: "quick", "standard" or "paper".
        task_names: harness tasks instead of the protocol's own. A task of this package named `laser_...` has a
            validation part of its own; of any other, a fifth of the documents is set apart.
        seed: of the order in which a race asks.
        include: folders with the user's own task files.
        counts: files of `impasto corpus count`, by which facts are rare or frequent.
        texts: plain text files, on which the perplexity of the chosen edits is measured.
        batch_tokens: tokens per batch; None starts from what suits the device.
        where: who measures candidates whole; None this process. Screening and races are always run here.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know.
        noted: what notes the run and its time; it is left before the page is made, which tells them.
        changes: what is wanted otherwise than the protocol has it, see `Changes`: limit, types, layers, rhos, select,
            screen, compose.

    Raises:
        UsageError: an unknown protocol, task or matrix, or a share outside of 0 to 1.
        UnsupportedModel: weights that cannot be edited, or a model that predicts no tokens.
        ImpastoError: something could not be measured; all else is kept, and `page_of` makes a page of it.
    """
    with noted or nullcontext():
        study = _prepare(
            loaded,
            store,
            protocol=protocol,
            task_names=task_names,
            seed=seed,
            include=include,
            counts=counts,
            texts=texts,
            batch_tokens=batch_tokens,
            where=where,
            progress=progress,
            note=note,
            **changes,
        )
        study.book.open()
        _effective(study)
        reports = [_study(study, pair) for pair in study.pairs]
        _read(study, reports)
    return page(evidence(study.book))


def dry_run_laser(loaded: LoadedModel, *, store: Store, **asked: Unpack[_Asked]) -> LaserPlan:
    """What `run_laser` would take with the same arguments; nothing is scored and nothing kept."""
    from impasto.pace import pace

    study = _prepare(loaded, store, **asked)
    tried = spaced(study.grid, study.protocol.screen)
    middle = Report(loaded.layers, tried[len(tried) // 2], None, (), study.protocol)
    works = [
        plan(loaded, recipes, [task], store, scorer=study.scorer)
        for pair in study.pairs
        for task, recipes in (
            (pair.validation, [study.recipe(), *map(study.recipe, tried)]),
            (pair.test, list(middle.uses.values())),
        )
    ]
    speed = pace(study.scorer())
    scoring = StudyPlan(
        recipes=sum(work.recipes for work in works),
        layer_calls=sum(work.layer_calls for work in works),
        shared_calls=sum(work.shared_calls for work in works),
        tokens=sum(work.tokens for work in works),
        shared_tokens=sum(work.shared_tokens for work in works),
        seconds=sum(map(speed.seconds, works)),
        naive_seconds=sum(map(speed.naive_seconds, works)),
        bytes=max((speed.bytes(work, study.scorer().budget or 0) for work in works), default=0),
        rows=tuple((task.name, task.n) for pair in study.pairs for task in (pair.validation, pair.test)),
    )
    return LaserPlan(len(study.book.asked.matrices), len(study.grid), len(tried), scoring)


def _prepare(
    loaded: LoadedModel,
    store: Store,
    *,
    protocol: str = "quick",
    task_names: Sequence[str] | None = None,
    seed: int = 0,
    include: Sequence[Path | str] = (),
    counts: Sequence[Path | str] = (),
    texts: Sequence[Path | str] = (),
    batch_tokens: int | None = None,
    where: Place | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    **changes: Unpack[Changes],
) -> _Study:
    wanted = adapted(named(protocol), tasks=task_names, **changes)
    tell, say = progress or (lambda phase, share: None), note or (lambda text: None)
    loaded.require_head()
    places = layers_of(wanted.layers, loaded.layers)
    if wanted.compose == "authors" and len(places) < 2:
        raise UsageError("the authors' composition leaves out the last layer, so it needs at least two")
    cut = matrices(loaded, wanted.types, places)
    grid = candidates(cut, wanted.rhos)
    if not grid:
        raise UsageError("a share of 1 changes nothing: name shares below it with --rhos")
    both = pairs(wanted, task_names, include, progress, note, masked=loaded.masked)
    made = scorer_of if loaded.masked else sliding_scorer
    asked = Asked(loaded.layers, wanted, cut, len(grid), tuple(pair.part for pair in both), seed, loaded.source)
    return _Study(
        loaded=loaded,
        store=store,
        book=Book(store, setting_of(loaded), asked, asked.mark),
        pairs=both,
        grid=grid,
        scorer=functools.cache(lambda: made(loaded, batch_tokens, note=say)),
        batch_tokens=batch_tokens,
        where=where,
        counts=asides.counted(counts),
        texts=asides.text_tasks(loaded, texts),
        progress=tell,
        note=say,
    )


# ── singular values ──────────────────────────────────────────────────────────────────────────────────────────


def _effective(study: _Study) -> None:
    """The effective rank of every matrix, from singular values that screening and edits need as well."""
    from impasto.anatomy import anatomy
    from impasto.fetch import cache_root
    from impasto.matrices import check, sites
    from impasto.svd import decompose, effective_rank

    known = study.book.effective()
    wanted = {(one.layer, one.name): one for one in study.book.asked.matrices}
    lacking = [one for key, one in wanted.items() if f"{key[0]}.{key[1]}" not in known]
    body = anatomy(study.loaded.model)
    done = 0
    for layer in sorted({one.layer for one in lacking}):
        for site in sites(body.layers[layer], layer):
            matrix: Matrix | None = wanted.get((layer, site.name))
            if matrix is None or site.expert is not None or matrix not in lacking:
                continue
            parameter = body.layers[layer].get_parameter(site.parameter)
            check(parameter, site)
            values = decompose(parameter.detach(), folder=cache_root() / "svd").values
            study.book.put_effective(matrix, effective_rank(values))
            done += 1
            study.progress("singular values", done / len(lacking))


# ── one task ─────────────────────────────────────────────────────────────────────────────────────────────────


def _study(study: _Study, pair: Pair) -> Report:
    tried = _screened(study, pair)
    points = _raced(study, pair, tried)
    chosen = best(points)
    low = min(points, key=lambda edit: (_loss(points[edit]), str(edit)))
    by_loss = low if low != chosen and math.isfinite(_loss(points[low])) else None
    study.book.decide(pair.name, "chosen", {"edit": str(chosen), "by_loss": by_loss and str(by_loss)})
    states = _composed(study, pair, points)
    report = Report(study.loaded.layers, chosen, by_loss, composed_of(states), study.protocol)
    _reported(study, pair, report)
    _beside(study, pair, report)
    return report


def _screened(study: _Study, pair: Pair) -> tuple[Edit, ...]:
    """The candidates that are worth measuring on a task."""
    count = study.protocol.screen
    if count is None or count >= len(study.grid):
        return study.grid
    kept: Mapping[str, float] | None = study.book.decided(pair.name, "screened")
    if kept is None:
        asked = rights(pair.validation)[: study.protocol.pass_on]
        if not asked:
            study.note(f"{pair.name}: no single right answers to screen by, so candidates are taken evenly")
            return spaced(study.grid, count)
        from impasto.screening import screen

        found = screen(
            study.loaded,
            asked,
            study.grid,
            batch_tokens=study.batch_tokens,
            progress=lambda share: study.progress(f"{title_of(pair.name)}: screening", share),
            note=study.note,
        )
        kept = {str(one.edit): one.change for one in found}
        study.book.decide(pair.name, "screened", kept)
    return promising({edit: kept[str(edit)] for edit in study.grid}, count)


def _raced(study: _Study, pair: Pair, tried: Sequence[Edit]) -> dict[Edit, Point]:
    """What the candidates get that were measured on the whole validation part."""
    title = title_of(pair.name)
    left = list(tried)
    if study.protocol.select == "race" and len(tried) > 1:
        from impasto.race import race

        found = race(
            study.loaded,
            [study.recipe(edit) for edit in tried],
            [pair.validation],
            keep=1,
            seed=study.book.asked.seed,
            store=study.store,
            batch_tokens=study.batch_tokens,
            progress=lambda phase, share: study.progress(f"{title}: {phase}", share),
            note=study.note,
        )
        left = [survivor.recipe.edits[0] for survivor in found.survivors]
        raced = {
            "recipes": len(tried),
            "dropped": len(found.dropped),
            "share": found.share,
            "error": found.rules.error,
            "rounds": [[one.documents, one.recipes, one.dropped] for one in found.rounds],
        }
        study.book.decide(pair.name, "raced", raced)
    points = _points(study, pair, [study.recipe(), *map(study.recipe, left)], f"{title}: choosing")
    return {edit: points[study.recipe(edit).fingerprint] for edit in left}


def _composed(study: _Study, pair: Pair, points: Mapping[Edit, Point]) -> list[tuple[Edit, ...]]:
    """The accepted states of a composition, each with one edit more than the one before."""
    how = study.protocol.compose
    if how == "none":
        return []
    phase = f"{title_of(pair.name)}: composing"
    known: dict[str, Point] = {}

    def measure(states: Iterable[Sequence[Edit]]) -> None:
        recipes = [study.recipe(*edits) for edits in states]
        known.update(_points(study, pair, [one for one in recipes if one.fingerprint not in known], phase))

    def judge(edits: Sequence[Edit]) -> Verdict:
        measure([edits])
        found = known[study.recipe(*edits).fingerprint]
        return Verdict(found.accuracy, math.nan if found.loss is None else found.loss)

    if how == "authors":
        trace = composition.authors(composition.ladder(study.grid), judge, ahead=measure)
    else:
        trace = composition.greedy(_ladder(study.protocol, points), judge, ahead=measure)
    states = [tuple(state) for state in trace.states[1:]]
    steps = [step_json(_step(one)) for one in trace.steps]
    study.book.decide(pair.name, "trace", {"steps": steps, "states": [list(map(str, state)) for state in states]})
    return states


def _ladder(wanted: Protocol, points: Mapping[Edit, Point]) -> tuple[Rung, ...]:
    """The matrices whose single cuts were best, each with its best ranks, in the order of the search."""
    by_matrix: dict[tuple[int, str], list[Edit]] = {}
    for edit in sorted(points, key=lambda edit: _order(edit, points[edit])):
        by_matrix.setdefault((edit.layers[0], edit.matrix), []).append(edit)
    chosen = list(by_matrix.values())[: wanted.ladder]
    return composition.ladder(edit for edits in chosen for edit in edits[: wanted.rungs])


def _step(step: composition.Step) -> Step:
    """A step as the page shows it: the best that was tried, whether or not it was accepted."""
    top = max(step.tried, key=lambda one: (one.verdict.accuracy, -one.verdict.loss), default=None)
    edit = step.edit or (top.edit if top is not None else None)
    after = step.after.accuracy if step.accepted or top is None else top.verdict.accuracy
    return Step(step.layer, step.matrix, edit, len(step.tried), step.before.accuracy, after, step.accepted)


def _reported(study: _Study, pair: Pair, report: Report) -> None:
    """Measure what is asked of the chosen edits on the test part, and keep it document by document."""
    phase = f"{title_of(pair.name)}: reporting"
    recipes = list({recipe.fingerprint: recipe for recipe in report.uses.values()}.values())
    _sheets(study, pair.test, recipes, phase)
    _sheets(study, pair.validation, [report.uses[BASE], report.uses[CHOSEN]], phase)


def _beside(study: _Study, pair: Pair, report: Report) -> None:
    """Keep how often a task's facts are mentioned, and what the discarded components answer to them."""
    if study.counts:
        study.book.put_mentions(pair.name, asides.mentions(pair.test, study.counts))
    if study.book.spoken(pair.name) is None:
        phase = f"{title_of(pair.name)}: what is discarded"
        spoken = asides.spoken(
            study.loaded,
            study.book,
            pair,
            report,
            batch_tokens=study.batch_tokens,
            progress=lambda share: study.progress(phase, share),
        )
        if spoken is not None:
            study.book.put_spoken(pair.name, spoken)


def _read(study: _Study, reports: Sequence[Report]) -> None:
    """Measure the perplexity of plain texts under the untouched model and all that was chosen."""
    if not study.texts:
        return
    wanted = [recipe for report in reports for recipe in (report.uses[BASE], report.uses[CHOSEN], *_last(report))]
    recipes = [replace(one, model=study.loaded.name) for one in {one.fingerprint: one for one in wanted}.values()]
    kept = []
    here = replace(study, where=None)  # workers read requests as the harness does, and it has no such windows
    for text in study.texts:
        results = _evaluated(here, recipes, text, f"reading {text.name}")
        for recipe, result in zip(recipes, results, strict=True):
            study.book.put_read(recipe, text.protocol, result.scores[METRIC])
        kept.append((text.name, text.protocol, int(results[0].info["tokens"])))
    study.book.put_texts(kept)


def _last(report: Report) -> list[Recipe]:
    """The end of the composition, if anything was composed."""
    return [recipe for use, recipe in report.uses.items() if use.role == "composed"][-1:]


def best(points: Mapping[Edit, Point]) -> Edit:
    """The candidate with the highest accuracy; of equal ones that with the lower loss, as in the paper.

    Raises:
        ImpastoError: no candidate has an accuracy that is a number.
    """
    finite = {edit: point for edit, point in points.items() if math.isfinite(point.accuracy)}
    if not finite:
        raise ImpastoError("no candidate has finite scores, so none can be chosen: load the model in float32")
    return min(finite, key=lambda edit: _order(edit, finite[edit]))


def _order(edit: Edit, found: Point) -> tuple[float, float, str]:
    accuracy = found.accuracy if math.isfinite(found.accuracy) else -math.inf
    return -accuracy, _loss(found), str(edit)


def _loss(found: Point) -> float:
    return found.loss if found.loss is not None and math.isfinite(found.loss) else math.inf


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────


def _points(study: _Study, pair: Pair, recipes: Sequence[Recipe], phase: str) -> dict[str, Point]:
    """What recipes get on the validation part, by fingerprint."""
    known = study.book.points(pair.part)
    lacking = [recipe for recipe in recipes if recipe.fingerprint not in known]
    if lacking:
        golds = [item.right or 0 for item in items(pair.validation)]
        for recipe, result in zip(lacking, _evaluated(study, lacking, pair.validation, phase), strict=True):
            answers = study.store.responses(study.book.setting, recipe, pair.validation.requests)
            known[recipe.fingerprint] = point(sheet(pair.validation, result, answers), pair.part, golds)
            study.book.put_point(recipe, pair.part, known[recipe.fingerprint])
    return {recipe.fingerprint: known[recipe.fingerprint] for recipe in recipes}


def _sheets(study: _Study, task: TaskSet, recipes: Sequence[Recipe], phase: str) -> None:
    """Keep what recipes answer on a part, document by document."""
    known = study.book.sheets(task.protocol, recipes)
    named = [replace(one, model=study.loaded.name) for one in recipes if one.fingerprint not in known]
    for recipe, result in zip(named, _evaluated(study, named, task, phase) if named else (), strict=True):
        answers = study.store.responses(study.book.setting, recipe, task.requests)
        study.book.put_sheet(recipe, task.protocol, sheet(task, result, answers))


def _evaluated(study: _Study, recipes: Sequence[Recipe], task: TaskSet, phase: str) -> list[Result]:
    return evaluate(
        study.loaded,
        recipes,
        [task],
        study.store,
        batch_tokens=study.batch_tokens,
        scorer=study.scorer,
        where=study.where,
        progress=lambda _, share: study.progress(phase, share),
        note=study.note,
    )
