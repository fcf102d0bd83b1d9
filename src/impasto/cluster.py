"""Sweeps on several GPUs of one host, or on a cluster, with Ray.

    evaluate(loaded, recipes, tasks, store, where=Cluster())           # one worker for each GPU of this host
    evaluate(loaded, recipes, tasks, store, where=Cluster("auto"))     # the cluster that this host belongs to

This process, the driver, cuts what the store lacks into units (`impasto.units`), gives them to workers
(`impasto.dispatch`) and writes what comes back, batch by batch; nobody else writes. A worker is a process that loads
the model once and keeps it. A driver that is started again asks only what its store lacks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from impasto import models
from impasto.dispatch import Died, Dispatch, Done, Event, Failed, Ready, Said, Scored, Share, Wrote
from impasto.errors import ImpastoError, MissingExtra, UsageError
from impasto.evaluate import Lost, Questions, scorer_of, setting_of, write
from impasto.models import LoadedModel
from impasto.result import Setting
from impasto.runtime import KV
from impasto.scoring import Scoring, Sharing
from impasto.trie import count, plant
from impasto.units import PER_WORKER, Unit, to_score, to_write

TELL = 0.5  # seconds between two words of a worker about how far it is
STORE = 256 << 20  # bytes of Ray's own memory on a cluster that is started here; answers are small

Tell = Callable[[Event], None]


# The worker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """How a worker gets the driver's model, and how it must come out."""

    ref: str
    setting: Setting
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self) -> LoadedModel:
        """The model, if it is the driver's.

        Raises:
            ImpastoError: it cannot be loaded here, or is another one.
        """
        wanted = self.setting
        loaded = models.load(
            self.ref,
            device=wanted.device,
            dtype=wanted.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            attention=wanted.attention,
        )
        if wanted.masking and loaded.masked:
            loaded = loaded.scored(wanted.masking)
        found = setting_of(loaded)
        for what in ("weights", "dtype", "device", "attention", "masking"):
            here, there = getattr(found, what), getattr(wanted, what)
            if here != there:
                raise ImpastoError(
                    f"{self.ref} is another model here than on the driver ({what}: {here[:16]} here, {there[:16]} "
                    "there): give every machine the same files and packages"
                )
        return loaded


class Worker:
    """One process's model, and what it does with it; every method tells what happens while it happens."""

    def __init__(self, reference: Reference, batch_tokens: int | None, sharing: Sharing) -> None:
        self.reference = reference
        self.batch_tokens = batch_tokens
        self.sharing = sharing
        self.loaded: LoadedModel
        self.scorer: Scoring
        self.tell: Tell = lambda event: None

    def load(self) -> Iterator[Event]:
        """Load the model, once."""
        yield from _told(self.prepare)

    def answer(self, unit: Unit) -> Iterator[Event]:
        """Answer one unit."""
        yield from _told(lambda tell: self.work(unit, tell))

    def prepare(self, tell: Tell) -> None:
        """What `load` does."""
        self.loaded = self.reference.load()
        self.scorer = scorer_of(self.loaded, self.batch_tokens, self.sharing, note=lambda text: self.tell(Said(text)))
        tell(Ready(socket.gethostname()))

    def work(self, unit: Unit, tell: Tell) -> None:
        """What `answer` does."""
        self.tell = tell
        if unit.writes:
            for recipe in unit.recipes:
                write(
                    self.loaded,
                    recipe,
                    unit.requests,
                    kv=cast(KV, self.reference.setting.kv),
                    scorer=self.scorer,
                    on_response=lambda place, response: tell(Wrote(place, response)),
                )
            return
        self.scorer.score(
            unit.recipes, unit.requests, on_batch=lambda batch: tell(Scored(batch)), progress=_seldom(tell)
        )


def _told(work: Callable[[Tell], None]) -> Iterator[Event]:
    """What `work` tells, as it tells it, with what it logs; it runs in a thread of its own."""
    said: SimpleQueue[Event | None] = SimpleQueue()

    def run() -> None:
        try:
            with _logging_to(said.put):
                work(said.put)
        except ImpastoError as problem:
            said.put(Failed(str(problem)))
        except Exception as problem:  # after a fault of the device, say, the process is of no more use
            traceback.print_exception(problem)  # for the worker's own log
            first = next(iter(str(problem).strip().splitlines()), "")
            said.put(Died(f"unexpected {type(problem).__name__}{f': {first}' if first else ''}"))
        finally:
            said.put(None)

    threading.Thread(target=run, daemon=True).start()
    while (event := said.get()) is not None:
        yield event


@contextlib.contextmanager
def _logging_to(tell: Tell) -> Iterator[None]:
    """Warnings and errors that packages log become sentences."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(Said(f"{record.name}: {record.getMessage()}"))

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in (None, "transformers")]  # the second keeps its lines to itself
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _seldom(tell: Tell) -> Callable[[float], None]:
    """Tells shares, but not too many."""
    last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL:
            last = time.monotonic()
            tell(Share(share))

    return progress


# Where it is done ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cluster:
    """The workers of a Ray cluster as a place where questions are answered.

    Args:
        address: "local" starts a cluster on this host and ends it afterwards; "auto" or HOST:PORT joins one.
        workers: how many; None is one for each GPU, or one for each machine where the model runs on CPUs.
        revision: branch, tag or commit, where the model was loaded from one.
        trust_remote_code: whether the model's own code was let run.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: an address or a number that cannot be.
    """

    address: str = "local"
    workers: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise MissingExtra("ray", "cluster", "a sweep on several workers")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"there is at least one worker, not {self.workers}")
        if not self.address or self.address.startswith("ray://"):
            raise UsageError(
                f"the address of a cluster is `local`, `auto` or HOST:PORT, not {self.address!r}: a sweep is driven "
                "from a machine of the cluster"
            )

    def answer(self, loaded: LoadedModel, questions: Questions) -> Sequence[Lost]:
        """Answer everything on the workers; says which questions brought them down."""
        if not questions.scored and not questions.written:
            return ()
        reference = self._reference(loaded, questions.setting)
        with _connected(self.address, self.workers, reference.setting.device):
            size, needs = seats(_machines(), self.workers, reference.setting.device)
            units = planned(questions, size)
            with _out_of_the_way(loaded):
                crew = RayCrew((reference, questions.batch_tokens, questions.sharing), needs)
                try:
                    return Dispatch(units, crew, size, questions).run()
                finally:
                    crew.dismiss()

    def _reference(self, loaded: LoadedModel, setting: Setting) -> Reference:
        if getattr(loaded.model, "hf_device_map", None) is not None:
            raise UsageError("a model spread over several devices is not run on a cluster: leave --device-map away")
        if loaded.source == "adopted from memory":
            raise UsageError(f"{loaded.name} is held in memory, where workers cannot load it: save it to a folder")
        path = Path(loaded.name).expanduser()
        ref = str(path.resolve()) if path.exists() else loaded.name
        return Reference(ref, setting, self.revision, self.trust_remote_code)


def planned(questions: Questions, workers: int) -> list[Unit]:
    """The units of all questions, texts last and large ones first."""
    scorer = questions.scorer()
    gaps = []
    for who, what in questions.scored:
        pieces = scorer.pieces(what)
        gaps.append((who, what, pieces, count(plant(who)).calls * sum(len(piece.tokens) for piece in pieces)))
    total = sum(cost for *_, cost in gaps) or 1
    units: list[Unit] = []
    for who, what, pieces, cost in gaps:
        units += to_score(
            who,
            what,
            scorer.trees(pieces),
            [piece.request for piece in pieces],
            budget=scorer.budget or 1,
            workers=round(workers * cost / total),
            wanted=round(workers * PER_WORKER * cost / total),
        )
    for who, what in questions.written:
        units += to_write(who, what, wanted=workers * PER_WORKER)
    return sorted(units, key=lambda unit: (unit.writes, -unit.cost))


def seats(machines: Sequence[Mapping[str, float]], workers: int | None, device: str) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each of them needs.

    Args:
        machines: what each machine has: "CPU" and "GPU".
        workers: how many are wanted; None leaves it to the machines.
        device: what the model runs on.

    Raises:
        UsageError: the machines do not have so much.
    """
    if device == "cuda":
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        if not gpus:
            raise UsageError("the cluster has no GPU, and the model was loaded on one: try --device cpu")
        if (workers or 1) > gpus:
            raise UsageError(f"{workers} workers need {workers} GPUs, and the cluster has {gpus}: leave --workers away")
        return workers or gpus, {"num_gpus": 1, "num_cpus": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    size = workers or len(cores)
    if size > sum(cores):
        raise UsageError(f"{size} workers need {size} CPU cores, and the cluster has {sum(cores)}: try fewer --workers")
    each = max(number for number in range(1, max(cores) + 1) if number == 1 or _hold(cores, number) >= size)
    return size, {"num_gpus": 0, "num_cpus": each}


def _hold(cores: Sequence[int], each: int) -> int:
    return sum(number // each for number in cores)


# Ray ----------------------------------------------------------------------------------------------------------------


class RayCrew:
    """Workers that are actors of the cluster to which this process is connected.

    Args:
        arguments: of `Worker`.
        needs: what Ray is to set aside for each, as options of an actor.
    """

    def __init__(self, arguments: tuple[Reference, int | None, Sharing], needs: Mapping[str, float]) -> None:
        import ray

        self.ray = ray
        self.arguments = arguments
        self.needs = needs
        self.kind = ray.remote(Worker).options(**needs, max_restarts=0, scheduling_strategy="SPREAD")
        self.actors: dict[int, Any] = {}
        self.streams: dict[int, Any] = {}

    def start(self, number: int) -> None:
        """Begin a worker as a new process, wherever there is room for it."""
        self._end(number)
        self.actors[number] = self.kind.remote(*self.arguments)
        self.streams[number] = self.actors[number].load.options(num_returns="streaming").remote()

    def give(self, number: int, unit: Unit) -> None:
        """Send the unit to the worker's process."""
        self.streams[number] = self.actors[number].answer.options(num_returns="streaming").remote(unit)

    def listen(self, seconds: float) -> Sequence[tuple[int, Event]]:
        """The next word of one worker."""
        if not self.streams:
            time.sleep(seconds)
            return ()
        numbers = list(self.streams)
        streams = list(self.streams.values())
        ready, _ = self.ray.wait(streams, num_returns=1, timeout=seconds)
        return [self._next(numbers[streams.index(stream)]) for stream in ready]

    def _next(self, number: int) -> tuple[int, Event]:
        stream = self.streams.pop(number)
        try:
            event: Event = self.ray.get(next(stream))
        except StopIteration:
            return number, Done()
        except self.ray.exceptions.RayError as problem:
            return number, Died(_cause(problem))
        self.streams = {**self.streams, number: stream}  # last, so that nobody has to wait for a talkative one
        return number, event

    def room(self) -> bool:
        """Whether a machine that is still there has what a worker needs."""
        return any(
            machine.get("CPU", 0) >= self.needs["num_cpus"] and machine.get("GPU", 0) >= self.needs["num_gpus"]
            for machine in _machines()
        )

    def dismiss(self) -> None:
        """End all workers, whatever they do."""
        for number in list(self.actors):
            self._end(number)

    def _end(self, number: int) -> None:
        self.streams.pop(number, None)
        actor = self.actors.pop(number, None)
        if actor is not None:
            with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
                self.ray.kill(actor)


def _cause(problem: Exception) -> str:
    """Ray's pages about a death in a few words."""
    text, kind = str(problem), type(problem).__name__
    if "node has died" in text or "node died" in text.lower() or kind == "NodeDiedError":
        return "its machine left the cluster"
    if kind == "OutOfMemoryError" or "memory usage threshold" in text:
        return "it was ended because its machine ran out of memory"
    if "creation task" in text or kind.startswith("RayTaskError"):
        return text.strip().splitlines()[-1].strip()
    return "its process died"


def _machines() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _connected(address: str, workers: int | None, device: str) -> Iterator[None]:
    """Connected to the cluster; to one that is started here, and ends with the block, if it is `local`."""
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a worker's death is told in one line, by us
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody else's business
        options |= {"include_dashboard": False, "object_store_memory": STORE}
        if device != "cuda" and workers is not None:
            options["num_cpus"] = max(workers, os.cpu_count() or 1)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise ImpastoError(
            f"no Ray cluster at {address!r} ({first}): start one with `ray start --head`, or use --ray local; one that "
            "asks for a token wants RAY_AUTH_MODE=token here too"
        ) from problem
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _out_of_the_way(loaded: LoadedModel) -> Iterator[None]:
    """The driver's own copy in main memory, so that a worker has the whole GPU."""
    import torch

    device = loaded.device
    if device.type != "cuda":
        yield
        return
    loaded.model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        loaded.model.to(device)
