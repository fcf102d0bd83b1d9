"""Laws of tasks.py: our requests and metrics are the harness's own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from impasto import fetch, tasks
from impasto.errors import UnknownTask, UsageError
from impasto.result import Request, Response
from tiny import tiny_model, tiny_tokenizer

TINY = ("impasto_tiny_choice", "impasto_tiny_lastword", "impasto_tiny_generate", "impasto_tiny_rolling")


@pytest.fixture(scope="module")
def harness_model() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=tiny_model(), tokenizer=tiny_tokenizer(), batch_size=8)


def answers(samples: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Response]:
    """What the harness's own model answered, read from its log, by request fingerprint."""
    found: dict[str, Response] = {}
    for sample in samples:
        for arguments, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            if kind == "generate_until":
                options = json.dumps(arguments[1], sort_keys=True, ensure_ascii=False)
                request, response = Request("generate", arguments[0], options=options), Response(text=answer)
            elif kind == "loglikelihood_rolling":
                request, response = Request("rolling", "", arguments[0]), Response(answer)
            else:
                request, response = Request("loglikelihood", *arguments), Response(*answer)
            found[request.fingerprint] = response
    return found


def made_up(task: tasks.TaskSet, seed: int = 0) -> dict[str, Response]:
    """Responses from a random number generator."""
    rng = random.Random(seed)
    return {
        request.fingerprint: Response(-10 * rng.random(), rng.random() < 0.5, text=rng.choice(["sun", " moon "]))
        for request in task.requests
    }


@pytest.mark.parametrize("shots", [None, 3])
def test_metrics_equal_the_harness(harness_model: Any, shots: int | None) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(Path(tasks.__file__).parent / "benchmarks"), include_defaults=False)
    names = [name for name in TINY if shots is None or name in ("impasto_tiny_choice", "impasto_tiny_generate")]
    expected = simple_evaluate(
        model=harness_model, tasks=names, num_fewshot=shots, limit=6, task_manager=manager, bootstrap_iters=2
    )
    for task in tasks.build(names, limit=6, num_fewshot=shots):
        responses = answers(expected["samples"][task.name], task.kind)
        assert set(responses) == {request.fingerprint for request in task.requests}
        result = task.result("recipe", responses)
        theirs = {
            name: value
            for name, value in expected["results"][task.name].items()
            if "," in name and isinstance(value, float | int)
        }
        assert dict(result.metrics) == {name: theirs[name] for name in result.metrics}
        assert set(theirs) - set(result.metrics) <= {"perplexity_stderr,none"}  # a bootstrap there
        assert task.shots == expected["n-shot"][task.name]


@pytest.mark.parametrize("name", TINY)
def test_results_do_not_depend_on_what_was_asked_before(name: str) -> None:
    (task,) = tasks.build([name])
    first, other = made_up(task, 1), made_up(task, 2)
    before = task.result("a", first)
    task.result("b", other)
    assert task.result("a", first) == before
    assert before.n == task.n
    assert all(len(column) == task.n for column in before.scores.values())


def test_building_twice_asks_the_same() -> None:
    again = [tasks.build(TINY, num_fewshot=2) for _ in range(2)]
    assert [task.protocol for task in again[0]] == [task.protocol for task in again[1]]
    assert [task.requests for task in again[0]] == [task.requests for task in again[1]]


def test_protocol_changes_with_what_is_asked() -> None:
    name = "impasto_tiny_choice"
    variants = [
        tasks.build([name], **options)[0].protocol
        for options in ({}, {"limit": 5}, {"num_fewshot": 2}, {"num_fewshot": 2, "seed": 5})
    ]
    assert len(set(variants)) == 4


def test_scores_average_to_the_metrics() -> None:
    for task in tasks.build(TINY):
        result = task.result("r", made_up(task))
        for name, column in result.scores.items():
            values = [value for value in column if value is not None]
            mean = sum(values) / len(values)
            if name == "perplexity,none":
                assert math.exp(mean) == pytest.approx(result.metrics[name])
            elif "perplexity" not in name and "bits" not in name:
                assert mean == pytest.approx(result.metrics[name])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_response_that_is_not_finite_spoils_its_example_and_the_metrics(value: float) -> None:
    (task,) = tasks.build(["impasto_tiny_choice"])
    responses = made_up(task)
    responses[task.requests[0].fingerprint] = Response(value)
    result = task.result("r", responses)
    assert result.nonfinite == 1
    assert math.isnan(result.metrics["acc,none"]) and math.isnan(result.metrics["acc_stderr,none"])
    assert result.scores["acc,none"][0] is None
    assert None not in result.scores["acc,none"][1:]


@pytest.mark.parametrize("name", TINY)
def test_nothing_finite_at_all_still_gives_a_result(name: str) -> None:
    (task,) = tasks.build([name], limit=4)
    result = task.result("r", {request.fingerprint: Response() for request in task.requests})
    assert result.nonfinite == len(task.requests)
    assert result.metrics and all(math.isnan(value) for value in result.metrics.values())
    assert all(column == (None,) * 4 for column in result.scores.values())


def test_truncation_is_counted_and_a_missing_response_refused() -> None:
    (task,) = tasks.build(["impasto_tiny_lastword"], limit=3)
    responses = {request.fingerprint: Response(-1.0, truncated=True) for request in task.requests}
    assert task.result("r", responses).truncated == len(task.requests)
    del responses[task.requests[0].fingerprint]
    with pytest.raises(ValueError, match="impasto_tiny_lastword: 1 of 3 requests have no response"):
        task.result("r", responses)


def test_guessing_levels() -> None:
    choice, word, text, rolling = tasks.build(TINY)
    rows = [json.loads(line) for line in (tasks._HERE / "tiny" / "choice.jsonl").read_text().splitlines()]
    assert choice.chance == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / len(rows))
    golds = [row["gold"] for row in rows]
    assert choice.majority == max(golds.count(gold) for gold in golds) / len(golds)
    assert (word.chance, text.chance, rolling.chance) == (0.0, 0.0, None)
    assert [task.metric for task in (choice, word, text, rolling)] == [
        "acc,none",
        "acc,none",
        "exact_match,strict",
        "word_perplexity,none",
    ]
    assert not rolling.higher_is_better


def test_generation_options_are_canonical_json() -> None:
    (task,) = tasks.build(["impasto_tiny_generate"], limit=1)
    assert task.requests[0].options == '{"do_sample": false, "max_gen_toks": 8, "until": ["\\n"]}'


def test_an_included_file_wins(tmp_path: Path) -> None:
    own = (tasks._HERE / "tiny_choice.yaml").read_text().replace("version: 1.0", "version: 7")
    (tmp_path / "mine.yaml").write_text(own)
    (task,) = tasks.build(["impasto_tiny_choice"], include=[tmp_path])
    assert (task.version, task.source) == ("7", "included file mine.yaml")


def test_a_group_stands_for_its_members_and_doubles_are_asked_once(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("group: both\ntask: [impasto_tiny_choice, impasto_tiny_rolling]\n")
    built = tasks.build(["both", "impasto_tiny_choice"], include=[tmp_path], limit=2)
    assert [task.name for task in built] == ["impasto_tiny_choice", "impasto_tiny_rolling"]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^limit must be at least 1, not 0$"):
        tasks.build(TINY, limit=0)
    with pytest.raises(UsageError, match=r"^the number of few-shot examples cannot be negative: -1$"):
        tasks.build(TINY, num_fewshot=-1)
    with pytest.raises(UsageError, match=r"^no folder .*nowhere to include tasks from$"):
        tasks.build(TINY, include=[tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="the model's tokenizer has none"):
        tasks.build(TINY, tokenizer=tiny_tokenizer(), apply_chat_template=True)
    with pytest.raises(UsageError, match="impasto_tiny_choice cannot be asked with 99 examples per prompt"):
        tasks.build(["impasto_tiny_choice"], num_fewshot=99)


def test_an_unknown_name_gets_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tasks._manager
    monkeypatch.setattr(tasks, "_manager", lambda include, harness: real(include, harness=False))  # 14,000 files less
    with pytest.raises(UnknownTask, match=r"^no task 'impasto_tiny_choise'; the nearest: impasto_tiny_choice"):
        tasks.build(["impasto_tiny_choise"])


def test_chat_template_wraps_prompts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (task,) = tasks.build(
        ["impasto_tiny_choice"], limit=1, num_fewshot=1, tokenizer=tokenizer, apply_chat_template=True
    )
    context = task.requests[0].context
    assert context.count("[user]") == 2 and context.count("[assistant]") == 2 and context.endswith("[assistant]")


def test_random_state_output_and_loggers_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    import numpy as np

    random.seed(3)
    np.random.seed(3)
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    state, numbers = random.getstate(), np.random.get_state()[1].copy()
    (task,) = tasks.build(["impasto_tiny_lastword"])
    task.result("r", made_up(task))
    assert random.getstate() == state
    assert (np.random.get_state()[1] == numbers).all()
    assert logging.getLogger("lm_eval").level == logging.INFO
    assert capfd.readouterr() == ("", "")


def test_the_same_shots_for_every_question_but_never_the_question_itself() -> None:
    from impasto.benchmarks.loader import SameShots

    docs = [{"q": number} for number in range(20)]
    sampler = SameShots(docs).set_rnd(1234)
    usual = sampler.sample(5, eval_doc={"q": -1})
    for doc in docs:
        drawn = sampler.sample(5, eval_doc=doc)
        assert doc not in drawn and len(drawn) == 5
        assert drawn == usual or doc in usual
        assert [one for one in usual if one != doc] == list(drawn[:4] if doc in usual else drawn)


def test_default_tasks_are_known_and_of_both_kinds() -> None:
    known: Mapping[str, tasks.Benchmark] = tasks.BENCHMARKS
    assert set(tasks.DEFAULT_TASKS) | set(tasks.PAPER_TASKS) <= set(known)
    assert {known[name].order_sensitive for name in tasks.DEFAULT_TASKS} == {True, False}


def test_every_listed_benchmark_but_the_hubs_has_a_definition_here() -> None:
    found = {info.name for info in _own_infos()}
    assert set(tasks.BENCHMARKS) - {"gsm8k"} <= found
    assert set(TINY) <= found


def _own_infos() -> list[tasks.TaskInfo]:
    manager = tasks._manager((), harness=False)
    return [
        tasks.TaskInfo(name, tasks._kind(entry), tasks._origin(entry.yaml_path), tasks._description(name, entry))
        for name, entry in manager.task_index.items()
    ]


def test_fetched_benchmarks_ask_the_published_prompts() -> None:
    if not fetch.is_fetched("benchmarks"):
        pytest.skip("the benchmarks are not in the cache: impasto fetch benchmarks")
    (task,) = tasks.build(["basic_skills_arithmetic"], limit=16)
    assert task.requests[0] == Request(
        "loglikelihood",
        "47 + 12 = 59\n\n16 + 8 / 4 = 18\n\n24 / 6 = 4\n\n8 + 12 = 20\n\n7 - 4 + 10 = 13\n\n4 * 8 =",
        " 40",
    )
    assert "8 / 4 = 2\n\n" not in task.requests[-1].context  # the sixteenth question is an example for the others


def test_parts_of_a_task_are_disjoint_and_judge_as_the_whole():
    for task in tasks.build(TINY[:3]):
        parts = task.parted(0.4)
        assert parts[0].n + parts[1].n == task.n
        asked = [{r.fingerprint for r in p.requests} for p in parts]
        assert asked[0] | asked[1] == {r.fingerprint for r in task.requests}
        responses = made_up(task)
        whole = task.result("r", responses)
        for key in whole.scores:
            both = sorted([*parts[0].result("r", responses).scores[key], *parts[1].result("r", responses).scores[key]])
            assert both == sorted(whole.scores[key])
        assert len({task.protocol, parts[0].protocol, parts[1].protocol}) == 3
    (choice,) = tasks.build(TINY[:1])
    golds = choice.golds()
    assert choice.majority == max(golds.count(g) for g in golds) / choice.n
    assert tasks.build(TINY[1:2])[0].golds() is None
    limited = tasks.build(TINY[:1], limit=10)[0].parted(0.4)
    for few, whole in zip(limited, choice.parted(0.4), strict=True):
        assert {r.fingerprint for r in few.requests} <= {r.fingerprint for r in whole.requests}
