"""Who does what: units given to workers that may die at any moment, until each is answered or was tried often enough.

What a worker did not finish when it died is given to another one; a unit that brings down `TRIES` workers is left out
and named at the end. Nothing here knows what a worker is: `Dispatch` talks to a `Crew`, so that every order of deaths
and answers can be tried without a process. The crew of real ones is in `impasto.cluster`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from impasto.errors import ImpastoError
from impasto.evaluate import Lost, Questions
from impasto.result import Response
from impasto.scoring import Batch
from impasto.units import Unit

TRIES = 3  # workers that a unit, or a model that is being loaded, may bring down
IN_A_ROW = 12  # workers that may die one after another without an answer from anybody; then no unit is tried again
LISTEN = 1.0  # seconds for which the driver waits for news before it looks around
PATIENCE = 300.0  # seconds without any machine that could hold a worker, after which a run gives up

# What a worker says -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded, and is the driver's."""

    name: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Some requests of the unit, by their places in it, are answered by all its recipes."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Wrote:
    """One request of the unit, by its place in it, is answered with text."""

    place: int
    response: Response


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the unit is done, from 0 to 1."""

    share: float


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked cannot be done, and why; the worker itself is well."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The worker is no more, or in no state to go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing more will be said about what was asked last."""


Event: TypeAlias = Ready | Scored | Wrote | Share | Said | Failed | Died | Done


# Who does what ------------------------------------------------------------------------------------------------------


class Crew(Protocol):
    """Workers, known by their numbers."""

    def start(self, number: int) -> None:
        """Begin a worker, in place of the one of that number if there was one; it loads the model by itself."""

    def give(self, number: int, unit: Unit) -> None:
        """Let a worker that is ready answer a unit; what it might still have said about the last one is not heard."""

    def listen(self, seconds: float) -> Sequence[tuple[int, Event]]:
        """What workers said next; nothing if they are silent for so long. `Done` ends each load and each unit."""

    def room(self) -> bool:
        """Whether any machine could hold a worker, busy or not."""


@dataclass(eq=False)
class _Task:
    unit: Unit
    tried: int = 0
    failed_at: int | None = None
    share: float = 0.0
    answered: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Member:
    name: str
    ready: bool = False
    given_up: bool = False
    failed_starts: int = 0
    task: _Task | None = None


class Dispatch:
    """Gives units to workers until every one is answered or has been tried often enough.

    Args:
        units: what is to be done; the first ones first.
        crew: who does it.
        size: how many workers there are.
        questions: where answers, notes and progress go.
    """

    def __init__(self, units: Sequence[Unit], crew: Crew, size: int, questions: Questions) -> None:
        self.waiting = [_Task(unit) for unit in units]
        self.crew = crew
        self.members = [_Member(f"worker {number + 1}") for number in range(size)]
        self.questions = questions
        self.lost: list[Lost] = []
        self.started: set[int] = set()
        self.total = {writes: sum(unit.cost for unit in units if unit.writes is writes) for writes in (False, True)}
        self.done = {False: 0, True: 0}
        self.deaths = 0  # since the last answer

    def run(self) -> list[Lost]:
        """Do it all; what could not be done is returned.

        Raises:
            ImpastoError: no worker can be had, or one has another model.
        """
        self.questions.progress("starting workers", 0.0)
        for number in range(len(self.members)):
            self.crew.start(number)
        roomless: float | None = None
        while self.waiting or any(member.task for member in self.members):
            for number, member in enumerate(self.members):
                if member.ready and member.task is None and (task := self.next_for(number)):
                    member.task = task
                    self.crew.give(number, task.unit)
            for number, event in self.crew.listen(LISTEN):
                self.hear(number, self.members[number], event)
            if any(member.ready for member in self.members) or self.crew.room():
                roomless = None
            else:
                roomless = roomless or time.monotonic()
                if time.monotonic() - roomless > PATIENCE:
                    raise ImpastoError(
                        f"for {PATIENCE / 60:.0f} minutes no machine of the cluster could hold a worker: bring one "
                        "back and run the same command again; everything measured is kept"
                    )
        return self.lost

    def next_for(self, number: int) -> _Task | None:
        """The first task that this worker has not just failed at; that too, if nobody else could take it."""
        others = any(member.ready for place, member in enumerate(self.members) if place != number)
        for place, task in enumerate(self.waiting):
            if task.failed_at != number or not others:
                return self.waiting.pop(place)
        return None

    def hear(self, number: int, member: _Member, event: Event) -> None:
        """What follows from what a worker said."""
        task = member.task
        match event:
            case Ready(name):
                member.name = f"worker {number + 1} on {name}"
                member.ready, member.failed_starts = True, 0
                self.started.add(number)
                self.questions.progress("starting workers", len(self.started) / len(self.members))
            case Said(text):
                self.questions.note(f"{member.name}: {text}")
            case Failed(reason) if task is None:
                raise ImpastoError(f"{member.name}: {reason}")
            case Failed(reason):
                self.questions.note(f"{member.name}: {reason}")
                self.set_aside(number, member, reason)
            case Died(reason):
                self.replace(number, member, reason)
            case Done() if task is not None:
                member.task = None
                self.advance(task.unit.writes, task.unit.cost)
            case Scored(batch) if task is not None:
                self.deaths = 0
                self.questions.keep(task.unit.recipes, task.unit.requests, batch)
                task.answered.update(batch.requests.tolist())
            case Wrote(place, response) if task is not None:
                self.deaths = 0
                self.questions.keep_text(task.unit.recipes[0], task.unit.requests[place], response)
                task.answered.add(place)
                task.share = len(task.answered) / len(task.unit.requests)
                self.advance(True)
            case Share(share) if task is not None:
                task.share = share
                self.advance(task.unit.writes)

    def set_aside(self, number: int, member: _Member, reason: str) -> None:
        """What is left of a worker's unit waits for another worker, or is given up."""
        task, member.task = member.task, None
        if task is None:
            return
        left = task.unit.without(task.answered)
        tried = task.tried + 1
        self.advance(task.unit.writes, task.unit.cost - (left.cost if left else 0))
        if left is not None and tried < TRIES:
            self.waiting.append(_Task(left, tried, number))
        elif left is not None:
            self.give_up(left, f"{reason} ({tried} times)")

    def give_up(self, unit: Unit, reason: str) -> None:
        """Nobody can answer this unit."""
        self.lost.append(Lost(unit.recipes, unit.requests, reason))
        self.advance(unit.writes, unit.cost)

    def replace(self, number: int, member: _Member, reason: str) -> None:
        """Another worker for one that died, unless its like die before they are ready."""
        self.questions.note(f"{member.name}: {reason}; another one is started")
        member.failed_starts += not member.ready
        member.ready = False
        self.set_aside(number, member, reason)
        self.deaths += 1
        if self.deaths >= IN_A_ROW:
            for task in self.waiting:
                self.give_up(task.unit, f"{reason} ({self.deaths} workers in a row)")
            self.waiting.clear()
        if member.failed_starts < TRIES:
            self.crew.start(number)
            return
        member.given_up = True
        if all(other.given_up for other in self.members):
            raise ImpastoError(
                f"no worker could load the model ({reason}): try fewer --workers, or machines with more memory"
            )

    def advance(self, writes: bool, cost: int = 0) -> None:
        """So much more is finished; tell how much is done in all."""
        self.done[writes] += cost
        running = sum(
            member.task.share * member.task.unit.cost
            for member in self.members
            if member.task is not None and member.task.unit.writes is writes
        )
        phase = "generating" if writes else "scoring"
        self.questions.progress(phase, (self.done[writes] + running) / max(1, self.total[writes]))
