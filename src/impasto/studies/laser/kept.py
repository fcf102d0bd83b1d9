"""A LASER study as its run folder keeps it: what was asked, what was decided, what was measured. Needs no model.

Decisions (what screening foretold, how a race went, which edit was chosen, what a composition accepted) are kept under
the fingerprint of what was asked, so that a folder may hold several studies, and the last one is its page. Numbers of
recipes are kept under the protocol of the part that they were measured on, so that studies share them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from impasto.edit import Edit
from impasto.errors import StoreError
from impasto.recipe import Recipe
from impasto.result import Estimate, Page, Setting, digest
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies.laser.evidence import (
    BASE,
    CHOSEN,
    Evidence,
    Mentions,
    Point,
    Sheet,
    Spoken,
    Step,
    Tail,
    Text,
    Trial,
    contrast,
)
from impasto.studies.laser.page import page
from impasto.studies.laser.protocol import Matrix, Protocol, Report, candidates, composed_of, protocol
from impasto.studies.provenance import provenance

KIND = "laser study"
POINT, SHEET, RANK, READ = "laser point", "laser sheet", "effective rank", "laser text"
_STUDY = ""  # under which decisions are kept that are about no single task


@dataclass(frozen=True, slots=True)
class Part:
    """Both parts of one task, as far as a page needs them.

    Attributes:
        name: of the task.
        validation: protocol of the validation part.
        test: protocol of the test part.
        n_validation: documents of the one.
        n_test: documents of the other.
        metric: the first metric.
        chance: see `Trial`.
        majority: see `Trial`.
        labels: see `Trial`.
        golds: see `Trial`.
        groups: see `Trial`.
        commonest: see `Trial`.
        units: see `Trial`.
        validation_units: the same of the validation documents.
    """

    name: str
    validation: str
    test: str
    n_validation: int
    n_test: int
    metric: str
    chance: float | None
    majority: float | None
    labels: tuple[str, ...]
    golds: tuple[int, ...]
    groups: tuple[int, ...]
    commonest: str
    units: tuple[int, ...]
    validation_units: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """What a study was asked to do; enough to make its page again.

    Attributes:
        depth: the model's number of layers.
        protocol: how much to measure.
        matrices: of the grid, without their effective ranks.
        grid: how many candidates there are.
        parts: the tasks.
        seed: of the order in which races ask.
        source: where the weights came from, in words.
    """

    depth: int
    protocol: Protocol
    matrices: tuple[Matrix, ...]
    grid: int
    parts: tuple[Part, ...]
    seed: int
    source: str

    @cached_property
    def mark(self) -> str:
        """Stable name of what was asked, under which decisions are kept."""
        return digest("laser study", replace(self, source="").to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data that `read` understands."""
        chosen = asdict(self.protocol)
        numbers = {name: [str(rho) for rho in chosen[name]] for name in ("rhos", "sweep")}
        return {
            "depth": self.depth,
            "protocol": {**chosen, **numbers},
            "matrices": [asdict(one) for one in self.matrices],
            "grid": self.grid,
            "parts": [asdict(one) for one in self.parts],
            "seed": self.seed,
            "source": self.source,
        }

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Asked:
        """What `to_json` wrote."""
        return cls(
            depth=value["depth"],
            protocol=_protocol(value["protocol"]),
            matrices=tuple(Matrix(**one) for one in value["matrices"]),
            grid=value["grid"],
            parts=tuple(Part(**{one.name: _tupled(part[one.name]) for one in fields(Part)}) for part in value["parts"]),
            seed=value["seed"],
            source=value["source"],
        )


@dataclass(frozen=True)
class Book:
    """The part of a store that one study writes and reads.

    Attributes:
        store: the run folder's store.
        setting: how the model is run.
        asked: what was asked.
        mark: the name under which its decisions are kept: `Asked.mark` of the version that began the study.
    """

    store: Store
    setting: Setting
    asked: Asked
    mark: str

    def open(self) -> None:
        """Keep what was asked; it is the folder's last study from now on."""
        self._put("asked", self.asked.to_json())
        self._put("last", self.mark)
        self._put("begun", time.time_ns())

    def decide(self, task: str, what: str, value: Any) -> None:
        """Keep a decision about a task: "screened", "raced", "chosen", "trace", "mentions", "spoken"."""
        self._put(f"{self.mark} {task} {what}", value)

    def decided(self, task: str, what: str) -> Any:
        """A decision; None where it has not been made."""
        return self.store.measurement(self.setting, self._recipe, KIND, f"{self.mark} {task} {what}")

    def put_point(self, recipe: Recipe, part: Part, point: Point) -> None:
        """Keep what a recipe gets on a validation part."""
        self.store.put_measurement(self.setting, recipe, POINT, part.validation, asdict(point))

    def points(self, part: Part) -> dict[str, Point]:
        """Every recipe's point on a validation part, by fingerprint."""
        found = self.store.measurements(self.setting, POINT)
        return {one.recipe: Point(**one.value) for one in found if one.key == part.validation}

    def put_sheet(self, recipe: Recipe, protocol: str, sheet: Sheet) -> None:
        """Keep what a recipe answered on a part, by the part's protocol."""
        self.store.put_measurement(self.setting, recipe, SHEET, protocol, asdict(sheet))

    def sheets(self, protocol: str, recipes: Iterable[Recipe]) -> dict[str, Sheet]:
        """What some recipes answered on a part, by fingerprint, as far as it was measured."""
        found = {}
        for recipe in recipes:
            value = self.store.measurement(self.setting, recipe, SHEET, protocol)
            if value is not None:
                found[recipe.fingerprint] = Sheet(**{name: tuple(column) for name, column in value.items()})
        return found

    def put_mentions(self, task: str, found: Sequence[Mentions]) -> None:
        """Keep how often the facts of a task stand in corpora."""
        self.decide(task, "mentions", [asdict(one) for one in found])

    def mentions(self, task: str) -> tuple[Mentions, ...]:
        """How often they do, as far as that was counted."""
        return tuple(
            Mentions(one["name"], one["corpus"], tuple(one["counts"])) for one in self.decided(task, "mentions") or ()
        )

    def put_spoken(self, task: str, found: Spoken) -> None:
        """Keep what the components of the chosen matrix say."""
        self.decide(task, "spoken", asdict(found))

    def spoken(self, task: str) -> Spoken | None:
        """What they say; None where that was not asked."""
        value = self.decided(task, "spoken")
        if value is None:
            return None
        tails = tuple(Tail(**{name: _tupled(part) for name, part in one.items()}) for one in value["tails"])
        return Spoken(**{**{name: _tupled(part) for name, part in value.items()}, "tails": tails})

    def put_read(self, recipe: Recipe, text: str, losses: Sequence[float | None]) -> None:
        """Keep the losses of a text's windows, by the protocol of the text."""
        self.store.put_measurement(self.setting, recipe, READ, text, list(losses))

    def put_texts(self, texts: Sequence[tuple[str, str, int]]) -> None:
        """Keep which texts are read: name, protocol and tokens of each."""
        self.decide(_STUDY, "texts", [list(one) for one in texts])

    def texts(self) -> tuple[Text, ...]:
        """The texts and what was read of them."""
        kept = self.store.measurements(self.setting, READ)
        return tuple(
            Text(name, tokens, {one.recipe: tuple(one.value) for one in kept if one.key == protocol})
            for name, protocol, tokens in self.decided(_STUDY, "texts") or ()
        )

    def put_effective(self, matrix: Matrix, value: float) -> None:
        """Keep the effective rank of a matrix."""
        self.store.put_measurement(self.setting, self._recipe, RANK, f"{matrix.layer}.{matrix.name}", value)

    def effective(self) -> dict[str, float]:
        """Effective ranks by layer and name, as far as they were computed."""
        return {one.key: float(one.value) for one in self.store.measurements(self.setting, RANK)}

    @property
    def _recipe(self) -> Recipe:
        return Recipe("", Schedule.identity(self.asked.depth))

    def _put(self, key: str, value: Any) -> None:
        name = key if key in ("last", "begun") or key.startswith(self.mark) else f"{self.mark} {key}"
        self.store.put_measurement(self.setting, self._recipe, KIND, name, value)


def page_of(folder: str | Path) -> Page:
    """The page of a study, finished or not, from its run folder alone.

    Raises:
        StoreError: the folder holds no LASER study.
    """
    with Store(folder, readonly=True) as store:
        return page(study_of(store))


def is_laser(store: Store) -> bool:
    """Whether a run folder holds a LASER study."""
    return any(store.measurements(setting, KIND) for setting in store.settings())


def study_of(store: Store) -> Evidence:
    """What the last LASER study of a run folder measured so far.

    Raises:
        StoreError: the folder holds no LASER study.
    """
    kept = [
        (setting, {one.key: one.value for one in store.measurements(setting, KIND)})
        for setting in reversed(store.settings())
    ]
    begun = [(setting, found) for setting, found in kept if "last" in found]
    if begun:
        setting, found = max(begun, key=lambda one: one[1].get("begun", 0))  # of equal ones the newest setting
        last = found["last"]
        return evidence(Book(store, setting, Asked.read(found[f"{last} asked"]), last))
    raise StoreError(f"{store.folder} holds results, but not of a study that was begun with `impasto study laser`")


def evidence(book: Book) -> Evidence:
    """Everything that the store knows about a study."""
    asked, effective = book.asked, book.effective()
    return Evidence(
        depth=asked.depth,
        protocol=asked.protocol,
        matrices=tuple(replace(one, effective=effective.get(f"{one.layer}.{one.name}")) for one in asked.matrices),
        trials=tuple(trial(book, part) for part in asked.parts),
        facts=_provenance(book),
        texts=book.texts(),
        masked=bool(book.setting.masking),
    )


def trial(book: Book, part: Part) -> Trial:
    """Everything that the store knows about one task of a study."""
    asked = book.asked
    screened = {Edit.parse(text): float(value) for text, value in (book.decided(part.name, "screened") or {}).items()}
    chosen = {name: text and Edit.parse(text) for name, text in (book.decided(part.name, "chosen") or {}).items()}
    composed = book.decided(part.name, "trace") or {"steps": (), "states": ()}
    plain = Recipe("", Schedule.identity(asked.depth))
    kept = book.points(part)
    grid = {replace(plain, edits=(edit,)).fingerprint: edit for edit in candidates(asked.matrices, asked.protocol.rhos)}
    report = None
    if chosen.get("edit"):
        states = [tuple(map(Edit.parse, state)) for state in composed["states"]]
        report = Report(asked.depth, chosen["edit"], chosen.get("by_loss"), composed_of(states), asked.protocol)
    return Trial(
        name=part.name,
        metric=part.metric,
        chance=part.chance,
        majority=part.majority,
        labels=part.labels,
        golds=part.golds,
        groups=part.groups,
        commonest=part.commonest,
        units=part.units,
        validation=part.n_validation,
        test=part.n_test,
        grid=asked.grid,
        screened=screened,
        raced=book.decided(part.name, "raced"),
        points={edit: kept[name] for name, edit in grid.items() if name in kept},
        base=kept.get(plain.fingerprint),
        chosen=chosen.get("edit"),
        by_loss=chosen.get("by_loss"),
        selected=_selected(book, part, report) if report else None,
        trace=tuple(step_of(one) for one in composed["steps"]),
        report=report,
        sheets=book.sheets(part.test, report.uses.values()) if report else {},
        mentions=book.mentions(part.name),
        spoken=book.spoken(part.name),
    )


def _selected(book: Book, part: Part, report: Report) -> Estimate | None:
    """What the chosen edit gained on the documents that chose it."""
    both = [report.uses[use] for use in (CHOSEN, BASE)]
    found = book.sheets(part.validation, both)
    if len(found) < 2:
        return None
    chosen, base = (np.asarray(found[one.fingerprint].scores, np.float64) for one in both)
    return contrast(chosen - base, part.validation_units)


def step_json(step: Step) -> dict[str, Any]:
    """A step of a composition as plain data."""
    return {**asdict(step), "edit": None if step.edit is None else str(step.edit)}


def step_of(value: Mapping[str, Any]) -> Step:
    """What `step_json` wrote."""
    return Step(**{**value, "edit": None if value["edit"] is None else Edit.parse(value["edit"])})


def _provenance(book: Book) -> dict[str, str]:
    """Where the numbers of a page come from, in words."""
    asked = book.asked
    tasks = [(part.name, part.test) for part in asked.parts]
    found = provenance(book.store, book.setting, "laser", asked.protocol.name, asked.source, tasks)
    sides = {
        f"task {part.name}": f"{part.n_validation} documents to choose on, {part.n_test} to report on"
        for part in asked.parts
    }
    return {name: f"{sides[name]}; {text}" if name in sides else text for name, text in found.items()}


def _protocol(value: Mapping[str, Any]) -> Protocol:
    """A protocol from plain data; the one of its name where it has parts that this version does not know."""
    try:
        kept = {name: _tupled(part) for name, part in value.items()}
        return Protocol(**{**kept, **{name: tuple(map(Decimal, kept[name])) for name in ("rhos", "sweep")}})
    except (TypeError, KeyError):
        return protocol(str(value.get("name")))


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
