"""Several models' painters studies on one page: common tasks, common axes, the same questions side by side.

    page = compare(["impasto-runs/small", "impasto-runs/large"])
    report.write(page, "impasto-runs/comparison")

Models differ in depth, so a change is placed by its share of the model and not by a number of layers: affected layers
in percent of all (experiment E12), a single layer at layer / (T - 1). Scores are the medians over those tasks that
every run asked in the same way and that every model does clearly better than guessing.

Each model is resampled by itself, independently of the others even where the examples are the same. What is hard for
one model tends to be hard for another too, so this errs towards "unclear".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from impasto import statistics
from impasto.errors import UsageError
from impasto.result import Answer, Figure, Page, Row
from impasto.store import Store
from impasto.studies.alike import Compared, answers
from impasto.studies.claims import QUESTIONS
from impasto.studies.evidence import Evidence, Task
from impasto.studies.figures import LAYERS, MIDDLE, RULES, bar, point
from impasto.studies.kept import study_of
from impasto.studies.paper import FOUND
from impasto.studies.protocol import METHODS
from impasto.studies.provenance import portable
from impasto.studies.reading import PAPER_ORDER, listed, with_interval
from impasto.studies.sides import Side, mean_scores, titles_of

QUESTION_BY_QUESTION = "Question by question"
_SHARE, _DEPTH = "affected layers, % of all", "relative depth, layer / (T \u2212 1)"
_SCORE = "normalised score, median over tasks"


def compare(runs: Sequence[Store | Path | str]) -> Page:
    """One page that compares painters studies, finished or not, from their run folders alone.

    What the runs have in common is compared, and the rest is named on the page.

    Args:
        runs: two or more run folders, or their open stores.

    Raises:
        UsageError: fewer than two runs, one of them twice, or runs without a task in common.
        StoreError: a folder holds no painters study.
    """
    folders = [run.folder if isinstance(run, Store) else Path(run) for run in runs]
    places = [folder.resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise UsageError(f"{twice} is given twice: a comparison needs different runs")
    return comparison([_study(run) for run in runs], [str(folder) for folder in folders])


def _study(run: Store | Path | str) -> Evidence:
    if isinstance(run, Store):
        return study_of(run)
    with Store(run, readonly=True) as store:
        return study_of(store)


def comparison(studies: Sequence[Evidence], folders: Sequence[str] = ()) -> Page:
    """The page that compares studies, given as their evidence.

    Args:
        studies: two or more.
        folders: where they come from, to name them and to say how to make the page again.

    Raises:
        UsageError: fewer than two studies, or none of their tasks can be compared.
    """
    if len(studies) < 2:
        raise UsageError("a comparison needs at least two runs")
    names = _names(studies, folders)
    tasks, left_out = _common(names, studies)
    sides = [
        Side(name, place, replace(study, tasks=tuple(task for task in study.tasks if task.name in tasks)))
        for place, (name, study) in enumerate(zip(names, studies, strict=True))
    ]
    asked = [Compared.of(question, sides) for question in QUESTIONS]
    shared = [one for one in asked if len(one.found) > 1]
    figures = tuple(figure for figure in _figures(sides, shared) if figure.rows)
    keys = {figure.key for figure in figures}
    cards = list(answers(sides, shared))
    return Page(
        title="Transformer layers as painters, side by side",
        subtitle=f"{listed(names)}, {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} in common",
        answers=tuple(card if card.figure in keys else replace(card, figure=None) for card in cards),
        figures=figures,
        notes=(*left_out, *_notes(sides, asked)),
        facts=_facts(sides, folders),
        tables=((QUESTION_BY_QUESTION, _table(sides, shared)), ("Runs", _runs(sides)), ("Tasks", _tasks(sides))),
    )


# ── what is common ───────────────────────────────────────────────────────────────────────────────────────────


def _names(studies: Sequence[Evidence], folders: Sequence[str]) -> list[str]:
    """What to call each run: its model, and where that is not enough what tells the runs apart."""
    places = [Path(folder).name for folder in folders] or ["run"] * len(studies)
    known = [
        {
            "model": study.facts.get("model", "").removesuffix(".gguf") or place,
            "protocol": study.protocol.name,
            "dtype": study.facts.get("computed in", "").partition(" ")[0],
            "folder": place,
        }
        for study, place in zip(studies, places, strict=True)
    ]
    for more in ((), ("protocol",), ("dtype",), ("protocol", "dtype"), ("folder",)):
        tails = [", ".join(filter(None, (one[field] for field in more))) for one in known]
        names = [one["model"] + (f" ({tail})" if tail else "") for one, tail in zip(known, tails, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [f"{name}, run {place + 1}" for place, name in enumerate(names)]


def _common(names: Sequence[str], studies: Sequence[Evidence]) -> tuple[set[str], list[str]]:
    """Names of the tasks that can be compared, and a sentence for every reason to leave others out."""
    titles = {task.name: task.title for study in studies for task in study.tasks}
    if not titles:
        raise UsageError("nothing to compare: none of these runs has measured a task yet")
    reasons: dict[str, list[str]] = {}
    kept = set()
    for task, title in titles.items():
        reason = _why_not(task, names, studies)
        if reason is None:
            kept.add(task)
        else:
            reasons.setdefault(reason, []).append(title)
    parts = [f"{listed(left, 20)} ({reason})" for reason, left in reasons.items()]
    if not kept:
        raise UsageError(
            f"nothing to compare: {listed(names)} have no task in common that all models do clearly better than "
            f"guessing: {'; '.join(parts)}. Run them on the same --tasks"
        )
    return kept, [f"Tasks left out: {'; '.join(parts)}."] if parts else []


def _why_not(task: str, names: Sequence[str], studies: Sequence[Evidence]) -> str | None:
    """Why a task cannot be compared; None if it can."""

    def lacking(tasks_of: Callable[[Evidence], Sequence[Task]]) -> list[str]:
        return [n for n, study in zip(names, studies, strict=True) if all(t.name != task for t in tasks_of(study))]

    if without := lacking(lambda study: study.tasks):
        return f"not measured for {listed(without)}"
    if len({_wording(study, task) for study in studies}) > 1:
        return "asked in different ways: version, shots or metric"
    if any(
        one.chance is None or not one.higher_is_better for study in studies for one in study.tasks if one.name == task
    ):
        return "no level of guessing, so no normalised score"
    if guessing := lacking(lambda study: study.usable):
        return f"{listed(guessing)} not clearly above guessing"
    if unfinished := lacking(lambda study: study.complete):
        return f"not finished for {listed(unfinished)}"
    return None


def _wording(study: Evidence, task: str) -> tuple[object, ...]:
    """How a task was asked, apart from how many of its examples."""
    mine = next(one for one in study.tasks if one.name == task)
    info = next(result.info for (_, name), result in study.results.items() if name == task)
    return info.get("version"), info.get("shots"), mine.metric, mine.higher_is_better


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────


def _figures(sides: Sequence[Side], asked: Sequence[Compared]) -> Iterator[Figure]:
    yield _effects(sides, asked)
    yield _skip(sides)
    yield _methods(sides)
    yield _mean_scores(sides)
    yield _single_layers(sides)
    yield _abilities(sides)


def _effects(sides: Sequence[Side], asked: Sequence[Compared]) -> Figure:
    rows = [
        {
            "label": one.label,
            "series": name,
            **(bar(found.estimate) if found.estimate is not None else {"value": None, "low": None, "high": None}),
            "unit": one.question.unit,
            "answer": found.verdict,
            "effect": found.effect,
        }
        for one in asked
        for name, found in one.found.items()
    ]
    caption = (
        "The effect behind every answer, in the unit of its question (most are normalised scores or differences of "
        "them; see the numbers), with 95 % intervals. A question is answered by where its interval lies; the "
        "thresholds stand on each run's own page."
    )
    options = {"sort": "given", "x_title": "effect, in the unit of the question", "rules": [{"value": 0.0}]}
    return Figure(
        "effects",
        "The size of every answer",
        caption,
        "bars",
        tuple(rows),
        _options(sides, QUESTION_BY_QUESTION, options),
    )


def _skip(sides: Sequence[Side]) -> Figure:
    rows = [row for row in _shares(sides) if row["panel"] == METHODS["skip"]]
    caption = (
        f"The middle left out, from the full model (0 %) to nearly all layers. {_caption(sides)} Between measured "
        "points lines are straight."
    )
    options = _options(sides, MIDDLE, {"x_title": "layers left out, % of all", "y_title": _SCORE, "rules": RULES})
    return Figure("skip-share", "The same share of layers left out", caption, "summary_curves", tuple(rows), options)


def _methods(sides: Sequence[Side]) -> Figure:
    rows = tuple(_shares(sides))
    caption = f"Every method that two models have, against the share of layers that it affects. {_caption(sides)}"
    options = _options(sides, MIDDLE, {"x_title": _SHARE, "rules": RULES, "panel_order": titles_of(sides)})
    return Figure("methods-share", "Every method, model by model", caption, "affected_curves", rows, options)


def _mean_scores(sides: Sequence[Side]) -> Figure:
    rows = [
        {"label": title, "series": name, **bar(number.estimate())}
        for title, prices in mean_scores(sides).items()
        for name, number in prices.items()
    ]
    caption = (
        "Average height of the curves above over the shares that all models have in common, read at the shares of the "
        "model with the fewest. The higher, the less harm."
    )
    options = {"sort": "given", "x_title": "mean normalised score", "rules": RULES}
    return Figure("prices", "What every method leaves", caption, "bars", tuple(rows), _options(sides, MIDDLE, options))


def _single_layers(sides: Sequence[Side]) -> Figure:
    rows: list[Row] = []
    for method in ("skip_one", "swap"):
        title = METHODS[method]
        mine = [side for side in sides if title in side.layers]
        for side in mine if len(mine) > 1 else ():
            curve = side.layers[title]
            known = dict(zip(curve.places.tolist(), curve.points(), strict=True))
            for cell in sorted(side.reading.cells(method), key=lambda cell: cell.parameter or 0):
                place = side.along(cell)
                row = {"panel": title, "series": side.name, "x": place, "layer": cell.parameter}
                rows.append({**row, **point(known.get(place))})
    caption = (
        "One layer left out, and two neighbours swapped (placed between them), by where the layer lies: 0 is the first "
        f"layer and 1 the last, whatever the depth. {_caption(sides)}"
    )
    options = _options(sides, LAYERS, {"x_title": _DEPTH, "y_title": _SCORE, "rules": RULES})
    return Figure("single-layers", "Which depths matter", caption, "layer_curve", tuple(rows), options)


def _abilities(sides: Sequence[Side]) -> Figure:
    rows: list[Row] = []
    for task in sides[0].evidence.tasks:
        for side in sides:
            mine = _task(side, task.name)
            scores = side.evidence.scores(side.evidence.full, mine)
            if scores is not None:
                rows.append({"label": task.title, "series": side.name, **bar(statistics.interval(scores))})
        rows.append({"label": task.title, "series": "guessing", "value": task.chance})
    caption = (
        "The untouched models on the common tasks, in each task's own metric, with 95 % intervals. A normalised score "
        "is 0 at guessing and 1 at the model's own dot, so models of different ability share one axis."
    )
    options = {"sort": "given", "x_title": "score", "series": [*(side.name for side in sides), "guessing"]}
    return Figure("scores", "What the models can do", caption, "bars", tuple(rows), {**options, "section": "The tasks"})


def _shares(sides: Sequence[Side]) -> list[Row]:
    """The curves of every method that two models have; a cell that was not measured is a gap."""
    rows: list[Row] = []
    for title in titles_of(sides):
        mine = [side for side in sides if title in side.methods]
        for side in mine if len(mine) > 1 else ():
            curve = side.methods[title]
            known = dict(zip(curve.places.tolist(), curve.points(), strict=True))
            cells = side.reading.cells(*(method for method in PAPER_ORDER if side.title(method) == title))
            widths = {0.0: 0, **{side.share(cell): cell.affected for cell in cells}}
            for share, width in sorted(widths.items()):
                row = {"panel": title, "series": side.name, "x": share, "layers": width}
                rows.append({**row, **point(known.get(share))})
    return rows


def _options(sides: Sequence[Side], section: str, more: Mapping[str, object]) -> dict[str, object]:
    return {"series": [side.name for side in sides], "section": section, **more}


def _caption(sides: Sequence[Side]) -> str:
    titles = [task.title for task in sides[0].evidence.tasks]
    depths = [f"{side.name} has {side.depth} layers" for side in sides]
    return (
        "Median over tasks of the normalised score: 0 is guessing and 1 each model's own full score. Bands are 95 % "
        f"intervals of a bootstrap over examples. {listed(depths)}. Tasks: {listed(titles, 20)}."
    )


# ── tables, notes, facts ─────────────────────────────────────────────────────────────────────────────────────


def _table(sides: Sequence[Side], asked: Sequence[Compared]) -> tuple[Row, ...]:
    """Question by model, what both say together, and what the paper found beside it."""
    words = {"same": "Same answer", "opposite": "Opposite answers", "open": "Unclear for some"}
    rows = []
    for one in asked:
        if (more := one.more) is not None:
            sizes = f"{more[0]} is higher{f' than {more[1]}' if len(sides) > 2 else ''} by {with_interval(more[2])}"
        elif one.gap is not None:
            sizes = "sizes not clearly apart"
        else:
            sizes = "sizes unknown"
        rows.append(
            {
                "Question": f"{one.question.text}\n({one.label}; {one.question.unit})",
                **{side.name: _given(one, side.name) for side in sides},
                "Together": f"{words[one.together]}; {sizes}.",
                "The paper found": FOUND[one.question.key],
            }
        )
    return tuple(rows)


def _given(asked: Compared, name: str) -> Answer | None:
    found, question = asked.found.get(name), asked.question
    if found is None:
        return None
    return Answer(
        key=question.key,
        question=question.text,
        verdict=found.verdict,
        effect=found.effect,
        estimate=found.estimate,
        unit=question.unit,
        paper=FOUND[question.key],
        rule=question.rule,
    )


def _runs(sides: Sequence[Side]) -> tuple[Row, ...]:
    return tuple(
        {
            "run": side.name,
            "layers": side.depth,
            "protocol": side.evidence.protocol.name,
            "recipes": len(side.evidence.variants),
            "random orders": max(
                (len(each) for cell, each in side.evidence.cells.items() if cell.method == "random_order"), default=None
            ),
            "computed in": side.evidence.facts.get("computed in"),
        }
        for side in sides
    )


def _tasks(sides: Sequence[Side]) -> tuple[Row, ...]:
    return tuple(
        {
            "task": task.title,
            "run": side.name,
            "metric": task.metric,
            "examples": mine.n,
            "full model": side.evidence.metric(side.evidence.full, mine),
            "guessing": mine.chance,
        }
        for task in sides[0].evidence.tasks
        for side in sides
        if (mine := _task(side, task.name))
    )


def _task(side: Side, name: str) -> Task:
    return next(task for task in side.evidence.tasks if task.name == name)


def _notes(sides: Sequence[Side], asked: Sequence[Compared]) -> Iterator[str]:
    """What a reader must know before believing the page, beside the tasks that were left out."""
    for side in sides:
        gaps = {task.title: len(side.evidence.missing(task)) for task in side.evidence.tasks}
        if count := sum(gaps.values()):
            yield f"The study of {side.name} is not complete: {count:,} results on the common tasks are missing."
    if other := [title for title, counts in _counts(sides).items() if len(set(counts)) > 1]:
        parts = [f"{title} {' and '.join(f'{count:,}' for count in _counts(sides)[title])}" for title in other]
        yield (
            f"The runs asked different numbers of examples ({listed(parts, 20)}, in the order of the runs): all are "
            "used, so the intervals of the run with fewer are wider."
        )
    if alone := [title for title in titles_of(sides) if sum(title in side.methods for side in sides) == 1]:
        yield f"Left out, since only one run measured it: {listed(alone, 20)}."
    if few := [one.question.text for one in asked if len(one.found) < 2]:
        yield f"Left out, since fewer than two runs can answer: {' '.join(few)}"
    if len({side.evidence.protocol.name for side in sides}) > 1:
        parts = [f"{side.name} {side.evidence.protocol.name}" for side in sides]
        yield (
            f"The runs followed different protocols ({listed(parts)}): answers average over the widths that each run "
            "has, and seeds and numbers of texts differ."
        )
    if len({side.evidence.facts.get("computed in") for side in sides}) > 1:
        parts = [f"{side.name} in {side.evidence.facts.get('computed in', 'unknown')}" for side in sides]
        yield f"The models were computed differently: {listed(parts)}."
    yield (
        "Answers here rest on the common tasks only and can differ from those on a run's own page. Models are "
        "resampled independently of each other. Each answer has its own 95 % interval, so of twenty one is expected "
        "to be wrong by chance."
    )


def _counts(sides: Sequence[Side]) -> dict[str, list[int]]:
    """By title of a task, its number of examples in every run."""
    return {task.title: [_task(side, task.name).n for side in sides] for task in sides[0].evidence.tasks}


def _facts(sides: Sequence[Side], folders: Sequence[str]) -> dict[str, str]:
    told = {}
    for side in sides:
        known = side.evidence.facts
        parts = [known[name] for name in ("weights", "computed in") if name in known]
        parts += [f"{name} {known[name]}" for name in ("versions", "begun", "computing time") if name in known]
        parts += [f"made by `{known['command']}`"] if "command" in known else []
        told[side.name] = "; ".join([f"{side.depth} layers", f"protocol {side.evidence.protocol.name}", *parts])
    if folders:
        told["command"] = portable(["impasto", "report", *folders])
    return told
