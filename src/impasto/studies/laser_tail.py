"""What the discarded components say: the model's next tokens with only the smallest singular values of a matrix left.

Figure 5 of the LASER paper (arXiv 2312.13558): where an edit corrects an answer, its largest components are kept and
the others thrown away. Here it is the other way round: of one matrix only the smallest components are kept, more and
more of them up to the whole matrix, and the likeliest next token is looked at; of a masked model the likeliest at the
first mask, all tokens of the right answer masked. The paper reports entities of the right
kind where few are kept, function words where many are, and that the answer moves away from the right one; the
shares of both kinds are in `impasto.studies.facts`. It does not say which embedding its likeness is of; here it is the
cosine of two rows of the input or the output embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from impasto.apply import worn
from impasto.edit import Edit
from impasto.encoding import Encoder
from impasto.errors import UsageError
from impasto.generation import generate
from impasto.masked import Masker, likeliest
from impasto.models import LoadedModel
from impasto.result import Request
from impasto.schedule import Schedule

SHARES = tuple(
    Decimal(text) for text in ("0.1", "0.25", "0.5", "0.75", "0.9", "0.925", "0.95", "0.975", "0.98", "0.99", "1")
)
"""The paper's shares of the smallest components that are kept; 1 is the whole matrix."""

Embedding = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Said:
    """The likeliest next tokens with one share of the smallest components kept, one entry per question.

    Attributes:
        share: the share that is kept; 1 is the model itself.
        tokens: the likeliest token; None where the model's output was not finite.
        texts: the same as text; empty where there is none.
        golds: the first token of each right answer, as text.
        right: whether the likeliest token is that token.
        likeness: the cosine of their embeddings; None where there is no token.
    """

    share: Decimal
    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    golds: tuple[str, ...]
    right: tuple[bool, ...]
    likeness: tuple[float | None, ...]


def tail_answers(
    loaded: LoadedModel,
    layer: int,
    matrix: str,
    questions: Sequence[Request],
    *,
    shares: Sequence[Decimal] = SHARES,
    embedding: Embedding = "input",
    batch_tokens: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Said, ...]:
    """The likeliest next token to each question, with only the tail of one matrix.

    Args:
        loaded: the model, which is left as it was.
        layer: which layer; negative ones count from the end.
        matrix: the name of the matrix inside its layer, wildcards allowed.
        questions: log-likelihood requests, the right answer as continuation.
        shares: how much is kept of the smallest components, each larger than 0 and at most 1.
        embedding: in which the likeness of two tokens is measured.
        batch_tokens: tokens per batch; None starts from what suits the device.
        progress: told the share of the work that is done.

    Returns:
        One value per share, in their order.

    Raises:
        NotationError: there is no such layer.
        UsageError: no such matrix, a share out of range, or requests of another kind.
    """
    if any(request.kind != "loglikelihood" for request in questions):
        raise UsageError("the tail of a matrix is asked questions with an answer: give log-likelihood requests")
    edits = [Edit.parse(f"{layer}.{matrix}@tail{share:f}", loaded.layers) for share in shares]
    ask = _masked if loaded.masked else _next
    golds, answers = ask(loaded, questions, batch_tokens)
    made: list[Said] = []
    for place, edit in enumerate(edits):
        if progress is not None:
            progress(place / len(edits))
        with worn(loaded, [edit]):
            made.append(_said(loaded, edit, answers(), golds, embedding))
    if progress is not None:
        progress(1.0)
    return tuple(made)


Answers = Callable[[], list[int | None]]  # the likeliest tokens of the model as it is, one for each question


def _next(loaded: LoadedModel, questions: Sequence[Request], batch_tokens: int | None) -> tuple[list[int], Answers]:
    """The first tokens of the right answers, and what gives the likeliest next ones."""
    encoder = Encoder(loaded.model, loaded.tokenizer)
    pieces = encoder.pieces(questions)
    # What comes before the answer's first token; the last tokens of a piece predict the answer's own.
    contexts = [piece.tokens[: len(piece.tokens) - len(piece.targets) + 1] for piece in pieces]

    def answers() -> list[int | None]:
        written = generate(
            loaded.model,
            loaded.tokenizer,
            Schedule.identity(loaded.layers),
            contexts,
            max_new_tokens=1,
            token_budget=batch_tokens,
            window=encoder.window + 1,
        )
        return [answer.new_token_ids[0] if answer.finite else None for answer in written]

    return [piece.targets[0] for piece in pieces], answers


def _masked(loaded: LoadedModel, questions: Sequence[Request], batch_tokens: int | None) -> tuple[list[int], Answers]:
    """The first tokens of the right answers, and what gives the likeliest ones at their masks."""
    masker = Masker(loaded.model, loaded.tokenizer)
    asked = [masker.encode(request.context, request.continuation, request.after) for request in questions]

    def answers() -> list[int | None]:
        found = dict(likeliest(loaded.model, masker, asked, budget=batch_tokens))
        return [None if (tokens := found[place]) is None else tokens[0] for place in range(len(asked))]

    return [one.targets[0] for one in asked], answers


def _said(
    loaded: LoadedModel, edit: Edit, tokens: Sequence[int | None], golds: Sequence[int], embedding: Embedding
) -> Said:
    there = [place for place, token in enumerate(tokens) if token is not None]
    likeness: list[float | None] = [None] * len(tokens)
    given = [token for token in tokens if token is not None]
    for place, value in zip(there, _cosines(loaded, given, [golds[i] for i in there], embedding), strict=True):
        likeness[place] = value
    decode = loaded.tokenizer.decode
    return Said(
        share=Decimal(edit.rule.value or 0),
        tokens=tuple(tokens),
        texts=tuple("" if token is None else str(decode([token])) for token in tokens),
        golds=tuple(str(decode([gold])) for gold in golds),
        right=tuple(token == gold for token, gold in zip(tokens, golds, strict=True)),
        likeness=tuple(likeness),
    )


def _cosines(loaded: LoadedModel, first: Sequence[int], second: Sequence[int], embedding: Embedding) -> list[float]:
    """Cosines of pairs of rows of an embedding."""
    model = loaded.model
    layer = model.get_input_embeddings() if embedding == "input" else model.get_output_embeddings()
    weight: Tensor = layer.weight
    with torch.no_grad():
        rows = torch.tensor([list(first), list(second)], device=weight.device, dtype=torch.long)
        a, b = weight[rows].float()
        cosines: list[float] = F.cosine_similarity(a, b, dim=-1).tolist()
    return cosines
