"""Attention of ours in models' own modules: transformers' `sdpa_attention_forward` is the oracle, and stays in charge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import families
from impasto import rows
from impasto.attention import OURS, THEIRS, attention, configs, shared
from impasto.fast import Decoder, fast
from impasto.schedule import Schedule
from test_fast import MIXED, PADDED, REFUSED, UNRECORDED, plain, prompts, slow_unless

# Families whose decoding steps stay as they are: some never take torch's attention, others call it by its name.
UNTOUCHED = {"gemma2", "gpt_oss", "xglm", "gemma4_text", "gptj", "bloom", "falcon", "codegen", "mpt", "gpt_neo"}
TAKEN = [family for family in families.DECODERS if family not in UNTOUCHED]
KINDS = {"llama", "gemma3_text", "gpt2", "deepseek_v3", "llama4_text"}  # all others stand in the slow law


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes `attention` take what it can on any device; the shapes of the keys that it took."""
    taken: list[tuple[int, ...]] = []
    own = rows.attention

    def heard(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        taken.append(tuple(key.shape))
        return own(query, key, *rest, **named)

    monkeypatch.setattr(rows, "attended", lambda query: True)
    monkeypatch.setattr(rows, "attention", heard)
    return taken


def example(heads: int = 4, keys: int = 2, queries: int = 1) -> list[Any]:
    """A module, a query, keys and values, as attention gets them."""
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=heads // keys, is_causal=True)
    query = torch.randn(3, queries, heads, 16).transpose(1, 2)
    return [module, query, torch.randn(3, keys, 20, 16), torch.randn(3, keys, 20, 24)]


def mask(kind: str, queries: int = 1) -> Tensor | None:
    seen = torch.rand(3, 1, queries, 20) > 0.4
    seen[..., 0] = True
    heads = torch.where(torch.rand(3, 4, queries, 20) > 0.4, 0.3, torch.finfo(torch.float32).min)
    heads[..., 0] = 0
    return {"none": None, "seen": seen, "one row": seen[:1], "added by head": heads}[kind]


@pytest.mark.parametrize("kind", ["none", "seen", "one row", "added by head"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_sees_what_it_sees_in_transformers_and_keys_are_not_copied(
    heads: tuple[int, int], kind: str, scaling: float | None, asked: list[tuple[int, ...]]
) -> None:
    given, hidden = example(*heads), mask(kind)
    made, weights = attention(*given, hidden, dropout=0.0, scaling=scaling, is_causal=True)
    wanted, none = sdpa_attention_forward(*given, hidden, dropout=0.0, scaling=scaling, is_causal=True)
    torch.testing.assert_close(made, wanted)
    assert made.shape == wanted.shape == (3, 1, 4, 24) and made.stride() == wanted.stride()
    assert weights is none is None
    assert asked == [(3, heads[1], 20, 16)]


def test_several_queries_are_transformers_alone(asked: list[tuple[int, ...]]) -> None:
    given = example(queries=20)
    for hidden in (None, mask("seen", 20)):
        assert torch.equal(attention(*given, hidden)[0], sdpa_attention_forward(*given, hidden)[0])
    assert asked == []


def test_what_transformers_does_not_know_is_ignored_and_what_it_knows_is_left_to_it(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, hidden = example(), mask("seen")
    ignored: dict[str, Any] = {"s_aux": torch.randn(4), "sliding_window": 3, "softcap": None, "position_ids": hidden}
    torch.testing.assert_close(attention(*given, hidden, **ignored), sdpa_attention_forward(*given, hidden, **ignored))
    assert len(asked) == 1
    known: dict[str, Any] = {"position_bias": torch.randn(3, 4, 1, 20)}
    assert torch.equal(attention(*given, hidden, **known)[0], sdpa_attention_forward(*given, hidden, **known)[0])
    assert outcome(attention, *given, hidden, softcap=30.0) == outcome(
        sdpa_attention_forward, *given, hidden, softcap=30.0
    )
    dropped = [
        (torch.manual_seed(1), run(*given, hidden, dropout=0.5))[1][0] for run in (attention, sdpa_attention_forward)
    ]
    assert torch.equal(*dropped)
    assert len(asked) == 1


def outcome(run: Any, *given: Any, **named: Any) -> Any:
    """What a function says: some versions of transformers refuse capped scores, others ignore that they are."""
    try:
        return run(*given, **named)[0].tolist()
    except ValueError as problem:
        return str(problem)


def test_where_no_kernel_of_ours_runs_it_is_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "attention", lambda *_, **__: pytest.fail("not on a CPU"))
    given, hidden = example(), mask("seen")
    assert torch.equal(attention(*given, hidden)[0], sdpa_attention_forward(*given, hidden)[0])
    with fast(families.shared("llama"), context=24) as decoder:
        decoder.generate(prompts(9), 3, ends=())


@pytest.mark.parametrize("family", slow_unless(KINDS, TAKEN))
def test_tokens_equal_the_plain_runtimes(
    family: str, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (prompt,) = families.shared(family), prompts(13)
    (config,) = configs(model)
    if family in REFUSED:
        pytest.skip("has no decoder")
    expected, compare = plain(model, MIXED, prompt, 14), Decoder._plain

    def alone(decoder: Decoder, given: list[list[int]]) -> list[Tensor]:
        before = len(asked)
        found = compare(decoder, given)
        assert len(asked) == before and config._attn_implementation == THEIRS
        return found

    monkeypatch.setattr(Decoder, "_plain", alone)
    assert asked == []
    with fast(model, MIXED, context=40, buckets=[16, 24]) as decoder:
        checked = len(asked)
        (made,) = decoder.generate([prompt], 14, ends=())
    assert list(made) == expected
    calls = Schedule.parse(MIXED, layers=6).calls
    assert checked == 2 * calls and len(asked) == (2 + 13) * calls  # two steps of the check, and all those behind
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert {shape[1] for shape in asked} == {heads}
    assert config._attn_implementation == THEIRS


@pytest.mark.parametrize("family", slow_unless({"gemma3_text"}, [one for one in PADDED if one in TAKEN]))
def test_rows_of_a_padded_batch_equal_rows_alone(family: str, asked: list[tuple[int, ...]]) -> None:
    model, given = families.shared(family), prompts(5, 13, 9, 11)
    with fast(model, MIXED, batch=3, context=40, buckets=[16], prompt_sizes=[16]) as decoder:
        made = decoder.generate(given, 8, ends=())
    assert asked
    assert [list(row) for row in made] == [plain(model, MIXED, row, 8) for row in given]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("ours", [True, False])
def test_recorded_steps_with_attention_of_ours_and_without(
    family: str, ours: bool, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "attended", lambda query: ours)
    model, given = families.build(family).cuda(), prompts(5, 13, 9, 11)
    expected = [plain(model, MIXED, row, 20) for row in given]
    assert asked == []
    with fast(model, MIXED, batch=4, context=40, buckets=[16, 24], prompt_sizes=[16]) as decoder:
        made = decoder.generate(given, 20, ends=())
    assert [list(row) for row in made] == expected
    assert bool(asked) == ours


@pytest.mark.parametrize("family", slow_unless({"gpt_oss", "falcon", "bloom", "gemma2"}, sorted(UNTOUCHED)))
def test_families_that_do_not_ask_for_torchs_attention_keep_their_own(
    family: str, asked: list[tuple[int, ...]]
) -> None:
    """Among them one with sinks and one with capped scores, which torch's attention does not know."""
    model, (prompt,) = families.shared(family), prompts(9)
    if family == "gemma2" and model.config._attn_implementation == THEIRS:
        pytest.skip("this version of transformers gives it torch's attention, which does not cap its scores")
    assert configs(model) == ()
    if family not in UNRECORDED | set(REFUSED):
        with fast(model, MIXED, context=24) as decoder:
            (made,) = decoder.generate([prompt], 6, ends=())
        assert list(made) == plain(model, MIXED, prompt, 6)
    assert asked == []


def test_a_model_that_takes_another_attention_keeps_it() -> None:
    model = families.build("llama")
    model.set_attn_implementation("eager")
    assert configs(model) == ()


def test_names_are_put_back_also_behind_an_error(asked: list[tuple[int, ...]]) -> None:
    inner = families.config("llama")
    outer = LlavaConfig(text_config=inner)
    outer._attn_implementation = THEIRS
    outer.vision_config._attn_implementation = "eager"
    before = [one._attn_implementation for one in (outer, outer.text_config, outer.vision_config)]
    with pytest.raises(ZeroDivisionError), shared([outer.text_config]):
        assert [one._attn_implementation for one in (outer, outer.text_config)] == [THEIRS, OURS]
        raise ZeroDivisionError
    with shared([outer]):
        assert [one._attn_implementation for one in (outer, outer.text_config)] == [OURS, THEIRS]
    assert [one._attn_implementation for one in (outer, outer.text_config, outer.vision_config)] == before


def test_who_chose_another_attention_meanwhile_keeps_it() -> None:
    model = families.build("llama")
    found = configs(model)
    model.set_attn_implementation("eager")
    with shared(found):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_names_may_be_changed_inside_one_another() -> None:
    config = families.config("llama")
    config._attn_implementation = THEIRS
    with shared([config]):
        with shared([config]):
            assert config._attn_implementation == OURS
        assert config._attn_implementation == OURS
    assert config._attn_implementation == THEIRS


def test_gradients_are_left_to_transformers(asked: list[tuple[int, ...]]) -> None:
    given, hidden = example(), mask("seen")
    given[1].requires_grad_()
    attention(*given, hidden)[0].sum().backward()
    assert given[1].grad is not None and asked == []


def test_a_config_of_several_modules_is_named_once() -> None:
    model = families.build("llama")
    assert configs(nn.ModuleList([model, nn.Linear(2, 2)])) == (model.config,)
    other = families.build("llama")
    assert configs(nn.ModuleList([model, other])) == (model.config, other.config)


INTERFACE = AttentionInterface()
LOCAL = AttentionInterface()
LOCAL[THEIRS] = lambda *given, **named: sdpa_attention_forward(*given, **named)


class Asking(nn.Module):
    """Looks attention up."""

    def __init__(self) -> None:
        super().__init__()
        self.config = families.config("llama")
        self.config._attn_implementation = THEIRS

    def forward(self, *given: Any) -> Any:
        return INTERFACE[self.config._attn_implementation](self, *given)


class Overridden(Asking):
    """Looks attention up where somebody has put another one."""

    def forward(self, *given: Any) -> Any:
        return LOCAL[self.config._attn_implementation](self, *given)


class Choosing(Asking):
    """Hides columns from attention by its name."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Any:
        if self.config._attn_implementation in ("eager", "sdpa"):
            hidden = hidden & (torch.arange(hidden.shape[-1]) < 5)
        return INTERFACE[self.config._attn_implementation](self, query, key, value, hidden)


class Property(Asking):
    """Asks for a name in a property."""

    @property
    def hides(self) -> bool:
        return bool(self.config._attn_implementation == "sdpa")


class Method(Asking):
    """Asks for a name in a method of the class."""

    @classmethod
    def hides(cls, name: str) -> bool:
        return name == "sdpa"


class Listed(Asking):
    """Asks for a name in a list."""

    hiding = ("eager", "sdpa")


def test_only_code_that_means_the_same_by_any_name_is_given_another() -> None:
    asking = Asking()
    assert configs(asking) == (asking.config,)
    assert configs(Overridden()) == ()
    assert all(configs(kind()) == () for kind in (Choosing, Property, Method, Listed))
    assert configs(nn.ModuleList([asking, Choosing()])) == ()
    assert configs(nn.Linear(2, 2)) == ()
