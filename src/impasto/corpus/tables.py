"""Files around a count: pairs to look for, and what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from impasto.corpus.counting import FORMAT, Counts, Rules
from impasto.corpus.mentions import Pair, distinct
from impasto.errors import UsageError

ANSWERS = ("answer", "target_true", "target")  # names under which files of facts hold the answer


def read_pairs(path: Path | str) -> tuple[Pair, ...]:
    """Pairs from a file: JSON lines with `subject` and `answer` (or `target_true`), or two columns with a tab between.

    Raises:
        UsageError: there is no such file, or a line without a pair.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no file {path} with pairs of subject and answer")
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = distinct(_pair(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip())
    if not pairs:
        raise UsageError(f"{path} is empty: give lines with a subject and its answer")
    return pairs


def _pair(line: str, where: str) -> Pair:
    if not line.lstrip().startswith("{"):
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) == 2:
            return Pair(*columns)
        raise UsageError(f"{where} is neither a JSON object nor subject and answer with a tab between")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UsageError(f"{where} is no JSON: {problem.msg}") from problem
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if not isinstance(row.get("subject"), str) or not isinstance(answer, str):
        raise UsageError(f"{where} lacks the texts subject and answer")
    return Pair(row["subject"], answer)


def write(counts: Counts, path: Path | str) -> None:
    """Write a count: one object with everything, or, where the name ends in `.jsonl`, one line a pair.

    The file is complete or not there at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    rows = [json.dumps(row, ensure_ascii=False) for row in _rows(counts)]
    if path.suffix == ".jsonl":
        text = "".join(f"{row}\n" for row in rows)
    else:
        about = {
            "format": FORMAT,
            "rules": asdict(counts.rules),
            "documents": counts.documents,
            "broken": counts.broken,
            "damaged": list(counts.damaged),
            "bytes": counts.bytes,
            "text_bytes": counts.text,
            "seconds": round(counts.seconds, 3),
            "megabytes_per_second_and_core": round(counts.speed, 2),
        }
        head = json.dumps(about, ensure_ascii=False, indent=1)[:-2]
        text = f'{head},\n "pairs": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


@dataclass(frozen=True, slots=True)
class Counted:
    """A finished count, read from its file.

    Attributes:
        frequencies: in how many documents each pair occurs.
        rules: what counted as a mention; None in a file of rows alone.
        documents: how many the corpus has; None likewise.
    """

    frequencies: Mapping[Pair, int]
    rules: Rules | None = None
    documents: int | None = None


def read(path: Path | str) -> Counted:
    """A count from a file that `write` wrote.

    Raises:
        UsageError: there is no such file, or it is of another kind.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else []
        whole: dict[str, Any] = {"pairs": [json.loads(line) for line in lines]} if lines else json.loads(text)
        found = {Pair(row["subject"], row["answer"]): int(row["documents"]) for row in whole["pairs"]}
        rules = whole.get("rules")
        return Counted(found, None if rules is None else Rules(**rules), whole.get("documents"))
    except OSError as problem:
        raise UsageError(f"no counts in {path}: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UsageError(f"{path} holds no counts: make them with `impasto corpus count`") from problem


def frequencies(path: Path | str) -> Mapping[Pair, int]:
    """In how many documents each pair occurs; see `read`."""
    return read(path).frequencies


def _rows(counts: Counts) -> Iterator[dict[str, object]]:
    for pair, number in zip(counts.pairs, counts.together, strict=True):
        yield {"subject": pair.subject, "answer": pair.answer, "documents": number}
