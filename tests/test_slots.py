"""Laws of the cache: decoding with it is the full pass, whatever the schedule, the family and the kind of cache."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from families import DECODERS, DEPTH, VOCABULARY, build, inputs, shared
from impasto import moves
from impasto.anatomy import anatomy
from impasto.errors import UsageError
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.slots import SlotView, lay_out

torch.set_num_threads(1)

TANGLE = "0 2 1 {2:5}x2 3x2 sum{1 2, {4 0, 3}} 5"  # repeats, loops, series branches, nesting, both merges
LENGTH = 13  # longer than the sliding window of 8
TYPED = ("lfm2",)  # keeps more than keys and values, so even untouched it needs a cache made from its config

CACHES: dict[str, Callable[[Any], Any]] = {
    "lazy": lambda model: DynamicCache(),
    "typed": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
    "own": lambda model: None,
}


def caches(family: str) -> list[str]:
    return [name for name in CACHES if not (family in TYPED and name == "lazy")]


def stepwise(model: Any, ids: torch.Tensor, cache: Any, sizes: tuple[int, ...] = (6, 5, 1, 1)) -> torch.Tensor:
    """Logits of a prefill in chunks and then token by token."""
    pieces, at = [], 0
    for size in sizes:
        out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        pieces.append(out.logits)
    assert at == ids.shape[1]
    return torch.cat(pieces, 1)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


# What some versions of transformers cannot do with the untouched model; where it can, the law holds there too.
UNTOUCHED = {("gpt_neo", "static"), ("bloom", "static")}


def sound(model: Any, family: str, name: str, ids: torch.Tensor) -> bool:
    """Whether the untouched model's own decoding with this cache is its own full pass."""
    try:
        gap = off(stepwise(model, ids, CACHES[name](model)), model(ids, use_cache=False).logits)
    except RuntimeError:
        gap = float("inf")
    assert gap < 1e-4 or (family, name) in UNTOUCHED, gap
    return gap < 1e-4


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_is_the_full_pass_for_every_kind_of_cache(family: str) -> None:
    model, ids = shared(family), inputs(family, length=LENGTH)["input_ids"]
    with torch.no_grad():
        for name in caches(family):
            if not sound(model, family, name, ids):
                continue
            for text in (TANGLE, "5 3") if name == "own" else (TANGLE,):
                with scheduled(model, text):
                    full = model(ids, use_cache=False).logits
                    assert off(stepwise(model, ids, CACHES[name](model)), full) < 1e-4, (name, text)


def every_schedule() -> list[Schedule]:
    found = [moves.skip_one(DEPTH, 0), moves.swap_adjacent(DEPTH, 4)]
    for start in moves.starts(DEPTH):
        found += [moves.skip(DEPTH, start), moves.middle_repeat(DEPTH, start), moves.reverse(DEPTH, start)]
        found += [
            moves.random_order(DEPTH, start, 3),
            moves.parallel(DEPTH, start),
            moves.parallel(DEPTH, start, "sum"),
        ]
        found += [moves.looped_parallel(DEPTH, start, 3), moves.block_repeat(DEPTH, start, 2)]
        found += [moves.inplace_repeat(DEPTH, start, 2)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon"])
def test_cached_decoding_is_the_full_pass_for_every_method(family: str) -> None:
    model, ids = shared(family), inputs(family, length=LENGTH)["input_ids"]
    with torch.no_grad():
        for schedule in every_schedule():
            with scheduled(model, schedule):
                full = model(ids, use_cache=False).logits
                assert off(stepwise(model, ids, None, (11, 1, 1)), full) < 1e-4, str(schedule)


HALVED = ["llama", "gemma3_text", "gpt2", "gptj", "opt", "bloom"]


@pytest.mark.parametrize("family", HALVED)
@pytest.mark.parametrize(
    "text", ["0:2 2.attn 3.mlp 2.mlp 3.attn 4:6", "(0:6).mlp", "(0:6).attn", "{0.mlp 1, 2.attn}x2 5", "0.mlp"]
)
def test_cached_decoding_with_halves_is_the_full_pass(family: str, text: str) -> None:
    """Also where no call has an attention, so that no slot holds the number of tokens seen."""
    model, ids = shared(family), inputs(family, length=LENGTH)["input_ids"]
    with torch.no_grad():
        names = [name for name in caches(family) if sound(model, family, name, ids)]
    with torch.no_grad(), scheduled(model, text):
        full = model(ids, use_cache=False).logits
        for name in names:
            assert off(stepwise(model, ids, CACHES[name](model)), full) < 1e-4, name


def test_a_schedule_of_convolutions_alone_still_counts_its_tokens() -> None:
    model, ids = shared("lfm2"), inputs("lfm2", length=LENGTH)["input_ids"]
    with torch.no_grad(), scheduled(model, "0 2 {0 4}x2"):
        full = model(ids, use_cache=False).logits
        assert off(stepwise(model, ids, None, (11, 1, 1)), full) < 1e-4


@pytest.mark.parametrize("text", ["0 {1 2}x2 {0:6} 5", "{0 1}", "1 3 5", "0 2 4"])
def test_sliding_windows_are_at_work_in_their_slots(text: str) -> None:
    """Sliding and full layers side by side, more tokens than the window holds; wider windows give other numbers."""
    model, ids = shared("gemma3_text"), inputs("gemma3_text", length=24)["input_ids"]
    wide = build("gemma3_text", sliding_window=64)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad(), scheduled(model, text), scheduled(wide, text):
        full = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        assert off(stepwise(model, ids, cache, (10, 6, *[1] * 8)), full) < 1e-4
        kinds = [layer.keys.shape[-2] for layer in cache.layers]
        assert set(kinds) <= {7, 24}
        if text != "1 3 5":
            assert 7 in kinds
            assert off(wide(ids, use_cache=False).logits, full) > 1e-3


# ------------------------------------------------------------------------------------------------- generate


def greedy(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


SAMPLED = ("llama", "gemma3_text", "gpt2", "falcon", "lfm2", "mixtral")
UNHANDED = {"mpt"}  # untouched, it generates other tokens with an empty cache that it is handed than with its own
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("family", DECODERS)
def test_generate_is_the_plain_loop_without_a_cache(family: str) -> None:
    model, ids = shared(family), inputs(family, length=11)["input_ids"]
    with torch.no_grad(), scheduled(model, "0 {1 2, 3}x2 2x2 5"):
        expected = greedy(model, ids, 4)
        assert torch.equal(model.generate(ids, do_sample=False, **OPTIONS), expected)
        if family not in UNHANDED:
            handed = CACHES["typed"](model)
            assert torch.equal(model.generate(ids, do_sample=False, past_key_values=handed, **OPTIONS), expected)
        beams = {"num_beams": 3, "do_sample": False, **OPTIONS}
        plain = model.generate(ids, use_cache=False, **beams)
        assert torch.equal(model.generate(ids, **beams), plain)
        sampled = []
        for use_cache in (True, False) if family in SAMPLED else ():
            torch.manual_seed(5)
            sampled.append(model.generate(ids, do_sample=True, use_cache=use_cache, **OPTIONS))
        assert not sampled or torch.equal(*sampled)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_generate_with_a_static_cache_leaves_nothing_of_it_on_the_model(family: str) -> None:
    model, ids = shared(family), inputs(family, length=11)["input_ids"]
    static = {"do_sample": False, "cache_implementation": "static", **OPTIONS}
    with torch.no_grad():
        before = model.generate(ids, **static)
        with scheduled(model, TANGLE):
            assert torch.equal(model.generate(ids, **static), greedy(model, ids, 4))
            cache = StaticCache(config=model.config, max_cache_len=20)
            given = model.generate(ids, do_sample=False, past_key_values=cache, **OPTIONS)
            assert torch.equal(given, greedy(model, ids, 4))
        assert torch.equal(model.generate(ids, **static), before)
        assert torch.equal(before, greedy(model, ids, 4))
        assert "_valid_auto_compile_criteria" not in vars(model)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padded_rows_are_the_rows_alone(family: str) -> None:
    model = shared(family)
    rows = [inputs(family, 1, 5)["input_ids"] + 1, inputs(family, 1, 12)["input_ids"]]
    padded = torch.zeros(2, 12, dtype=torch.long)
    mask = torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **OPTIONS}

    def worst() -> float:
        batch = model.generate(padded, attention_mask=mask, **options)
        found = 0.0
        for i, row in enumerate(rows):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
            if torch.equal(batch.sequences[i, -4:], alone.sequences[0, -4:]):
                pairs = zip(batch.logits, alone.logits, strict=True)
                found = max(found, *(off(a[i], b[0]) for a, b in pairs))
            else:
                found = 1.0
        return found

    with torch.no_grad():
        if family in UNPADDED:
            assert worst() > 1e-4  # the untouched model does not have this property
            return
        with scheduled(model, "0 2 1 {2:5}x2 3x2 {1 2, 4} 5"):
            assert worst() < 1e-4


UNPADDED: set[str] = set()


# ------------------------------------------------------------------------------------------------- whose cache is it


def test_a_cache_serves_one_schedule_across_calls_and_is_refused_to_another() -> None:
    model, ids = shared("llama"), inputs("llama", length=LENGTH)["input_ids"]
    message = (
        "this cache already holds tokens that another schedule (or the untouched model) has written: pass an empty "
        "cache, or keep one cache per schedule"
    )
    cache = DynamicCache()
    with torch.no_grad():
        with scheduled(model, TANGLE):
            full = model(ids, use_cache=False).logits
            first = model(ids[:, :9], past_key_values=cache).logits
            forked = copy.deepcopy(cache)
        with scheduled(model, TANGLE):
            rest = model(ids[:, 9:], past_key_values=cache).logits
            assert off(torch.cat([first, rest], 1), full) < 1e-4
            assert off(model(ids[:, 9:], past_key_values=forked).logits, rest) < 1e-6
            cache.crop(-3)
            assert off(model(ids[:, -3:], past_key_values=cache).logits, full[:, -3:]) < 1e-4
        for text, kv in (
            ("0:6", "exact"),
            ("0 5", "exact"),
            (TANGLE.replace("1 2,", "1,").replace("4 0,", "4,"), "exact"),
        ):
            with scheduled(model, text, kv=kv), pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
                model(ids[:, :2], past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():  # some versions of transformers keep zeros of the old length
            return
        with scheduled(model, "0 5"):
            out = model(ids, past_key_values=cache)
            assert off(out.logits, model(ids, use_cache=False).logits) < 1e-4
            assert len(out.past_key_values.layers) == 2


def test_a_cache_of_the_untouched_model_goes_on_under_the_identity_only() -> None:
    model, ids = shared("llama"), inputs("llama", length=LENGTH)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        full = model(ids).logits
        model(ids[:, :9], past_key_values=cache)
        with scheduled(model, "0:5"), pytest.raises(UsageError, match="or the untouched model"):
            model(ids[:, 9:], past_key_values=cache)
        with scheduled(model, "0:6"):
            assert off(model(ids[:, 9:12], past_key_values=cache).logits, full[:, 9:12]) < 1e-4
        assert off(model(ids[:, 12:], past_key_values=cache).logits, full[:, 12:]) < 1e-4


def test_caches_that_cannot_be_laid_out() -> None:
    short = DynamicCache(config=build("llama", num_hidden_layers=3).config)
    with pytest.raises(UsageError, match=r"^this cache was made for a model of 3 layers; the model has 6$"):
        lay_out(short, [(0,)], DEPTH, "key")

    class Odd:
        pass

    with pytest.raises(UsageError, match=r"^a Odd has no list of layers that a schedule could lay out anew$"):
        lay_out(Odd(), [(0,)], DEPTH, "key")  # type: ignore[arg-type]


def test_a_view_answers_for_its_slot_whatever_number_is_asked() -> None:
    cache = DynamicCache()
    keys = torch.ones(1, 1, 3, 4)
    cache.update(keys, keys, 0)
    cache.update(keys[:, :, :2], keys[:, :, :2], 1)
    view = SlotView(cache, 1, 40)
    assert view.get_seq_length(17) == view.get_seq_length(layer_idx=3) == view.get_seq_length() == 2
    assert view.layers[39] is cache.layers[1]
    view.update(keys, keys, 33)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 5]
    assert isinstance(view, type(view)) and repr(view) == "SlotView(1)"


# ------------------------------------------------------------------------------------------------- the paper's shortcut


class ByHand:
    """The painters paper's semantics for a Llama-like model, written out with a cache of plain lists.

    Slots are numbered by an execution counter. A parallel group has one: during a pass every member attends to the
    averaged past and its own new keys, and the mean of the new ones is stored.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.slots = model.model, {}
        self.head = model.lm_head

    def attend(self, layer: Any, x: torch.Tensor, slot: int, at: int) -> tuple[torch.Tensor, Any]:
        a, (batch, length, _) = layer.self_attn, x.shape
        q, k, v = (p(x).view(batch, length, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        angles = torch.arange(at, at + length)[:, None] * (
            1.0 / 10000.0 ** (torch.arange(0, a.head_dim, 2).float() / a.head_dim)
        )
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

        def turn(t: torch.Tensor) -> torch.Tensor:
            half = a.head_dim // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        q, k = turn(q), turn(k)
        new = (k, v)
        if slot in self.slots:
            k, v = (torch.cat([past, own], 2) for past, own in zip(self.slots[slot], new, strict=True))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / a.head_dim**0.5
        hidden = torch.arange(k.shape[2]) > torch.arange(at, at + length)[:, None]
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return a.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), new

    def block(self, index: int, x: torch.Tensor, slot: int, at: int) -> tuple[torch.Tensor, Any]:
        layer = self.model.layers[index]
        mixed, new = self.attend(layer, layer.input_layernorm(x), slot, at)
        x = x + mixed
        return x + layer.mlp(layer.post_attention_layernorm(x)), new

    def store(self, slot: int, news: list[Any]) -> None:
        mean = tuple(torch.stack(each).mean(0) for each in zip(*news, strict=True))
        past = self.slots.get(slot)
        self.slots[slot] = (
            mean if past is None else tuple(torch.cat([p, m], 2) for p, m in zip(past, mean, strict=True))
        )

    def __call__(self, ids: torch.Tensor, plan: list[int | list[int]], at: int = 0) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for slot, step in enumerate(plan):
            results = [self.block(i, x, slot, at) for i in (step if isinstance(step, list) else [step])]
            x = torch.stack([out for out, _ in results]).mean(0)
            self.store(slot, [new for _, new in results])
        return self.head(self.model.norm(x))


def plans() -> dict[str, tuple[Schedule, list[int | list[int]]]]:
    order = list(range(2, 5))
    __import__("random").Random(4).shuffle(order)
    return {
        "skip": (moves.skip(6, 1), [0, 1, 5]),
        "reverse": (moves.reverse(6, 1), [0, 1, 4, 3, 2, 5]),
        "middle repeat": (moves.middle_repeat(6, 1), [0, 1, 3, 3, 3, 5]),
        "random": (moves.random_order(6, 1, 4), [0, 1, *order, 5]),
        "parallel": (moves.parallel(6, 1), [0, 1, [2, 3, 4], 5]),
        "looped parallel": (moves.looped_parallel(6, 1, 3), [0, 1, [2, 3, 4], [2, 3, 4], [2, 3, 4], 5]),
        "skip one": (moves.skip_one(6, 2), [0, 1, 3, 4, 5]),
        "swap": (moves.swap_adjacent(6, 2), [0, 1, 3, 2, 4, 5]),
    }


@pytest.mark.parametrize("name", list(plans()))
def test_the_paper_s_semantics_written_out_by_hand(name: str) -> None:
    model, ids = shared("llama"), inputs("llama", length=LENGTH)["input_ids"]
    schedule, plan = plans()[name]
    sizes = (9, *[1] * 4)
    with torch.no_grad():
        full = ByHand(model)(ids, plan)
        hand, at, pieces = ByHand(model), 0, []
        for size in sizes:
            pieces.append(hand(ids[:, at : at + size], plan, at))
            at += size
        shortcut = torch.cat(pieces, 1)
        with scheduled(model, schedule):
            assert off(model(ids, use_cache=False).logits, full) < 1e-5
            assert off(stepwise(model, ids, DynamicCache(), sizes), full) < 1e-5
        with scheduled(model, schedule, kv="mean"):
            assert off(model(ids, use_cache=False).logits, full) < 1e-5
            cache = DynamicCache()
            assert off(stepwise(model, ids, cache, sizes), shortcut) < 1e-5
            assert len(cache.layers) == len(plan)
    assert off(shortcut[:, :9], full[:, :9]) < 1e-5
    gap = float((shortcut[:, 9:] - full[:, 9:]).abs().max() / full.std())
    assert gap > 0.1 if "parallel" in name else gap < 1e-4


def test_generation_under_the_shared_slot_and_what_it_is_not_defined_for() -> None:
    model, ids = shared("llama"), inputs("llama", length=11)["input_ids"]
    with torch.no_grad(), scheduled(model, moves.looped_parallel(6, 0, 2), kv="mean"):
        assert model.generate(ids, do_sample=False, **OPTIONS).shape == (2, 15)
        assert model.generate(ids, do_sample=False, num_beams=2, **OPTIONS).shape == (2, 15)
        message = "kv='mean' needs a dynamic cache; static, quantised and offloaded ones have no shared slot"
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    for text in ("0 {1 2, 3} 5", "0 {1.attn 2}", "{1 2, {3 4}}"):
        with pytest.raises(UsageError, match="defined for groups of whole single layers only"):
            with scheduled(model, text, kv="mean"):
                pass
    mixed = shared("gemma3_text")
    with scheduled(mixed, "0 {1 2} 5", kv="mean"), pytest.raises(UsageError, match=r"among layers \[1, 2\]"):
        mixed(ids, past_key_values=DynamicCache(config=mixed.config))
    with scheduled(shared("lfm2"), "0 {2 4} 5", kv="mean"), pytest.raises(UsageError, match="kv='mean'"):
        shared("lfm2")(ids, use_cache=True)


def test_scheduling_takes_no_cache_from_a_model_without_one() -> None:
    assert not anatomy(shared("bert")).cached
    assert shared("llama").config.vocab_size == VOCABULARY
