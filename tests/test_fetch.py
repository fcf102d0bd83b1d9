"""Laws of fetch.py, with a stand-in for pip that copies wheels from a folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from impasto import fetch
from impasto.errors import FetchError, UsageError

PIP = """
import pathlib, shutil, sys, time
arguments = sys.argv[1:]
index, log = pathlib.Path({index!r}), pathlib.Path({log!r})
log.open("a").write("called\\n")
time.sleep({delay})
folder = pathlib.Path(arguments[arguments.index("--dest") + 1])
for wanted in (one for one in arguments if "==" in one):
    name, version = wanted.split("==")
    found = list(index.glob(name.replace("-", "_") + "-" + version + "-*.whl"))
    if not found:
        print("WARNING: an index was not reachable")
        print("ERROR: Could not find a version that satisfies the requirement " + wanted)
        print("ERROR: No matching distribution found for " + wanted)
        sys.exit(1)
    shutil.copy(found[0], folder)
"""

EXPLOSIVE = "raise SystemExit('a fetched package was imported')\n"


def wheel(index: Path, package: str, members: dict[str, bytes]) -> fetch.Wheel:
    """A wheel in `index` whose code must never run, and its entry for the table."""
    index.mkdir(exist_ok=True)
    stem = package.replace("-", "_")
    path = index / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}/__init__.py", EXPLOSIVE)
        for name, data in members.items():
            archive.writestr(f"{stem}/{name}", data)
    return fetch.Wheel(package, "1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def requests(*rows: dict[str, object]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs the stand-in; gives the file with one line per call."""

    def install(delay: float = 0.0) -> Path:
        log = tmp_path / "calls"
        log.touch()
        script = tmp_path / "pip.py"
        script.write_text(PIP.format(index=str(tmp_path / "index"), log=str(log), delay=delay))
        monkeypatch.setattr(fetch, "_pip", lambda: [sys.executable, str(script)])
        return log

    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    return install


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, fetch.Source]:
    """A table with a file in two parts and a set in two readings."""
    index = tmp_path / "index"
    parts = (
        wheel(index, "big-part1", {"data/big.bin.part00": b"abc" * 1000}),
        wheel(index, "big-part2", {"data/big.bin.part01": b"xyz"}),
    )
    doc = {"id": "q0", "question": "1 + 1 =", "choices": ["2", "3"], "gold": 0}
    science = {"id": "s", "query": "Question: Why?\nAnswer:", "choices": ["so", "no"], "gold": 1}
    skills = requests(
        {"idx": 0, "doc_id": 0, "doc": doc},
        {"idx": 1, "doc_id": 0, "doc": doc},
        {"idx": 0, "doc_id": 1_000_000, "doc": doc},
    )
    arc = requests({"idx": 0, "doc_id": 0, "doc": science})
    text = requests({"idx": 0, "doc_id": 0, "doc": {}, "request": {"context": "to be", "continuation": " é"}})
    sets = (wheel(index, "sets", {"skills.gz": skills, "arc.gz": arc, "text.gz": text}),)
    joined = hashlib.sha256(b"abc" * 1000 + b"xyz").hexdigest()
    table = {
        "big": fetch.Source(
            "a big file", "free for all", parts, (fetch.File("big.bin", r"/data/.*part\d+$", "join", joined),), 3003
        ),
        "sets": fetch.Source(
            "some sets",
            "free too",
            sets,
            (
                fetch.File("skills/test.jsonl", r"skills\.gz$", "skill"),
                fetch.File("arc/test.jsonl", r"arc\.gz$", "arc"),
                fetch.File("text/test.jsonl", r"text\.gz$", "lambada"),
            ),
            1000,
        ),
    }
    monkeypatch.setattr(fetch, "SOURCES", MappingProxyType(table))
    return table


def test_parts_become_one_file_once(pip: Callable[..., Path], things: dict[str, fetch.Source]) -> None:
    calls, notices, seen = pip(delay=0.3), list[str](), list[tuple[str, int, int]]()
    assert not fetch.is_fetched("big")
    folder = fetch.ensure("big", progress=lambda *step: seen.append(step), notice=notices.append)
    assert (folder / "big.bin").read_bytes() == b"abc" * 1000 + b"xyz"
    assert folder == fetch.location("big") == fetch.ensure("big", notice=notices.append)
    assert fetch.is_fetched("big")
    assert calls.read_text() == "called\n"
    assert notices == [
        f"fetching a big file ({fetch.megabytes(things['big'].size)}, once) into {folder}",
        "free for all",
    ]
    downloading = [done for what, done, total in seen if what == "downloading a big file"]
    assert downloading and downloading == sorted(downloading) and downloading[-1] <= things["big"].size
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, ".big.lock"}  # nothing left over


def test_sets_become_json_lines(pip: Callable[..., Path], things: dict[str, fetch.Source]) -> None:
    pip()
    folder = fetch.ensure("sets")
    read = {
        file.target: [json.loads(line) for line in (folder / file.target).read_text("utf-8").splitlines()]
        for file in things["sets"].files
    }
    assert read == {
        "skills/test.jsonl": [{"id": "q0", "question": "1 + 1 =", "choices": ["2", "3"], "gold": 0}],
        "arc/test.jsonl": [
            {"id": "s", "question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
        ],
        "text/test.jsonl": [{"text": "to be é"}],
    }


def test_wrong_bytes_are_refused_and_not_kept(
    pip: Callable[..., Path], things: dict[str, fetch.Source], tmp_path: Path
) -> None:
    pip()
    expected = things["big"].wheels[1].sha256
    actual = wheel(tmp_path / "index", "big-part2", {"data/big.bin.part01": b"evil"}).sha256
    with pytest.raises(FetchError) as problem:
        fetch.ensure("big")
    assert str(problem.value) == (
        f"big-part2==1.0 is not the file that impasto knows: expected sha256 {expected}, got {actual}. "
        "The index or mirror serves something else; nothing was kept"
    )
    assert not fetch.is_fetched("big")
    assert [path.name for path in fetch.location("big").parent.iterdir()] == [".big.lock"]


def test_without_an_index_one_line_says_what_to_do(
    pip: Callable[..., Path], things: dict[str, fetch.Source], tmp_path: Path
) -> None:
    pip()
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(FetchError) as problem:
        fetch.ensure("sets")
    assert str(problem.value) == (
        "cannot fetch 'sets' (0 MB: sets==1.0) from the Python package index "
        "(No matching distribution found for sets==1.0). Where an index can be reached: impasto fetch sets; "
        f"then copy {Path('fetched') / fetch.location('sets').name} from the cache folder there "
        f"to {tmp_path / 'cache'}"
    )


def test_a_copied_cache_folder_is_enough(
    pip: Callable[..., Path], things: dict[str, fetch.Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip()
    fetch.ensure("sets")
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere")
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "elsewhere"))
    assert fetch.ensure("sets").is_relative_to(tmp_path / "elsewhere")
    assert calls.read_text() == "called\n"


def test_what_a_killed_process_left_is_never_used_and_swept(
    pip: Callable[..., Path], things: dict[str, fetch.Source]
) -> None:
    pip()
    final = fetch.location("big")
    leftover = final.parent / f".{final.name}.abc" / "done"
    leftover.mkdir(parents=True)
    (leftover / "big.bin").write_bytes(b"half")
    assert not fetch.is_fetched("big")
    assert (fetch.ensure("big") / "big.bin").stat().st_size == 3003
    assert not leftover.parent.exists()


@pytest.mark.parametrize("native_lock", [True, False])
def test_two_processes_download_once(
    pip: Callable[..., Path], things: dict[str, fetch.Source], tmp_path: Path, native_lock: bool
) -> None:
    calls = pip(delay=0.5)
    program = (
        "import sys; from impasto import fetch; from types import MappingProxyType\n"
        f"fetch._pip = lambda: [sys.executable, {str(tmp_path / 'pip.py')!r}]\n"
        f"fetch._flock = fetch._flock if {native_lock} else None\n"
        "from impasto.fetch import File, Source, Wheel\n"
        f"fetch.SOURCES = MappingProxyType({things!r})\n"
        "print(fetch.ensure('big'))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    assert printed == {str(fetch.location("big"))}
    assert calls.read_text() == "called\n"


def test_a_full_or_closed_disk_says_so(
    pip: Callable[..., Path],
    things: dict[str, fetch.Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pip()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(FetchError, match=r"^big needs 0 MB and .* has 0 MB free: make room, or set IMPASTO_CACHE"):
        fetch.ensure("big")
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        FetchError,
        match=r"^cannot write to the cache folder .*file/fetched \(Not a directory\): "
        r"make room or set IMPASTO_CACHE to a folder that can be written$",
    ):
        fetch.ensure("big")


def test_no_pip_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "pip" else None)
    assert fetch._pip() == ["/bin/pip"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FetchError) as problem:
        fetch._pip()
    assert str(problem.value) == (
        f"fetching needs pip, which this Python does not have: {sys.executable} -m ensurepip --upgrade"
    )


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"^nothing called 'demon' can be fetched; there is: demo, benchmarks$"):
        fetch.ensure("demon")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path))
    assert fetch.cache_root() == tmp_path
    monkeypatch.delenv("IMPASTO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_root() == tmp_path / "impasto"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_root() == tmp_path / ".cache" / "impasto"


def test_the_table_is_complete() -> None:
    for source in fetch.SOURCES.values():
        assert source.licence and source.title and source.unpacked > 0
        for one in source.wheels:
            assert len(one.sha256) == 64 and one.size > 10**6
        assert len({file.target for file in source.files}) == len(source.files)


def test_changing_what_is_pinned_changes_the_folder(
    things: dict[str, fetch.Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fetch.location("big")
    other = fetch.Source("a big file", "free for all", things["big"].wheels[:1], things["big"].files, 3003)
    monkeypatch.setattr(fetch, "SOURCES", MappingProxyType({"big": other}))
    assert fetch.location("big") != before


def test_sizes_are_read_while_pip_makes_and_removes_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a/one.whl", 5), ("b/one.whl", 7), ("b/gone/two.whl", 90), ("b/three.whl", 1)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert fetch._bytes_below(tmp_path / "a", tmp_path / "b") == 7 + 90 + 1
    listed = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert fetch._bytes_below(tmp_path / "a", tmp_path / "b") == 7 + 1
