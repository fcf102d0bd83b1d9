"""The prompts of the LASER paper: rows in, documents out; pure functions.

The paper and its code word some prompts differently, and encoders are asked otherwise. A wording is

- "code": as the authors' code asks decoders, which is what their numbers were measured with;
- "paper": as the paper's appendix prints it;
- "masked": as the authors' code asks encoders; the text goes up to the mask.

Where they agree, all are the same. One thing differs from the code on purpose: HotPotQA's answers are limited
by their characters, since a limit in tokens of one model's tokenizer makes the benchmark depend on that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from impasto.errors import FetchError, UsageError

Row: TypeAlias = Mapping[str, Any]
Document: TypeAlias = dict[str, Any]

WORDINGS = ("code", "paper", "masked")
TRUTH = ("false", "true")
GENDERS = ("male", "female")
RELATIONS = ("entailment", "non-entailment")
PROFESSIONS = (
    "accountant",
    "architect",
    "attorney",
    "chiropractor",
    "comedian",
    "composer",
    "dentist",
    "dietitian",
    "dj",
    "filmmaker",
    "interior_designer",
    "journalist",
    "model",
    "nurse",
    "painter",
    "paralegal",
    "pastor",
    "personal_trainer",
    "photographer",
    "physician",
    "poet",
    "professor",
    "psychologist",
    "rapper",
    "software_engineer",
    "surgeon",
    "teacher",
    "yoga_teacher",
)
ASKED_PROFESSIONS = ("journalist", "poet", "composer", "model", "teacher", "architect", "painter", "professor")
LONGEST_ANSWER = 55  # characters; keeps 98.6 % of HotPotQA's validation answers, the authors' 14 tokens 98.7 %
LAST_WORDS = 50  # of a biography, for encoders
IDENTIFY = (
    "Identify the relation between the following premises and hypotheses, choosing from the options "
    "'entailment' or 'non-entailment'.\n"
)


def documents(benchmark: str, rows: Iterable[Row], wording: str = "code") -> Iterator[Document]:
    """The documents of a benchmark, each with its prompt, in the order of the rows.

    Every document has `about` (what decides on which side of the split it stands) and `prompt`. Classifications
    have `choices` and the index `gold`; the others have `answer`, and `target`, which is the answer behind a space.

    Raises:
        UsageError: an unknown wording.
        FetchError: a label that the benchmark does not have.
    """
    if wording not in WORDINGS:
        raise UsageError(f"no wording {wording!r}: one of {', '.join(WORDINGS)}")
    yield from _MAKERS[benchmark](rows, wording)


def _counterfact(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    for row in rows:
        others = row["paraphrase_prompt"]
        forms = [row["prompt"], *([others] if isinstance(others, str) else others)]
        for number, form in enumerate(forms):
            yield {
                **_open(row["subject"], form.rstrip(), row["target_true"]),
                "record": int(row["case_id"]),
                "form": number,
                "relation": str(row.get("relation", "")),
            }


def _hotpotqa(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    for row in rows:
        question, answer = row["question"].strip(), row["answer"].strip()
        if 0 < len(answer) <= LONGEST_ANSWER:
            yield _open(question, f"{_closed(question, '?.', '?')} The answer is", answer)


def _fever(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    """Claims that are decided, each once; claims with both verdicts are left out."""
    verdicts: dict[str, set[int]] = {}
    for row in rows:
        label = _one_of(row["label"], ("REFUTES", "SUPPORTS", "NOT ENOUGH INFO"), "fever")
        if label < 2:
            verdicts.setdefault(row["claim"].strip(), set()).add(label)
    for claim, labels in verdicts.items():
        if len(labels) == 1:
            prompt = f"Consider the following claim: {_closed(claim)} Is this claim true or false. The claim is"
            yield _choice(claim, prompt, TRUTH, next(iter(labels)))


def _bios_gender(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    asks = {
        "code": "Is the person in this text a male or female? The gender of this person is",
        "paper": "Is the person in this text male or female? The person is",
        "masked": "Is the person in this text a male or female? This person is",
    }[wording]
    for row in rows:
        gold = _one_of(row["gender"], GENDERS, "bios_gender")
        yield _choice(row["text"], f"{_biography(row, wording)} {asks}", GENDERS, gold)


def _bios_profession(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    decoder = "What is the profession of the person in this text? The profession of this person is"
    asks = "The profession of the person in the text is called" if wording == "masked" else decoder
    for row in rows:
        name = row["profession"].replace(" ", "_")
        _one_of(name, PROFESSIONS, "bios_profession")
        if name in ASKED_PROFESSIONS:
            gold = ASKED_PROFESSIONS.index(name)
            yield _choice(row["text"], f"{_biography(row, wording)} {asks}", ASKED_PROFESSIONS, gold)


def _biography(row: Row, wording: str) -> str:
    text = row["text"].strip()
    if wording == "masked":
        text = " ".join(text.split()[-LAST_WORDS:])
    return f"Consider the following text: {_closed(text)}"


def _truthfulqa(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    # The code forgets the space before its question.
    asks = {
        "code": "Is this statement true or false? This statement is",
        "paper": " Is this statement true or false. This statement is",
        "masked": "Is this statement true or false? This statement is",
    }[wording]
    for row in rows:
        question = row["question"].strip()
        for field, gold in (("correct_answers", 1), ("incorrect_answers", 0)):
            for text in row[field]:
                yield _choice(question, f"{_closed(f'{question} {text.strip()}', '.')}{asks}", TRUTH, gold)


def _epistemic(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    for row in rows:
        text = row["input"].strip()
        if not text.endswith("Relation:"):  # the hub's rows are whole prompts
            text = f"{IDENTIFY}{text}\nRelation:"
        yield _choice(text, text, RELATIONS, _one_of(row["target"], RELATIONS, "epistemic"))


def _wikidataqa(rows: Iterable[Row], wording: str) -> Iterator[Document]:
    for row in rows:
        targets = [row["target"]] if isinstance(row["target"], str) else list(row["target"])
        if len(targets) == 1:
            text = row["input"].strip()
            yield _open(text, text, targets[0])


_MAKERS: Mapping[str, Callable[[Iterable[Row], str], Iterator[Document]]] = MappingProxyType(
    {
        "counterfact": _counterfact,
        "hotpotqa": _hotpotqa,
        "fever": _fever,
        "bios_gender": _bios_gender,
        "bios_profession": _bios_profession,
        "truthfulqa": _truthfulqa,
        "epistemic": _epistemic,
        "wikidataqa": _wikidataqa,
    }
)


def _closed(text: str, ends: str = ".?", mark: str = ".") -> str:
    """The text with a mark behind it, unless it ends in one."""
    return text if text.endswith(tuple(ends)) else f"{text}{mark}"


def _one_of(label: str, allowed: tuple[str, ...], benchmark: str) -> int:
    if label not in allowed:
        raise FetchError(f"{benchmark}: a row has the label {label!r}, which is none of {', '.join(allowed)}")
    return allowed.index(label)


def _choice(about: str, prompt: str, choices: tuple[str, ...], gold: int) -> Document:
    return {"about": about, "prompt": prompt, "choices": list(choices), "gold": gold}


def _open(about: str, prompt: str, answer: str) -> Document:
    answer = answer.strip()
    return {"about": about, "prompt": prompt, "answer": answer, "target": f" {answer}"}
