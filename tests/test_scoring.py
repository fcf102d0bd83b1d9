"""Law 6: the shared engine gives, per request, what the plain loop over recipes gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import impasto.head as scoring_head
import impasto.scoring as scoring
from families import DECODERS, DEPTH, build
from impasto import moves
from impasto.errors import OutOfMemory, UnsupportedModel, UsageError
from impasto.head import TOP
from impasto.recipe import Recipe
from impasto.result import RANK, Request
from impasto.runtime import scheduled
from impasto.scoring import Scorer, Sharing
from tiny import tiny_model, tiny_tokenizer

SCHEDULES = (
    "0:6",
    "0 2 1 3:6",
    "0:3 4:6",
    "0 4 3 2 1 5",
    "0 {1:5} 5",
    "0 {1:5}x3 5",
    "0 {1:5}x2 {1 2} 5",
    "sum{0:3} 3:6",
    "0 sum{1 2, 3}x2 5",
    "0 {1 2, {3 4} 1} 5",
    "{1 1 2} 3 4",
    "0 3x4 5",
    "0",
)


def words(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("abcdefgh ") for _ in range(count)).strip() or "a"


def questions(seed: int = 0) -> list[Request]:
    """Ragged requests: shared examples, shared questions, empty contexts, single tokens, rolling texts."""
    rng = random.Random(seed)
    examples = words(rng, 12)
    asked = []
    for _ in range(4):
        question = f"{examples}\n{words(rng, rng.randrange(3, 9))}"
        asked += [Request("loglikelihood", question, " " + words(rng, rng.randrange(1, 5))) for _ in range(3)]
    asked += [
        Request("loglikelihood", words(rng, rng.randrange(1, 20)), words(rng, rng.randrange(1, 4))) for _ in range(4)
    ]
    asked += [Request("loglikelihood", "", words(rng, 5)), Request("rolling", "", words(rng, 70))]
    return asked


def recipes(*texts: str, layers: int = DEPTH) -> list[Recipe]:
    return [Recipe.of("any", text, layers=layers) for text in texts]


def plain_loop(scorer: Scorer, recipe: Recipe, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: one recipe, one sequence at a time, all logits, the harness's formula."""
    values, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    with torch.no_grad(), scheduled(scorer.model, recipe.schedule):
        for piece in scorer.encoder.pieces(requests):
            ids = torch.tensor([piece.tokens])
            logits = scorer.model(ids, use_cache=False).logits[0, -len(piece.targets) :].float()
            targets = torch.tensor(piece.targets)
            values[piece.request] += logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
            greedy[piece.request] &= bool((logits.argmax(-1) == targets).all())
    return values, greedy


def assert_equal_to_plain_loop(scorer: Scorer, chosen: list[Recipe], requests: list[Request], tolerance: float) -> None:
    scores = scorer.score(chosen, requests)
    for row, recipe in enumerate(chosen):
        values, greedy = plain_loop(scorer, recipe, requests)
        np.testing.assert_allclose(scores.loglikelihood[row], values, rtol=0, atol=tolerance, err_msg=str(recipe))
        assert (scores.greedy[row] == greedy).all(), str(recipe)


def small_vocabulary_model(family: str):
    """A tiny model whose every embedding knows the tokenizer's 259 tokens."""
    layered = {"vocab_size_per_layer_input": 259} if family in ("gemma3n_text", "gemma4_text") else {}
    return build(family, vocab_size=259, **layered)


@pytest.mark.parametrize("family", DECODERS)
def test_engine_equals_plain_loop(family):
    scorer = Scorer(small_vocabulary_model(family), tiny_tokenizer(), budget=150, window=48)
    rng = random.Random(family)
    assert_equal_to_plain_loop(scorer, recipes(*rng.sample(SCHEDULES, 5)), questions(), 1e-4)


def test_all_methods_of_the_paper_on_one_model():
    scorer = Scorer(tiny_model(layers=7), tiny_tokenizer(), budget=300)
    schedules = [moves.identity(7), moves.swap_adjacent(7, 3)]
    for start in moves.starts(7):
        schedules += [moves.skip(7, start), moves.reverse(7, start), moves.middle_repeat(7, start)]
        schedules += [moves.parallel(7, start), moves.looped_parallel(7, start, 3), moves.random_order(7, start, 1)]
        schedules += [moves.block_repeat(7, start, 2), moves.inplace_repeat(7, start, 2)]
    chosen = list({s.fingerprint: Recipe("any", s) for s in schedules}.values())
    assert_equal_to_plain_loop(scorer, chosen, questions(3), 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_of_recipes(seed):
    rng = random.Random(seed)

    def series(depth: int) -> str:
        return " ".join(step(depth) for _ in range(rng.randrange(1, 4)))

    def step(depth: int) -> str:
        if depth and rng.random() < 0.35:
            branches = ", ".join(series(depth - 1) for _ in range(rng.randrange(2, 4)))
            return f"{rng.choice(['', 'sum'])}{{{branches}}}" + rng.choice(["", "x2"])
        return f"{rng.randrange(4)}{rng.choice(['', '', '', '.attn', '.mlp', 'x2'])}"

    scorer = Scorer(tiny_model(seed=seed), tiny_tokenizer(), budget=rng.choice([60, 200, 1000]))
    chosen = recipes(*{series(2) for _ in range(12)}, layers=4)
    assert_equal_to_plain_loop(scorer, chosen, questions(seed), 1e-4)


@pytest.mark.parametrize(
    "sharing", [Sharing(calls=False), Sharing(contexts=False), Sharing(head=False), Sharing(False, False, False)]
)
def test_each_kind_of_sharing_can_be_switched_off(sharing):
    model, requests = tiny_model(), questions(1)
    chosen = recipes("0:4", "0 {1 2} 3", "0 2 1 3", layers=4)
    whole = Scorer(model, tiny_tokenizer(), budget=200).score(chosen, requests)
    part = Scorer(model, tiny_tokenizer(), budget=200, sharing=sharing).score(chosen, requests)
    np.testing.assert_allclose(part.loglikelihood, whole.loglikelihood, rtol=0, atol=1e-4)
    assert (part.greedy == whole.greedy).all()


def test_bfloat16_agrees_within_its_precision():
    model = tiny_model().to(torch.bfloat16)
    scorer = Scorer(model, tiny_tokenizer(), budget=200)
    requests, recipe = questions(), recipes("0 {1 2} 3", layers=4)[0]
    scores = scorer.score([recipe], requests)
    values, _ = plain_loop(scorer, recipe, requests)
    assert np.abs(scores.loglikelihood[0] - values).max() <= 0.03 * scores.tokens.max()


def test_the_same_call_twice_is_bit_equal_and_other_recipes_beside_do_not_matter():
    scorer = Scorer(tiny_model(), tiny_tokenizer(), budget=200, sharing=Sharing(head=False))
    few = recipes("0:4", "0 {1 2} 3", layers=4)
    many = few + recipes("0 2 1 3", "3 2 1 0", "0 {1 2}x3 3", layers=4)
    first, again, more = (scorer.score(chosen, questions()).loglikelihood for chosen in (few, few, many))
    assert (first == again).all()
    assert (more[:2] == first).all()


def test_batches_arrive_once_each_with_what_they_answer():
    scorer = Scorer(tiny_model(), tiny_tokenizer(), budget=80)
    requests, chosen = questions(), recipes("0:4", "0 3", layers=4)
    seen: list[int] = []
    shares: list[float] = []

    def keep(batch: scoring.Batch) -> None:
        seen.extend(batch.requests.tolist())
        assert batch.loglikelihood.shape == (2, len(batch.requests)) == batch.greedy.shape

    scores = scorer.score(chosen, requests, on_batch=keep, progress=shares.append)
    assert sorted(seen) == list(range(len(requests)))
    assert shares == sorted(shares) and shares[-1] == 1
    assert (scores.tokens > 0).all()


def test_out_of_memory_halves_the_budget_and_loses_nothing(monkeypatch):
    model, requests, chosen = tiny_model(), questions(), recipes("0:4", "0 3", layers=4)
    expected = Scorer(model, tiny_tokenizer(), budget=200).score(chosen, requests)
    real, notes, seen = scoring.call_layer, [], []

    def tight(body, layer, levels, states):
        if sum(state.shape[0] * state.shape[1] for state in states) > 90:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(body, layer, levels, states)

    monkeypatch.setattr(scoring, "call_layer", tight)
    scorer = Scorer(model, tiny_tokenizer(), budget=400, note=notes.append)
    scores = scorer.score(chosen, requests, on_batch=lambda batch: seen.extend(batch.requests.tolist()))
    np.testing.assert_allclose(scores.loglikelihood, expected.loglikelihood, rtol=0, atol=1e-4)
    assert sorted(seen) == list(range(len(requests)))
    assert notes and notes[0].startswith("out of memory: token budget halved to ")


def test_one_sequence_that_does_not_fit_alone_is_an_error_and_the_rest_is_kept(monkeypatch):
    def never(body, layer, levels, states):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scoring, "call_layer", never)
    with pytest.raises(OutOfMemory, match="one sequence of .* tokens does not fit into the memory of cpu"):
        Scorer(tiny_model(), tiny_tokenizer()).score(recipes("0:4", layers=4), questions())


def test_long_requests_are_cut_from_the_left_as_the_harness_does_and_counted():
    scorer = Scorer(tiny_model(), tiny_tokenizer(), window=20)
    requests = [Request("loglikelihood", "a" * 50, " bcd"), Request("loglikelihood", "a", " bcd")]
    scores = scorer.score(recipes("0:4", layers=4), requests)
    assert scores.truncated.tolist() == [True, False]
    values, _ = plain_loop(scorer, recipes("0:4", layers=4)[0], requests)
    np.testing.assert_allclose(scores.loglikelihood[0], values, rtol=0, atol=1e-4)


def test_non_finite_logits_are_handed_on_for_that_recipe_alone():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))  # not a query: with one key no score matters
    scores = Scorer(model, tiny_tokenizer()).score(recipes("0 1 3", "0:4", layers=4), questions())
    assert np.isfinite(scores.loglikelihood[0]).all()
    assert np.isnan(scores.loglikelihood[1]).all()
    assert not scores.greedy[1].any()


def test_plan_counts_what_will_run():
    scorer = Scorer(tiny_model(), tiny_tokenizer(), budget=200)
    chosen = recipes("0:4", "0 {1 2} 3", "0 1 3", layers=4)
    work = scorer.plan(chosen, questions())
    assert (work.recipes, work.layer_calls, work.shared_calls) == (3, 11, 4 + 1 + 1 + 1)
    assert work.shared_tokens < work.tokens
    assert work.cost < work.naive_cost


def test_what_cannot_be_scored_is_said():
    with pytest.raises(UnsupportedModel, match="does not predict next tokens"):
        Scorer(build("bert"), tiny_tokenizer())
    scorer = Scorer(tiny_model(), tiny_tokenizer())
    with pytest.raises(UsageError, match="came without a tokenizer"):
        Scorer(tiny_model(), None)
    with pytest.raises(UsageError, match="answered by impasto.generation"):
        scorer.score(recipes("0:4", layers=4), [Request("generate", "a")])
    with pytest.raises(UsageError, match="without a way to apply them"):
        scorer.score([Recipe.of("any", "0:4", ["1.mlp.down_proj@0.5"], layers=4)], questions())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_ranks_where_they_are_asked_for(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring_head.SLICE, "cpu", 1)  # the least slice: several of them
    monkeypatch.setattr(scoring_head, "CHUNK", 4)
    model = tiny_model(family)
    scorer = Scorer(model, tiny_tokenizer(), budget=64)
    contexts = ["abc de", *(f"{c} long" for c in "fghijklm")]
    asked = [Request("loglikelihood", context, chr(33 + 2 * i), RANK) for context in contexts for i in range(30)]
    asked += [Request("loglikelihood", context, " xy", RANK) for context in contexts]
    asked += [Request("loglikelihood", "abc de", "z"), Request("rolling", "", "a text")]
    chosen = recipes("0:4", "0:3", layers=4)
    scores = scorer.score(chosen, asked)
    assert scores.rank is not None
    for row, recipe in enumerate(chosen):
        for column, request in enumerate(asked):
            if not request.wants_rank:
                assert scores.rank[row, column] == -1
                continue
            (piece,) = scorer.encoder.pieces([request])
            with torch.no_grad(), scheduled(model, recipe.schedule):
                logits = model(torch.tensor([piece.tokens])).logits[0, -len(piece.targets)]
            assert scores.rank[row, column] == min(TOP, int((logits > logits[piece.targets[0]]).sum()))
    assert len(set(scores.rank[0].tolist())) > 5
    single = [i for i, request in enumerate(asked) if len(request.continuation) == 1 and request.wants_rank]
    np.testing.assert_array_equal(scores.rank[:, single] == 0, scores.greedy[:, single])


@given(st.integers(1, 5), st.integers(1, 400), st.integers(0, 2**31), st.booleans())
def test_the_largest_of_many(rows: int, words: int, seed: int, ties: bool) -> None:
    logits = torch.randn(rows, words, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_head, "CHUNK", 4)
        assert torch.equal(scoring_head._largest(logits), logits.topk(min(TOP, words)).values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_logits_are_weighed_alike_by_the_kernel(dtype: torch.dtype) -> None:
    from impasto.kernels import weigh

    logits = 20 * torch.randn(5, 100_003, device="cuda").to(dtype)
    logits[1] = -torch.inf
    logits[2, :70_000] = -torch.inf
    logits[3, 4] = torch.nan
    for rows in (logits, logits[:, ::2], logits[:0]):
        peak, mass = weigh(rows)
        finite = [i for i in range(len(rows)) if i != 3]
        expected, sums = scoring_head._weigh(rows.clone())
        assert torch.equal(peak[finite], expected[finite])
        torch.testing.assert_close(mass[finite], sums[finite], rtol=1e-5, atol=1e-31)  # of words at -inf, exp(-85) each
        assert not len(rows) or mass[3].isnan()
