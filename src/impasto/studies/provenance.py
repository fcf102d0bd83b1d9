"""Where the numbers of a page come from, in words: model, tasks, versions, time, and the command to run it again."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from impasto.records import Run
from impasto.result import MASKINGS, Setting
from impasto.store import Store

# A word of a command, or what stands behind `--option=` or `-o`, that leads out of the folder it was typed in.
_AWAY = re.compile(r"(?P<option>--[\w-]+=|-\w)?(?P<path>(?:/|~[\w.-]*/|\.\.[/\\]|[A-Za-z]:[/\\]).*)", re.DOTALL)


def provenance(
    store: Store, setting: Setting, study: str, protocol: str, source: str, tasks: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Where the numbers of a page come from, in words.

    Args:
        store: the run folder's store.
        setting: how the model was run.
        study: the word for the study on the command line.
        protocol: name of the study's protocol.
        source: where the weights came from.
        tasks: (name, protocol fingerprint) of each task.
    """
    told = {
        "model": _shown(setting.model),
        "weights": f"{source}, fingerprint {setting.weights[:16]}",
        "computed in": f"{setting.dtype} on {setting.device}, {setting.attention} attention, {_scored(setting)}",
        "protocol": protocol,
    }
    for name, info in ((name, store.tasks().get((name, mark), {})) for name, mark in tasks):
        if info:
            told[f"task {name}"] = (
                f"{info['n']} examples, {info['shots']}-shot, version {info['version']}; {info['source']}"
            )
    if runs := store.runs():
        first = runs[0]
        asked = next((run for run in reversed(runs) if ("study", study) == run.command[1:3]), first)
        told["versions"] = ", ".join(f"{package} {number}" for package, number in first.versions.items())
        told["begun"] = first.started
        told["computing time"] = computing_time(runs)
        told["machine"] = f"{platform.machine()}, {platform.system()}"
        told["command"] = portable(asked.command)
    return told


def computing_time(runs: Sequence[Run]) -> str:
    """How long the runs of a folder took; one that has no end (it is going on, or was killed) is named, not counted."""
    minutes = sum(run.seconds or 0.0 for run in runs) / 60
    open_ended = sum(run.seconds is None for run in runs)
    told = f"{minutes:.1f} minutes in {len(runs)} run{'s' if len(runs) > 1 else ''}"
    if not open_ended:
        return told
    if open_ended == len(runs):
        return f"not known: {'the run has' if len(runs) == 1 else 'the runs have'} not ended, or not noted it"
    return (
        f"{told}, without {open_ended} of them that {'has' if open_ended == 1 else 'have'} not ended, or not noted it"
    )


def portable(command: Sequence[str]) -> str:
    """A command as one types it on another machine, where the files have the same names and lie elsewhere.

    Paths that lead out of the folder in which the command was given keep their name only, and so many of the folders
    above it as tell different files apart. Every other word stays as it is, in quotes where a shell needs them.

    Example:
        >>> portable(["impasto", "study", "laser", "/data/m.gguf", "--text=../a/b.txt", "--types", "*.up_proj"])
        "impasto study laser m.gguf --text=b.txt --types '*.up_proj'"
        >>> portable(["impasto", "report", "/runs/small/laser", "/runs/large/laser"])
        'impasto report small/laser large/laser'
    """
    words = [_AWAY.fullmatch(word) for word in command]
    names = _names({word["path"] for word in words if word is not None})
    return shlex.join(
        text if word is None else f"{word['option'] or ''}{names[word['path']]}"
        for text, word in zip(command, words, strict=True)
    )


def _names(paths: Iterable[str]) -> dict[str, str]:
    """Each path's last parts, as few as no other path ends with; all of them where there are no such."""
    parts = {path: _parts(path) for path in paths}
    found = {}
    for path, mine in parts.items():
        others = [theirs for theirs in parts.values() if theirs != mine]
        counts = range(1, len(mine))
        enough = (count for count in counts if all(theirs[-count:] != mine[-count:] for theirs in others))
        found[path] = "/".join(mine[-next(enough, len(mine)) :]) or path
    return found


def _parts(path: str) -> tuple[str, ...]:
    """Names along a path, without what says where it begins."""
    pure = PureWindowsPath(path) if "\\" in path or path[1:2] == ":" else PurePosixPath(path)
    return tuple(part for part in pure.parts if part not in (pure.anchor, "..") and part[:1] != "~")


def _shown(name: str) -> str:
    """A model's name without the folders of the machine that it ran on."""
    return Path(name).name if name.startswith(("/", "./", "../", "~")) else name


def _scored(setting: Setting) -> str:
    """How answers were read off the model, in words."""
    return MASKINGS[setting.masking] if setting.masking else "exact KV cache"
