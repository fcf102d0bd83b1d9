"""Log-likelihoods of many recipes on the same requests, each shared piece of work done once.

What is shared: the tokens of the requests and the beginnings they have in common (`forest`), the model's masks and
rotary tables per batch (`levels`), every layer call that recipes have in common (`trie`), and the head, which runs at
the scored positions only, for several recipes at a time (`head`). The tree of recipes is walked depth first, so memory
holds a hidden state per open branch, not per recipe.

For one machine and one set of requests the numbers are reproducible bit for bit. Other requests beside them, or
another token budget, change the shapes of the matrix products and with them the last bits; in float32 a
log-likelihood moves by less than 1e-4.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from impasto import memory
from impasto.anatomy import Anatomy, anatomy, input_device, quietly, split
from impasto.edit import Edit
from impasto.encoding import Encoder, Piece
from impasto.errors import OutOfMemory, UnsupportedModel, UsageError
from impasto.forest import Forest, Node, batches, grow, lay_out
from impasto.graphs import Backend, Cuda
from impasto.halves import halves
from impasto.head import Head
from impasto.levels import Level, call_layer, prepare, send
from impasto.nested import RANKS, Nested
from impasto.recipe import Recipe
from impasto.recorded import Recorder
from impasto.result import Request
from impasto.trie import Bundle, Symbol, count, fork, naive_calls, plant
from impasto.trie import Node as Place

BUDGET = {"cpu": 2048, "cuda": 65536}  # padded tokens of one batch, before memory says otherwise
# Tokens that a layer could run while another batch is begun, and floating-point operations that are done while one byte
# of weights is read, by device and bytes of a weight; measured on two cores and on one H200.
OVERHEAD = {("cpu", 4): 32, ("cpu", 2): 64, ("cuda", 4): 6000, ("cuda", 2): 6000}
INTENSITY = {("cpu", 4): 8, ("cpu", 2): 40, ("cuda", 4): 16, ("cuda", 2): 160}
HEAD_ROWS = 1024  # scored positions that the head takes at once

States = list[Tensor]
Wear = Callable[[int, tuple[Edit, ...]], AbstractContextManager[object]]


@dataclass(frozen=True)
class Batch:
    """Requests that are answered: one row per recipe, one column per request."""

    requests: NDArray[np.int64]  # indices into the requests that were asked, (q,)
    loglikelihood: NDArray[np.float64]  # (recipes, q)
    greedy: NDArray[np.bool_]  # (recipes, q)
    tokens: NDArray[np.int64]  # scored tokens, (q,)
    truncated: NDArray[np.bool_]  # (q,)
    rank: NDArray[np.int8] | None = None  # (recipes, q), likelier tokens than a text's first; -1 where not asked for


@dataclass(frozen=True)
class Scores:
    """Answers of all recipes to all requests, in the order in which both were given."""

    loglikelihood: NDArray[np.float64]  # (recipes, requests)
    greedy: NDArray[np.bool_]
    tokens: NDArray[np.int64]  # (requests,)
    truncated: NDArray[np.bool_]
    rank: NDArray[np.int8] | None = None  # (recipes, requests)


@dataclass(frozen=True, slots=True)
class Work:
    """What a scoring run takes, before it is run."""

    recipes: int
    requests: int
    layer_calls: int  # of the recipes one by one
    shared_calls: int  # as they will be run
    tokens: int  # of all requests, each sequence whole
    shared_tokens: int  # as they will be run, padding included
    positions: int  # scored positions of one recipe
    batches: int
    alive: int  # hidden states alive at once

    @property
    def cost(self) -> int:
        """Layer calls times tokens: what one run of the layers takes, in units of one layer on one token."""
        return self.shared_calls * self.shared_tokens

    @property
    def naive_cost(self) -> int:
        """The same without any sharing or padding."""
        return self.layer_calls * self.tokens


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which kinds of sharing are on; all of them, except to measure what each is worth."""

    calls: bool = True  # common layer calls of recipes
    contexts: bool = True  # common beginnings of requests
    ranks: bool = True  # what comes before a matrix that recipes have at several ranks
    head: bool = True  # several recipes' positions in one product
    launches: bool = True  # the kernels of a layer call that is made often, recorded and launched as a whole; on GPUs


class Scoring(Protocol):
    """What answers requests for log-likelihoods: `Scorer`, or `impasto.masked.MaskedScorer`."""

    @property
    def model(self) -> Any:
        """The model."""

    @property
    def body(self) -> Anatomy:
        """Where its layers are."""

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""

    @property
    def head(self) -> Head:
        """The part behind the last layer."""

    @property
    def budget(self) -> int | None:
        """Padded tokens of one batch."""

    @property
    def note(self) -> Callable[[str], None]:
        """Told in a sentence what the user should know."""

    @property
    def wear(self) -> Callable[[int, tuple[Edit, ...]], AbstractContextManager[object]] | None:
        """Applies edits to a layer for the length of a `with` block."""

    def pieces(self, requests: Sequence[Request]) -> list[Piece]:
        """The sequences to run."""

    def trees(self, pieces: Sequence[Piece]) -> list[Node]:
        """What of them is run once."""

    def plan(self, recipes: Sequence[Recipe], requests: Sequence[Request]) -> Work:
        """What scoring would take; runs nothing."""

    def score(
        self,
        recipes: Sequence[Recipe],
        requests: Sequence[Request],
        *,
        on_batch: Callable[[Batch], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Scores:
        """Answer every request under every recipe."""


def check(recipes: Sequence[Recipe], scorer: Scoring) -> None:
    """Make sure that a scorer can run recipes.

    Raises:
        NotationError: a schedule calls a layer that the model does not have.
        UsageError: edits, and no way to apply them.
    """
    for recipe in recipes:
        recipe.schedule.check(scorer.body.depth)
        if recipe.edits and scorer.wear is None:
            raise UsageError("these recipes have edits, and this scorer was made without a way to apply them")


@dataclass
class Scorer:
    """Scores recipes on one loaded model.

    Args:
        model: a causal language model with one stack of layers.
        tokenizer: its tokenizer.
        budget: padded tokens per batch; halved by itself where memory does not suffice. None: by device.
        sharing: which kinds of sharing to use.
        wear: puts edits on a layer for the length of a `with` block.
        window: longest input in tokens; None takes the harness's choice.
        folder: where components of matrices are kept between runs; None keeps none.
        note: called with a sentence when something happens that the user should know.
    """

    model: Any
    tokenizer: Any
    budget: int | None = None
    sharing: Sharing = field(default_factory=Sharing)
    wear: Wear | None = None
    window: int | None = None
    folder: Path | None = None
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.body = anatomy(self.model)
        if self.model.get_output_embeddings() is None or not self.body.cached:
            raise UnsupportedModel(
                f"{type(self.model).__name__} does not predict next tokens, so texts cannot be scored with it"
            )
        self.device = input_device(self.model)
        if self.device.type == "cpu":
            memory.keep_freed()
        if self.budget is None:
            self.budget = BUDGET.get(self.device.type, BUDGET["cuda"])
        self.encoder = Encoder(self.model, self.tokenizer, self.window)
        self._head: Head | None = None

    @property
    def head(self) -> Head:
        """The part behind the last layer; examined at its first use."""
        if self._head is None:
            self._head = Head(self.model, self.body)
        return self._head

    def backend(self) -> Backend | None:
        """How layer calls are recorded; None where they cannot be."""
        spread = getattr(self.model, "hf_device_map", None) or any(map(split, self.body.layers[0].parameters()))
        if not self.sharing.launches or self.device.type != "cuda" or spread:
            return None
        return Cuda(self.device, parallel=False, warmup=0, collect=False)

    def pieces(self, requests: Sequence[Request]) -> list[Piece]:
        """The sequences to run for requests, in their order."""
        return self.encoder.pieces(requests)

    def trees(self, pieces: Sequence[Piece]) -> list[Node]:
        """The common beginnings of the pieces."""
        return grow([p.tokens for p in pieces], share=self.sharing.contexts and not self.body.stateful)

    def pack(self, trees: Sequence[Node], budget: int, calls: int | None = None) -> list[list[Node]]:
        """The batches that they are run in.

        Args:
            trees: what is to be scored.
            budget: padded tokens of one batch at the most.
            calls: layer calls on each batch; None is one pass through the model.
        """
        return batches(trees, budget, self.overhead(calls or self.body.depth))

    def overhead(self, calls: int) -> int:
        """What one more batch costs, as tokens on which all of so many layer calls could run instead."""
        return round(OVERHEAD[self._kind] + self._head_read / calls)

    @property
    def _kind(self) -> tuple[str, int]:
        """Which row of `OVERHEAD` and `INTENSITY` is this model's."""
        width = next(self.body.layers[0].parameters()).element_size()
        return "cpu" if self.device.type == "cpu" else "cuda", 4 if width > 2 else 2

    @functools.cached_property
    def _head_read(self) -> float:
        """Tokens that one layer could run while the weights of the head are read, which each batch does anew."""
        layer = sum(weight.numel() for weight in self.body.layers[0].parameters())
        weight = self.model.get_output_embeddings().weight
        return float(weight.numel() * weight.element_size() * INTENSITY[self._kind] / (2 * max(1, layer)))

    def plan(self, recipes: Sequence[Recipe], requests: Sequence[Request]) -> Work:
        """What scoring these would take; runs nothing."""
        pieces = self.encoder.pieces(requests)
        counted = count(plant(recipes)) if self.sharing.calls else None
        naive = naive_calls(recipes)
        packed = self.pack(self.trees(pieces), self.budget or 1, counted.calls if counted else naive)
        return Work(
            recipes=len(recipes),
            requests=len(requests),
            layer_calls=naive,
            shared_calls=counted.calls if counted else naive,
            tokens=sum(len(p.tokens) for p in pieces),
            shared_tokens=sum(lay_out(batch).padded for batch in packed),
            positions=len({(p.tokens[: len(p.tokens) - k]) for p in pieces for k in range(len(p.targets))}),
            batches=len(packed),
            alive=counted.alive if counted else 2,
        )

    def score(
        self,
        recipes: Sequence[Recipe],
        requests: Sequence[Request],
        *,
        on_batch: Callable[[Batch], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Scores:
        """Log-likelihood and greedy flag of every request under every recipe.

        Args:
            recipes: schedules with edits; their `model` text is not looked at.
            requests: log-likelihood and rolling requests.
            on_batch: called as soon as some requests are answered by all recipes, before the next are begun.
            progress: called with the share of the work that is done, 0 to 1.

        Raises:
            OutOfMemory: a single sequence does not fit; what was answered before has gone to `on_batch`.
        """
        check(recipes, self)
        if any(request.kind == "generate" for request in requests):
            raise UsageError("requests that generate text are answered by impasto.generation, not by the scorer")
        pieces = self.encoder.pieces(requests)
        answers = _Answers(len(recipes), requests, pieces)
        roots = [plant(recipes)] if self.sharing.calls else [_alone(recipes, i) for i in range(len(recipes))]
        calls = sum(count(root).calls for root in roots)
        nested = Nested(self.model, self.body, self.folder) if self.sharing.ranks else None
        budget = self.budget or 1
        queue = self.pack(self.trees(pieces), budget, calls)
        total, done = sum(lay_out(batch).padded for batch in queue), 0

        def run(batch: list[Node]) -> tuple[Forest, NDArray[np.float64], NDArray[np.bool_], NDArray[np.int8]]:
            forest = lay_out(batch)

            def tell(share: float) -> None:
                if progress is not None:
                    progress((done + share * forest.padded) / total)

            return forest, *self._run(roots, forest, pieces, answers.ranked, len(recipes), calls, nested, tell)

        def smaller(queue: list[list[Node]]) -> list[list[Node]]:
            nonlocal budget, total
            if nested is not None:
                nested.forget()
                memory.free()
            forest = lay_out(queue[0])
            budget = min(budget, forest.padded) // 2
            cut = self.pack([tree for batch in queue for tree in batch], max(1, budget), calls)
            if lay_out(cut[0]).padded >= forest.padded:
                longest = max(len(p.tokens) for i, p in enumerate(pieces) if i in forest.ends)
                raise OutOfMemory(
                    f"one sequence of {longest} tokens does not fit into the memory of {self.device}: use a "
                    "smaller window or dtype, or a device with more memory"
                )
            self.note(f"out of memory: token budget halved to {budget}")
            self.budget = budget
            total = done + sum(lay_out(batch).padded for batch in cut)
            return cut

        for _, (forest, values, greedy, rank) in memory.batch_by_batch(queue, run, smaller):
            done += forest.padded
            finished = answers.add(sorted(forest.ends), values, greedy, rank)
            if on_batch is not None and finished is not None:
                on_batch(finished)
        return answers.scores()

    def _run(
        self,
        roots: Sequence[Place],
        forest: Forest,
        pieces: Sequence[Piece],
        ranked: NDArray[np.bool_],
        recipes: int,
        calls: int,
        nested: Nested | None,
        tell: Callable[[float], None],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int8]]:
        """Of each sequence of a batch, for all recipes: (recipes, sequences) sums, greedy flags, first ranks."""
        with quietly(self.model):
            levels = prepare(self.model, self.body, forest, self.device)
            targets = _Targets(forest, pieces, ranked, self.device)
            walk = _Walk(self, levels, targets, recipes, nested, lambda made: tell(made / calls))
            for root in roots:
                walk.visit([root], [level.hidden for level in levels])
            return walk.finish()


class _Targets:
    """Where the scored positions of a batch are and which tokens they must predict."""

    def __init__(
        self, forest: Forest, pieces: Sequence[Piece], ranked: NDArray[np.bool_], device: torch.device
    ) -> None:
        self.device = device
        self.sequences = sorted(forest.ends)
        self.ranked = any(ranked[pieces[s].request] for s in self.sequences)
        targets = [pieces[s].targets for s in self.sequences]
        places = [
            place for s, wanted in zip(self.sequences, targets, strict=True) for place in forest.tail(s, len(wanted))
        ]
        # Equal places are one position; positions are gathered level by level, so they are numbered in that order.
        distinct, place = np.unique(np.array(places, dtype=np.int64).reshape(-1, 3), axis=0, return_inverse=True)
        self.positions = len(distinct)
        self.place = send(torch.from_numpy(place.reshape(-1)), device)
        self.token = send(torch.tensor([token for wanted in targets for token in wanted]), device)
        self.owner = send(torch.arange(len(targets)).repeat_interleave(torch.tensor([len(t) for t in targets])), device)
        self.first = send(torch.tensor(np.cumsum([0, *(len(wanted) for wanted in targets[:-1])])), device)
        level_of, row, column = torch.from_numpy(distinct).unbind(1)
        self.by_level = [
            (send(row[level_of == level], device), send(column[level_of == level], device))
            for level in range(len(forest.levels))
        ]

    def gather(self, states: States) -> Tensor:
        """The hidden states at the scored positions, (..., positions, channels), wherever their last layer ran."""
        picked = [
            state[..., rows.to(state.device), columns.to(state.device), :].to(self.device)
            for state, (rows, columns) in zip(states, self.by_level, strict=True)
        ]
        return torch.cat(picked, dim=-2)


class _Sum:
    """The merge of a parallel group, taken branch by branch."""

    def __init__(self, bundle: Bundle, states: States) -> None:
        self.bundle = bundle
        self.start = states
        self.total: States | None = None

    def add(self, states: States) -> None:
        pairs = list(zip(states, self.start, strict=True))
        if self.bundle.merge == "mean":
            change = [out.float().to(h.device) for out, h in pairs]
        else:
            change = [out.float().to(h.device) - h.float() for out, h in pairs]
        if self.total is None:
            self.total = [c.clone() if c is out else c for c, (out, _) in zip(change, pairs, strict=True)]
        else:
            for total, c in zip(self.total, change, strict=True):
                total.add_(c)

    def finish(self) -> States:
        assert self.total is not None
        if self.bundle.merge == "mean":
            return [
                total.div_(len(self.bundle.branches)).to(h.dtype)
                for total, h in zip(self.total, self.start, strict=True)
            ]
        return [(h.float() + total).to(h.dtype) for total, h in zip(self.total, self.start, strict=True)]


class _Walk:
    """One batch's walk over the tree of recipes."""

    def __init__(
        self,
        scorer: Scorer,
        levels: Sequence[Level],
        targets: _Targets,
        recipes: int,
        nested: Nested | None,
        tell: Callable[[int], None],
    ) -> None:
        self.scorer = scorer
        self.nested = nested
        self.tell = tell
        self.made = 0
        self.levels = levels
        self.targets = targets
        self.recorder = Recorder(scorer.backend(), scorer.note)
        self.sums: dict[tuple[int, Bundle], _Sum] = {}
        self.waiting: list[tuple[int, Tensor]] = []
        shape = (recipes, len(targets.sequences))
        self.values = torch.zeros(shape, dtype=torch.float64, device=scorer.device)
        self.greedy = torch.ones(shape, dtype=torch.bool, device=scorer.device)
        self.rank = torch.full(shape, -1, dtype=torch.int8, device=scorer.device)

    def call(self, symbol: Symbol, states: States) -> States:
        scorer, layer = self.scorer, symbol.call.layer
        self.tell(self.made)
        self.made += 1

        def call(states: Sequence[Tensor]) -> States:
            return call_layer(scorer.body, layer, self.levels, states)

        with contextlib.ExitStack() as stack:
            if symbol.call.half != "whole":
                split = halves(scorer.model, scorer.body, layer)
                stack.enter_context(split.only(scorer.body.layers[layer], symbol.call.half))
            if not symbol.edits or scorer.wear is None:
                return self.recorder.call((layer, symbol.call.half), call, states)
            worn = None if self.nested is None else self.nested.wearing(layer, symbol.edits)
            stack.enter_context(scorer.wear(layer, symbol.edits) if worn is None else worn)
            return call(states)

    def calls(self, symbols: Sequence[Symbol], states: States) -> Iterator[States]:
        """What one state becomes under each of some calls; together where they are ranks of one matrix."""
        found: list[States] | None = None
        if self.nested is not None and len(symbols) > 1:
            edits = [symbol.edits[0] for symbol in symbols]
            found = self.nested.call(symbols[0].call.layer, edits, self.levels, states)
        if found is None:
            yield from (self.call(symbol, states) for symbol in symbols)
            return
        for _ in symbols:
            self.tell(self.made)
            self.made += 1
            yield found.pop(0)

    def visit(self, places: Sequence[Place], states: States) -> None:
        """Everything that follows from one state; the largest part is walked last and without recursion."""
        while True:
            way = fork(places)
            for place in way.here:
                for recipe in place.recipes:
                    self.arrive(recipe, states)
                for owner, bundle in place.arrivals:
                    self.sums[id(owner), bundle].add(states)
            for place, bundle in way.groups:
                self.sums[id(place), bundle] = _Sum(bundle, states)
            for alike in _alike(way.sides):
                symbols = [symbol for symbol, _ in alike]
                for (_, children), after in zip(alike, self.calls(symbols, states), strict=True):
                    self.visit(children, after)
            if way.kept is not None:
                states = self.call(way.kept.symbol, states)
                if way.kept.now:
                    self.visit(way.kept.now, states)
            for place, bundle in way.groups[: None if way.kept else -1]:
                self.visit([place.bundles[bundle]], self.sums.pop((id(place), bundle)).finish())
            if way.kept is not None:
                places = way.kept.later
            elif way.groups:
                place, bundle = way.groups[-1]
                places, states = [place.bundles[bundle]], self.sums.pop((id(place), bundle)).finish()
            else:
                return

    def arrive(self, recipe: int, states: States) -> None:
        self.waiting.append((recipe, self.targets.gather(states)))
        together = self.scorer.sharing.head
        if not together or (len(self.waiting) + 1) * self.targets.positions > HEAD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Send the waiting positions through the head."""
        if not self.waiting:
            return
        targets, n = self.targets, self.targets.positions
        recipes = torch.tensor([recipe for recipe, _ in self.waiting]).to(self.values.device)
        states = torch.cat([states for _, states in self.waiting], dim=-2)
        shift = n * torch.arange(len(recipes), device=targets.place.device)[:, None]
        places = (targets.place[None] + shift).reshape(-1)
        tokens = targets.token.repeat(len(recipes))
        values, greedy, rank = self.scorer.head.score(states, places, tokens, ranks=targets.ranked)
        values = values.to(self.values.device, torch.float64).reshape(len(recipes), -1)
        greedy = greedy.to(self.values.device).reshape(len(recipes), -1)
        sums = torch.zeros(len(recipes), self.values.shape[1], dtype=torch.float64, device=self.values.device)
        self.values[recipes] = sums.index_add_(1, targets.owner, values)
        missed = torch.zeros_like(sums).index_add_(1, targets.owner, (~greedy).double())
        self.greedy[recipes] = missed == 0
        if rank is not None:
            rank = rank.to(self.rank.device, torch.int8).reshape(len(recipes), -1)
            self.rank[recipes] = rank[:, targets.first.to(rank.device)]
        self.waiting = []

    def finish(self) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int8]]:
        self.flush()
        self.tell(self.made)
        values: NDArray[np.float64] = self.values.cpu().numpy()
        greedy: NDArray[np.bool_] = self.greedy.cpu().numpy()
        rank: NDArray[np.int8] = self.rank.cpu().numpy()
        return values, greedy, rank


class _Answers:
    """Collects sums of pieces until all pieces of a request are there."""

    def __init__(self, recipes: int, requests: Sequence[Request], pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.values = np.zeros((recipes, len(requests)))
        self.greedy = np.ones((recipes, len(requests)), dtype=bool)
        self.rank = np.full((recipes, len(requests)), -1, dtype=np.int8)
        self.tokens = np.zeros(len(requests), dtype=np.int64)
        self.truncated = np.zeros(len(requests), dtype=bool)
        self.left = np.zeros(len(requests), dtype=np.int64)
        for piece in pieces:
            self.left[piece.request] += 1
            self.tokens[piece.request] += len(piece.targets)
            self.truncated[piece.request] |= piece.truncated
        self.ranked = np.array([r.wants_rank for r in requests], dtype=bool) & (self.left == 1)

    def add(
        self,
        sequences: Sequence[int],
        values: NDArray[np.float64],
        greedy: NDArray[np.bool_],
        rank: NDArray[np.int8],
    ) -> Batch | None:
        finished = []
        for column, s in enumerate(sequences):
            request = self.pieces[s].request
            self.values[:, request] += values[:, column]
            self.greedy[:, request] &= greedy[:, column]
            if self.ranked[request]:
                self.rank[:, request] = rank[:, column]
            self.left[request] -= 1
            if self.left[request] == 0:
                finished.append(request)
        if not finished:
            return None
        chosen = np.array(finished, dtype=np.int64)
        return Batch(
            chosen,
            self.values[:, chosen],
            self.greedy[:, chosen],
            self.tokens[chosen],
            self.truncated[chosen],
            self.rank[:, chosen],
        )

    def scores(self) -> Scores:
        return Scores(self.values, self.greedy, self.tokens, self.truncated, self.rank)


def _alike(sides: Sequence[tuple[Symbol, list[Place]]]) -> list[list[tuple[Symbol, list[Place]]]]:
    """Calls of one whole layer that differ only in the rule for one of its matrices, side by side; the others alone."""
    found: dict[Hashable, list[tuple[Symbol, list[Place]]]] = {}
    for symbol, children in sides:
        single = len(symbol.edits) == 1 and symbol.edits[0].rule.kind in RANKS and symbol.call.half == "whole"
        found.setdefault((symbol.call, symbol.edits[0].matrix) if single else symbol, []).append((symbol, children))
    return list(found.values())


def _alone(recipes: Sequence[Recipe], index: int) -> Place:
    """A tree with one recipe, numbered as in the whole list."""
    root = plant([recipes[index]])
    place = root
    while not place.recipes:
        place = next(iter([*place.symbols.values(), *place.bundles.values()]))
    place.recipes = [index]
    return root
