"""Text by a decoder where it pays: the same text as the plain runtime's, and the plain runtime wherever it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import families
from impasto import fast as fast_module
from impasto.errors import UnsupportedModel
from impasto.fast import fast, hastened, pays
from impasto.generation import Size, generate, respond
from impasto.result import Request
from impasto.schedule import Schedule
from tiny import tiny_model, tiny_tokenizer

SCHEDULE = "0 {1,2} 3"
PROMPTS = ["one", "two and three", "and so on and on", "x"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


class Always:
    """Gives a decoder whatever the work, and notes what it was."""

    def __init__(self) -> None:
        self.asked: list[Size] = []

    def __call__(self, model: Any, schedule: Any, size: Size) -> Any:
        self.asked.append(size)
        return fast(model, schedule, batch=size.rows, context=size.columns)


@pytest.mark.parametrize("budget", [None, 60, 1])
def test_texts_are_the_plain_runtimes(model: Any, budget: int | None) -> None:
    tokenizer, always = tiny_tokenizer(), Always()
    options: dict[str, Any] = {"max_new_tokens": 12, "until": ["a"], "token_budget": budget}
    plain = generate(model, tokenizer, SCHEDULE, PROMPTS, **options)
    heard: dict[int, str] = {}

    def hear(place: int, piece: str) -> None:
        heard[place] = heard.get(place, "") + piece

    made = generate(model, tokenizer, SCHEDULE, PROMPTS, **options, hasten=always, on_token=hear)
    assert [(one.text, one.new_token_ids) for one in made] == [(one.text, one.new_token_ids) for one in plain]
    assert [heard.get(i, "") for i in range(4)] == [one.text for one in made]
    rows = {None: 4, 60: 60 // 28, 1: 1}[budget]
    assert always.asked == [Size(rows, 28, 12 * -(-4 // rows))]


def test_requests_that_sample_go_another_way(model: Any) -> None:
    requests = [
        Request("generate", "one two", options='{"max_gen_toks": 5}'),
        Request("generate", "one two", options='{"max_gen_toks": 5, "do_sample": true, "temperature": 1.0}'),
    ]
    always = Always()
    made = respond(model, tiny_tokenizer(), SCHEDULE, requests, hasten=always)
    assert made == respond(model, tiny_tokenizer(), SCHEDULE, requests)
    assert [size.rows for size in always.asked] == [1]


@pytest.mark.parametrize("problem", [UnsupportedModel("moody"), torch.OutOfMemoryError("out of memory"), None])
def test_the_plain_runtime_writes_what_is_left(model: Any, problem: Exception | None) -> None:
    class Broken:
        def __enter__(self) -> Any:
            assert problem is not None
            raise problem

        def __exit__(self, *_: Any) -> None: ...

    found = None if problem is None else Broken()
    made = generate(model, tiny_tokenizer(), SCHEDULE, PROMPTS, max_new_tokens=4, hasten=lambda *_: found)  # type: ignore[arg-type,return-value]
    plain = generate(model, tiny_tokenizer(), SCHEDULE, PROMPTS, max_new_tokens=4)
    assert [one.new_token_ids for one in made] == [one.new_token_ids for one in plain]


def test_other_errors_are_not_swallowed(model: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        generate(model, tiny_tokenizer(), SCHEDULE, PROMPTS, max_new_tokens=4, hasten=broken)


def test_the_mean_cache_has_no_decoder(model: Any) -> None:
    always = Always()
    generate(model, tiny_tokenizer(), SCHEDULE, PROMPTS, max_new_tokens=4, kv="mean", hasten=always)
    assert always.asked == []


def test_a_model_that_is_split_over_processes_is_not_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_module, "input_device", lambda model: torch.device("cuda"))
    assert pays(model, SCHEDULE, Size(1, 10, 10_000))
    monkeypatch.setattr(next(model.parameters()), "device_mesh", "two processes", raising=False)
    assert not pays(model, SCHEDULE, Size(1, 10, 10_000))


def test_long_work_on_a_gpu_pays_and_short_work_does_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pays(model, SCHEDULE, Size(1, 10, 10**9)) and hastened(model, SCHEDULE, Size(1, 10, 10**9)) is None
    monkeypatch.setattr(fast_module, "input_device", lambda model: torch.device("cuda"))
    answers = [pays(model, SCHEDULE, Size(1, 10, steps)) for steps in (10, 100, 1000, 10_000)]
    assert answers == sorted(answers) and answers[0] is False and answers[-1] is True


def test_long_rows_in_large_batches_do_not_pay_where_heads_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_module, "input_device", lambda model: torch.device("cuda"))
    model = nn.Linear(2, 2).to(torch.bfloat16)
    shared = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    for config, answers in (
        (shared, [True, True, False]),  # measured: a step takes 3.84, 3.29 and 18.4 ms, a plain one about 15
        (shared | {"head_dim": 16}, [True, True, True]),
        (shared | {"num_key_value_heads": 14}, [True, True, True]),
        ({}, [True, True, True]),
    ):
        model.config = SimpleNamespace(**config)  # type: ignore[assignment]
        sizes = [Size(32, 161, 10_000), Size(1, 4129, 10_000), Size(32, 4129, 10_000)]
        assert [pays(model, Schedule.identity(24), size) for size in sizes] == answers


@pytest.mark.parametrize(("family", "answer"), [("llama", True), ("gpt_oss", False)])
def test_copies_count_where_attention_is_not_ours(family: str, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = families.shared(family), Size(32, 400_000, 10_000)
    monkeypatch.setattr(fast_module, "input_device", lambda model: torch.device("cuda"))
    assert not pays(model, "0:6", long)
    monkeypatch.setattr("impasto.rows.attended", lambda query: True)
    assert pays(model, "0:6", long) == answer
