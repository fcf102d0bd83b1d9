"""Greedy text under any schedule: batched, with a cache slot per layer call, for the harness and for people.

Prompts are sorted by length and padded on the left; a row leaves its batch, and the cache, as soon as it has ended.
What ends a row and what is cut from its text follow the evaluation harness run with one request per batch, so that a
text never depends on which other requests it was batched with (up to floating-point ties between tokens).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from impasto import memory
from impasto.anatomy import Anatomy, anatomy, end_tokens, input_device, quietly, text_config
from impasto.errors import OutOfMemory, UnsupportedModel, UsageError
from impasto.result import Request, Response
from impasto.runtime import KV, scheduled
from impasto.schedule import Schedule

Encode = Callable[[str], list[int]]

BUDGET = {"cpu": 16_384, "cuda": 131_072}  # tokens in one batch's cache, prompts and answers, before memory says more
MAX_NEW_TOKENS = 256  # where a harness request does not say
ROWS = 64  # at most so many are decoded together by a decoder, whose rows stay until the last has ended
_LOOK = {True: 2, False: 16}  # steps between two looks at what a decoder wrote: where somebody reads along, and else
_WINDOW = 2048  # where neither the model nor its tokenizer says
_WINDOW_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first one given wins
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
# Generation settings of a model that do not change which token is the likeliest.
_NEUTRAL = (
    "transformers_version _from_model_config bos_token_id eos_token_id pad_token_id decoder_start_token_id do_sample "
    "max_length max_new_tokens use_cache cache_implementation cache_config return_dict_in_generate output_attentions "
    "output_hidden_states output_scores output_logits num_return_sequences disable_compile"
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much a decoder would have to write.

    Attributes:
        rows: at a time.
        columns: tokens of the longest row, prompt and answer together.
        steps: tokens to be made one after another, all batches together; an upper limit.
    """

    rows: int
    columns: int
    steps: int


class Decoding(Protocol):
    """What writes the likeliest tokens of a batch of rows; `impasto.fast.Decoder` does."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, and choose their first tokens."""

    def step(self) -> Tensor:
        """One token more in every row."""

    def new_tokens(self) -> list[list[int]]:
        """What was chosen since the prompts were read, row by row; -1 where logits were not finite."""


Hasten = Callable[[nn.Module, Schedule | str, Size], AbstractContextManager[Decoding] | None]
"""Gives a decoder for so much work, or None where making it takes longer than it saves: `impasto.fast.hastened`."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What followed one prompt.

    Attributes:
        text: the new text, special tokens left out, cut before the first stop string.
        tokens: how many tokens were generated, those that ended the text included.
        new_token_ids: those tokens.
        seconds_prefill: from the start of the row's batch to its first token.
        seconds_decode: from then until this row ended; the rows of a batch share this time.
        truncated: the prompt was too long, and its beginning was cut off.
        finite: every step had a likeliest token. Where logits are nan or infinite, the row ends there, and its text
            means nothing.
    """

    text: str
    tokens: int
    new_token_ids: tuple[int, ...]
    seconds_prefill: float
    seconds_decode: float
    truncated: bool = False
    finite: bool = True


def generate(
    model: nn.Module,
    tokenizer: Any,
    schedule: Schedule | str,
    prompts: Sequence[Sequence[int] | str],
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    kv: KV = "exact",
    token_budget: int | None = None,
    window: int | None = None,
    encode: Encode | None = None,
    on_token: Callable[[int, str], None] | None = None,
    hasten: Hasten | None = None,
) -> list[Generated]:
    """Continue every prompt with the likeliest tokens, one after another.

        generate(model, tokenizer, "0:8 12:28", ["The capital of France is"], max_new_tokens=20)[0].text

    Running out of memory halves the batch and goes on; no prompt is lost or answered twice.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        schedule: a `Schedule` or its text.
        prompts: texts, or token ids.
        max_new_tokens: how many tokens to generate at most, at least 1.
        until: texts that end a row; they are not part of its text. The end-of-text token always ends it.
        kv: see `impasto.runtime.scheduled`.
        token_budget: how many tokens a batch may hold, prompts and answers together; None starts from what suits the
            device. A single row always runs.
        window: the most tokens the model can read; what `context_window` says where it is None.
        encode: turns a text into token ids; without it the tokenizer does, adding no special tokens.
        on_token: called with the number of a prompt and the next piece of its text, as soon as later tokens cannot
            change that piece. The pieces of one prompt, joined, are its text.
        hasten: see `Hasten`; the plain runtime writes what it does not, and everything under `kv="mean"`.

    Returns:
        One `Generated` per prompt, in their order.

    Raises:
        UsageError: no room for a prompt beside `max_new_tokens`, or the model does not write text.
        OutOfMemory: a single prompt does not fit into memory.
    """
    writer = _Writer.of(model, tokenizer, window, encode)
    rows = [writer.row(i, prompt, max_new_tokens, until) for i, prompt in enumerate(prompts)]
    stream = None if on_token is None else _Stream(writer, on_token)
    answers = {row.place: made for row, made in _written(writer, schedule, rows, token_budget, stream, kv, hasten)}
    return [answers[i] for i in range(len(rows))]


def respond(
    model: nn.Module,
    tokenizer: Any,
    schedule: Schedule | str,
    requests: Sequence[Request],
    *,
    kv: KV = "exact",
    token_budget: int | None = None,
    window: int | None = None,
    encode: Encode | None = None,
    on_response: Callable[[int, Response], None] | None = None,
    hasten: Hasten | None = None,
) -> list[Response]:
    """Answer the harness's "generate" requests, each with the options it carries.

    Requests that ask for more than the likeliest tokens (sampling, beams, penalties), or models whose own generation
    settings do, go through the model's own `generate`, one request at a time. Sampling is seeded by the request's
    fingerprint, so an answer depends neither on order nor on company.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        schedule: a `Schedule` or its text.
        requests: of kind "generate".
        kv: see `impasto.runtime.scheduled`.
        token_budget: see `generate`.
        window: see `generate`.
        encode: see `generate`.
        on_response: called with the number of a request and its answer, as soon as it is there.
        hasten: see `generate`.

    Returns:
        One `Response` per request, in their order: text (None where logits were not finite), count of tokens, whether
        the context was cut.

    Raises:
        UsageError: a request of another kind, or options that cannot be.
        OutOfMemory: a single request does not fit into memory.
    """
    writer = _Writer.of(model, tokenizer, window, encode)
    rows = []
    for i, request in enumerate(requests):
        if request.kind != "generate":
            raise UsageError(f"only requests of kind 'generate' are answered with text, not {request.kind!r}")
        options = _Options.read(request.options)
        rows.append((writer.row(i, request.context, options.limit, options.until), options))
    plain = _greedy_settings(model)
    answers: dict[int, Response] = {}

    def keep(place: int, made: Generated) -> None:
        text = made.text if made.finite else None
        answers[place] = Response(text=text, tokens=made.tokens, truncated=made.truncated)
        if on_response is not None:
            on_response(place, answers[place])

    simple = [row for row, options in rows if plain and options.plain]
    for row, made in _written(writer, schedule, simple, token_budget, None, kv, hasten):
        keep(row.place, made)
    if len(answers) < len(rows):
        with quietly(model), scheduled(model, schedule, kv=kv):
            for row, options in rows:
                if row.place not in answers:
                    keep(row.place, _own_generate(writer, row, options, requests[row.place].fingerprint))
    return [answers[i] for i in range(len(rows))]


def prompt_room(window: int, limit: int) -> int:
    """The most tokens of a prompt that `limit` new ones leave in a window.

    Raises:
        UsageError: none at all, or no new tokens.
    """
    if limit < 1:
        raise UsageError(f"at least one token must be generated, not {limit}")
    if limit >= window:
        raise UsageError(
            f"{limit} new tokens leave no room for a prompt in the model's window of {window}: ask for fewer"
        )
    return window - limit


def context_window(model: nn.Module, tokenizer: Any) -> int:
    """The most tokens the model reads, as the harness finds it: config, then tokenizer, then 2,048."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in _WINDOW_NAMES:
        if (length := getattr(config, name, None)) is not None:
            return int(length)
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 1e12 else _WINDOW


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt and what ends its answer."""

    place: int
    prompt: tuple[int, ...]
    limit: int
    stops: tuple[str, ...]
    lookback: int  # how many of the last tokens are searched for a stop string
    truncated: bool

    @property
    def size(self) -> int:
        return len(self.prompt) + self.limit


@dataclass(frozen=True, eq=False)
class _Writer:
    """A model and tokenizer with all that the loops ask of them."""

    model: nn.Module
    body: Anatomy
    tokenizer: Any
    encode: Encode
    window: int
    device: torch.device
    ends: frozenset[int]  # tokens that end a text
    pad: int

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, window: int | None, encode: Encode | None) -> _Writer:
        body = anatomy(model)
        if not body.cached or model.get_output_embeddings() is None:  # type: ignore[operator]
            raise UnsupportedModel(
                f"{type(model).__name__} does not write text: it is no causal language model with a KV cache"
            )

        def plainly(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        ends = end_tokens(getattr(model, "generation_config", None), tokenizer)
        pad = tokenizer.pad_token_id
        return cls(
            model=model,
            body=body,
            tokenizer=tokenizer,
            encode=encode or plainly,
            window=window or context_window(model, tokenizer),
            device=input_device(model),
            ends=ends,
            pad=int(pad) if pad is not None else min(ends, default=0),
        )

    def row(self, place: int, prompt: Sequence[int] | str, limit: int, until: Sequence[str]) -> _Row:
        room = prompt_room(self.window, limit)
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            ids = [next(i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0) if i is not None)]
        stops = tuple(dict.fromkeys(s for s in (*until, self.end_text) if s))
        lengths = [len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        # Two tokens more than the stop string's own: it may come out in another split.
        return _Row(place, tuple(ids[-room:]), limit, stops, max(lengths, default=0) + 2, len(ids) > room)

    @property
    def end_text(self) -> str:
        end = self.tokenizer.eos_token_id
        return "" if end is None else str(self.tokenizer.decode(end))

    def ended(self, row: _Row, new: Sequence[int]) -> bool:
        """Whether a row's answer is complete with its last token."""
        if new[-1] in self.ends or len(new) >= row.limit:
            return True
        return self.stopped(row, new)

    def stopped(self, row: _Row, new: Sequence[int]) -> bool:
        """Whether a stop string stands in the last tokens, special tokens written out."""
        if not row.stops:
            return False
        tail = self.tokenizer.decode(list(new[-row.lookback :]))
        return any(stop in tail for stop in row.stops)

    def text(self, row: _Row, new: Sequence[int]) -> str:
        """The answer as text, cut before its stop strings."""
        return _cut(self.tokenizer.decode(list(new), skip_special_tokens=True), row.stops)

    def next_tokens(self, ids: Tensor, pads: Tensor | None, cache: DynamicCache) -> Tensor:
        """The likeliest next token of each row, shape (batch,), -1 where there is none; one forward pass.

        Args:
            ids: the tokens that the cache does not hold yet, (batch, new positions).
            pads: how many pad positions each row begins with, or None where no row has any.
            cache: what came before.
        """
        before = cache.get_seq_length()
        after = before + ids.shape[1]
        options: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if pads is not None:
            columns = torch.arange(after, device=ids.device)
            options["attention_mask"] = (columns >= pads[:, None]).long()
        if "position_ids" in self.body.arguments:
            columns = torch.arange(before, after, device=ids.device)[None]
            columns = columns.expand(ids.shape[0], -1) if pads is None else (columns - pads[:, None]).clamp(min=0)
            options["position_ids"] = columns
        if "logits_to_keep" in self.body.arguments:
            options["logits_to_keep"] = 1
        best = self.model(**options).logits[:, -1].max(-1)
        chosen: Tensor = torch.where(best.values.isfinite(), best.indices, -1)
        return chosen


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


@dataclass
class _Stream:
    """Hands out the texts piece by piece; remembers how far it came, also when a batch is begun again."""

    writer: _Writer
    on_token: Callable[[int, str], None]
    told: dict[int, int] = field(default_factory=dict)

    def __call__(self, row: _Row, new: Sequence[int], ended: bool) -> None:
        text = self.writer.text(row, new)
        if not ended:
            text = text.rstrip("\ufffd")  # the first bytes of a character
            begun = (n for stop in row.stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        told = self.told.get(row.place, 0)
        if len(text) > told:
            self.told[row.place] = len(text)
            self.on_token(row.place, text[told:])


def _written(
    writer: _Writer,
    schedule: Schedule | str,
    rows: Sequence[_Row],
    budget: int | None,
    stream: _Stream | None,
    kv: KV,
    hasten: Hasten | None,
) -> Iterator[tuple[_Row, Generated]]:
    """Every row with its answer: by a decoder where that pays, and what is left by the plain runtime."""
    done: set[int] = set()
    if hasten is not None and kv == "exact" and rows:
        for row, made in _hastened(writer, schedule, rows, budget, stream, hasten):
            done.add(row.place)
            yield row, made
    left = [row for row in rows if row.place not in done]
    if left:
        with quietly(writer.model), scheduled(writer.model, schedule, kv=kv):
            yield from _batches(writer, left, budget, stream)


def _hastened(
    writer: _Writer,
    schedule: Schedule | str,
    rows: Sequence[_Row],
    budget: int | None,
    stream: _Stream | None,
    hasten: Hasten,
) -> Iterator[tuple[_Row, Generated]]:
    """Rows with their answers by a decoder; ends early where there is none, it is refused, or memory runs out."""
    budget = BUDGET.get(writer.device.type, BUDGET["cuda"]) if budget is None else budget
    waiting = sorted(rows, key=lambda row: (-len(row.prompt), row.place))
    columns = max(row.size for row in rows)
    count = max(1, min(len(rows), ROWS, budget // columns))
    batches = [waiting[first : first + count] for first in range(0, len(waiting), count)]
    steps = sum(max(row.limit for row in batch) for batch in batches)
    found = hasten(writer.model, schedule, Size(count, columns, steps))
    if found is None:
        return
    try:
        with found as decoder:
            for batch in batches:
                yield from zip(batch, _answer_by(decoder, writer, batch, stream), strict=True)
    except UnsupportedModel:
        return
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
    memory.free()


def _answer_by(decoder: Decoding, writer: _Writer, rows: Sequence[_Row], stream: _Stream | None) -> list[Generated]:
    """The answers to one batch of rows by a decoder, which is looked at now and then."""
    began = time.perf_counter()
    new: list[list[int]] = [[] for _ in rows]
    broken: set[int] = set()
    done: dict[int, float] = {}
    limit = max(row.limit for row in rows)
    decoder.prefill([row.prompt for row in rows])
    first, made = 0.0, 1
    while True:
        found = decoder.new_tokens()
        now = time.perf_counter()
        first = first or now
        for index, row in enumerate(rows):
            for token in found[index][len(new[index]) :]:
                if index in done:
                    break
                if token < 0:
                    broken.add(index)
                else:
                    new[index].append(token)
                ended = token < 0 or writer.ended(row, new[index])
                if ended:
                    done[index] = now
                if stream is not None:
                    stream(row, new[index], ended)
        if len(done) == len(rows):
            return [_generated(writer, row, new[i], began, first, done[i], i in broken) for i, row in enumerate(rows)]
        for _ in range(min(_LOOK[stream is not None], limit - made)):
            decoder.step()
            made += 1


def _generated(
    writer: _Writer, row: _Row, new: Sequence[int], began: float, first: float, ended: float, broken: bool
) -> Generated:
    return Generated(
        text=writer.text(row, new),
        tokens=len(new),
        new_token_ids=tuple(new),
        seconds_prefill=first - began,
        seconds_decode=ended - first,
        truncated=row.truncated,
        finite=not broken,
    )


def _batches(
    writer: _Writer, rows: Sequence[_Row], budget: int | None, stream: _Stream | None
) -> Iterator[tuple[_Row, Generated]]:
    """Every row with its answer, longest prompts first: too large a batch then shows at once."""
    budget = BUDGET.get(writer.device.type, BUDGET["cuda"]) if budget is None else budget
    waiting = sorted(rows, key=lambda row: (-len(row.prompt), row.place))
    while waiting:
        count = 1
        while count < len(waiting) and _cost(waiting[: count + 1]) <= budget:
            count += 1
        batch = waiting[:count]
        made = memory.tried(lambda batch=batch: _answer(writer, batch, stream))  # type: ignore[misc]
        if made is None and count == 1:
            raise _too_large(batch[0])
        if made is None:
            budget = _cost(batch) // 2
            continue
        waiting = waiting[count:]
        yield from zip(batch, made, strict=True)


def _cost(rows: Sequence[_Row]) -> int:
    return len(rows) * (max(len(row.prompt) for row in rows) + max(row.limit for row in rows))


def _too_large(row: _Row) -> OutOfMemory:
    return OutOfMemory(
        f"a single prompt of {len(row.prompt)} tokens with {row.limit} to generate does not fit into memory: "
        "ask for fewer tokens, a smaller dtype or another device"
    )


def _answer(writer: _Writer, rows: Sequence[_Row], stream: _Stream | None) -> list[Generated]:
    """The answers to one batch of rows; reads the chosen tokens back once per step."""
    began = time.perf_counter()
    width = max(len(row.prompt) for row in rows)
    padding = [width - len(row.prompt) for row in rows]
    ids = torch.tensor(
        [[writer.pad] * n + list(row.prompt) for n, row in zip(padding, rows, strict=True)], device=writer.device
    )
    pads = torch.tensor(padding, device=writer.device) if any(padding) else None
    cache = DynamicCache(config=text_config(writer.model))
    new: list[list[int]] = [[] for _ in rows]
    broken: set[int] = set()
    done: dict[int, float] = {}
    alive = list(range(len(rows)))  # the rows that are still in the batch, in its order
    first = 0.0
    while alive:
        chosen = writer.next_tokens(ids, pads, cache)
        tokens = chosen.tolist()
        now = time.perf_counter()
        first = first or now
        stay = []
        for position, (index, token) in enumerate(zip(alive, tokens, strict=True)):
            if token < 0:
                broken.add(index)
            else:
                new[index].append(token)
            ended = token < 0 or writer.ended(rows[index], new[index])
            if ended:
                done[index] = now
            else:
                stay.append(position)
            if stream is not None:
                stream(rows[index], new[index], ended)
        ids = chosen[:, None]
        if stay and len(stay) < len(alive):
            kept = torch.tensor(stay, device=writer.device)
            ids = ids[kept]
            cache.reorder_cache(kept)  # as for beams; unlike batch_select_indices, slots of every kind know it
            pads = None if pads is None or not any(padding[alive[i]] for i in stay) else pads[kept]
        alive = [alive[i] for i in stay]
    return [_generated(writer, row, new[i], began, first, done[i], i in broken) for i, row in enumerate(rows)]


@dataclass(frozen=True, slots=True)
class _Options:
    """The harness's generation options, read by its rules."""

    limit: int
    until: tuple[str, ...]
    extra: Mapping[str, Any]  # what is left for the model's own `generate`; empty for plain greedy text

    @property
    def plain(self) -> bool:
        return not self.extra

    @classmethod
    def read(cls, text: str) -> _Options:
        options: dict[str, Any] = dict(json.loads(text)) if text else {}
        lengths = [options.pop(name, None) for name in _LENGTH_NAMES]
        limit = next((int(n) for n in lengths if n is not None), MAX_NEW_TOKENS)
        until = options.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(options.pop("temperature", None) or 0.0)
        asked = options.pop("do_sample", None)
        if asked and temperature <= 0:
            raise UsageError("a request asks for sampling at temperature 0: give a temperature, or do_sample: false")
        if asked is False or temperature <= 0:
            options = {k: v for k, v in options.items() if k not in _SAMPLING_NAMES}
        else:
            options |= {"do_sample": True, "temperature": temperature}
        return cls(limit, until, options)


def _greedy_settings(model: nn.Module) -> bool:
    """Whether the model's own generation settings leave the likeliest token the likeliest."""
    settings = getattr(model, "generation_config", None)
    return settings is None or not set(settings.to_diff_dict()) - {*_NEUTRAL.split(), *_SAMPLING_NAMES}


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Stop strings for the model's own `generate`, for one row."""

    def __init__(self, writer: _Writer, row: _Row) -> None:
        self.writer = writer
        self.row = row

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        new = input_ids[0, len(self.row.prompt) :].tolist()
        return torch.tensor([self.writer.ended(self.row, new)], device=input_ids.device)


class _Watch(LogitsProcessor):  # type: ignore[misc]
    """Notes where the model's own `generate` meets logits among which there is no likeliest token."""

    def __init__(self) -> None:
        self.finite = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.max(-1).values.isfinite().all()):
            return scores
        self.finite = False
        return torch.zeros_like(scores)


def _own_generate(writer: _Writer, row: _Row, options: _Options, fingerprint: str) -> Generated:
    """One request by the model's own `generate`, with its settings and the request's."""
    ids = torch.tensor([row.prompt], device=writer.device)
    wanted = {"do_sample": False, "max_length": ids.shape[1] + row.limit, **options.extra}

    def work() -> list[Generated]:
        watch = _Watch()
        began = time.perf_counter()
        output = writer.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=writer.pad,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([_StopStrings(writer, row)]),
            logits_processor=LogitsProcessorList([watch]),
            **wanted,
        )
        new = output[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
        return [Generated(writer.text(row, new), len(new), tuple(new), 0.0, seconds, row.truncated, watch.finite)]

    with torch.random.fork_rng(devices=[writer.device] if writer.device.type == "cuda" else []):
        torch.manual_seed(int(fingerprint, 16) >> 1)
        made = memory.tried(work)
    if made is None:
        raise _too_large(row)
    return made[0]
