r"""The painters study: a page that answers the questions of *Transformer Layers as Painters* for one model.

    plan = variants(depth, PROTOCOLS["quick"])                  # what to run
    shown = page(Evidence(depth, PROTOCOLS["quick"], plan, tasks, results, ...))
    print("\n".join(summary_lines(shown)))

Paper: Sun, Pickett, Nain and Jones, arXiv 2407.09298.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from impasto.result import Page, Row
from impasto.studies.claims import answers
from impasto.studies.evidence import Cached, Evidence, Task
from impasto.studies.figures import figures
from impasto.studies.protocol import (
    PROTOCOLS,
    Protocol,
    Use,
    Variant,
    cache_schedules,
    protocol,
    state_schedules,
    variants,
)
from impasto.studies.reading import Reading, listed, said

__all__ = [
    "PROTOCOLS",
    "Cached",
    "Evidence",
    "Protocol",
    "Task",
    "Use",
    "Variant",
    "cache_schedules",
    "page",
    "protocol",
    "state_schedules",
    "summary_lines",
    "variants",
]


def page(evidence: Evidence) -> Page:
    """The study as a page: every question answered, then the figures, then all numbers.

    Any part of the evidence may be missing; what is missing is named, and the questions that need it are unclear.
    """
    reading = Reading(evidence)
    drawn = figures(reading)
    return Page(
        title="Transformer layers as painters",
        subtitle=_subtitle(evidence),
        answers=answers(reading, [figure.key for figure in drawn]),
        figures=drawn,
        notes=tuple(_notes(evidence)),
        facts=evidence.facts,
        tables=(("Tasks", _tasks(evidence)), ("Recipes", _recipes(evidence))),
    )


def summary_lines(page: Page) -> list[str]:
    """One line for every answer: verdict, question, effect.

    Example:
        `yes      Does it help to run the parallel layers several times?  0.120 [0.050, 0.190] difference of ...`
    """
    lines = []
    for answer in page.answers:
        effect = f"{answer.estimate} {answer.unit}" if answer.estimate is not None else answer.effect
        lines.append(f"{answer.verdict:<8} {answer.question}  {effect}")
    return lines


def _subtitle(evidence: Evidence) -> str:
    model = evidence.facts.get("model", "")
    parts = (model, f"{evidence.depth} layers", _count(evidence.tasks, "task"), f"protocol {evidence.protocol.name}")
    return ", ".join(part for part in parts if part)


def _notes(evidence: Evidence) -> Iterator[str]:
    """What a reader must know before believing the page."""
    yield from _missing(evidence)
    for task in evidence.tasks:
        if broken := evidence.broken(task):
            schedules = [f"{one.uses[0]} ({one.schedule})" for one in broken]
            yield (
                f"{task.title}: not every score is finite under {_count(broken, 'recipe')}, shown as gaps: "
                f"{listed(schedules)}."
            )
    for task in evidence.tasks:
        if task not in evidence.usable and evidence.scores(evidence.full, task) is not None:
            yield f"{task.title}: {_why_unusable(evidence, task)}, so it has no normalised score and is in no answer."
    if len(evidence.complete) < len(evidence.usable):
        left = [task.title for task in evidence.usable if task not in evidence.complete]
        yield f"{listed(left)}: not measured for every recipe yet, so not part of medians and answers."
    cut = {
        task.title: count
        for task in evidence.tasks
        if (full := evidence.result(evidence.full, task)) is not None and (count := full.truncated)
    }
    if cut:
        parts = [f"{title} ({count:,})" for title, count in cut.items()]
        yield f"Requests longer than the model's window were cut at the front: {listed(parts)}."
    if evidence.usable:
        yield (
            "Each answer has its own 95 % interval, so of twenty answers one is expected to be wrong by chance. "
            "Intervals speak about more examples of these tasks, not about other tasks or other models."
        )
    asked = {evidence.protocol.limit_of(task.name) for task in evidence.tasks}
    if None not in asked and evidence.usable:
        yield "Only some examples of each task were asked; a longer protocol narrows the intervals."


def _missing(evidence: Evidence) -> Iterator[str]:
    total = len(evidence.variants) * len(evidence.tasks)
    gaps = {task: evidence.missing(task) for task in evidence.tasks}
    if count := sum(map(len, gaps.values())):
        parts = [f"{task.title} ({len(gap)} of {len(evidence.variants)} recipes)" for task, gap in gaps.items() if gap]
        yield f"The study is not complete: {count:,} of {total:,} results are missing, in {listed(parts)}."
    if not evidence.tasks:
        yield "No task was measured."
    elif not evidence.usable:
        yield "The full model is clearly above guessing on no task, so no question about scores has an answer."
    strangers = sum(
        (variant.recipe, task.name) in evidence.results and evidence.result(variant, task) is None
        for task in evidence.tasks
        for variant in evidence.variants
        if evidence.result(evidence.full, task) is not None
    )
    if strangers:
        yield f"{strangers:,} results belong to another version or selection of their task and are not used."
    labels = [label.replace("_", " ") for label in state_schedules(evidence.depth) if label not in evidence.similarity]
    if labels:
        yield f"The similarity of states was not measured for: {listed(labels)}."
    if not evidence.kv:
        yield "Exact and averaged KV caches were not compared."


def _why_unusable(evidence: Evidence, task: Task) -> str:
    if task.chance is None or not task.higher_is_better:
        return f"its metric ({task.metric}) has no level of guessing"
    score = evidence.metric(evidence.full, task)
    level = f"guessing ({said(task.chance)})"
    return f"the full model ({'?' if score is None else said(score)}) is not clearly above {level}"


def _tasks(evidence: Evidence) -> tuple[Row, ...]:
    return tuple(
        {
            "task": task.title,
            "name": task.name,
            "metric": task.metric,
            "examples": task.n,
            "full model": evidence.metric(evidence.full, task),
            "guessing": task.chance,
            "most frequent position": task.majority,
            "needs order": task.order_sensitive,
            "usable": task in evidence.usable,
        }
        for task in evidence.tasks
    )


def _recipes(evidence: Evidence) -> tuple[Row, ...]:
    return tuple(
        {
            "recipe": "; ".join(map(str, variant.uses)),
            "schedule": str(variant.schedule),
            "M": max(use.affected for use in variant.uses),
            "layer calls": variant.schedule.calls,
            "depth": variant.schedule.depth,
            **{task.title: evidence.metric(variant, task) for task in evidence.tasks},
        }
        for variant in evidence.variants
    )


def _count(things: Sequence[object], noun: str) -> str:
    return f"1 {noun}" if len(things) == 1 else f"{len(things)} {noun}s"
