"""Tasks in two parts that share no document, the matrices of a model, and answers as a study keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from impasto.anatomy import anatomy
from impasto.edit import Edit, Rule
from impasto.errors import FetchError, UnsupportedModel, UsageError
from impasto.halves import members
from impasto.matrices import Site, matched, shape, sites
from impasto.models import LoadedModel
from impasto.result import Request, Response, Result
from impasto.studies.laser.evidence import Point, Sheet, balanced
from impasto.studies.laser.kept import Part
from impasto.studies.laser.protocol import ELSEWHERE, TEST, Matrix, Protocol
from impasto.tasks import TaskSet, build

Progress = Callable[[str, float], None]
Note = Callable[[str], None]

VALIDATION = "_validation"
MASKED = "_masked"  # ends the names of tasks that are worded for encoders
WORDED = ("laser", "laser_counterfact", "laser_bios_gender", "laser_bios_profession")  # there is such a form of these
_SHARE = 0.2  # of a task without parts of its own


@dataclass(frozen=True)
class Pair:
    """One task: the part to choose on, the part to report on, and what a page needs of both."""

    validation: TaskSet
    test: TaskSet
    part: Part

    @property
    def name(self) -> str:
        """The task's name."""
        return self.test.name


def pairs(
    protocol: Protocol,
    names: Sequence[str] | None,
    include: Sequence[Path | str],
    progress: Progress | None,
    note: Note | None,
    *,
    masked: bool = False,
) -> list[Pair]:
    """The tasks of a study, each in two parts.

    Args:
        protocol: which tasks and how many documents.
        names: tasks that the user named; each must be had. None is the protocol's own: those whose data can be had,
            or, where that is none, benchmarks that come with pip.
        include: folders with the user's own task files.
        progress: told the share of the tasks that are read.
        note: told which of the protocol's own tasks are left out.
        masked: the model predicts masked tokens: of the protocol's own tasks those forms are taken that the paper asks
            encoders; tasks that the user named are asked as named.

    Raises:
        UnknownTask: no task of that name.
        FetchError: the data of a named task cannot be had.
        UsageError: a task that has no right answers to compare, or too few documents.
    """
    wanted = list(names or [f"{name}{MASKED}" if masked and name in WORDED else name for name in protocol.tasks])
    if masked and note is not None:
        for name in [name for name in wanted if name in WORDED]:
            note(f"{name} is worded for models that read from left to right; {name}{MASKED} is its form for encoders")
    found: list[Pair] = []
    lacking: list[str] = []
    for i, name in enumerate(wanted):
        if progress is not None:
            progress("reading tasks", i / len(wanted))
        try:
            found += _pairs(name, protocol, include, note)
        except FetchError:
            if names:
                raise
            lacking.append(name)
    if lacking and note is not None:
        instead = "" if found else f"; asking {', '.join(ELSEWHERE)} instead"
        note(f"no data here for {', '.join(lacking)} (a folder in IMPASTO_DATA, or the hub, has them){instead}")
    if not found:
        found = [pair for name in ELSEWHERE for pair in _pairs(name, protocol, include, note)]
    if progress is not None:
        progress("reading tasks", 1.0)
    return list({pair.name: pair for pair in found}.values())


def _pairs(name: str, protocol: Protocol, include: Sequence[Path | str], note: Note | None) -> Iterator[Pair]:
    if name.endswith(VALIDATION):
        raise UsageError(f"{name} is a part to choose on: name {name.removesuffix(VALIDATION)}, and both are asked")
    count = protocol.validation_of(name.removesuffix(MASKED))
    if name == "laser" or name.startswith("laser_"):
        second = {task.name: task for task in build([name], limit=count and TEST * count, include=include, notice=note)}
        first = build([name + VALIDATION], limit=count, include=include)
        both = [(one, second[one.name.removesuffix(VALIDATION)]) for one in first]
    else:
        both = [
            _cut(task.parted(_SHARE), count)
            for task in build([name], limit=count and round(2 * count / _SHARE), include=include, notice=note)
        ]
    for validation, test in both:
        if test.kind == "loglikelihood_rolling" or (not test.higher_is_better and not _rights(test)):
            raise UsageError(f"task {test.name} has no right answers, so edits cannot be chosen on it")
        yield _pair(_apart(validation, test, note), test)


def _cut(both: tuple[TaskSet, TaskSet], count: int | None) -> tuple[TaskSet, TaskSet]:
    """The first documents of two parts."""
    if count is None:
        return both
    validation, test = both
    return (
        validation.part("validation", list(validation.documents)[:count]),
        test.part("test", list(test.documents)[: TEST * count]),
    )


def _apart(validation: TaskSet, test: TaskSet, note: Note | None) -> TaskSet:
    """The validation part without documents that ask what a document of the test part asks.

    Benchmarks hold the same question twice now and then, and a hash of the whole document cannot see that.
    """
    taken = {item.options for item in items(test)}
    kept = [
        number
        for number, item in zip(validation.documents, items(validation), strict=True)
        if item.options not in taken
    ]
    if len(kept) == validation.n:
        return validation
    if note is not None:
        note(
            f"{test.name}: {validation.n - len(kept)} of {validation.n} documents to choose on are asked on the test "
            "part too, and are left out"
        )
    return validation.part("validation", kept)


def _pair(validation: TaskSet, test: TaskSet) -> Pair:
    shown = items(test)
    texts = {request.fingerprint: request for request in test.requests}
    labels = {tuple(texts[one].continuation.strip() for one in item.options) for item in shown}
    named = next(iter(labels)) if len(labels) == 1 and len(next(iter(labels))) > 1 else ()
    golds = tuple(item.right for item in shown if item.right is not None)
    choices = test.kind == "multiple_choice" and len(golds) == len(shown)
    groups, words = _answers(shown, texts, golds, named, choices)
    return Pair(
        validation,
        test,
        Part(
            name=test.name,
            validation=validation.protocol,
            test=test.protocol,
            n_validation=validation.n,
            n_test=test.n,
            metric=test.metric,
            chance=test.chance,
            majority=test.majority,
            labels=named if choices else (),
            golds=golds if choices else (),
            groups=groups,
            commonest=words[Counter(groups).most_common(1)[0][0]] if groups else "",
            units=_units(test),
            validation_units=_units(validation),
        ),
    )


def _answers(
    shown: Sequence[Item], texts: Mapping[str, Request], golds: Sequence[int], named: Sequence[str], choices: bool
) -> tuple[tuple[int, ...], Sequence[str]]:
    """The number of each document's right answer, and the answers' texts; empty where there are no words for them."""
    if choices:
        return (tuple(golds), named) if named else ((), ())
    if len(golds) < len(shown) or not all(item.options for item in shown):
        return (), ()
    words = [texts[item.options[0]].continuation.strip().lower() for item in shown]
    known = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return tuple(known[word] for word in words), list(known)


def _units(task: TaskSet) -> tuple[int, ...]:
    """What each document is about, as numbers; every document by itself where the task does not say."""
    seen: dict[str, int] = {}
    return tuple(
        seen.setdefault(str(doc["about"]) if isinstance(doc, Mapping) and "about" in doc else f"{number}", len(seen))
        for number, doc in task.documents.items()
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Item:
    """One document's log-likelihood requests.

    Attributes:
        options: their fingerprints, one for each choice, or the one of the right answer.
        right: which one is right; None where several are, or none is known.
    """

    options: tuple[str, ...]
    right: int | None


def items(task: TaskSet) -> list[Item]:
    """The documents of a task, in the order of its scores."""
    grouped: dict[int, list[tuple[int, str]]] = {number: [] for number in task.documents}
    for instance, asked in zip(task._task.instances, task._asked, strict=True):
        if instance.request_type == "loglikelihood":
            grouped[instance.doc_id].append((instance.idx, asked))
    return [
        _item(task, doc, tuple(asked for _, asked in sorted(options)))
        for doc, options in zip(task.documents.values(), grouped.values(), strict=True)
    ]


def _item(task: TaskSet, doc: Any, options: tuple[str, ...]) -> Item:
    if task.kind != "multiple_choice":
        return Item(options, 0 if len(options) == 1 else None)
    harness = task._task
    choices = harness.doc_to_choice(doc)
    gold = harness.doc_to_text(doc) if harness.multiple_input else harness.doc_to_target(doc)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    options = options[: len(choices)]  # behind them may stand the choices without their context
    return Item(options, gold if isinstance(gold, int) and 0 <= gold < len(options) else None)


def rights(task: TaskSet) -> list[Request]:
    """The right answers of a task, each with its context; of documents with exactly one."""
    known = {request.fingerprint: request for request in task.requests}
    return list(dict.fromkeys(known[name] for name in _rights(task)))


def _rights(task: TaskSet) -> list[str]:
    return [item.options[item.right] for item in items(task) if item.right is not None and item.options]


def sheet(task: TaskSet, result: Result, answers: Mapping[str, Response]) -> Sheet:
    """What a recipe answered, document by document."""
    shown = items(task)
    sign = 1 if task.higher_is_better else -1
    scores = tuple(None if one is None else sign * one for one in result.scores[task.metric])
    right = [answers[item.options[item.right]] if item.right is not None and item.options else None for item in shown]
    known = [one for one in right if one is not None and one.tokens]
    whole = len(known) == len(shown)
    chosen = task.kind == "multiple_choice" and all(item.options for item in shown)
    ranks = [one.rank for one in known if one.rank is not None]
    return Sheet(
        scores=scores,
        loss=tuple(-one.loglikelihood / one.tokens for one in known) if whole else (),
        predicted=tuple(_likeliest([answers[name].loglikelihood for name in item.options]) for item in shown)
        if chosen
        else (),
        rank=tuple(ranks) if whole and len(ranks) == len(shown) else (),
    )


def point(found: Sheet, part: Part, golds: Sequence[int]) -> Point:
    """The means of a sheet.

    Args:
        found: the sheet.
        part: says whether there are classes.
        golds: the right choice of each of the sheet's documents.
    """
    classes = bool(part.labels) and len(set(golds)) > 1
    counts = np.bincount(found.predicted) if found.predicted else np.zeros(1)
    return Point(
        accuracy=float(np.mean(np.asarray(found.scores, np.float64))),
        loss=float(np.mean(np.asarray(found.loss, np.float64))) if found.loss else None,
        balanced=_balanced(found, golds) if classes and found.predicted else None,
        commonest=float(counts.max() / len(found.predicted)) if classes and found.predicted else None,
    )


def _balanced(found: Sheet, golds: Sequence[int]) -> float:
    return float(balanced(np.asarray(found.predicted) == np.asarray(golds), golds).mean())


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: np.nan_to_num(values[place], nan=-np.inf))


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────────────────


def matrices(loaded: LoadedModel, types: Sequence[str], layers: Sequence[int]) -> tuple[Matrix, ...]:
    """The matrices of some layers that a study cuts, layer by layer; stacked experts count as one.

    Args:
        loaded: the model.
        types: globs of names inside a block, "mlp", "attention" or "all".
        layers: which layers.

    Raises:
        UsageError: a glob that matches nothing; names the nearest.
        UnsupportedModel: blocks that cannot be split where "mlp" or "attention" was asked for.
    """
    body = anatomy(loaded.model)
    found: dict[tuple[int, str], Matrix] = {}
    for kind in types:
        if kind not in ("mlp", "attention", "all"):
            matched(loaded.model, body, Edit(tuple(layers), kind, Rule("zero")))  # refuses what is nowhere
        for layer in layers:
            half = _halves(loaded, layer, kind)
            for site in _named(loaded, layer, kind):
                name = site.names[-1]
                rows, columns = shape(loaded.model, body, site)
                where = half.get(name.partition(".")[0], "")
                if kind in ("all", where) or kind not in ("mlp", "attention"):
                    found.setdefault((layer, name), Matrix(layer, name, where, rows, columns))
    if not found:
        raise UsageError(f"layers {layers[0]} to {layers[-1]} have no matrices of the kind {', '.join(types)}")
    return tuple(sorted(found.values(), key=lambda one: one.layer))


def _named(loaded: LoadedModel, layer: int, kind: str) -> list[Site]:
    body = anatomy(loaded.model)
    if kind in ("mlp", "attention", "all"):
        return list(sites(body.layers[layer], layer))
    try:
        return list(matched(loaded.model, body, Edit((layer,), kind, Rule("zero"))))
    except UsageError:  # another layer has it
        return []


def _halves(loaded: LoadedModel, layer: int, kind: str) -> dict[str, str]:
    """Which half of a block its children are of, by their names."""
    try:
        found = members(loaded.model, anatomy(loaded.model), layer)
    except UnsupportedModel as problem:
        if kind in ("mlp", "attention"):
            raise UnsupportedModel(f"{problem}; name the matrices instead (--types), or take all of them") from None
        return {}
    return {name: "attention" if half == "attn" else half for name, half in found.items()}
