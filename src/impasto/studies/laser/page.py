"""The LASER study as a page: what low-rank edits do to one model, on questions that no choice has seen.

    report.write(page(study_of(store)), folder)

Paper: Sharma, Ash and Misra, arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from impasto.result import Estimate, Page, Row
from impasto.studies.laser.claims import answers
from impasto.studies.laser.evidence import BASE, CHOSEN, Evidence, Point, Trial
from impasto.studies.laser.figures import figures
from impasto.studies.laser.findings import constant, in_points, last_composed
from impasto.studies.reading import listed

_SHOWN = 12  # candidates of a task in a table


def page(evidence: Evidence) -> Page:
    """The study as a page: every question answered, then the figures, then the numbers.

    Any part of the evidence may be missing; what is missing is named, and the questions that need it are unclear.
    """
    drawn = figures(evidence)
    tables = [("Tasks", tuple(map(_task, evidence.trials)))]
    tables += [(f"Best candidates: {t.title}", rows) for t in evidence.trials if (rows := tuple(_candidates(t)))]
    if steps := tuple(row for trial in evidence.trials for row in _steps(trial)):
        tables.append(("Composition", steps))
    return Page(
        title="Layer-selective rank reduction",
        subtitle=_subtitle(evidence),
        answers=answers(evidence, [figure.key for figure in drawn]),
        figures=drawn,
        notes=tuple(_notes(evidence)),
        facts=evidence.facts,
        tables=tuple(tables),
    )


def _subtitle(evidence: Evidence) -> str:
    tasks = len(evidence.trials)
    parts = (
        evidence.facts.get("model", ""),
        f"{evidence.depth} layers",
        "1 task" if tasks == 1 else f"{tasks} tasks",
        f"protocol {evidence.protocol.name}",
    )
    return ", ".join(part for part in parts if part)


def _notes(evidence: Evidence) -> Iterator[str]:
    """What a reader must know before believing the page."""
    lacking = [trial.title for trial in evidence.trials if trial not in evidence.reported]
    if lacking:
        yield f"The study is not complete: nothing is reported yet on {listed(lacking)}."
    yield from (warning for trial in evidence.trials if (warning := constant(trial)) is not None)
    for trial in evidence.trials:
        if trial.chance is not None and (level := trial.level(BASE)) is not None and _at(level, trial.chance):
            yield (
                f"{trial.title}: the model itself ({level}) is not clearly above guessing ({trial.chance:.3f}), so "
                "there is little that an edit could bring to light."
            )
    compared = sorted({trial.grid for trial in evidence.trials})
    if compared and evidence.reported:
        count = f"{compared[0]:,}" if len(compared) == 1 else f"{compared[0]:,} to {compared[-1]:,}"
        screened = [
            trial.raced["recipes"] if trial.raced else len(trial.points) for trial in evidence.trials if trial.screened
        ]
        left = f" Screening left {max(screened)} of them to be measured." if screened else ""
        yield (
            f"{count} single edits were compared on each task's validation part.{left} The best of so many is "
            "flattered there by chance alone, so all answers are of the test part, whose documents no choice has seen."
        )
        yield (
            "Each answer has its own 95 % interval, so of twenty answers one is expected to be wrong by chance. "
            "Intervals speak about more documents of these tasks, not about other tasks or other models."
        )
    if raced := [trial for trial in evidence.trials if trial.raced is not None]:
        yield _races(raced)


def _at(level: Estimate, chance: float) -> bool:
    return level.low is not None and level.low <= chance


def _races(trials: Sequence[Trial]) -> str:
    dropped = [f"{trial.title} {raced['dropped']} of {raced['recipes']}" for trial in trials if (raced := trial.raced)]
    error = max(trial.raced["error"] for trial in trials if trial.raced)
    return (
        f"Races dropped clearly worse candidates before they had seen all documents: {listed(dropped)}. The "
        f"probability that one lost the best is at most {error:g}."
    )


def _task(trial: Trial) -> Row:
    several = last_composed(trial)
    gain = trial.difference(CHOSEN)
    return {  # what is asked for first, so that no screen hides it
        "task": trial.title,
        "the model itself": trial.mean(BASE),
        "chosen edit": "" if trial.chosen is None else str(trial.chosen),
        "with it": trial.mean(CHOSEN),
        "difference": "" if gain is None else in_points(gain),
        "several edits": None if several is None else trial.mean(several),
        "guessing": trial.chance,
        "most frequent answer": trial.majority,
        "balanced, without": trial.mean(BASE, "balanced"),
        "balanced, with it": trial.mean(CHOSEN, "balanced"),
        "loss, without": trial.mean(BASE, "loss"),
        "loss, with it": trial.mean(CHOSEN, "loss"),
        **{f"top-{k}, without": trial.top(BASE, k) for k in (5, 10) if trial.top(BASE, k) is not None},
        **{f"top-{k}, with it": trial.top(CHOSEN, k) for k in (5, 10) if trial.top(CHOSEN, k) is not None},
        "to choose on": trial.validation,
        "held out": trial.test,
        "name": trial.name,
        "metric": trial.metric,
    }


def _candidates(trial: Trial) -> Iterator[Row]:
    """The best candidates where they were chosen."""
    ordered = sorted(trial.points.items(), key=lambda pair: (-pair[1].accuracy, pair[1].loss or 0.0, str(pair[0])))
    if trial.base is not None and ordered:
        yield {"edit": "the model itself", "chosen": None, **_of(trial.base, trial)}
    for edit, point in ordered[:_SHOWN]:
        yield {
            "edit": str(edit),
            "chosen": edit == trial.chosen,
            **_of(point, trial),
            "foretold change of the loss": trial.screened.get(edit),
        }


def _of(point: Point, trial: Trial) -> Row:
    found = {"accuracy": point.accuracy, "loss": point.loss}
    if trial.classes:
        found |= {"balanced accuracy": point.balanced, "most given answer": point.commonest}
    return found


def _steps(trial: Trial) -> Iterator[Row]:
    for step in trial.trace:
        yield {
            "task": trial.title,
            "layer": step.layer,
            "matrix": step.matrix,
            "best edit": "" if step.edit is None else str(step.edit),
            "tried": step.tried,
            "before": step.before,
            "after": step.after,
            "accepted": step.accepted,
        }
