"""A painters study as its run folder keeps it: what was asked, and the evidence gathered so far. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from impasto.errors import StoreError
from impasto.recipe import Recipe
from impasto.result import Page, Setting
from impasto.schedule import Schedule
from impasto.store import Store
from impasto.studies import painters
from impasto.studies.evidence import Cached, Evidence, Task
from impasto.studies.protocol import Heat, Protocol, protocol, variants
from impasto.studies.provenance import provenance

KIND = "painters study"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a study was asked to do; enough to make its page again.

    Attributes:
        depth: the model's number of layers.
        protocol: name of the protocol.
        methods: names of methods instead of the protocol's own.
        seeds: number of random orders instead of the protocol's own.
        tasks: (task name, protocol fingerprint) in the order of the figures.
        source: where the weights came from, in words.
        definition: the protocol as it was when the study was begun; None takes the one that has the name today, which
            may ask for other recipes than were run.
    """

    depth: int
    protocol: str
    methods: tuple[str, ...] | None
    seeds: int | None
    tasks: tuple[tuple[str, str], ...]
    source: str
    definition: Protocol | None = None

    def chosen(self) -> Protocol:
        """The protocol with the changes that were asked for."""
        kept = self.definition or protocol(self.protocol)
        return kept if self.seeds is None else replace(kept, seeds=self.seeds)

    def write(self, store: Store, setting: Setting) -> None:
        """Keep it in the store."""
        value = {
            "depth": self.depth,
            "protocol": self.protocol,
            "methods": None if self.methods is None else list(self.methods),
            "seeds": self.seeds,
            "tasks": [list(task) for task in self.tasks],
            "source": self.source,
            "definition": asdict(self.definition or protocol(self.protocol)),
        }
        store.put_measurement(setting, self._recipe(), KIND, "asked", value)

    def _recipe(self) -> Recipe:
        return Recipe("", Schedule.identity(self.depth))

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Asked:
        """What `write` kept."""
        methods: Sequence[str] | None = value["methods"]
        return cls(
            depth=value["depth"],
            protocol=value["protocol"],
            methods=None if methods is None else tuple(methods),
            seeds=value["seeds"],
            tasks=tuple((name, fingerprint) for name, fingerprint in value["tasks"]),
            source=value["source"],
            definition=_definition(value.get("definition")),
        )


def _definition(value: Mapping[str, Any] | None) -> Protocol | None:
    """A protocol from JSON; None where it has parts that this version does not know, or lacks some."""
    if value is None:
        return None
    try:
        heat = Heat(**{name: _tupled(part) for name, part in value["heat"].items()})
        return Protocol(**{**{name: _tupled(part) for name, part in value.items()}, "heat": heat})
    except (TypeError, KeyError):
        return None


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def page_of(folder: str | Path) -> Page:
    """The page of a study, finished or not, from its run folder alone.

    Raises:
        StoreError: the folder holds no painters study.
    """
    with Store(folder, readonly=True) as store:
        return painters.page(study_of(store))


def study_of(store: Store) -> Evidence:
    """What the last painters study of a run folder measured so far.

    Raises:
        StoreError: the folder holds no painters study.
    """
    for setting in reversed(store.settings()):
        found = [m for m in store.measurements(setting, KIND) if m.key == "asked"]
        if found:
            return evidence(store, setting, Asked.read(found[-1].value))
    raise StoreError(f"{store.folder} holds results, but not of a study that was begun with `impasto study painters`")


def evidence(store: Store, setting: Setting, asked: Asked) -> Evidence:
    """Everything that the store knows about a study."""
    results = {}
    tasks: list[Task] = []
    for name, fingerprint in asked.tasks:
        found = store.results(setting, tasks=[name], protocol=fingerprint)
        results.update({(result.recipe, name): result for result in found})
        if found:
            tasks.append(Task.of(found[0]))
    measured = store.measurements(setting)
    return Evidence(
        depth=asked.depth,
        protocol=asked.chosen(),
        variants=variants(asked.depth, asked.chosen(), methods=asked.methods, seeds=asked.seeds),
        tasks=tuple(tasks),
        results=results,
        similarity={m.key: m.value for m in measured if m.kind == "similarity"},
        groups={m.key: m.value for m in measured if m.kind == "groups"},
        kv=tuple(_cached(m.value) for m in measured if m.kind == "kv"),
        facts=provenance(store, setting, "painters", asked.protocol, asked.source, asked.tasks),
    )


def _cached(value: Mapping[str, Any]) -> Cached:
    kept: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    return Cached(**kept)
