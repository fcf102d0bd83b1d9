"""From requests to token sequences, by lm-evaluation-harness's own rules.

The harness's Hugging Face class does the encoding (where a context's trailing spaces go, which token stands before an
empty context, rolling windows, truncation from the left), so that the numbers agree; impasto only runs the sequences.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from impasto.errors import UsageError
from impasto.result import Request


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens to run for one request, and the tokens that the last positions must predict.

    A request has one piece, or several where a long text is scored in windows. The last `len(targets)` positions
    of `tokens` predict `targets`.
    """

    request: int  # index of the request it belongs to
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    truncated: bool = False


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness below errors, and the tokenizer about texts that are longer than the model's window."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Together:
    """A tokenizer that encodes many texts in one call: first it is told which, then it answers from memory.

    The harness asks for one text after another, each context once per choice; a fast tokenizer takes a list of
    distinct ones several times as quickly.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._asked: dict[tuple[tuple[str, Any], ...], dict[str, list[int]]] = {}
        self._decoded: dict[int, str] = {}
        self._listening = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, tokens: Any, **options: Any) -> Any:
        if not isinstance(tokens, int) or options:
            return self._tokenizer.decode(tokens, **options)
        if tokens not in self._decoded:
            self._decoded[tokens] = self._tokenizer.decode(tokens)
        return self._decoded[tokens]

    def encode(self, text: str, **options: Any) -> Any:
        known = self._asked.get(tuple(sorted(options.items())), {})
        if self._listening:
            self._asked.setdefault(tuple(sorted(options.items())), {})[text] = []
            return []
        return known[text] if text in known else self._tokenizer.encode(text, **options)

    @contextlib.contextmanager
    def remembering(self, ask: Callable[[], object]) -> Iterator[None]:
        """Remember every text that `ask` wants encoded, for the length of a `with` block."""
        try:
            self._listening = True
            ask()
            self._listening = False
            for options, texts in self._asked.items():
                found = self._tokenizer(list(texts), **dict(options))["input_ids"]
                texts.update(zip(texts, found, strict=True))
            yield
        finally:
            self._listening = False
            self._asked = {}


class Encoder:
    """Turns texts into tokens exactly as the harness does for this model and tokenizer.

    Args:
        model: the loaded model; its config gives the window.
        tokenizer: its tokenizer.
        window: longest input in tokens; None takes the harness's choice.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, window: int | None = None) -> None:
        from lm_eval.models.huggingface import HFLM

        if tokenizer is None:
            raise UsageError("this model came without a tokenizer, so texts cannot be scored with it")
        with quiet_harness():
            self._harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=window)
        self._together = self._harness.tokenizer = _Together(self._harness.tokenizer)

    @property
    def window(self) -> int:
        """The longest input in tokens."""
        return int(self._harness.max_length)

    def encode(self, text: str) -> list[int]:
        """Token ids of a context."""
        return list(self._harness.tok_encode(text))

    def pieces(self, requests: Sequence[Request]) -> list[Piece]:
        """The sequences to run for log-likelihood and rolling requests, in the order of the requests."""
        pairs = [(r.context, r.continuation) for r in requests if r.kind != "rolling"]
        with quiet_harness(), self._together.remembering(lambda: [self._pair(*pair) for pair in pairs]):
            return [piece for index, request in enumerate(requests) for piece in self._pieces(index, request)]

    def _pieces(self, index: int, request: Request) -> Iterator[Piece]:
        if request.kind == "rolling":
            if request.options:
                raise UsageError(
                    "a window of a text needs `impasto.perplexity.sliding_scorer`, which knows such requests"
                )
            yield from self._windows(index, request.continuation)
            return
        context, continuation = self._pair(request.context, request.continuation)
        whole = context + continuation
        kept = whole[-(self.window + 1) :]
        yield Piece(index, tuple(kept[:-1]), tuple(continuation), len(kept) < len(whole))

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        harness = self._harness
        if context:
            before, after = harness._encode_pair(context, continuation)
            return list(before), list(after)
        after = list(harness.tok_encode(continuation, add_special_tokens=False))
        if after and after[0] == harness.prefix_token_id:
            return after[:1], after[1:]
        return [harness.prefix_token_id], after

    def _windows(self, index: int, text: str) -> Iterator[Piece]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=self.encode(text),
            prefix_token=self._harness.prefix_token_id,
            max_seq_len=self.window,
            context_len=1,
        )
        for context, continuation in map(make_disjoint_window, windows):
            whole = list(context) + list(continuation)
            yield Piece(index, tuple(whole[-(self.window + 1) :][:-1]), tuple(continuation))
