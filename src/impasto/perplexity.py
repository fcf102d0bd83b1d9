"""Perplexity of plain text in sliding windows, for many recipes at once.

    task = text_task(loaded, [text], stride=512)
    results = evaluate(loaded, recipes, [task, *others], store, scorer=lambda: sliding_scorer(loaded))

or, in one call, `perplexity(loaded, recipes, [text])`.

A window moves over the tokens in steps of `stride`; of each window only the tokens that no window before it has
scored count, so every token is scored once, and with as much text before it as the window allows (but for
the first window, at least window - stride tokens). The harness's own `loglikelihood_rolling` moves by whole windows
instead, so that the first tokens of each are guessed from almost nothing. This is how the LASER paper measured its
perplexities (appendix C.4: stride 512), and how Hugging Face's guide to perplexity does it.

A window is a request with token ids, so the engine shares between recipes what it always shares, and a store
remembers the answers.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from impasto.encoding import Encoder, Piece, quiet_harness
from impasto.errors import UnsupportedModel, UsageError
from impasto.evaluate import evaluate, next_scorer
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.result import Request, Response, Result, digest
from impasto.scoring import Scorer
from impasto.store import Store
from impasto.tasks import TaskSet

STRIDE = 512  # tokens, as in the paper
METRIC = "perplexity,none"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read together; the last `new` of them are scored."""

    tokens: tuple[int, ...]
    new: int


def windows(tokens: Sequence[int], size: int, stride: int, prefix: Sequence[int] = ()) -> Iterator[Window]:
    """The windows over a text's tokens.

    Args:
        tokens: of the text, without what the tokenizer puts before every text.
        size: tokens in a window, prefix included.
        stride: how far one window begins behind the one before.
        prefix: what stands before the text in every window. Without it nothing predicts the first token, which
            is then not scored.

    Raises:
        UsageError: a stride that would leave tokens out.

    >>> [(window.tokens, window.new) for window in windows([1, 2, 3, 4, 5], size=3, stride=1)]
    [((1, 2, 3), 2), ((2, 3, 4), 1), ((3, 4, 5), 1)]
    """
    room = size - len(prefix)
    if room < 2 or not 1 <= stride <= (room if prefix else room - 1):
        raise UsageError(
            f"windows of {size} tokens can move by 1 to {max(1, room if prefix else room - 1)} tokens at a time, "
            f"not by {stride}"
        )
    done = 0 if prefix else 1
    begin = 0
    while done < len(tokens):
        end = min(begin + room, len(tokens))
        yield Window((*prefix, *tokens[begin:end]), end - done)
        done, begin = end, begin + stride


@dataclass(frozen=True)
class _TextTask(TaskSet):
    """A task whose examples are windows of text; its metric is their perplexity.

    The score of a window is its log-loss in nats, in units of the tokens that a window has on average. So the mean
    of the scores is the loss per token of the whole text, and its exponential the metric, although windows
    differ in length; and intervals of differences are in nats per token.
    """

    def result(self, recipe: str, responses: Mapping[str, Response]) -> Result:
        """What the answers say together; a window whose answer is not finite makes the metric undefined."""
        if missing := [name for name in self._asked if name not in responses]:
            raise ValueError(f"{self.name}: {len(missing)} of {len(self._asked)} requests have no response")
        answers = [responses[name] for name in self._asked]
        usual = sum(answer.tokens for answer in answers) / len(answers)
        finite = [math.isfinite(answer.loglikelihood) for answer in answers]
        scores = tuple(
            -answer.loglikelihood / usual if good else None for answer, good in zip(answers, finite, strict=True)
        )
        loss = sum(score for score in scores if score is not None) / len(scores) if all(finite) else math.nan
        return Result(
            recipe=recipe,
            task=self.name,
            protocol=self.protocol,
            n=self.n,
            metrics={METRIC: math.exp(min(loss, 700.0)) if all(finite) else math.nan},
            scores={METRIC: scores},
            nonfinite=finite.count(False),
            info={
                "version": self.version,
                "shots": self.shots,
                "metric": self.metric,
                "higher_is_better": False,
                "chance": None,
                "majority": None,
                "order_sensitive": None,
                "source": self.source,
                "tokens": sum(answer.tokens for answer in answers),
            },
        )

    def parted(self, share: float = 0.2) -> tuple[TaskSet, TaskSet]:
        """Not for this task: windows of one text are no independent examples."""
        raise UsageError(f"{self.name} is one text and has no part to choose on: give another text for that")


def text_task(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    window: int | None = None,
    name: str = "text_perplexity",
    source: str = "a text of your own",
) -> TaskSet:
    """Texts as a task for `evaluate`, which then needs a `sliding_scorer`.

    What the tokenizer puts before every text (most often one token) stands before every window.

    Args:
        loaded: the model whose tokenizer and window are meant.
        texts: each has windows of its own.
        stride: tokens between the beginnings of two windows; None: 512, or half of a window below 1,024.
        window: tokens in a window; None takes the model's own.
        name: of the task.
        source: where the texts came from, in words.

    Raises:
        UsageError: there is nothing to score, or the stride does not fit the window.
        UnsupportedModel: the model predicts masked tokens and not next ones.
    """
    if loaded.masked:
        raise UnsupportedModel(f"{loaded.name} predicts masked tokens, and perplexity is that of next tokens")
    encoder = Encoder(loaded.model, loaded.tokenizer)
    size = min(window or encoder.window, encoder.window)
    stride = min(STRIDE, max(1, size // 2)) if stride is None else stride
    requests: dict[str, Request] = {}
    asked: list[str] = []
    for number, text in enumerate(texts):
        with quiet_harness():  # a text may be longer than the model's window, and mostly is
            prefix, tokens = _encoded(encoder, loaded.tokenizer, text)
        for place, found in enumerate(windows(tokens, size, stride, prefix)):
            request = _request(found, number, place)
            requests[request.fingerprint] = request
            asked.append(request.fingerprint)
    if not asked:
        raise UsageError("the texts hold no token to score: give more text")
    return _TextTask(
        name=name,
        kind="loglikelihood_rolling",
        version="1",
        shots=0,
        n=len(asked),
        requests=tuple(requests.values()),
        protocol=digest("text", name, size, stride, asked),
        metric=METRIC,
        higher_is_better=False,
        chance=None,
        majority=None,
        order_sensitive=None,
        source=f"{source}; windows of {size:,} tokens, stride {stride:,}",
        _task=None,
        _asked=tuple(asked),
    )


def sliding_scorer(
    loaded: LoadedModel, batch_tokens: int | None = None, note: Callable[[str], None] | None = None
) -> Scorer:
    """A scorer that reads windows of text as well as all other requests."""
    scorer = next_scorer(loaded, batch_tokens, note=note)
    scorer.encoder = _WindowEncoder(loaded.model, loaded.tokenizer)
    return scorer


def perplexity(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    texts: Sequence[str],
    *,
    stride: int | None = None,
    window: int | None = None,
    store: Store | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[str, float], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Result]:
    """The perplexity of texts under each recipe, all recipes together.

    Args:
        loaded: the model.
        recipes: what to run.
        texts: what to read; each has windows of its own.
        stride: tokens between the beginnings of two windows; None: 512, or half of a window below 1,024.
        window: tokens in a window; None takes the model's own.
        store: where answers are kept and found again; None forgets them.
        batch_tokens: tokens per batch; None starts from what suits the device.
        progress: told the phase and the share of it that is done.
        note: told in a sentence what the user should know.

    Returns:
        One result per recipe: the perplexity in `metrics["perplexity,none"]`, and in `scores` one number per window,
        whose mean is the loss in nats per token.

    Raises:
        UsageError: nothing to score, or a stride that does not fit the window.
        OutOfMemory: a single window does not fit.
    """
    task = text_task(loaded, texts, stride=stride, window=window)

    def run(kept: Store) -> list[Result]:
        made = evaluate(
            loaded,
            recipes,
            [task],
            kept,
            scorer=lambda: sliding_scorer(loaded, batch_tokens, note),
            progress=progress,
            note=note,
        )
        by_recipe = {result.recipe: result for result in made}
        return [by_recipe[recipe.fingerprint] for recipe in recipes]

    if store is not None:
        return run(store)
    with tempfile.TemporaryDirectory() as nowhere, Store(nowhere) as kept:
        return run(kept)


class _WindowEncoder(Encoder):
    """The harness's encoding, and windows, whose tokens are in the request itself."""

    def pieces(self, requests: Sequence[Request]) -> list[Piece]:
        """The sequences to run, in the order of the requests."""
        others = [place for place, request in enumerate(requests) if not _is_window(request)]
        texts = super().pieces([requests[place] for place in others])
        found = {place: _piece(place, request) for place, request in enumerate(requests) if _is_window(request)}
        pieces = [Piece(others[p.request], p.tokens, p.targets, p.truncated) for p in texts]
        return sorted([*pieces, *found.values()], key=lambda piece: piece.request)


def _request(window: Window, text: int, place: int) -> Request:
    content = {"new": window.new, "tokens": list(window.tokens)}
    return Request("rolling", f"window {place} of text {text}", options=json.dumps(content, sort_keys=True))


def _is_window(request: Request) -> bool:
    return request.kind == "rolling" and bool(request.options)


def _piece(place: int, request: Request) -> Piece:
    content: dict[str, Any] = json.loads(request.options)
    tokens, new = content["tokens"], content["new"]
    return Piece(place, tuple(tokens[:-1]), tuple(tokens[-new:]))


def _encoded(encoder: Encoder, tokenizer: Any, text: str) -> tuple[tuple[int, ...], list[int]]:
    """What the tokenizer puts before every text, and the tokens of this one."""
    tokens = encoder.encode(text)
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and tokens[:1] == [first]:
        return (first,), tokens[1:]
    return (), tokens
