"""What a matrix's smallest components say, against a plain decomposition and a plain forward pass."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F

from impasto import models
from impasto.errors import NotationError, UsageError
from impasto.result import Request
from impasto.studies.laser_tail import SHARES, tail_answers
from tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    Request("loglikelihood", "The mother tongue of Ada is", " English"),
    Request("loglikelihood", "Rome is in", " Italy"),
    Request("loglikelihood", "a", "b"),
    Request("loglikelihood", "", "x"),
    Request("loglikelihood", "long " * 80 + "end", " y"),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPASTO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield models.adopt(tiny_model(request.param), tiny_tokenizer(), name="tiny")


def matrix_of(loaded, layer: int):
    """The matrix that goes into the MLP, as rows of outputs, and its name."""
    name = "mlp.up_proj" if loaded.model.config.model_type == "llama" else "mlp.c_fc"
    base = loaded.model.model.layers if name == "mlp.up_proj" else loaded.model.transformer.h
    return base[layer].get_submodule(name).weight, name


def plainly(loaded, weight, share: Decimal) -> list[int]:
    """The oracle: keep the smallest singular values, one question at a time."""
    kept, answers = weight.detach().clone(), []
    u, s, v = torch.linalg.svd(kept.double(), full_matrices=False)
    count = int(share * len(s))
    try:
        with torch.no_grad():
            if share < 1:
                weight.copy_((u[:, -count:] * s[-count:]) @ v[-count:] if count else torch.zeros_like(kept))
            for question in QUESTIONS:
                context, target = (
                    loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (question.context, question.continuation)
                )
                ids = [1, *context, *target][-257 : -len(target)]  # the harness cuts on the left
                answers.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    return answers


def test_every_share_says_what_the_plain_computation_says(loaded) -> None:
    weight, name = matrix_of(loaded, 2)
    before = weight.detach().clone()
    told: list[float] = []
    found = tail_answers(loaded, 2, name, QUESTIONS, progress=told.append)
    assert torch.equal(weight, before)
    assert [said.share for said in found] == list(SHARES)
    assert told[0] == 0.0 and told[-1] == 1.0 and told == sorted(told)
    for said in found:
        assert list(said.tokens) == plainly(loaded, weight, said.share), said.share
    assert len({said.tokens for said in found}) > 1


def test_texts_likeness_and_right_answers_belong_to_the_tokens(loaded) -> None:
    _, name = matrix_of(loaded, 0)
    for embedding in ("input", "output"):
        model = loaded.model
        layer = model.get_input_embeddings() if embedding == "input" else model.get_output_embeddings()
        (said,) = tail_answers(loaded, -4, name, QUESTIONS, shares=[Decimal("0.5")], embedding=embedding)
        golds = [loaded.tokenizer(q.continuation, add_special_tokens=False)["input_ids"][0] for q in QUESTIONS]
        assert said.golds == tuple(loaded.tokenizer.decode([gold]) for gold in golds)
        assert said.texts == tuple(loaded.tokenizer.decode([token]) for token in said.tokens)
        assert said.right == tuple(a == b for a, b in zip(said.tokens, golds, strict=True))
        for token, gold, value in zip(said.tokens, golds, said.likeness, strict=True):
            rows = layer.weight.detach()[torch.tensor([token, gold])]
            assert value == pytest.approx(float(F.cosine_similarity(rows[:1], rows[1:])), abs=1e-6)


def test_the_right_token_is_as_like_itself_as_can_be(loaded) -> None:
    _, name = matrix_of(loaded, 0)
    (first,) = tail_answers(loaded, 1, name, QUESTIONS[:3], shares=[Decimal(1)])
    asked = [Request("loglikelihood", q.context, text) for q, text in zip(QUESTIONS, first.texts, strict=False)]
    (again,) = tail_answers(loaded, 1, name, asked, shares=[Decimal(1)])
    for right, value, text in zip(again.right, again.likeness, first.texts, strict=True):
        if text.isascii() and text.isprintable() and not text.isspace() and text:
            assert right and value == pytest.approx(1.0)


def test_a_model_without_finite_numbers_says_nothing() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    loaded = models.adopt(broken, tiny_tokenizer(), name="broken")
    (said,) = tail_answers(loaded, 0, "mlp.up_proj", QUESTIONS[:2], shares=[Decimal("0.5")])
    assert said.tokens == (None, None) and said.texts == ("", "") and said.likeness == (None, None)
    assert said.right == (False, False)


def test_what_cannot_be_asked_is_refused(loaded) -> None:
    _, name = matrix_of(loaded, 0)
    with pytest.raises(NotationError, match="layer 9 does not exist: this model has layers 0..3"):
        tail_answers(loaded, 9, name, QUESTIONS)
    with pytest.raises(NotationError, match="the fraction 1.5 is not between 0 and 1"):
        tail_answers(loaded, 0, name, QUESTIONS, shares=[Decimal("1.5")])
    with pytest.raises(UsageError, match="give log-likelihood requests"):
        tail_answers(loaded, 0, name, [Request("generate", "x")])
    with pytest.raises(UsageError):
        tail_answers(loaded, 0, "no.such", QUESTIONS)
