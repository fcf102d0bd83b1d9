"""Generated text: equal to the slowest way of making it, whatever the batch, the schedule and the family."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import build
from impasto import generation
from impasto.anatomy import anatomy
from impasto.errors import OutOfMemory, UnsupportedModel, UsageError
from impasto.generation import context_window, generate, respond
from impasto.result import Request
from impasto.runtime import scheduled

SCHEDULE = "0 2 1 {2:5}x2 3x2 5"
# full and sliding windows, learned positions, alibi, tuple outputs, a convolution's state, experts
FAMILIES = ("llama", "gemma3_text", "mistral", "gpt2", "opt", "bloom", "mpt", "gptj", "lfm2", "qwen2_moe")
PROMPTS = (
    list(range(10, 40)),
    [7, 9],
    list(range(30, 41)),
    [50],
    [20, 21, 22, 23, 24] * 3,
    [60, 61, 62, 63],
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that characters of several tokens and broken ones occur."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {text: i for i, text in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", vocab_size=259)


def slowly(model: Any, tokenizer: Any, schedule: str, prompt: list[int], count: int, until: Any = ()) -> list[int]:
    """One prompt, no cache, no padding: a full forward pass per token."""
    ids, new = list(prompt), []
    with scheduled(model, schedule), torch.no_grad():
        while len(new) < count:
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id or any(stop in tokenizer.decode(new) for stop in until):
                break
    return new


def stop_in(model: Any, tokenizer: Any, schedule: str, prompt: list[int], at: int = 3) -> str:
    """A text that ends this prompt's answer before its limit."""
    new = slowly(model, tokenizer, schedule, prompt, 12)
    return str(tokenizer.decode(new[at : at + 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_equal_the_slow_loop(family: str, tokenizer: Any) -> None:
    model = build(family, vocab_size=259)
    until = [stop_in(model, tokenizer, SCHEDULE, PROMPTS[0])]
    made = generate(model, tokenizer, SCHEDULE, PROMPTS, max_new_tokens=12, until=until)
    wanted = [slowly(model, tokenizer, SCHEDULE, prompt, 12, until) for prompt in PROMPTS]
    assert [list(row.new_token_ids) for row in made] == wanted
    assert len({row.tokens for row in made}) > 1  # rows did leave the batch at different times


@pytest.mark.parametrize("schedule", ["0:6", "0 5", "(1:4).mlp 5", "sum{0 1, 2 3} 4x3", "5:0"])
@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_no_batching_changes_the_answer(schedule: str, token_budget: int, model: Any, tokenizer: Any) -> None:
    made = generate(model, tokenizer, schedule, PROMPTS, max_new_tokens=8, token_budget=token_budget)
    assert [list(r.new_token_ids) for r in made] == [slowly(model, tokenizer, schedule, p, 8) for p in PROMPTS]


def test_shared_slots_generate_in_batches_as_alone(model: Any, tokenizer: Any) -> None:
    together = generate(model, tokenizer, SCHEDULE, PROMPTS, max_new_tokens=8, kv="mean")
    alone = [generate(model, tokenizer, SCHEDULE, [p], max_new_tokens=8, kv="mean")[0] for p in PROMPTS]
    assert [r.new_token_ids for r in together] == [r.new_token_ids for r in alone]


CONTEXTS = [
    "the quick brown fox",
    "a",
    "Zwölf Boxkämpfer jagen Viktor",
    "1 + 1 =",
    "x" * 150,  # longer than the window
    "a longer context, to be cut from the left: " * 2,
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_untouched_schedule_answers_as_the_harness_does(batch_size: int, model: Any, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    ends = [
        stop_in(model, tokenizer, "0:6", harness.tok_encode(c), at) for c, at in zip(CONTEXTS, (2, 4), strict=False)
    ]
    options: list[dict[str, Any]] = [
        {"until": ends, "max_gen_toks": 20},
        {"until": "\n\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.0},
        {"max_new_tokens": 5, "temperature": 0},
        {"max_gen_toks": 12, "repetition_penalty": 1.7},
    ]
    asked = [(context, chosen) for chosen in options for context in CONTEXTS]
    if batch_size > 1:
        asked = asked[:18]  # padding is penalised in the harness's batches
    instances = [Instance("generate_until", {}, (c, json.loads(json.dumps(o))), 0) for c, o in asked]
    wanted = harness.generate_until(instances, disable_tqdm=True)
    requests = [Request("generate", c, options=json.dumps(o)) for c, o in asked]
    told: dict[int, str | None] = {}
    made = respond(
        model,
        tokenizer,
        "0:6",
        requests,
        encode=harness.tok_encode,
        on_response=lambda i, r: told.__setitem__(i, r.text),
    )
    assert [r.text for r in made] == wanted
    assert [told[i] for i in range(len(made))] == wanted
    assert [r.truncated for r in made] == [
        len(c.encode()) > 128 - r.tokens and len(c) == 150 for c, r in zip((c for c, _ in asked), made, strict=True)
    ]
    assert context_window(model, tokenizer) == harness.max_length == 128


def test_an_end_token_ends_a_row(model: Any, tokenizer: Any) -> None:
    prompt = PROMPTS[0]
    free = slowly(model, tokenizer, "0:6", prompt, 6)
    model.generation_config.eos_token_id = [2, free[2]]
    try:
        made = generate(model, tokenizer, "0:6", [prompt, PROMPTS[1]], max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = 2
    assert list(made[0].new_token_ids) == free[: free.index(free[2]) + 1]
    assert made[0].tokens == len(made[0].new_token_ids)


@pytest.mark.parametrize("failures", [1, 3])
def test_running_out_of_memory_halves_the_batch_and_loses_nothing(
    failures: int, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generate(model, tokenizer, SCHEDULE, PROMPTS, max_new_tokens=6)
    sizes: list[int] = []
    forward = generation._Writer.next_tokens
    calls = 0

    def fails(self: Any, ids: torch.Tensor, pads: Any, cache: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if ids.shape[1] > 1:
            sizes.append(len(ids))
        if len(sizes) <= failures and len(ids) > 1 and calls % 3 == 0:  # in the middle of an answer
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, ids, pads, cache)

    monkeypatch.setattr(generation._Writer, "next_tokens", fails)
    pieces: list[list[str]] = [[] for _ in PROMPTS]
    made = generate(
        model, tokenizer, SCHEDULE, PROMPTS, max_new_tokens=6, on_token=lambda i, text: pieces[i].append(text)
    )
    assert [r.new_token_ids for r in made] == [r.new_token_ids for r in wanted]
    assert ["".join(p) for p in pieces] == [r.text for r in wanted]
    assert sizes[0] == len(PROMPTS) and sizes[1] <= len(PROMPTS) // 2


def test_a_prompt_too_large_for_memory_is_named(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(generation._Writer, "next_tokens", fails)
    with pytest.raises(OutOfMemory, match="a single prompt of 30 tokens with 4 to generate does not fit"):
        generate(model, tokenizer, "0:6", PROMPTS, max_new_tokens=4)


def test_other_errors_are_not_taken_for_lack_of_memory(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(generation._Writer, "next_tokens", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, tokenizer, "0:6", PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pieces_of_a_stream_are_its_text(family: str, tokenizer: Any) -> None:
    model = build(family, vocab_size=259)
    new = tokenizer.decode(slowly(model, tokenizer, "0:6", PROMPTS[0], 30))
    until = [new[9:12]]  # some tokens long, so that its beginning must be held back
    pieces: list[list[str]] = [[] for _ in PROMPTS]
    made = generate(
        model,
        tokenizer,
        "0:6",
        PROMPTS,
        max_new_tokens=30,
        until=until,
        on_token=lambda i, text: pieces[i].append(text),
    )
    assert ["".join(p) for p in pieces] == [row.text for row in made]
    assert all(piece for row in pieces for piece in row)
    assert made[0].text == new.split(until[0])[0]


def test_times_and_counts(model: Any, tokenizer: Any) -> None:
    (row,) = generate(model, tokenizer, "0:6", ["hello"], max_new_tokens=5)
    assert row.tokens == len(row.new_token_ids) <= 5
    assert row.seconds_prefill > 0 and row.seconds_decode >= 0
    assert generate(model, tokenizer, "0:6", [], max_new_tokens=5) == []


def test_an_empty_context_begins_with_the_first_token(model: Any, tokenizer: Any) -> None:
    empty, first = generate(model, tokenizer, "0:6", ["", [tokenizer.bos_token_id]], max_new_tokens=5)
    assert empty.new_token_ids == first.new_token_ids


def test_sampling_is_seeded_by_the_request(model: Any, tokenizer: Any) -> None:
    options = json.dumps({"do_sample": True, "temperature": 5.0, "max_gen_toks": 12})
    requests = [Request("generate", c, options=options) for c in ("one", "two", "three")]
    state = torch.random.get_rng_state()
    there = respond(model, tokenizer, SCHEDULE, requests)
    back = respond(model, tokenizer, SCHEDULE, requests[::-1])[::-1]
    assert [r.text for r in there] == [r.text for r in back]
    greedy = [Request("generate", r.context, options='{"max_gen_toks": 12}') for r in requests]
    assert [r.text for r in there] != [r.text for r in respond(model, tokenizer, SCHEDULE, greedy)]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}, {"do_sample": True, "temperature": 1.0}])
def test_no_text_comes_from_logits_that_are_not_finite(extra: dict[str, Any], tokenizer: Any) -> None:
    broken = build("llama", vocab_size=259)
    anatomy(broken)
    with torch.no_grad():
        broken.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    asked = [Request("generate", c, options=json.dumps({"max_gen_toks": 5, **extra})) for c in ("one", "three")]
    assert [r.text for r in respond(broken, tokenizer, "0:6", asked)] == [None, None]
    assert all(respond(broken, tokenizer, "0:3 4:6", asked)[i].text is not None for i in range(2))
    (row,) = generate(broken, tokenizer, "0:6", ["one"], max_new_tokens=5)
    assert (row.finite, row.tokens, row.text) == (False, 0, "")


@pytest.mark.parametrize(
    ("options", "limit", "until", "extra"),
    [
        ("", 256, (), {}),
        ('{"until": "x", "max_gen_toks": 7}', 7, ("x",), {}),
        ('{"max_tokens": 3, "max_gen_toks": 7, "until": ["a", "b"]}', 7, ("a", "b"), {}),
        ('{"do_sample": false, "temperature": 0.7, "top_p": 0.9}', 256, (), {}),
        ('{"temperature": 0.7}', 256, (), {"do_sample": True, "temperature": 0.7}),
        ('{"num_beams": 2}', 256, (), {"num_beams": 2}),
    ],
)
def test_options_are_read_by_the_harness_rules(options: str, limit: int, until: Any, extra: Any) -> None:
    read = generation._Options.read(options)
    assert (read.limit, read.until, dict(read.extra)) == (limit, until, extra)


def test_what_cannot_be_is_said(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="leave no room for a prompt in the model's window of 128"):
        generate(model, tokenizer, "0:6", ["a"], max_new_tokens=128)
    with pytest.raises(UsageError, match="at least one token must be generated, not 0"):
        generate(model, tokenizer, "0:6", ["a"], max_new_tokens=0)
    with pytest.raises(UsageError, match="sampling at temperature 0"):
        respond(model, tokenizer, "0:6", [Request("generate", "a", options='{"do_sample": true}')])
    with pytest.raises(UsageError, match="only requests of kind 'generate'"):
        respond(model, tokenizer, "0:6", [Request("rolling", "", "a")])
    with pytest.raises(UnsupportedModel, match="does not write text"):
        generate(build("bert"), tokenizer, "0:6", ["a"], max_new_tokens=3)
