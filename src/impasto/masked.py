"""Log-likelihoods and text from encoders: what a masked language model says of a continuation.

A continuation is scored as LASER scores it with encoders: all its tokens are masked at once, and the log-probabilities
of the true tokens at the masks are added. `masking="each"` masks one token at a time and shows the model the others,
which is the pseudo-log-likelihood of Salazar et al. (arXiv 1910.14659). For one token the two are the same number.

Questions that differ in the answer alone (the labels of a classification) are one row of the batch. Of many recipes,
what they begin with runs once, as in `impasto.scoring`; so a grid of edits costs about half of its layer calls.

    scorer = MaskedScorer(model, tokenizer, after=".")
    scorer.score(recipes, [Request("loglikelihood", "The capital of France is", " Paris")])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from impasto import memory
from impasto.anatomy import anatomy, input_device, quietly
from impasto.edit import Edit
from impasto.encoding import Piece
from impasto.errors import OutOfMemory, UnsupportedModel, UsageError
from impasto.forest import Node as Row
from impasto.forest import grow
from impasto.halves import halves
from impasto.head import Head
from impasto.levels import record, send
from impasto.recipe import Recipe
from impasto.result import Request, Response
from impasto.runtime import merge
from impasto.scoring import Batch, Scores, Work, check
from impasto.taps import Context, hidden_of, real_call
from impasto.trie import Bundle, Dressed, Node, Symbol, count, naive_calls, plant

Masking = Literal["together", "each"]
Lengths = Literal["tokens", "authors"]
Wear = Callable[[int, tuple[Edit, ...]], AbstractContextManager[object]]

WAYS: Mapping[str, tuple[Masking, Lengths]] = MappingProxyType(
    {"together": ("together", "tokens"), "each": ("each", "tokens"), "authors": ("together", "authors")}
)
"""What each of `result.MASKINGS` stands for: how tokens are masked, and how many of them are said to be scored."""

BUDGET = {"cpu": 2048, "cuda": 32768}  # padded tokens of one batch, before memory says otherwise
MASKS = 5  # how many tokens the paper's encoders write


@dataclass(frozen=True, slots=True)
class Masked:
    """One request as tokens: what stands before and behind the masks, and what belongs under them."""

    left: tuple[int, ...]
    targets: tuple[int, ...]
    right: tuple[int, ...]
    truncated: bool = False

    def rows(self, masking: Masking, mask: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The sequences to run, each with the numbers of the targets that it says something of."""
        if masking == "together":
            yield (*self.left, *[mask] * len(self.targets), *self.right), tuple(range(len(self.targets)))
            return
        for k in range(len(self.targets)):
            yield (*self.left, *self.targets[:k], mask, *self.targets[k + 1 :], *self.right), (k,)


class Masker:
    """Turns texts into tokens with room for masks.

    Args:
        model: a masked language model; its position table limits the length.
        tokenizer: its tokenizer, which must have a mask token.
        specials: put the tokenizer's special tokens around each text. The paper's code leaves them out where it
            scores answers of several tokens, though no encoder was trained without them.
        window: longest sequence in tokens; None takes what model and tokenizer allow.

    Raises:
        UsageError: no tokenizer, or one without a mask token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, specials: bool = True, window: int | None = None) -> None:
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise UsageError("scoring with masks needs a tokenizer with a mask token, and this model has none")
        self.tokenizer = tokenizer
        self.mask = int(mask)
        self.window = window or _window(model, tokenizer)
        self.before, self.behind = self._specials() if specials else ((), ())

    def encode(self, context: str, continuation: str, after: str = "") -> Masked:
        """The tokens of a continuation between its context and what comes after it; too long contexts lose their start.

        Raises:
            UsageError: the continuation has no tokens, or does not fit into the window.
        """
        left, targets, right = self._cut(context, continuation, after)
        if not targets:
            raise UsageError(f"a continuation without tokens cannot be scored with masks: {continuation!r}")
        return self._fit(left, targets, right)

    def blanks(self, context: str, count: int) -> Masked:
        """A context with so many masks behind it."""
        return self._fit(self._plain(context.rstrip()), (self.mask,) * count, ())

    def _fit(self, left: tuple[int, ...], targets: tuple[int, ...], right: tuple[int, ...]) -> Masked:
        room = self.window - len(targets) - len(right) - len(self.before) - len(self.behind)
        if room < 0:
            raise UsageError(f"a continuation of {len(targets)} tokens does not fit into a window of {self.window}")
        kept = left[len(left) - min(room, len(left)) :]
        return Masked((*self.before, *kept), targets, (*right, *self.behind), len(kept) < len(left))

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _cut(self, *texts: str) -> list[tuple[int, ...]]:
        """The tokens of each text as they come out in the whole; on its own where tokens run across the border."""
        parts: list[tuple[int, ...]] = []
        done: tuple[int, ...] = ()
        for k, text in enumerate(texts):
            whole = self._plain("".join(texts[: k + 1]))
            part = whole[len(done) :] if whole[: len(done)] == done else self._plain(text)
            parts.append(part)
            done = (*done, *part)
        return parts

    def _specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens before and behind a text, found on a sample."""
        bare, dressed = self._plain("a"), tuple(self.tokenizer.encode("a"))
        for start in range(len(dressed) - len(bare) + 1):
            if bare == dressed[start : start + len(bare)]:
                return dressed[:start], dressed[start + len(bare) :]
        return (), ()


class MaskedScorer:
    """Scores recipes on one loaded encoder; the counterpart of `impasto.scoring.Scorer`.

    Args:
        model: a masked language model with one stack of layers.
        tokenizer: its tokenizer.
        masking: "together" masks all tokens of a continuation at once, "each" one at a time.
        after: text behind a continuation, such as the full stop that the paper's facts end with, where the request
            itself names none.
        lengths: "tokens" reports how many tokens were scored. "authors" reports one more, as the paper's code
            does for encoders: its losses per token come out too small by n / (n + 1). For comparison only.
        specials: see `Masker`.
        budget: padded tokens per batch, halved by itself where memory does not suffice; None: by device.
        window: see `Masker`.
        wear: puts edits on a layer for the length of a `with` block.
        note: called with a sentence when something happens that the user should know.

    Raises:
        UnsupportedModel: the model does not predict masked tokens.
        UsageError: an unknown option, or a tokenizer without a mask token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        masking: Masking = "together",
        after: str = "",
        lengths: Lengths = "tokens",
        specials: bool = True,
        budget: int | None = None,
        window: int | None = None,
        wear: Wear | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if masking not in ("together", "each") or lengths not in ("tokens", "authors"):
            raise UsageError(
                f"masking is 'together' or 'each' and lengths is 'tokens' or 'authors', not {masking!r} and {lengths!r}"
            )
        self.model, self.masking, self.after, self.lengths = model, masking, after, lengths
        self.masker = Masker(model, tokenizer, specials=specials, window=window)
        self.body = anatomy(model)
        if model.get_output_embeddings() is None:
            raise UnsupportedModel(f"{type(model).__name__} does not predict tokens, so texts cannot be scored with it")
        self.device = input_device(model)
        self.budget: int | None = budget or BUDGET.get(self.device.type, BUDGET["cuda"])
        self.wear, self.note = wear, note
        self.head = Head(model, self.body)

    def pieces(self, requests: Sequence[Request]) -> list[Piece]:
        """The sequences to run for requests, in their order, each with what belongs under its masks."""
        return [
            Piece(index, row, tuple(one.targets[k] for k in targets), one.truncated)
            for index, one in enumerate(self.sheet(requests).asked)
            for row, targets in one.rows(self.masking, self.masker.mask)
        ]

    def trees(self, pieces: Sequence[Piece]) -> list[Row]:
        """Equal sequences as one; beginnings are not shared, since each token sees what stands behind it."""
        return grow([piece.tokens for piece in pieces], share=False)

    def plan(self, recipes: Sequence[Recipe], requests: Sequence[Request]) -> Work:
        """What scoring these would take; runs nothing."""
        sheet = self.sheet(requests, len(recipes))
        queue = sheet.batches(self.budget or 1)
        tree = plant(recipes)
        return Work(
            recipes=len(recipes),
            requests=len(requests),
            layer_calls=naive_calls(recipes),
            shared_calls=_calls(tree),
            tokens=sum(len(row) for one in sheet.asked for row, _ in one.rows(self.masking, self.masker.mask)),
            shared_tokens=sum(map(padded, queue)),
            positions=sum(len(one.targets) for one in sheet.asked),
            batches=len(queue),
            alive=count(tree).alive,
        )

    def score(
        self,
        recipes: Sequence[Recipe],
        requests: Sequence[Request],
        *,
        on_batch: Callable[[Batch], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Scores:
        """Log-likelihood of every request under every recipe, and whether every token is the likeliest at its mask.

        Args:
            recipes: schedules with edits; their `model` text is not looked at.
            requests: of kind "loglikelihood".
            on_batch: called as soon as some requests are answered by all recipes, before the next are begun.
            progress: called with the share of the work that is done, 0 to 1.

        Raises:
            UsageError: a request of another kind, or edits without a way to apply them.
            OutOfMemory: a single sequence does not fit; what was answered before has gone to `on_batch`.
        """
        check(recipes, self)
        sheet = self.sheet(requests, len(recipes))
        tree = plant(recipes)
        queue = sheet.batches(self.budget or 1)
        total, done = sum(map(padded, queue)) or 1, 0

        def smaller(queue: list[list[tuple[int, ...]]]) -> list[list[tuple[int, ...]]]:
            nonlocal total
            self.budget, cut = halved(queue, self.device)
            self.note(f"out of memory: token budget halved to {self.budget}")
            total = done + sum(map(padded, cut))
            return cut

        for rows, finished in memory.batch_by_batch(queue, lambda rows: self._answer(tree, rows, sheet), smaller):
            done += padded(rows)
            if on_batch is not None and len(finished):
                on_batch(sheet.batch(finished))
            if progress is not None:
                progress(done / total)
        return sheet.scores()

    def through(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """The hidden states of a batch behind the last layer, the layers run once each and in their own order."""
        hidden, contexts = record(self.model, self.body, _inputs(rows, self.body.arguments, self.device))
        for block, context in zip(self.body.layers, contexts, strict=True):
            args, kwargs = context.join(hidden)
            hidden = hidden_of(real_call(block, args, kwargs))
        return hidden

    def sheet(self, requests: Sequence[Request], recipes: int = 0) -> Sheet:
        """The distinct sequences of requests and what is read off where, with room for the answers of some recipes.

        Raises:
            UsageError: a request of another kind.
        """
        if other := next((request.kind for request in requests if request.kind != "loglikelihood"), None):
            raise UsageError(f"a masked model scores continuations; a request of kind {other!r} is none")
        asked = [
            self.masker.encode(request.context, request.continuation, request.after or self.after)
            for request in requests
        ]
        ranked = [request.wants_rank for request in requests]
        return Sheet(asked, ranked, self.masking, self.masker.mask, recipes, self.lengths)

    def _answer(self, tree: Node, rows: Sequence[tuple[int, ...]], sheet: Sheet) -> NDArray[np.int64]:
        """Run one batch under all recipes; returns which requests are complete with it."""
        spots = sheet.spots(rows)
        row, column, token = (send(torch.tensor(list(part)), self.device) for part in zip(*spots, strict=True))
        with quietly(self.model):
            hidden, contexts = record(self.model, self.body, _inputs(rows, self.body.arguments, self.device))
            walk = _Walk(self, contexts)
            places = torch.arange(len(spots), device=self.device)
            ranks = bool(sheet.ranked.any())
            said: list[tuple[int, tuple[Tensor, Tensor, Tensor | None]]] = []
            for recipe, states in walk.ends(tree, hidden):
                picked = states[row.to(states.device), column.to(states.device)].to(self.device)
                said.append((recipe, self.head.score(picked, places, token, ranks=ranks)))
        return sheet.fill(rows, {recipe: _Found.of(*answers) for recipe, answers in said})


class _Walk:
    """One batch on its way through the tree of recipes."""

    def __init__(self, scorer: MaskedScorer, contexts: Sequence[Context]) -> None:
        self.scorer = scorer
        self.contexts = contexts

    def ends(self, node: Node, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(recipe, last hidden state) of every recipe; what they begin with in common runs once."""
        while True:
            for recipe in node.recipes:
                yield recipe, hidden
            steps: list[tuple[Dressed, Node]] = [*node.symbols.items(), *node.bundles.items()]
            if not steps:
                return
            for step, child in steps[:-1]:
                yield from self.ends(child, self.step(step, hidden))
            step, node = steps[-1]
            hidden = self.step(step, hidden)

    def step(self, step: Dressed, hidden: Tensor) -> Tensor:
        """A layer call, or a group whose branches all read `hidden`."""
        if isinstance(step, Symbol):
            return self.call(step, hidden)
        return merge([self.series(branch, hidden) for branch in step.branches], hidden, step.merge)

    def series(self, steps: Iterable[Symbol | Bundle], hidden: Tensor) -> Tensor:
        for step in steps:
            hidden = self.step(step, hidden)
        return hidden

    def call(self, symbol: Symbol, hidden: Tensor) -> Tensor:
        scorer, layer = self.scorer, symbol.call.layer
        block = scorer.body.layers[layer]
        with contextlib.ExitStack() as stack:
            if symbol.call.half != "whole":  # found before weights are changed
                stack.enter_context(halves(scorer.model, scorer.body, layer).only(block, symbol.call.half))
            if symbol.edits and scorer.wear is not None:
                stack.enter_context(scorer.wear(layer, symbol.edits))
            args, kwargs = self.contexts[layer].join(hidden)
            return hidden_of(real_call(block, args, kwargs))


@dataclass(frozen=True, slots=True)
class _Found:
    """What one recipe says at the masks of a batch."""

    values: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    rank: NDArray[np.int8] | None

    @classmethod
    def of(cls, values: Tensor, greedy: Tensor, rank: Tensor | None) -> _Found:
        return cls(
            values.double().cpu().numpy(),
            greedy.cpu().numpy(),
            None if rank is None else rank.to(torch.int8).cpu().numpy(),
        )


class Sheet:
    """The distinct rows of all requests, and what has been answered so far."""

    def __init__(
        self,
        asked: Sequence[Masked],
        ranked: Sequence[bool],
        masking: Masking,
        mask: int,
        recipes: int,
        lengths: Lengths,
    ) -> None:
        self.asked = asked
        self.ranked = np.array(ranked, dtype=bool)
        self.wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # row: (request, number of the target)
        for index, masked in enumerate(asked):
            for row, targets in masked.rows(masking, mask):
                self.wanted.setdefault(row, []).extend((index, k) for k in targets)
        self.values = np.zeros((recipes, len(asked)))
        self.greedy = np.ones((recipes, len(asked)), dtype=bool)
        self.rank = np.full((recipes, len(asked)), -1, dtype=np.int8)
        self.left = np.array([len(masked.targets) for masked in asked], dtype=np.int64)
        self.tokens = self.left + (lengths == "authors")
        self.truncated = np.array([masked.truncated for masked in asked], dtype=bool)

    def batches(self, budget: int) -> list[list[tuple[int, ...]]]:
        """All sequences, longest first, in batches."""
        return packed(sorted(self.wanted, key=lambda row: (-len(row), row)), budget)

    def spots(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[int, int, int]]:
        """(row of the batch, position, token) of everything that is read off these rows, in the order of `fill`."""
        return [
            (number, len(self.asked[index].left) + k, self.asked[index].targets[k])
            for number, row in enumerate(rows)
            for index, k in self.wanted[row]
        ]

    def fill(self, rows: Sequence[tuple[int, ...]], found: Mapping[int, _Found]) -> NDArray[np.int64]:
        """Take what recipes say at the spots of these rows; returns which requests are complete with them."""
        owners, targets = np.array([spot for row in rows for spot in self.wanted[row]], dtype=np.int64).T
        first = (targets == 0) & self.ranked[owners]
        for recipe, answers in found.items():
            np.add.at(self.values[recipe], owners, answers.values)
            np.logical_and.at(self.greedy[recipe], owners, answers.greedy)
            if answers.rank is not None:
                self.rank[recipe, owners[first]] = answers.rank[first]
        np.subtract.at(self.left, owners, 1)
        seen = np.unique(owners)
        finished: NDArray[np.int64] = seen[self.left[seen] == 0]
        return finished

    def batch(self, chosen: NDArray[np.int64]) -> Batch:
        """The answers to some requests."""
        return Batch(
            requests=chosen,
            loglikelihood=self.values[:, chosen],
            greedy=self.greedy[:, chosen],
            tokens=self.tokens[chosen],
            truncated=self.truncated[chosen],
            rank=self.rank[:, chosen],
        )

    def scores(self) -> Scores:
        """The answers to all requests."""
        return Scores(self.values, self.greedy, self.tokens, self.truncated, self.rank)


def respond(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    masks: int = MASKS,
    specials: bool = True,
    budget: int | None = None,
    window: int | None = None,
    on_response: Callable[[int, Response], None] | None = None,
) -> list[Response]:
    """What an encoder writes after each context: so many masks behind it, each replaced by its likeliest token.

    The model runs as it is, so inside `impasto.applied` under the recipe applied there. The length is the number
    of masks, as in the paper; what a request says about it, and its stop strings, cannot be followed.

    Args:
        model: a masked language model.
        tokenizer: its tokenizer.
        requests: of kind "generate".
        masks: how many tokens to write.
        specials: see `Masker`.
        budget: padded tokens per batch, halved by itself where memory does not suffice; None: by device.
        window: see `Masker`.
        on_response: called with each answer and the number of its request.

    Raises:
        UsageError: a request of another kind, no masks, or a tokenizer without a mask token.
        OutOfMemory: a single sequence does not fit; what was answered before has gone to `on_response`.
    """
    if masks < 1:
        raise UsageError(f"at least one token must be written, not {masks}")
    if any(request.kind != "generate" for request in requests):
        raise UsageError("only requests that generate text are answered with text")
    masker = Masker(model, tokenizer, specials=specials, window=window)
    asked = [masker.blanks(request.context, masks) for request in requests]
    answers: list[Response] = [Response()] * len(requests)
    for index, tokens in likeliest(model, masker, asked, budget=budget):
        text = None if tokens is None else tokenizer.decode(list(tokens), skip_special_tokens=True)
        answers[index] = Response(text=text, tokens=masks, truncated=asked[index].truncated)
        if on_response is not None:
            on_response(index, answers[index])
    return answers


def likeliest(
    model: Any, masker: Masker, asked: Sequence[Masked], *, budget: int | None = None
) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """The likeliest token at each mask, all targets masked at once; None where a logit is not finite.

    Args:
        model: a masked language model, run as it is.
        masker: of its tokenizer.
        asked: what stands around the masks; equal sequences are run once.
        budget: padded tokens per batch, halved by itself where memory does not suffice; None: by device.

    Yields:
        The number of each entry of `asked` with its tokens, batch by batch.

    Raises:
        OutOfMemory: a single sequence does not fit.
    """
    sheet = Sheet(asked, [False] * len(asked), "together", masker.mask, 1, "tokens")
    device = input_device(model)
    arguments = anatomy(model).arguments

    def run(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...] | None]]:
        found: list[tuple[int, tuple[int, ...] | None]] = []
        with quietly(model):
            logits = model(**_inputs(rows, arguments, device)).logits
            for number, row in enumerate(rows):
                for index in dict.fromkeys(index for index, _ in sheet.wanted[row]):
                    start = len(asked[index].left)
                    best = logits[number, start : start + len(asked[index].targets)].max(-1)
                    finite = bool(best.values.isfinite().all())
                    found.append((index, tuple(best.indices.tolist()) if finite else None))
        return found

    queue = sheet.batches(budget or BUDGET.get(device.type, BUDGET["cuda"]))
    for _, answers in memory.batch_by_batch(queue, run, lambda left: halved(left, device)[1]):
        yield from answers


def _inputs(rows: Sequence[tuple[int, ...]], arguments: frozenset[str], device: torch.device) -> dict[str, Any]:
    """A batch padded on the right, the padding masked out."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        seen[number, : len(row)] = 1
    inputs: dict[str, Any] = {"input_ids": send(ids, device), "attention_mask": send(seen, device)}
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    return inputs


def packed(rows: Sequence[tuple[int, ...]], budget: int) -> list[list[tuple[int, ...]]]:
    """Rows, longest first, in batches of at most `budget` padded tokens; at least one row each."""
    found: list[list[tuple[int, ...]]] = []
    for row in rows:
        if found and len(found[-1][0]) * (len(found[-1]) + 1) <= budget:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def halved(queue: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> tuple[int, list[list[tuple[int, ...]]]]:
    """What is left in batches of half the size of the first, which did not fit into memory, and that size in tokens.

    Raises:
        OutOfMemory: the first batch is a single sequence.
    """
    rows = queue[0]
    if len(rows) == 1:
        raise OutOfMemory(
            f"one sequence of {len(rows[0])} tokens does not fit into the memory of {device}: "
            "use a smaller dtype, or a device with more memory"
        )
    budget = padded(rows) // 2
    return budget, [part for batch in queue for part in packed(batch, budget)]


def padded(rows: Sequence[tuple[int, ...]]) -> int:
    """Tokens of a batch, padding included."""
    return len(rows) * max(map(len, rows))


def _calls(tree: Node) -> int:
    """How many layer calls the walk through a tree makes."""

    def size(step: Dressed) -> int:
        return 1 if isinstance(step, Symbol) else sum(size(one) for branch in step.branches for one in branch)

    total, queue = 0, [tree]
    while queue:
        node = queue.pop()
        steps: list[Dressed] = [*node.symbols, *node.bundles]
        total += sum(map(size, steps))
        queue += [*node.symbols.values(), *node.bundles.values()]
    return total


def _window(model: nn.Module, tokenizer: Any) -> int:
    """The most tokens that a position table and the tokenizer allow."""
    config: Any = model.config
    rows = getattr(config, "max_position_embeddings", None) or 512
    for name, module in model.named_modules():
        # Some models number positions from behind the padding token's row of the table.
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            rows = min(rows, module.num_embeddings - module.padding_idx - 1)
    limit = getattr(tokenizer, "model_max_length", None)
    return min(rows, limit) if isinstance(limit, int) and limit < 1e12 else int(rows)
