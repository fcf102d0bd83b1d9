"""How fast facts are counted in a corpus, by kind of file and by rule: megabytes per second of one core.

    python benchmarks/corpus.py TEXTS.jsonl... --pairs FACTS.jsonl --output corpus.json

The texts are JSON lines with `text` (or `page`); their paragraphs, shuffled, are put together to documents of about
3,300 letters until there are `--megabytes` of them. The same documents are written as every kind of file, and each is
counted `--rounds` times in one process, in turns. Seconds are of the processor, so waiting for the disk is not in them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from impasto import corpus
from impasto.hardware import machine

LETTERS = 3300
PLAIN = corpus.Rules()
CASES = (
    ("jsonl", PLAIN),
    ("jsonl", corpus.Rules(ignore_case=True)),
    ("jsonl", corpus.Rules(match="all_words")),
    ("jsonl", corpus.Rules(match="all_words", ignore_case=True)),
    ("jsonl.zst", PLAIN),
    ("jsonl.gz", PLAIN),
    ("txt", PLAIN),
    ("parquet", PLAIN),
)


def paragraphs(files: Sequence[Path]) -> list[str]:
    """All paragraphs of more than a line."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row.get("text") or row.get("page") for row in rows]
    return [part.strip() for text in texts for part in text.split("\n") if len(part.strip()) > 60]


def documents(parts: list[str], letters: int) -> Iterator[str]:
    """Shuffled paragraphs, put together, until there are so many letters."""
    draw, written = random.Random(0), 0
    while written < letters:
        draw.shuffle(parts)
        here: list[str] = []
        for part in parts:
            here.append(part)
            if sum(map(len, here)) > LETTERS:
                yield "\n".join(here)
                written += sum(map(len, here))
                here = []


def write(folder: Path, texts: Sequence[str]) -> None:
    """The same documents as every kind of file."""
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "corpus.jsonl").write_bytes(raw)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(raw, 6))
    (folder / "corpus.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=3).compress(raw))
    (folder / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    pq.write_table(pa.table({"text": list(texts)}), folder / "corpus.parquet", compression="zstd", row_group_size=500)


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument(
        "--pairs", type=Path, required=True, help="subjects and answers, as `impasto corpus count` takes"
    )
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("corpus.json"))
    chosen = parser.parse_args()
    pairs = corpus.read_pairs(chosen.pairs)
    texts = list(documents(paragraphs(chosen.texts), chosen.megabytes * 10**6))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as nowhere:
        write(Path(nowhere), texts)
        for turn in range(chosen.rounds):
            for kind, rules in CASES:
                found = corpus.count(
                    corpus.files([str(Path(nowhere) / f"corpus.{kind}")]), pairs, rules=rules, workers=1
                )
                speeds = {"disk": found.speed, "text": found.text / found.seconds / 1e6}
                row = {"kind": kind, "match": rules.match, "ignore_case": rules.ignore_case, "round": turn, **speeds}
                rows.append({**row, "documents": found.documents, "seconds": found.seconds})
                print(row, flush=True)
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {"megabytes": chosen.megabytes, "rounds": chosen.rounds, "pairs": len(pairs)},
        "documents": len(texts),
        "megabytes_per_second_and_core": rows,
    }
    chosen.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
