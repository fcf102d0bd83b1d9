"""Laws of the LASER tasks: prompts, parts, metrics, and errors that say which file is missing."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from impasto import statistics, tasks
from impasto.benchmarks.laser import data, metrics, prompts
from impasto.benchmarks.reply import Reply
from impasto.errors import FetchError, UsageError
from impasto.result import RANK, Request, Response
from tiny import tiny_model, tiny_tokenizer

NAMES = tuple(data.SOURCES)
CLASSIFIED = ("fever", "bios_gender", "bios_profession", "truthfulqa", "epistemic")
HOME = Path(data.__file__).parent
FILES = {
    "counterfact": "counterfact/counterfact-00000.jsonl",
    "hotpotqa": "hotpotqa/validation.jsonl",
    "fever": "fever/paper_dev.jsonl",
    "bios_gender": "bias_in_bios/sample.jsonl",
    "bios_profession": "bias_in_bios/sample.jsonl",
    "truthfulqa": "truthfulqa/validation.jsonl",
    "epistemic": "bigbench/epistemic_reasoning.jsonl",
    "wikidataqa": "bigbench/qa_wikidata.jsonl",
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "counterfact": [
        {
            "case_id": n,
            "prompt": f"The mother tongue of Person {n} is",
            "subject": f"Person {n}",
            "target_true": ("French", "Dutch")[n % 2],
            "paraphrase_prompt": f"Where Person {n} is from, people speak",
        }
        for n in range(20)
    ],
    "hotpotqa": [
        {"question": f"Is city {n} in France, yes or no?", "answer": ("yes", "Chief of Protocol")[n % 2]}
        for n in range(20)
    ],
    "fever": [{"claim": f"Film {n} is a film.", "label": ("SUPPORTS", "REFUTES")[n % 3 > 0]} for n in range(20)],
    "bios_gender": [
        {
            "text": f"They wrote {n} books.",
            "profession": prompts.ASKED_PROFESSIONS[n % 8],
            "gender": prompts.GENDERS[n % 2],
        }
        for n in range(40)
    ],
    "truthfulqa": [
        {
            "question": f"What is {n} + {n}?",
            "correct_answers": [f"It is {2 * n}", "A number."],
            "incorrect_answers": ["Nothing"],
        }
        for n in range(20)
    ],
    "epistemic": [
        {"input": f"Premise: A knows {n}. Hypothesis: {n}.", "target": prompts.RELATIONS[n % 2]} for n in range(20)
    ],
    "wikidataqa": [{"input": f"The country of town {n} is", "target": ["Spain"]} for n in range(20)],
}
ROWS["bios_profession"] = ROWS["bios_gender"]


def write(folder: Path, benchmark: str, rows: Sequence[Mapping[str, Any]], file: str | None = None) -> None:
    path = folder / (file or FILES[benchmark])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a small file for every benchmark; nothing else can be reached."""
    for name, rows in ROWS.items():
        write(tmp_path, name, rows)
    monkeypatch.setenv(data.FOLDER, str(tmp_path))
    monkeypatch.setattr(tasks.fetch, "ensure", lambda *_, **__: tmp_path)
    monkeypatch.setattr(data.datasets, "load_dataset", unreachable)
    return tmp_path


def unreachable(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the hub is far\naway")


def made(benchmark: str, rows: Sequence[Mapping[str, Any]], wording: str = "code") -> list[dict[str, Any]]:
    return list(prompts.documents(benchmark, rows, wording))


# Prompts -------------------------------------------------------------------------------------------------------


def test_counterfact_asks_every_form_of_a_fact() -> None:
    row = {**ROWS["counterfact"][0], "prompt": "Person 0 speaks ", "paraphrase_prompt": ["One", "Two"]}
    assert made("counterfact", [row]) == [
        {
            "about": "Person 0",
            "prompt": prompt,
            "answer": "French",
            "target": " French",
            "record": 0,
            "form": number,
            "relation": "",
        }
        for number, prompt in enumerate(["Person 0 speaks", "One", "Two"])
    ]
    assert [doc["prompt"] for doc in made("counterfact", ROWS["counterfact"][:1])] == [
        "The mother tongue of Person 0 is",
        "Where Person 0 is from, people speak",
    ]


def test_hotpotqa_closes_the_question_and_keeps_short_answers() -> None:
    rows = [
        {"question": " Who? ", "answer": " He "},
        {"question": "Name him.", "answer": "He"},
        {"question": "Who", "answer": "x" * 55},
        {"question": "Long?", "answer": "x" * 56},
        {"question": "Empty?", "answer": " "},
    ]
    assert [(doc["prompt"], doc["target"]) for doc in made("hotpotqa", rows)] == [
        ("Who? The answer is", " He"),
        ("Name him. The answer is", " He"),
        ("Who? The answer is", " " + "x" * 55),
    ]


def test_fever_asks_decided_claims_once() -> None:
    rows = [
        {"claim": "A is B", "label": "SUPPORTS"},
        {"claim": "Is it?", "label": "REFUTES"},
        {"claim": "A is B", "label": "SUPPORTS"},
        {"claim": "Both.", "label": "SUPPORTS"},
        {"claim": "Both.", "label": "REFUTES"},
        {"claim": "Open.", "label": "NOT ENOUGH INFO"},
        {"claim": "A is B", "label": "NOT ENOUGH INFO"},
    ]
    assert [(doc["prompt"], doc["choices"], doc["gold"]) for doc in made("fever", rows)] == [
        (
            "Consider the following claim: A is B. Is this claim true or false. The claim is",
            ["false", "true"],
            1,
        ),
        ("Consider the following claim: Is it? Is this claim true or false. The claim is", ["false", "true"], 0),
    ]


def test_biographies_are_asked_for_gender_and_profession() -> None:
    row = {"text": "She sings", "profession": "painter", "gender": "female"}
    start = "Consider the following text: She sings. "
    for wording, ask in {
        "code": "Is the person in this text a male or female? The gender of this person is",
        "paper": "Is the person in this text male or female? The person is",
        "masked": "Is the person in this text a male or female? This person is",
    }.items():
        (doc,) = made("bios_gender", [row], wording)
        assert (doc["prompt"], doc["choices"], doc["gold"]) == (start + ask, ["male", "female"], 1)
    for wording, ask in {
        "code": "What is the profession of the person in this text? The profession of this person is",
        "masked": "The profession of the person in the text is called",
    }.items():
        (doc,) = made("bios_profession", [row], wording)
        assert (doc["prompt"], doc["choices"][doc["gold"]]) == (start + ask, "painter")
    assert made("bios_profession", [{**row, "profession": "yoga teacher"}]) == []
    (doc,) = made("bios_gender", [{**row, "text": " ".join(map(str, range(99)))}], "masked")
    assert doc["prompt"].startswith("Consider the following text: 49 50 ")


def test_truthfulqa_makes_statements_and_the_code_forgets_a_space() -> None:
    row = {"question": "Why?", "correct_answers": ["So"], "incorrect_answers": ["Not so."]}
    assert [(doc["prompt"], doc["gold"]) for doc in made("truthfulqa", [row], "paper")] == [
        ("Why? So. Is this statement true or false. This statement is", 1),
        ("Why? Not so. Is this statement true or false. This statement is", 0),
    ]
    assert made("truthfulqa", [row])[0]["prompt"] == "Why? So.Is this statement true or false? This statement is"


def test_epistemic_reasoning_is_the_same_prompt_from_file_and_hub() -> None:
    (row,) = ROWS["epistemic"][:1]
    (doc,) = made("epistemic", [row])
    assert doc["prompt"] == (
        "Identify the relation between the following premises and hypotheses, choosing from the options 'entailment' "
        "or 'non-entailment'.\nPremise: A knows 0. Hypothesis: 0.\nRelation:"
    )
    assert made("epistemic", [{**row, "input": doc["prompt"] + " "}]) == [doc]


def test_wikidataqa_keeps_items_with_one_answer() -> None:
    rows = [{"input": " It is ", "target": t} for t in ("one", ["two"], ["two", "three"])]
    assert [(doc["prompt"], doc["answer"]) for doc in made("wikidataqa", rows)] == [("It is", "one"), ("It is", "two")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wording", prompts.WORDINGS)
def test_no_prompt_ends_in_a_space_and_answers_follow_one(name: str, wording: str) -> None:
    for doc in made(name, ROWS[name], wording):
        assert doc["prompt"] == doc["prompt"].rstrip() != ""
        assert "choices" in doc or doc["target"] == " " + doc["answer"]


# Parts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), unique=True), st.randoms(use_true_random=False))
def test_a_document_stays_on_its_side(questions: list[str], rng: random.Random) -> None:
    rows = [{"question": q, "correct_answers": ["a", "b"], "incorrect_answers": ["c"]} for q in questions]
    before = {(doc["prompt"], doc["about"]): data.part_of(doc["about"]) for doc in made("truthfulqa", rows)}
    rng.shuffle(rows)
    for doc in made("truthfulqa", rows[: len(rows) // 2]):
        assert before[doc["prompt"], doc["about"]] == data.part_of(doc["about"])


def test_a_fifth_validates_and_nothing_stands_on_both_sides(folder: Path) -> None:
    sides = [data.part_of(str(n)) for n in range(20_000)]
    assert sides.count("validation") / len(sides) == pytest.approx(0.2, abs=0.01)
    for name in NAMES:
        both = data.documents(name)
        about = {part: {doc["about"] for doc in found} for part, found in both.items()}
        assert about["validation"] and about["test"] and not about["validation"] & about["test"]
        assert sum(map(len, both.values())) == len(made(name, ROWS[name]))


def test_the_side_is_pinned() -> None:
    assert [text for text in "abcdefgh" if data.part_of(text) == "validation"] == ["c", "d", "f"]
    assert data.part_of("Danielle Darrieux") == "test"


def test_the_tasks_of_a_benchmark_ask_the_two_parts(folder: Path) -> None:
    both = data.documents("fever")
    for part, suffix in (("test", ""), ("validation", "_validation")):
        (task,) = tasks.build([f"laser_fever{suffix}"])
        assert [request.context for request in task.requests[::2]] == [doc["prompt"] for doc in both[part]]
    assert tasks.build(["laser_fever"])[0].protocol != tasks.build(["laser_fever_validation"])[0].protocol


# Files ---------------------------------------------------------------------------------------------------------


def test_every_task_has_its_validation_task_and_both_groups_hold_the_eight() -> None:
    found = {path.stem: yaml.load(path.read_text(), Loader=Plain) for path in HOME.glob("*.yaml")}
    groups = [
        found.pop(name)["group"] for name in ("laser", "laser_masked", "laser_validation", "laser_masked_validation")
    ]
    for stem, config in found.items():
        assert config["task"] == f"laser_{stem}"
        if not stem.endswith("_validation"):
            assert found[f"{stem}_validation"] == {
                "include": f"{stem}.yaml",
                "task": f"laser_{stem}_validation",
                "test_split": "validation",
            }
    for group in groups:
        listed = yaml.load((HOME / f"{group}.yaml").read_text(), Loader=Plain)["task"]
        masked, suffix = "_masked" in group, "_validation" if group.endswith("_validation") else ""
        forms = [f"{name}_masked" if masked and f"{name}_masked" in found else name for name in NAMES]
        assert listed == [f"laser_{form}{suffix}" for form in forms]
    assert {name for name in found if name.endswith("_masked")} == {
        f"{name}_masked" for name in ("counterfact", "bios_gender", "bios_profession")
    }


def test_a_full_stop_stands_behind_the_masks_where_the_paper_has_one(folder: Path) -> None:
    ends = {task.name: {request.after for request in task.requests} for task in tasks.build(["laser_masked"])}
    assert {name for name, after in ends.items() if after == {"."}} == {name for name in ends if "_masked" in name}
    assert all(after in ({"."}, {""}) for after in ends.values()) and len(ends) == 8
    (facts,) = tasks.build(["laser_counterfact_masked"])
    assert all(request.wants_rank for request in facts.requests)
    (own,) = tasks.build(["laser_counterfact"])
    assert {request.options for request in own.requests} == {RANK}


class Plain(yaml.SafeLoader):
    """Reads `!function` as text."""


Plain.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_files_in_parts_are_read_one_after_another_and_empty_lines_skipped(folder: Path) -> None:
    write(folder, "counterfact", ROWS["counterfact"][:7])
    write(folder, "counterfact", ROWS["counterfact"][7:], "counterfact/counterfact-00001.jsonl")
    second = folder / "counterfact/counterfact-00001.jsonl"
    second.write_text(second.read_text() + "\n  \n")
    assert data.rows("counterfact") == ROWS["counterfact"]


def test_a_folder_in_the_task_wins_over_the_environment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(other, "fever", ROWS["fever"][:3])
    assert data.rows("fever", str(other)) == ROWS["fever"][:3]


def test_a_missing_file_is_named_with_its_fields(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / FILES["fever"]).unlink()
    with pytest.raises(FetchError) as caught:
        tasks.build(["laser_fever"])
    assert str(caught.value) == (
        f"the data of fever is not here (no fever/*.jsonl in {folder}) and cannot be had from the hub's EleutherAI/"
        "fever (the hub is far). Put fever/*.jsonl into a folder, one JSON object a line with the fields claim (a "
        "sentence), label (SUPPORTS, REFUTES or NOT ENOUGH INFO), and name the folder in IMPASTO_DATA"
    )
    monkeypatch.delenv(data.FOLDER)
    with pytest.raises(FetchError, match=r"^the data of wikidataqa is not here \(IMPASTO_DATA names no folder\)"):
        data.rows("wikidataqa")
    monkeypatch.setenv(data.FOLDER, str(folder / "nowhere"))
    with pytest.raises(FetchError, match=r"^fever: there is no folder .*nowhere \(IMPASTO_DATA names it\)$"):
        data.rows("fever")


def test_a_bad_line_is_named(folder: Path) -> None:
    path = folder / FILES["fever"]
    path.write_text('{"claim": "A.", "label": "SUPPORTS"}\n{"claim": "B."}\n')
    with pytest.raises(FetchError) as caught:
        data.rows("fever")
    assert str(caught.value) == f"fever: line 2 of {path} lacks label (a row has claim, label)"
    path.write_text("[1]\n")
    with pytest.raises(FetchError, match=r"line 1 of .* lacks claim, label"):
        data.rows("fever")
    path.write_text('{"claim": \n')
    with pytest.raises(FetchError, match=r"^fever: line 1 of .*paper_dev.jsonl is no JSON: Expecting value$"):
        data.rows("fever")
    path.write_text('{"claim": "A.", "label": "MAYBE"}\n')
    with pytest.raises(FetchError, match=r"^fever: a row has the label 'MAYBE', which is none of REFUTES, SUPPORTS,"):
        data.documents("fever")


def test_too_few_rows_for_both_parts_are_refused(folder: Path) -> None:
    write(folder, "fever", ROWS["fever"][:1])
    with pytest.raises(FetchError, match=r"^fever: none of its documents belongs to the (validation|test) part"):
        data.load("fever")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^no LASER benchmark 'fevr': one of counterfact, hotpotqa, fever,"):
        data.documents("fevr")
    with pytest.raises(UsageError, match=r"^no wording 'mine': one of code, paper, masked$"):
        made("fever", [], "mine")


HUB: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "counterfact": lambda row: {
        "case_id": row["case_id"],
        "requested_rewrite": {
            "prompt": row["prompt"].replace(row["subject"], "{}"),
            "subject": row["subject"],
            "relation_id": "P103",
            "target_true": {"str": row["target_true"], "id": "Q1"},
        },
        "paraphrase_prompts": [row["paraphrase_prompt"]],
    },
    "hotpotqa": lambda row: {**row, "level": "hard"},
    "fever": lambda row: {**row, "evidence": []},
    "bios_gender": lambda row: {
        "hard_text": row["text"],
        "profession": prompts.PROFESSIONS.index(row["profession"]),
        "gender": prompts.GENDERS.index(row["gender"]),
    },
    "truthfulqa": lambda row: {
        "question": row["question"],
        "mc2_targets": {
            "choices": [*row["correct_answers"], *row["incorrect_answers"]],
            "labels": [1] * len(row["correct_answers"]) + [0] * len(row["incorrect_answers"]),
        },
    },
    "epistemic": lambda row: {"inputs": row["input"], "targets": [row["target"]]},
    "wikidataqa": lambda row: {"inputs": row["input"], "targets": row["target"]},
}
HUB["bios_profession"] = HUB["bios_gender"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_from_the_hub_make_the_documents_of_the_file(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = data.documents(name)
    asked: list[tuple[str, str]] = []

    def load_dataset(kind: str, data_files: str, split: str) -> list[Mapping[str, Any]]:
        assert kind == "parquet"
        asked.append((data_files, split))
        return [HUB[name](row) for row in ROWS[name]] if len(asked) == 1 else []

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    monkeypatch.delenv(data.FOLDER)
    found = data.documents(name)
    for part, docs in found.items():
        assert [{**doc, "relation": ""} if "relation" in doc else doc for doc in docs] == expected[part]
    source = data.SOURCES[name]
    start = f"hf://datasets/{source.hub}@refs%2Fconvert%2Fparquet"
    assert asked == [
        (f"{start}/{table.path}/*.parquet", f"train[:{table.rows}]" if table.rows else "train")
        for table in source.tables
    ]


def test_the_documents_own_task_works_and_its_tables_name_every_task(folder: Path, tmp_path_factory: Any) -> None:
    text = (Path(__file__).parents[1] / "docs" / "laser-tasks.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)
    place = tmp_path_factory.mktemp("mine")
    (place / "mine.yaml").write_text(example.replace("/data/mine", str(folder)))
    (mine,), (own,) = tasks.build(["my_fever"], include=[place]), tasks.build(["laser_fever"])
    assert mine.requests == own.requests
    assert mine.result("r", answered(mine)).metrics == own.result("r", answered(own)).metrics
    for path in HOME.glob("*.yaml"):
        name = path.stem if path.stem.startswith("laser") else f"laser_{path.stem}"
        assert f"`{name}`" in text or f"`{name.removesuffix('_validation')}`" in text


# Metrics -------------------------------------------------------------------------------------------------------


def answered(task: tasks.TaskSet, seed: int = 0) -> dict[str, Response]:
    """Answers from a random number generator."""
    rng = random.Random(seed)
    texts = [" yes, I think", " I know", " Spain.", " in Chief of protocol"]
    return {
        request.fingerprint: Response(-1 - 9 * rng.random(), rng.random() < 0.5, rng.choice(texts), rng.randint(1, 4))
        for request in task.requests
    }


@pytest.fixture
def replying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges are told token counts and ranks beside the harness's pair."""
    real = tasks._answer

    def answer(request: Request, response: Response) -> Any:
        if request.kind == "loglikelihood":
            return Reply(response.loglikelihood, response.is_greedy, response.tokens, 3 * response.tokens)
        return real(request, response)

    monkeypatch.setattr(tasks, "_answer", answer)


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_classification_is_judged_as_the_paper_does_and_honestly(name: str, folder: Path, replying: None) -> None:
    (task,) = tasks.build([f"laser_{name}"])
    wording = "paper" if name == "truthfulqa" else "code"
    docs = data.documents(name, wording)["test"]
    responses = answered(task)
    result = task.result("r", responses)
    labels = docs[0]["choices"]
    shares = dict.fromkeys(labels, 0.0)
    right: list[list[float]] = [[] for _ in labels]
    for row, doc in enumerate(docs):
        asked = [Request("loglikelihood", doc["prompt"], " " + label) for label in labels]
        found = [responses[request.fingerprint] for request in asked]
        logs = [response.loglikelihood for response in found]
        predicted = logs.index(max(logs))
        shares[labels[predicted]] += 1 / len(docs)
        right[doc["gold"]].append(float(predicted == doc["gold"]))
        mass = math.log(sum(map(math.exp, logs)))
        expected = {
            "acc": float(predicted == doc["gold"]),
            "balanced_acc": float(predicted == doc["gold"]),
            "answer_loss": -logs[doc["gold"]],
            "log_loss": -logs[doc["gold"]] / found[doc["gold"]].tokens,
            "choice_loss": mass - logs[doc["gold"]],
        }
        assert {key: result.scores[f"{key},none"][row] for key in expected} == pytest.approx(expected)
    recalls = [sum(some) / len(some) for some in right if some]
    assert result.metrics["balanced_acc,none"] == pytest.approx(sum(recalls) / len(recalls))
    assert {label: result.metrics[f"predicted_{label},none"] for label in labels} == pytest.approx(shares)
    assert task.metric == "acc,none" and task.chance == pytest.approx(1 / len(labels))
    assert task.majority == pytest.approx(metrics.majority(docs))


def test_a_constant_answer_gets_its_share_but_no_balance(folder: Path) -> None:
    (task,) = tasks.build(["laser_fever"])
    constant = {r.fingerprint: Response(-1.0 if r.continuation == " false" else -2.0) for r in task.requests}
    result = task.result("r", constant)
    assert result.metrics["acc,none"] == task.majority
    assert result.metrics["balanced_acc,none"] == 0.5
    assert result.metrics["predicted_false,none"] == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2))
def test_weighed_scores_average_to_the_balanced_accuracy(pairs: list[tuple[int, int]]) -> None:
    right = [float(gold == predicted) for gold, predicted in pairs]
    weighed = metrics.balanced(right, [gold for gold, _ in pairs])
    assert sum(weighed) / len(pairs) == pytest.approx(metrics.balanced_accuracy(pairs))  # type: ignore[arg-type]
    assert metrics.balanced([None], [0]) == (None,)
    change = statistics.paired_bootstrap(weighed, [0.0] * len(pairs), n=50)
    assert change.value == pytest.approx(metrics.balanced_accuracy(pairs))


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (" I know", "no", {"acc": 1, "acc_words": 0, "acc_with_prompt": 1, "in_prompt": 1}),
        (" I see", "no", {"acc": 0, "acc_words": 0, "acc_with_prompt": 1, "in_prompt": 1}),
        (" No.", "no", {"acc": 1, "acc_words": 1, "acc_with_prompt": 1, "in_prompt": 1}),
        (" the U.S. today", "U.S.", {"acc": 1, "acc_words": 1, "acc_with_prompt": 1, "in_prompt": 0}),
        (" Rome", "Paris", {"acc": 0, "acc_words": 0, "acc_with_prompt": 0, "in_prompt": 0}),
    ],
)
def test_an_answer_is_looked_for_in_the_new_text_and_as_the_authors_do(
    text: str, answer: str, found: dict[str, int]
) -> None:
    doc = {"prompt": "Is it so, yes or no? The answer is", "answer": answer}
    assert metrics.answer(doc, [Reply(-3.0, True, 2), text]) == {
        **found,
        "acc_greedy": 1,
        "answer_loss": 3,
        "log_loss": 1.5,
    }
    assert "log_loss" not in metrics.answer(doc, [(-3.0, True), text])


def test_an_open_question_is_asked_for_likelihood_and_for_text(folder: Path) -> None:
    (task,) = tasks.build(["laser_wikidataqa"])
    doc = data.documents("wikidataqa")["test"][0]
    assert task.requests[:2] == (
        Request("loglikelihood", doc["prompt"], " Spain", RANK),
        Request("generate", doc["prompt"], options='{"do_sample": false, "max_gen_toks": 10, "until": []}'),
    )
    (task,) = tasks.build(["laser_hotpotqa"])
    assert json.loads(task.requests[1].options)["max_gen_toks"] == 15
    assert (task.kind, task.metric, len(task.requests)) == ("generate_until", "acc,none", 2 * task.n)
    (fast,) = tasks.build(["laser_hotpotqa_likelihood"])
    assert fast.requests == task.requests[::2]
    responses = answered(task)
    assert fast.result("r", responses).scores["acc,none"] == task.result("r", responses).scores["acc_greedy,none"]


def test_facts_have_top_k_only_where_ranks_are_known(folder: Path, replying: None) -> None:
    (task,) = tasks.build(["laser_counterfact"])
    result = task.result("r", answered(task))
    tokens = [answered(task)[request.fingerprint].tokens for request in task.requests]
    assert result.scores["top5,none"] == tuple(float(3 * n < 5) for n in tokens)
    assert result.scores["top10,none"] == tuple(float(3 * n < 10) for n in tokens)
    assert metrics.word({}, [(-2.0, False)]) == {"acc": 0.0, "answer_loss": 2.0}


@pytest.mark.parametrize("name", NAMES)
def test_scores_average_to_the_metrics_and_one_broken_answer_spoils_them(name: str, folder: Path) -> None:
    (task,) = tasks.build([f"laser_{name}_validation"])
    responses = answered(task)
    result = task.result("r", responses)
    assert result.n == task.n == len(data.documents(name)["validation"])
    for key, column in result.scores.items():
        assert len(column) == task.n and None not in column
        if key != "balanced_acc,none":
            assert sum(column) / task.n == pytest.approx(result.metrics[key])  # type: ignore[arg-type]
    responses[task.requests[0].fingerprint] = Response(math.nan)
    spoilt = task.result("r", responses)
    assert spoilt.nonfinite == 1 and math.isnan(spoilt.metrics["acc,none"])


def test_metrics_equal_the_harness(folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=tiny_model(), tokenizer=tiny_tokenizer(), batch_size=8)
    manager = TaskManager(include_path=str(HOME), include_defaults=False)
    names = ["laser_wikidataqa", "laser_counterfact", "laser_epistemic"]
    theirs = simple_evaluate(model=model, tasks=names, limit=2, task_manager=manager, bootstrap_iters=0)
    for task in tasks.build(names, limit=2):
        responses: dict[str, Response] = {}
        for sample in theirs["samples"][task.name]:
            for arguments, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
                if isinstance(answer, str):
                    options = json.dumps(arguments[1], sort_keys=True)
                    request, response = Request("generate", arguments[0], options=options), Response(text=answer)
                else:
                    options = "" if task.kind == "multiple_choice" else RANK
                    request, response = Request("loglikelihood", *arguments, options), Response(*answer)
                responses[request.fingerprint] = response
        result = task.result("r", responses)
        for key, value in result.metrics.items():
            if "stderr" not in key:
                assert theirs["results"][task.name][key] == pytest.approx(value), key


# The real thing ------------------------------------------------------------------------------------------------


def test_the_real_files_have_the_known_counts() -> None:
    named = os.environ.get(data.FOLDER, "")
    if not (Path(named) / FILES["fever"]).is_file() or not named:
        pytest.skip(f"{data.FOLDER} names no folder with the benchmarks")
    docs = {name: [doc for part in data.documents(name, folder=named).values() for doc in part] for name in NAMES}
    golds = {name: [doc["gold"] for doc in docs[name]] for name in CLASSIFIED}
    assert (golds["fever"].count(0), golds["fever"].count(1)) == (3258, 3252)  # the authors' 6,510 from this split
    assert (golds["epistemic"].count(0), golds["epistemic"].count(1)) == (741, 1259)
    assert len({doc["record"] for doc in docs["counterfact"]}) == 21_919
