"""Rows of the eight benchmarks: from files that the user has, or from the hub; and their two parts.

    IMPASTO_DATA=folder impasto eval demo --tasks laser_fever

reads `folder/fever/*.jsonl`. Without that variable, or where the folder lacks the files, the rows come from the hub's
Parquet copies of the data sets, so that no code from a data repository is ever run. Both are brought into one form,
that of the files (see `SOURCES`), before prompts are made of them.

Every benchmark has a validation part (a fifth, as in the paper) to choose on and a test part to report on. The paper
takes the first fifth of the rows; here a hash of what a document is about decides. So a document stays on its side
whatever other rows a file holds and in whatever order, and documents that share their subject (three wordings of
one fact, all statements about one question) never stand on both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import datasets

from impasto.benchmarks.laser import prompts
from impasto.benchmarks.laser.prompts import Document, Row
from impasto.errors import FetchError, UsageError

Part = Literal["validation", "test"]

FOLDER = "IMPASTO_DATA"  # the environment variable that names the folder with the files
VALIDATION = 0.2


@dataclass(frozen=True)
class Table:
    """Rows of a data set on the hub: one split of one configuration, the first `rows` of them or all."""

    path: str  # "configuration/split"
    rows: int | None = None


@dataclass(frozen=True)
class Source:
    """Where one benchmark's rows come from.

    Attributes:
        files: pattern of its files inside the data folder; several are read one after another, by name.
        fields: the fields that each row must have, and what is in them, for the reader of an error.
        hub: the data set's name on the hub.
        tables: its splits that the paper uses, in the paper's order.
        adapt: makes rows of the files' form out of one row of the hub's.
    """

    files: str
    fields: Mapping[str, str]
    hub: str
    tables: tuple[Table, ...]
    adapt: Callable[[Row], Row]


def _fact(row: Row) -> Row:
    asked = row["requested_rewrite"]
    return {
        "case_id": row["case_id"],
        "prompt": asked["prompt"].format(asked["subject"]),
        "subject": asked["subject"],
        "target_true": asked["target_true"]["str"],
        "paraphrase_prompt": list(row["paraphrase_prompts"]),
        "relation": asked["relation_id"],
    }


def _biography(row: Row) -> Row:
    return {
        "text": row["hard_text"],
        "profession": prompts.PROFESSIONS[int(row["profession"])],
        "gender": prompts.GENDERS[int(row["gender"])],
    }


def _statements(row: Row) -> Row:
    targets = row["mc2_targets"]
    pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    return {
        "question": row["question"],
        "correct_answers": [text for text, label in pairs if label == 1],
        "incorrect_answers": [text for text, label in pairs if label != 1],
    }


def _item(row: Row) -> Row:
    targets = list(row["targets"])
    return {"input": row["inputs"], "target": targets if len(targets) != 1 else targets[0]}


def _as_it_is(row: Row) -> Row:
    return row


_BIOGRAPHIES = Source(
    files="bias_in_bios/*.jsonl",
    fields={"text": "a biography without its first sentence", "profession": "in words", "gender": "male or female"},
    hub="LabHC/bias_in_bios",
    tables=(Table("default/dev"),),
    adapt=_biography,
)

SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "counterfact": Source(
            files="counterfact/*.jsonl",
            fields={
                "case_id": "number of the fact",
                "prompt": "its beginning, the subject filled in",
                "subject": "whom or what it is about",
                "target_true": "how it ends",
                "paraphrase_prompt": "another beginning, or a list of them",
            },
            hub="azhx/counterfact",
            tables=(Table("default/train"), Table("default/test")),
            adapt=_fact,
        ),
        "hotpotqa": Source(
            files="hotpotqa/*.jsonl",
            fields={"question": "a question", "answer": "its answer"},
            hub="hotpotqa/hotpot_qa",
            tables=(Table("fullwiki/train", rows=7405), Table("fullwiki/validation")),
            adapt=_as_it_is,
        ),
        "fever": Source(
            files="fever/*.jsonl",
            fields={"claim": "a sentence", "label": "SUPPORTS, REFUTES or NOT ENOUGH INFO"},
            hub="EleutherAI/fever",
            tables=(Table("v1.0/paper_dev"), Table("v1.0/paper_test")),
            adapt=_as_it_is,
        ),
        "bios_gender": _BIOGRAPHIES,
        "bios_profession": _BIOGRAPHIES,
        "truthfulqa": Source(
            files="truthfulqa/*.jsonl",
            fields={
                "question": "a question",
                "correct_answers": "list of true answers",
                "incorrect_answers": "list of false answers",
            },
            hub="truthfulqa/truthful_qa",
            tables=(Table("multiple_choice/validation"),),
            adapt=_statements,
        ),
        "epistemic": Source(
            files="bigbench/epistemic_reasoning*.jsonl",
            fields={"input": "premise and hypothesis", "target": "entailment or non-entailment"},
            hub="tasksource/bigbench",
            tables=(Table("epistemic_reasoning/validation"), Table("epistemic_reasoning/train")),
            adapt=_item,
        ),
        "wikidataqa": Source(
            files="bigbench/qa_wikidata*.jsonl",
            fields={"input": "the beginning of a sentence", "target": "how it ends, or a list of ways"},
            hub="tasksource/bigbench",
            tables=(Table("qa_wikidata/validation"), Table("qa_wikidata/train")),
            adapt=_item,
        ),
    }
)


def load(benchmark: str, wording: str = "code", folder: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """Both parts of a benchmark, as the harness's `custom_dataset`; its further arguments do not matter.

    Args:
        benchmark: a name in `SOURCES`.
        wording: which of the published prompts, see `prompts`.
        folder: the data folder, instead of the one that the environment names.

    Raises:
        FetchError: no rows from anywhere; the text says which file with which fields is looked for.
    """
    both = documents(benchmark, wording, folder)
    for part, found in both.items():
        if not found:
            raise FetchError(
                f"{benchmark}: none of its documents belongs to the {part} part, which takes a hash's choice of "
                f"{VALIDATION if part == 'validation' else 1 - VALIDATION:.0%} of them: give more rows"
            )
    return {part: datasets.Dataset.from_list(found) for part, found in both.items()}


def documents(benchmark: str, wording: str = "code", folder: str | None = None) -> dict[Part, list[Document]]:
    """The documents of both parts, in the order of the rows; arguments and errors as for `load`."""
    if benchmark not in SOURCES:
        raise UsageError(f"no LASER benchmark {benchmark!r}: one of {', '.join(SOURCES)}")
    both: dict[Part, list[Document]] = {"validation": [], "test": []}
    for document in prompts.documents(benchmark, rows(benchmark, folder), wording):
        both[part_of(document["about"])].append(document)
    return both


def part_of(about: str, share: float = VALIDATION) -> Part:
    """On which side everything about one thing stands: a fixed function of the text, `share` of all texts validate."""
    number = int.from_bytes(hashlib.sha256(about.encode()).digest()[:8], "big")
    return "validation" if number < share * 2**64 else "test"


# Rows ----------------------------------------------------------------------------------------------------------


def rows(benchmark: str, folder: str | None = None) -> list[Row]:
    """The benchmark's rows in the form of the files, from the data folder or else from the hub."""
    source = SOURCES[benchmark]
    named = folder or os.environ.get(FOLDER)
    if named and not Path(named).is_dir():
        raise FetchError(f"{benchmark}: there is no folder {named}" + ("" if folder else f" ({FOLDER} names it)"))
    if named and (files := sorted(Path(named).glob(source.files))):
        return [row for file in files for row in _read(benchmark, file, source)]
    wanted = ", ".join(f"{field} ({what})" for field, what in source.fields.items())
    try:
        return list(_from_hub(source))
    except Exception as problem:  # whatever the hub's client, the network or Parquet raise
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:200]
        where = f"no {source.files} in {named}" if named else f"{FOLDER} names no folder"
        raise FetchError(
            f"the data of {benchmark} is not here ({where}) and cannot be had from the hub's {source.hub} ({reason}). "
            f"Put {source.files} into a folder, one JSON object a line with the fields {wanted}, and name the folder "
            f"in {FOLDER}"
        ) from problem


def _read(benchmark: str, file: Path, source: Source) -> Iterator[Row]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise FetchError(f"{benchmark}: line {number} of {file} is no JSON: {problem.msg}") from problem
        missing = [field for field in source.fields if not isinstance(row, dict) or field not in row]
        if missing:
            wanted = ", ".join(source.fields)
            raise FetchError(f"{benchmark}: line {number} of {file} lacks {', '.join(missing)} (a row has {wanted})")
        yield row


def _from_hub(source: Source) -> Iterator[Row]:
    for table in source.tables:
        found: Iterable[Row] = datasets.load_dataset(
            "parquet",
            data_files=f"hf://datasets/{source.hub}@refs%2Fconvert%2Fparquet/{table.path}/*.parquet",
            split=f"train[:{table.rows}]" if table.rows else "train",
        )
        yield from map(source.adapt, found)


def answers(found: Sequence[Document]) -> tuple[str, ...]:
    """The right answer of each document, in words."""
    return tuple(doc["answer"] if "answer" in doc else doc["choices"][doc["gold"]] for doc in found)
