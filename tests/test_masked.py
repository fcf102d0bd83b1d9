"""Laws of masked.py: the fast scorer of encoders against one forward pass per mask pattern."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from impasto import masked
from impasto.anatomy import anatomy
from impasto.apply import applied
from impasto.edit import Edit
from impasto.errors import OutOfMemory, UsageError
from impasto.evaluate import evaluate, setting_of
from impasto.head import TOP
from impasto.masked import MaskedScorer, Masker
from impasto.matrices import matched
from impasto.models import adopt
from impasto.recipe import Recipe
from impasto.result import MASKINGS, RANK, Request
from impasto.scoring import Batch
from impasto.screening import screen
from impasto.store import Store
from impasto.surgery import edited
from impasto.tasks import build
from tiny import masking_tokenizer, tiny_tokenizer

WORDS = ("sun", " moon", " a cloud over it", " no", " yes", " tree.")


TOKENIZER = masking_tokenizer()
MASK = TOKENIZER.mask_token_id
SIZE = len(TOKENIZER)


def encoder(family: str = "bert") -> Any:
    return families.build(family, vocab_size=SIZE)


@functools.cache
def usual() -> Any:
    """The model of the tests that need no particular one; they leave it as it was."""
    return encoder()


def ask(*pairs: tuple[str, str]) -> list[Request]:
    return [Request("loglikelihood", context, continuation) for context, continuation in pairs]


REQUESTS = ask(*itertools.product(("The sky:", "A much longer context, to be padded", "x"), WORDS))


def identity(model: Any, *edits: str) -> Recipe:
    return Recipe.of("tiny", None, edits, layers=families.DEPTH)


def oracle(model: Any, request: Request, masking: str = "together", after: str = "") -> tuple[float, bool]:
    """One forward pass per mask pattern, without padding, batches or sharing."""
    left = [1, *TOKENIZER.encode(request.context, add_special_tokens=False)]
    targets = TOKENIZER.encode(request.continuation, add_special_tokens=False)
    right = [*TOKENIZER.encode(after, add_special_tokens=False), 2]
    patterns = [range(len(targets))] if masking == "together" else [[k] for k in range(len(targets))]
    total, greedy = 0.0, True
    for hidden in patterns:
        shown = [MASK if k in hidden else token for k, token in enumerate(targets)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*left, *shown, *right]])).logits[0]
        for k in hidden:
            words = logits[len(left) + k].float().log_softmax(-1)
            total += float(words[targets[k]])
            greedy &= bool(words[targets[k]] >= words.max())
    return total, greedy


def expect(model: Any, requests: Sequence[Request], **options: str) -> tuple[np.ndarray, np.ndarray]:
    found = [oracle(model, request, **options) for request in requests]
    return np.array([value for value, _ in found]), np.array([greedy for _, greedy in found])


@pytest.mark.parametrize("family", families.ENCODERS)
@pytest.mark.parametrize("masking", ["together", "each"])
def test_scores_equal_one_pass_per_mask_pattern(family: str, masking: str) -> None:
    model = encoder(family)
    scorer = MaskedScorer(model, TOKENIZER, masking=masking, after=".", budget=200)
    scores = scorer.score([identity(model)], REQUESTS)
    values, greedy = expect(model, REQUESTS, masking=masking, after=".")
    np.testing.assert_allclose(scores.loglikelihood[0], values, atol=2e-4)
    np.testing.assert_array_equal(scores.greedy[0], greedy)
    assert scores.tokens.tolist() == [len(request.continuation) for request in REQUESTS]
    assert not scores.truncated.any()


@pytest.mark.parametrize("masking", ["together", "each"])
def test_ranks_at_the_first_mask(masking: str) -> None:
    model = encoder("bert")
    asked = [replace(request, options=RANK) for request in REQUESTS] + [REQUESTS[0]]
    scorer = MaskedScorer(model, TOKENIZER, masking=masking, budget=200)
    scores = scorer.score([identity(model)], asked)
    assert scores.rank is not None
    for column, request in enumerate(asked[:-1]):
        masked = scorer.masker.encode(request.context, request.continuation)
        row = next(row for row, targets in masked.rows(masking, scorer.masker.mask) if 0 in targets)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, len(masked.left)]
        assert scores.rank[0, column] == min(TOP, int((logits > logits[masked.targets[0]]).sum()))
    assert scores.rank[0, -1] == -1


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_recipes_equal_the_model_under_each_of_them(family: str) -> None:
    model = encoder(family)
    body = MaskedScorer(model, TOKENIZER).body
    name = next(m.name for m in body.matrices(2) if len(m.shape) == 2)
    schedules = ["0:6", "0:4", "0 1 {2:5} 5", "0 sum{1 2, 3}x2 4", "5:0", "0:6", "0.attn 1:6"]
    edits = [(), (), (), (), (), (f"2.{name}@r3",), ()]
    if family != "bert":  # halves of a block are not exact everywhere
        schedules, edits = schedules[:-1], edits[:-1]
    recipes = [
        Recipe.of("tiny", schedule, worn, layers=families.DEPTH)
        for schedule, worn in zip(schedules, edits, strict=True)
    ]

    def wear(layer: int, some: tuple[Edit, ...]) -> Any:
        return edited(model, some)

    scorer = MaskedScorer(model, TOKENIZER, budget=150, wear=wear)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = scorer.score(recipes, REQUESTS[:9])
    for row, recipe in enumerate(recipes):
        with applied(model, recipe.schedule, recipe.edits):
            values, greedy = expect(model, REQUESTS[:9])
        np.testing.assert_allclose(scores.loglikelihood[row], values, atol=2e-4, err_msg=str(recipe))
        np.testing.assert_array_equal(scores.greedy[row], greedy)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_common_beginnings_of_recipes_run_once_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    texts = ("0:6", "0:5", "0:4 5", "0:4 4", "0:4 {4 5}")
    recipes = [Recipe.of("tiny", text, layers=families.DEPTH) for text in texts]
    calls: list[int] = []
    real = masked._Walk.call
    monkeypatch.setattr(masked._Walk, "call", lambda self, s, h: calls.append(s.call.layer) or real(self, s, h))
    scorer = MaskedScorer(model, TOKENIZER, budget=10_000)
    plan = scorer.plan(recipes, REQUESTS[:2])
    scorer.score(recipes, REQUESTS[:2])
    assert sorted(calls) == [0, 1, 2, 3, 4, 4, 5, 5, 5]
    assert (plan.shared_calls, plan.layer_calls, plan.batches) == (9, 6 + 5 + 5 + 5 + 6, 1)
    rows = [len(request.context + request.continuation) + 2 for request in REQUESTS[:2]]
    assert (plan.tokens, plan.shared_tokens) == (sum(rows), 2 * max(rows))
    assert plan.positions == sum(len(request.continuation) for request in REQUESTS[:2])


def test_for_one_token_both_maskings_are_one_number() -> None:
    model = encoder("roberta")
    requests = ask(("The sky is", "."), ("One", "a"), ("", "b"))
    one, other = (
        MaskedScorer(model, TOKENIZER, masking=masking).score([identity(model)], requests)
        for masking in ("together", "each")
    )
    np.testing.assert_array_equal(one.loglikelihood, other.loglikelihood)


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(len(REQUESTS))), budget=st.integers(1, 600))
def test_neither_order_nor_budget_changes_an_answer(order: list[int], budget: int) -> None:
    model = usual()
    kept: dict[int, float] = {}

    def keep(batch: Batch) -> None:
        assert not kept.keys() & set(batch.requests.tolist())
        kept.update(zip(batch.requests.tolist(), batch.loglikelihood[0].tolist(), strict=True))

    plain = MaskedScorer(model, TOKENIZER).score([identity(model)], REQUESTS)
    shares: list[float] = []
    mixed = MaskedScorer(model, TOKENIZER, budget=budget, masking="together").score(
        [identity(model)], [REQUESTS[k] for k in order], on_batch=keep, progress=shares.append
    )
    np.testing.assert_allclose(mixed.loglikelihood[0], plain.loglikelihood[0][order], atol=1e-4)
    assert [kept[k] for k in range(len(order))] == mixed.loglikelihood[0].tolist()
    assert shares == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize("masking", ["together", "each"])
def test_greedy_says_that_every_token_is_the_likeliest_at_its_mask(masking: str) -> None:
    model = encoder()
    (z,) = TOKENIZER.encode("z", add_special_tokens=False)
    with torch.no_grad():
        model.get_output_embeddings().bias[z] += 100
    scores = MaskedScorer(model, TOKENIZER, masking=masking).score(
        [identity(model)], ask(*(("x", t) for t in ("z", "zzz", "za", "az")))
    )
    assert scores.greedy[0].tolist() == [True, True, False, False]


def test_labels_of_one_length_share_their_row() -> None:
    model = usual()
    masker = Masker(model, TOKENIZER)
    asked = [masker.encode("It is", label) for label in (" aye", " nay", " perhaps")]
    sheet = masked.Sheet(asked, [False] * 3, "together", masker.mask, 1, "tokens")
    assert len(sheet.wanted) == 2
    assert sorted(len(wanted) for wanted in sheet.wanted.values()) == [8, 8]


def test_authors_lengths_are_one_too_many_and_nothing_else_changes() -> None:
    model = usual()
    plain = MaskedScorer(model, TOKENIZER).score([identity(model)], REQUESTS[:4])
    theirs = MaskedScorer(model, TOKENIZER, lengths="authors").score([identity(model)], REQUESTS[:4])
    np.testing.assert_array_equal(theirs.tokens, plain.tokens + 1)
    np.testing.assert_array_equal(theirs.loglikelihood, plain.loglikelihood)


def test_without_special_tokens_the_row_is_the_text_alone() -> None:
    masker = Masker(usual(), TOKENIZER, specials=False)
    ab = tuple(TOKENIZER.encode("ab", add_special_tokens=False))
    assert masker.encode("a", "b") == masked.Masked(ab[:1], ab[1:], ())
    dressed = Masker(usual(), TOKENIZER)
    assert (dressed.before, dressed.behind) == ((1,), (2,))


def test_too_long_a_context_loses_its_start() -> None:
    model = usual()
    scorer = MaskedScorer(model, TOKENIZER, window=20)
    long, short = "word " * 30 + "the end is", "d the end is"
    requests = ask((long, " nigh"), ("the end is", " nigh"))
    scores = scorer.score([identity(model)], requests)
    assert scores.truncated.tolist() == [True, False]
    kept = scorer.masker.encode(long, " nigh")
    assert len(kept.left) + len(kept.targets) + len(kept.right) == 20
    assert kept.left == scorer.masker.encode(short, " nigh").left[:1] + kept.left[1:]
    with pytest.raises(UsageError, match=r"^a continuation of 30 tokens does not fit into a window of 20$"):
        scorer.score([identity(model)], ask(("x", "y" * 30)))


def test_the_window_leaves_out_positions_that_are_no_positions() -> None:
    assert Masker(encoder("bert"), TOKENIZER).window == 128
    assert Masker(encoder("roberta"), TOKENIZER).window == 127  # numbered from behind the padding row


def test_running_out_of_memory_halves_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = usual()
    notes: list[str] = []
    plain = MaskedScorer(model, TOKENIZER).score([identity(model)], REQUESTS)
    scorer = MaskedScorer(model, TOKENIZER, budget=10_000, note=notes.append)
    real = MaskedScorer._answer

    def scarce(self: Any, tree: Any, rows: Any, sheet: Any) -> Any:
        if masked.padded(rows) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tree, rows, sheet)

    monkeypatch.setattr(MaskedScorer, "_answer", scarce)
    scores = scorer.score([identity(model)], REQUESTS)
    np.testing.assert_allclose(scores.loglikelihood, plain.loglikelihood, atol=1e-4)
    assert notes and notes[-1] == f"out of memory: token budget halved to {scorer.budget}"
    monkeypatch.setattr(MaskedScorer, "_answer", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match=r"^one sequence of \d+ tokens does not fit into the memory of cpu"):
        scorer.score([identity(model)], REQUESTS)


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = usual()
    scorer = MaskedScorer(model, TOKENIZER)
    monkeypatch.setattr(MaskedScorer, "_answer", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        scorer.score([identity(model)], REQUESTS)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_text_is_the_likeliest_token_at_each_mask(family: str) -> None:
    model = encoder(family)
    requests = [Request("generate", context) for context in ("The sky is ", "A much longer context for the padding")]
    told: dict[int, Any] = {}
    answers = masked.respond(model, TOKENIZER, requests, masks=3, budget=1000, on_response=told.__setitem__)
    for request, answer in zip(requests, answers, strict=True):
        left = [1, *TOKENIZER.encode(request.context.rstrip(), add_special_tokens=False)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*left, MASK, MASK, MASK, 2]])).logits[0]
        best = logits[len(left) : len(left) + 3].argmax(-1).tolist()
        assert answer.text == TOKENIZER.decode(best, skip_special_tokens=True)
        assert (answer.tokens, answer.truncated) == (3, False)
    assert told == dict(enumerate(answers))


def test_text_is_written_in_smaller_batches_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = usual()
    requests = [Request("generate", "a" * length) for length in (3, 5, 8, 13, 21)]
    plain = masked.respond(model, TOKENIZER, requests, masks=2)
    real, sizes = type(model).forward, []

    def scarce(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(input_ids.numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, **more)

    monkeypatch.setattr(type(model), "forward", scarce)
    limit, told = 40, []
    answers = masked.respond(model, TOKENIZER, requests, masks=2, on_response=lambda place, _: told.append(place))
    assert answers == plain
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert sizes[0] == 5 * 25 and min(sizes) <= limit  # 21 letters, two masks, two special tokens
    limit = 20
    with pytest.raises(OutOfMemory, match=r"^one sequence of 25 tokens does not fit into the memory of cpu: use a sm"):
        masked.respond(model, TOKENIZER, requests, masks=2)


def test_logits_that_are_not_finite_give_no_text() -> None:
    model = encoder()
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(torch.nan)
    (answer,) = masked.respond(model, TOKENIZER, [Request("generate", "x")])
    assert answer.text is None


def test_what_cannot_be_asked_is_refused() -> None:
    model = usual()
    recipe = identity(model)
    with pytest.raises(UsageError, match=r"^scoring with masks needs a tokenizer with a mask token"):
        MaskedScorer(model, tiny_tokenizer())
    with pytest.raises(UsageError, match=r"^masking is 'together' or 'each' and lengths is 'tokens' or 'authors'"):
        MaskedScorer(model, TOKENIZER, masking="some")  # type: ignore[arg-type]
    scorer = MaskedScorer(model, TOKENIZER)
    with pytest.raises(UsageError, match=r"^a masked model scores continuations; a request of kind 'rolling' is none$"):
        scorer.score([recipe], [Request("rolling", "", "text")])
    with pytest.raises(UsageError, match=r"^a continuation without tokens cannot be scored with masks: ''$"):
        scorer.score([recipe], ask(("x", "")))
    with pytest.raises(UsageError, match=r"^these recipes have edits, and this scorer was made without a way"):
        scorer.score([Recipe.of("tiny", None, ["0.*@r2"], layers=families.DEPTH)], REQUESTS)
    with pytest.raises(UsageError, match=r"^at least one token must be written, not 0$"):
        masked.respond(model, TOKENIZER, [], masks=0)
    with pytest.raises(UsageError, match=r"^only requests that generate text are answered with text$"):
        masked.respond(model, TOKENIZER, REQUESTS)


def test_an_encoder_answers_a_task_and_the_store_keeps_it(tmp_path: Path) -> None:
    model = usual()
    loaded = adopt(model, TOKENIZER, name="tiny")
    (task,) = build(["impasto_tiny_choice"], limit=4)
    recipes = [Recipe.of("tiny", text, layers=families.DEPTH) for text in ("0:6", "0:5")]
    with Store(tmp_path) as store:
        results = evaluate(loaded, recipes, [task], store, scorer=lambda: MaskedScorer(model, TOKENIZER, budget=64))
        kept = store.responses(setting_of(loaded), recipes[0], task.requests)
    values, _ = expect(model, task.requests)
    assert [kept[r.fingerprint].loglikelihood for r in task.requests] == pytest.approx(list(values), abs=2e-4)
    assert len(results) == 2 and all(result.n == 4 and result.nonfinite == 0 for result in results)


def mean_loss(model: Any, requests: Sequence[Request], masking: str) -> float:
    values, _ = expect(model, requests, masking=masking)
    return float(np.mean([-value / len(request.continuation) for value, request in zip(values, requests, strict=True)]))


def slope(model: Any, text: str, requests: Sequence[Request], masking: str) -> float:
    """d loss / d t at t = 0 of W + t (W' - W) for the matrices of an edit, by central differences."""
    body, step = anatomy(model), 1e-2
    edit = Edit.parse(text, body.depth)
    weights = [body.layers[site.layer].get_parameter(site.parameter) for site in matched(model, body, edit)]
    before = [weight.data.clone() for weight in weights]
    with edited(model, [edit]):
        change = [weight.data - old for weight, old in zip(weights, before, strict=True)]
    losses = []
    for way in (step, -step, 0):
        for weight, old, by in zip(weights, before, change, strict=True):
            weight.data.copy_(old + way * by)
        losses.append(mean_loss(model, requests, masking))
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("masking", ["together", "each"])
def test_what_is_foretold_of_edits_are_the_slopes_of_finite_differences(
    family: str, masking: str, tmp_path: Path
) -> None:
    model = families.build(family, torch.float64, vocab_size=SIZE)
    names = [matrix.name for matrix in anatomy(model).matrices(2)]
    edits = [f"4.{names[-1]}@0.3", f"1.{names[0]}@r2", f"2:4.{names[-2]}@prune0.5"]
    loaded = adopt(model, TOKENIZER).scored(masking)
    requests = [*REQUESTS[2:4], *ask(("The sea", " b"), ("", "ab"), ("The sky:", " sea"))]
    rows = [screen(loaded, requests, edits, folder=tmp_path, batch_tokens=tokens) for tokens in (None, 20)]
    changes = [[one.change for one in found] for found in rows]
    expected = [slope(model, text, requests, masking) for text in edits]
    np.testing.assert_allclose(changes[0], expected, rtol=5e-3, atol=1e-5)
    np.testing.assert_allclose(changes[1], changes[0], rtol=1e-5)
    assert max(map(abs, expected)) > 1e-4


@pytest.mark.parametrize("masking", ["together", "authors"])
def test_curvature_is_half_the_mean_square_of_each_requests_change(masking: str, tmp_path: Path) -> None:
    """Exact where every batch is one request, whatever its loss is divided by."""
    model = families.build("bert", torch.float64, vocab_size=SIZE)
    name = anatomy(model).matrices(2)[-1].name
    edits = [f"4.{name}@0.3", f"1.{name}@0", f"2:4.{name}@prune0.5"]
    loaded = adopt(model, TOKENIZER).scored(masking)
    asked = ask(*((f"{start}{start} is", " a" * (1 + i % 2)) for i, start in enumerate("abcdef")))
    alone = [[one.change for one in screen(loaded, [r], edits, folder=tmp_path)] for r in asked]
    found = screen(loaded, asked, edits, folder=tmp_path, curvature=True, batch_tokens=1)
    np.testing.assert_allclose([one.change for one in found], np.mean(alone, 0), rtol=1e-5)
    np.testing.assert_allclose([one.curvature for one in found], np.mean(np.square(alone), 0) / 2, rtol=1e-4)


def test_every_way_to_mask_is_known_to_the_scorer() -> None:
    assert set(masked.WAYS) == set(MASKINGS)


def test_screening_leaves_a_masked_model_as_it_was(tmp_path: Path) -> None:
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares: list[float] = []
    found = screen(
        adopt(model, TOKENIZER), REQUESTS, ["1:3.*@0.5"], folder=tmp_path, curvature=True, progress=shares.append
    )
    assert found[0].curvature is not None and found[0].curvature >= 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 1


def test_nothing_asked_is_nothing_answered() -> None:
    model = usual()
    scores = MaskedScorer(model, TOKENIZER).score([identity(model)], [])
    assert scores.loglikelihood.shape == (1, 0)
