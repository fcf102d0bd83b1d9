"""Counting in how many documents of a corpus each subject occurs together with its answer.

    pairs = [Pair("Danielle Darrieux", "French"), ...]
    counts = count(files(["pile/*.jsonl.zst"]), pairs, workers=8, kept=Path("counts.kept"))

Files are read as streams and shared out among processes in parts (`reading.parts`). What a finished part gave is a
line in the file `kept`, so a count that was stopped goes on with the parts that are lacking, and a count over more
shards counts only the new ones. Speeds are bytes on disk per second of processor time of one process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from impasto.corpus.mentions import Match, Mentions, Pair, distinct
from impasto.corpus.reading import Damaged, Part, Unit, documents, fields, parts
from impasto.errors import ImpastoError, UsageError
from impasto.result import digest

Progress = Callable[[int, int], None]
Note = Callable[[str], None]

FORMAT = 1
TELL = 0.25  # seconds between two words of a worker on how far it is
LOOKED_AT = 200  # documents that are looked at first: whether they can be read, and what words they have
SAMPLES = 8  # places of a corpus that a plan looks at
SHOWN = 3  # files that an error names before it counts the others
RETRIES = 1  # times that a part is tried again whose process died


@dataclass(frozen=True, slots=True)
class Rules:
    """What a mention is, and what a document is.

    Attributes:
        match: how a subject is mentioned, see `impasto.corpus.mentions`.
        ignore_case: whether A to Z are compared without case.
        field: where JSON lines and Parquet hold the text.
        unit: what a document of plain text is, see `impasto.corpus.reading`.
    """

    match: Match = "phrase"
    ignore_case: bool = False
    field: str = "text"
    unit: Unit = "block"


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each pair occurs together, and what it took to find out.

    Attributes:
        pairs: subjects and answers.
        together: in how many documents both occur, in the order of the pairs.
        rules: what counted.
        documents: how many were read.
        broken: lines and rows that are no document.
        damaged: files that break off, with the reason; what stands before is counted.
        bytes: read from disk.
        text: bytes of the documents' texts.
        seconds: processor time of all processes together.
    """

    pairs: tuple[Pair, ...]
    together: tuple[int, ...]
    rules: Rules = field(default_factory=Rules)
    documents: int = 0
    broken: int = 0
    damaged: tuple[str, ...] = ()
    bytes: int = 0
    text: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Megabytes on disk per second of one core."""
        return self.bytes / 1e6 / self.seconds if self.seconds > 0 else 0.0

    @property
    def frequencies(self) -> Mapping[Pair, int]:
        """The counts by pair."""
        return dict(zip(self.pairs, self.together, strict=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a count would take, extrapolated from a sample.

    Attributes:
        files: how many shards.
        bytes: of all shards on disk.
        kept: bytes of parts that were counted before.
        documents: about how many, in all shards.
        broken: share of lines and rows in the sample that are no document.
        speed: megabytes on disk per second of one core.
        sampled: bytes that were read for this.
    """

    files: int
    bytes: int
    kept: int
    documents: int
    broken: float
    speed: float
    sampled: int

    def seconds(self, workers: int = 1) -> float:
        """How long what is left would take on so many free cores, if the disk keeps up."""
        return (self.bytes - self.kept) / 1e6 / self.speed / workers if self.speed > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """What one part gave."""

    documents: int
    broken: int
    text: int
    seconds: float
    damaged: str
    together: dict[int, int]  # by the place of the pair; pairs that do not occur are left out


def count(
    shards: Sequence[Path],
    pairs: Sequence[Pair],
    *,
    rules: Rules | None = None,
    workers: int = 1,
    kept: Path | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Counts:
    """In how many documents of the shards each subject occurs together with its answer.

    Args:
        shards: files, as `reading.files` finds them.
        pairs: what to look for; equal pairs are counted once.
        rules: what a mention and a document are; None the defaults.
        workers: processes; 1 counts in this one.
        kept: where finished parts are kept; None keeps nothing.
        progress: told the bytes on disk that are done and the bytes in all.
        note: told in a sentence what the user should know.

    Raises:
        UsageError: nothing to count, or `kept` belongs to a count of other pairs or by other rules.
        MissingExtra: an optional package is not installed.
        ImpastoError: a file cannot be read, after all others are counted; or a process died twice over one part.
    """
    rules = rules or Rules()
    pairs = distinct(pairs)
    Mentions(pairs[:1], rules.match)  # what is missing is said before anything is begun
    todo = [part for shard in shards for part in parts(shard)]
    if not todo:
        raise UsageError("there are no shards to count in")
    book = _Book(kept, digest("corpus", FORMAT, asdict(rules), [(pair.subject, pair.answer) for pair in pairs]))
    known = book.read()
    found = {part: known[part] for part in todo if part in known}
    left = [part for part in todo if part not in found]
    sample = _first_documents(left[0], rules) if left else ()
    total, before = sum(part.bytes for part in todo), sum(part.bytes for part in found)
    tell = progress or (lambda done, total: None)
    tell(before, total)
    lost: dict[str, str] = {}
    source = _here if workers == 1 or len(left) < 2 else _shared_out
    search = _Search(pairs, rules, sample)
    with contextlib.closing(source(left, search, workers, lambda done: tell(before + done, total))) as finished:
        for part, tally in finished:
            if isinstance(tally, str):
                lost[part.path] = tally
                continue
            book.add(part, tally)
            found[part] = tally
            if tally.damaged and note is not None:
                note(f"{part.path} breaks off ({tally.damaged}); what stands before is counted")
    if lost:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in sorted(lost.items())[:SHOWN])
        more = f" and {len(lost) - SHOWN:,} more" if len(lost) > SHOWN else ""
        again = "the others are counted and kept, and the same command tries again" if kept else "nothing was kept"
        raise ImpastoError(f"some shards cannot be read ({reasons}{more}); {again}")
    together = Counter[int]()
    for tally in found.values():
        together.update(tally.together)
    return Counts(
        pairs=pairs,
        together=tuple(together[place] for place in range(len(pairs))),
        rules=rules,
        documents=sum(tally.documents for tally in found.values()),
        broken=sum(tally.broken for tally in found.values()),
        damaged=tuple(f"{part.path}: {found[part].damaged}" for part in todo if found[part].damaged),
        bytes=total,
        text=sum(tally.text for tally in found.values()),
        seconds=sum(tally.seconds for tally in found.values()),
    )


def plan(
    shards: Sequence[Path],
    pairs: Sequence[Pair],
    *,
    rules: Rules | None = None,
    kept: Path | None = None,
    seconds: float = 4.0,
) -> Plan:
    """What a count would take, from counting for some seconds at a few places of the corpus.

    Raises:
        UsageError, MissingExtra, ImpastoError: as for `count`.
    """
    rules = rules or Rules()
    pairs = distinct(pairs)
    todo = [part for shard in shards for part in parts(shard)]
    if not todo:
        raise UsageError("there are no shards to count in")
    name = digest("corpus", FORMAT, asdict(rules), [(pair.subject, pair.answer) for pair in pairs])
    found = _Book(kept, name).read()
    mentions = _Search(pairs, rules, _first_documents(todo[0], rules)).mentions()
    chosen = sorted({place * len(todo) // SAMPLES for place in range(SAMPLES)})
    taken, read = [], 0
    for place in chosen:
        worker = _Tallying(todo[place], mentions, rules)
        limit = time.process_time() + seconds / len(chosen)
        for _ in worker.run():
            if worker.done and time.process_time() > limit:
                break
        taken.append(worker.tally())
        read += worker.done
    spent = sum(tally.seconds for tally in taken)
    good, bad = sum(tally.documents for tally in taken), sum(tally.broken for tally in taken)
    total = sum(part.bytes for part in todo)
    return Plan(
        files=len(shards),
        bytes=total,
        kept=sum(part.bytes for part in todo if part in found),
        documents=round(good * total / read) if read else 0,
        broken=bad / (good + bad) if good + bad else 0.0,
        speed=read / 1e6 / spent if spent > 0 else 0.0,
        sampled=read,
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """What every process needs to know."""

    pairs: tuple[Pair, ...]
    rules: Rules
    sample: tuple[bytes, ...]

    def mentions(self) -> Mentions:
        return Mentions(self.pairs, self.rules.match, ignore_case=self.rules.ignore_case, sample=self.sample)


def _first_documents(part: Part, rules: Rules) -> tuple[bytes, ...]:
    """Some documents, to see what the corpus is like before hours go into it.

    Raises:
        UsageError: there are rows, but none with a text.
    """
    found: list[bytes | None] = []
    with contextlib.suppress(ImpastoError):  # what is wrong with the file is said when it is counted
        found = list(itertools.islice(_opened(part, rules, lambda done: None), LOOKED_AT))
    texts = tuple(text for text in found if text is not None)
    if found and not texts:
        there = ", ".join(fields(Path(part.path))) or "none"
        raise UsageError(
            f"not one of the first {len(found)} rows of {part.path} has a text in the field {rules.field!r}; "
            f"fields there: {there}"
        )
    return texts


def _opened(part: Part, rules: Rules, at: Callable[[int], None]) -> Iterator[bytes | None]:
    """The documents of a part; a file that cannot be opened or read is an error of ours."""
    try:
        yield from documents(part, field=rules.field, unit=rules.unit, at=at)
    except OSError as problem:
        raise ImpastoError(problem.strerror or str(problem)) from problem


# One part --------------------------------------------------------------------------------------------------------


class _Tallying:
    """Counts in one part; `run` gives control back after every document."""

    def __init__(self, part: Part, mentions: Mentions, rules: Rules) -> None:
        self._part = part
        self._mentions = mentions
        self._rules = rules
        self._together = Counter[int]()
        self._documents = self._broken = self._text = 0
        self._damaged = ""
        self._began = time.process_time()
        self.done = 0  # bytes of the part on disk

    def run(self) -> Iterator[None]:
        try:
            for document in _opened(self._part, self._rules, self._at):
                if document is None:
                    self._broken += 1
                else:
                    self._documents += 1
                    self._text += len(document)
                    self._together.update(self._mentions.of(document))
                yield
        except Damaged as problem:
            self._damaged = str(problem)

    def tally(self) -> Tally:
        """What there is so far."""
        seconds = time.process_time() - self._began
        return Tally(self._documents, self._broken, self._text, seconds, self._damaged, dict(self._together))

    def _at(self, done: int) -> None:
        self.done = done


Finished = Generator[tuple[Part, Tally | str]]  # a text says why a part could not be read


def _here(todo: Sequence[Part], search: _Search, workers: int, tell: Callable[[int], None]) -> Finished:
    """Count in this process."""
    if not todo:
        return
    mentions = search.mentions()
    before = 0
    for part in todo:
        worker = _Tallying(part, mentions, search.rules)
        told = time.monotonic()
        said: Tally | str
        try:
            for _ in worker.run():
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    tell(before + worker.done)
            said = worker.tally()
        except ImpastoError as problem:
            said = str(problem)
        before += part.bytes
        tell(before)
        yield part, said


# Several processes -----------------------------------------------------------------------------------------------


def _work(pipe: connection.Connection, search: _Search) -> None:
    """A worker: parts come in by the pipe; how far it is (int), tallies and errors (str) go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, which then ends its workers
    mentions = search.mentions()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            worker = _Tallying(pipe.recv(), mentions, search.rules)
            told = time.monotonic()
            try:
                for _ in worker.run():
                    if time.monotonic() - told > TELL:
                        told = time.monotonic()
                        pipe.send(worker.done)
            except ImpastoError as problem:
                pipe.send(str(problem))
            else:
                pipe.send(worker.tally())


@dataclass
class _Worker:
    """A process, the part it is at, and how far it is with it."""

    process: Any
    pipe: connection.Connection
    part: Part | None = None
    done: int = 0

    def give(self, todo: deque[Part]) -> None:
        self.part, self.done = (todo.popleft(), 0) if todo else (None, 0)
        if self.part is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died; the empty pipe will say so
                self.pipe.send(self.part)


def _shared_out(todo: Sequence[Part], search: _Search, workers: int, tell: Callable[[int], None]) -> Finished:
    """Count in several processes; large parts first, so that none is left alone with one at the end."""
    context = multiprocessing.get_context("spawn")
    waiting = deque(sorted(todo, key=lambda part: part.bytes, reverse=True))
    failures = Counter[Part]()
    crew: dict[connection.Connection, _Worker] = {}

    def hire() -> None:
        near, far = context.Pipe()
        process = context.Process(target=_work, args=(far, search), daemon=True)
        process.start()
        far.close()
        crew[near] = worker = _Worker(process, near)
        worker.give(waiting)

    finished = 0
    try:
        for _ in range(min(workers, len(todo))):
            hire()
        while any(worker.part for worker in crew.values()):
            for pipe in connection.wait(list(crew)):
                worker = crew[pipe]  # type: ignore[index]
                try:
                    said = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    said = None
                if said is None:
                    del crew[worker.pipe]
                    if worker.part is not None:
                        failures[worker.part] += 1
                        if failures[worker.part] > RETRIES:
                            raise ImpastoError(
                                f"the process that read {worker.part.path} died twice: is there enough memory for "
                                f"{workers} workers? Finished parts are kept"
                            )
                        waiting.append(worker.part)
                        hire()
                elif isinstance(said, Tally | str) and worker.part is not None:
                    part = worker.part
                    finished += part.bytes
                    worker.give(waiting)
                    yield part, said
                else:
                    worker.done = said
                tell(finished + sum(worker.done for worker in crew.values()))
    finally:
        for worker in crew.values():
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()


# What is kept ----------------------------------------------------------------------------------------------------


class _Book:
    """The file with what finished parts gave: a line that says of which count, then one line a part."""

    def __init__(self, path: Path | None, name: str) -> None:
        self._path = path
        self._name = name

    def read(self) -> dict[Part, Tally]:
        """What is there; a last line that was cut off by a crash is removed.

        Raises:
            UsageError: it belongs to another count.
        """
        if self._path is None or not self._path.exists():
            return {}
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        if rows and rows[0] != self._head():
            raise UsageError(
                f"{self._path} belongs to a count of other pairs or by other rules: delete it, or choose another output"
            )
        if len(whole) < len(data):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        found = {}
        for row in rows[1:]:
            part = Part(*row.pop("part"))
            together = {int(place): number for place, number in row.pop("together").items()}
            found[part] = Tally(**row, together=together)
        return found

    def add(self, part: Part, tally: Tally) -> None:
        """Keep what a part gave."""
        if self._path is None:
            return
        new = not self._path.exists() or self._path.stat().st_size == 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        row = {"part": [part.path, part.start, part.end, part.size, part.modified], **asdict(tally)}
        with self._path.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps(self._head()) + "\n")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _head(self) -> dict[str, Any]:
        return {"impasto": "corpus count", "format": FORMAT, "count": self._name}
