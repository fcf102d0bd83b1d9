"""What edits would do to the loss, foretold for all of them from one backward pass.

    >>> right = [Request("loglikelihood", prompt, answer) for prompt, answer in task.questions()]  # doctest: +SKIP
    >>> found = screen(loaded, right, ["20:28.mlp.*@0.1", "27.mlp.down_proj@0.01"])                # doctest: +SKIP
    >>> best_first = sorted(found, key=lambda one: one.change)                                     # doctest: +SKIP

Let L be the mean over the requests of a continuation's negative log-likelihood per token, W = U diag(s) V^T a matrix
and G = dL/dW. Truncation to rank k takes away the components behind the k-th, so to first order L changes by

    - sum_{i>k} s_i u_i^T G v_i,

where s_i u_i^T G v_i is what L would lose or gain with the i-th component. One vector of such slopes for a matrix
serves all of its ranks, and one pass over the requests serves all matrices. Of a masked model L is the loss at the
masks, masked as `impasto.masked` masks them.

This orders candidates, it does not measure them: cutting most of a matrix away is no small change. The second order
can be added from the squared slopes (`curvature`): with F = E(g g^T) over requests, the empirical Fisher matrix, in
the place of the Hessian, it is half of the mean of (change of one request)^2. It is never negative.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from impasto import memory
from impasto.anatomy import Anatomy, anatomy, quietly
from impasto.calibration import Calibration
from impasto.edit import Edit, Rule
from impasto.errors import ImpastoError, OutOfMemory, UsageError
from impasto.evaluate import scorer_of
from impasto.fetch import cache_root
from impasto.forest import Node, lay_out
from impasto.head import Head
from impasto.levels import call_layer, prepare
from impasto.masked import MaskedScorer, packed, padded
from impasto.matrices import Site, check, check_rank, holders, matched, parts, place
from impasto.models import LoadedModel
from impasto.reduction import Solver, reduced
from impasto.reduction import check as check_rule
from impasto.result import Request
from impasto.scoring import Scorer, Scoring
from impasto.svd import Factors, decompose, decompose_weighed, noise_rank, quartile_rank

BUDGET = {"cpu": 1024, "cuda": 16384}  # padded tokens of one batch, whose activations are all kept
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}  # positions times words that the head makes at once
BATCHES = 16  # at least so many samples of the squared slopes

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Screened:
    """What one edit is expected to do.

    Attributes:
        edit: the edit.
        rank: components it keeps, of all its matrices together; None for pruning.
        change: first-order change of the loss, in nats per token; below zero is better.
        curvature: second-order change; None where it was not asked for.
    """

    edit: Edit
    rank: int | None
    change: float
    curvature: float | None = None

    @property
    def expected(self) -> float:
        """The change of the loss by all that is known of it."""
        return self.change + (self.curvature or 0.0)


def screen(
    loaded: LoadedModel,
    requests: Iterable[Request],
    edits: Iterable[Edit | str],
    *,
    curvature: bool = False,
    calibration: Calibration | None = None,
    folder: Path | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[float], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Screened]:
    """Foretell what each of many edits, alone, would do to the loss on some requests.

    The model is left exactly as it was: which weights ask for gradients, the gradients they hold, modes, numbers.

    Args:
        loaded: a causal or a masked language model.
        requests: right answers, each with its prompt.
        edits: values or texts, of any rule. One that names several matrices changes them together.
        curvature: also estimate the second order. Then the requests are cut into at least 16 batches where they
            can be, and the components of all matrices are held in memory.
        calibration: the matrices' inputs, for rules with w.
        folder: where exact components are kept between runs; None takes impasto's cache.
        batch_tokens: padded tokens of one batch; halved by itself where memory does not suffice.
        progress: told the share of the pass over the requests that is done.
        note: told in a sentence what the user should know.

    Returns:
        One for each edit, in the order in which they were given.

    Raises:
        NotationError: an edit cannot be read, or names a layer that does not exist.
        UsageError: no requests, some that are answered with text, an edit that matches no matrix or asks for more
            components than there are, or no calibration.
        UnsupportedModel: a matrix is packed or not in memory, or the model predicts no tokens.
        OutOfMemory: a single sequence does not fit.
        ImpastoError: a gradient is not finite.
    """
    asked = list(requests)
    if not asked:
        raise UsageError("screening needs at least one request: the right answers of a task")
    if any(request.kind == "generate" for request in asked):
        raise UsageError("screening takes requests for log-likelihoods, not requests that are answered with text")
    model = loaded.model
    body = anatomy(model)
    values = [Edit.parse(edit, body.depth) if isinstance(edit, str) else edit for edit in edits]
    if not values:
        return []
    grid = _Grid(model, body, values, calibration, folder or cache_root() / "svd", keep=curvature)
    total: list[Tensor] | None = None
    sums, squares, pairs = np.zeros(len(values)), np.zeros(len(values)), 0.0
    with quietly(model), torch.inference_mode(False), torch.enable_grad(), _followed(model, grid.parameters):
        scorer = scorer_of(loaded, note=note)
        budget = batch_tokens or BUDGET.get(scorer.device.type, BUDGET["cuda"])
        sweep: _Sweep = (
            _MaskedSweep(scorer, asked, grid.parameters, budget)
            if isinstance(scorer, MaskedScorer)
            else _NextSweep(scorer, asked, grid.parameters, budget)
        )
        for gradients, count in sweep.batches(BATCHES if curvature else 1, progress or (lambda share: None)):
            if curvature:
                found = grid.changes(gradients)
                sums, squares, pairs = sums + found, squares + found**2, pairs + count * (count - 1)
            elif total is None:
                total = gradients
            else:
                for one, more in zip(total, gradients, strict=True):
                    one += more
    if total is not None:
        sums = grid.changes(total)
    mean = sums / len(asked)
    # A batch of n sums n requests: its square holds n squares and n (n - 1) products, each about mean^2.
    bent = np.maximum(mean**2, (squares - pairs * mean**2) / len(asked)) / 2
    return [
        Screened(edit, grid.rank(i), float(mean[i]), float(bent[i]) if curvature else None)
        for i, edit in enumerate(values)
    ]


@dataclass(frozen=True)
class _Matrix:
    """One matrix of the model that edits change."""

    site: Site  # the first of its names
    tensor: int  # number of the tensor that holds it
    rules: dict[Rule, list[int]] = field(default_factory=dict)  # which edits do this to it


class _Grid:
    """All edits, sorted by matrix, as functions of gradients."""

    def __init__(
        self,
        model: nn.Module,
        body: Anatomy,
        edits: Sequence[Edit],
        calibration: Calibration | None,
        folder: Path,
        *,
        keep: bool,
    ) -> None:
        self.model, self.body, self.calibration, self.solver = model, body, calibration, Solver(folder=folder)
        self.edits = edits
        self.kept: dict[int, int] = {}
        self.tensors: list[list[nn.Parameter]] = []  # under all of its names
        self.matrices: dict[tuple[Hashable, int | None, str | None], _Matrix] = {}
        self._components = functools.cache(self._decomposed) if keep else self._decomposed
        names, numbers = holders(model), dict[Hashable, int]()
        for i, edit in enumerate(edits):
            check_rule(edit.rule, self.solver, calibration is not None)
            sites = matched(model, body, edit)
            check_rank(model, body, edit, sites)
            for site in sites:
                parameter = body.layers[site.layer].get_parameter(site.parameter)
                check(parameter, site)
                key = place(parameter)
                if key not in numbers:
                    numbers[key] = len(self.tensors)
                    self.tensors.append(list({id(p): p for _, p in names[key]}.values()))
                matrix = self.matrices.setdefault((key, site.expert, site.part), _Matrix(site, numbers[key]))
                named = matrix.rules.setdefault(edit.rule, [])
                if i not in named:  # a tensor that several layers share is changed once
                    named.append(i)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that gradients are wanted of."""
        return [parameter for holding in self.tensors for parameter in holding]

    def rank(self, edit: int) -> int | None:
        """How many components an edit keeps; known once its changes were asked for."""
        return self.kept.get(edit)

    def changes(self, gradients: Sequence[Tensor]) -> Floats:
        """The first-order change by each edit, for gradients in the order of `parameters`."""
        each = iter(gradients)
        whole = [functools.reduce(torch.add, [next(each) for _ in holding]) for holding in self.tensors]
        found = np.zeros(len(self.edits))
        self.kept = {}
        for matrix in self.matrices.values():
            slope = self._part(whole[matrix.tensor], matrix.site)
            if not bool(torch.isfinite(slope).all()):
                raise ImpastoError(
                    f"the gradient of {matrix.site} is not finite, so nothing can be foretold of it: load the model in "
                    "float32 or bfloat16"
                )
            self._add(matrix, slope, found)
        return found

    def _add(self, matrix: _Matrix, slope: Tensor, found: Floats) -> None:
        """Add what the rules of one matrix change, and the ranks that they leave."""
        weight = self._part(self.tensors[matrix.tensor][0].detach(), matrix.site)
        tails: dict[bool, Floats] = {}
        for rule, edits in matrix.rules.items():
            rank: int | None
            if rule.kind in ("prune", "zero"):  # no components are needed
                left = reduced(weight, [rule], self.solver)
                change, rank = float(((left.dense.double() - weight.double()) * slope.double()).sum()), left.rank
            else:
                weighed = rule.kind in ("whitened", "whitened_rank")
                factors = self._components(matrix.site, weighed)
                tail = tails[weighed] if weighed in tails else tails.setdefault(weighed, _tails(factors, slope))
                rank = _rank(rule, weight, factors)
                change = float(tail[-1 - rank] - tail[0] if rule.kind == "tail" else -tail[rank])
            for edit in edits:
                found[edit] += change
                if rank is not None:
                    self.kept[edit] = self.kept.get(edit, 0) + rank

    def _part(self, tensor: Tensor, site: Site) -> Tensor:
        matrix = tensor if site.expert is None else tensor[site.expert]
        fused = parts(self.model, self.body, site)
        return matrix if fused is None or site.part is None else fused.take(matrix, site.part)

    def _decomposed(self, site: Site, weighed: bool) -> Factors:
        weight = self._part(self.body.layers[site.layer].get_parameter(site.parameter).detach(), site)
        if not weighed or self.calibration is None:
            return decompose(weight, folder=self.solver.folder)
        inputs = self.calibration.of(site)
        if inputs.axis == 1:
            return decompose_weighed(weight, inputs.moment, folder=self.solver.folder)
        return decompose_weighed(weight.mT, inputs.moment, folder=self.solver.folder).transposed()


def _tails(factors: Factors, slope: Tensor) -> Floats:
    """For k from 0 to the full rank, what the components from the k-th on add to <W, G>."""
    slope = slope.to(factors.left.dtype)
    each = ((factors.left.mT @ slope) * factors.right).sum(1) * factors.values
    zero = each.new_zeros(1, dtype=torch.float64)
    tails: Floats = torch.cat([zero, each.flip(0).double().cumsum(0)]).flip(0).cpu().numpy()
    return tails


def _rank(rule: Rule, weight: Tensor, factors: Factors) -> int:
    rows, columns = weight.shape
    rank = rule.rank(rows, columns)
    if rank is not None:
        return rank
    return noise_rank(weight, factors.values) if rule.kind == "mp" else quartile_rank(rows, columns, factors.values)


class _Sweep(ABC):
    """One pass over the requests, batch by batch.

    Args:
        scorer: of the model.
        requests: right answers.
        parameters: what gradients are wanted of.
        budget: padded tokens of one batch.
    """

    def __init__(
        self, scorer: Scoring, requests: Sequence[Request], parameters: Sequence[nn.Parameter], budget: int
    ) -> None:
        self.scorer, self.parameters, self.budget = scorer, parameters, budget

    @abstractmethod
    def pack(self, items: Sequence[Any] | None, budget: int) -> list[Any]:
        """These sequences, or all there are, in batches."""

    @abstractmethod
    def padded(self, batch: Any) -> int:
        """Tokens of a batch, padding included."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens of a batch."""

    @abstractmethod
    def run(self, batch: Any) -> _Scored:
        """The states behind the last layer at the scored positions of a batch."""

    def batches(self, least: int, progress: Callable[[float], None]) -> Iterator[tuple[list[Tensor], float]]:
        """Gradients of the summed loss of each batch, and of how many requests it is.

        Args:
            least: into how many batches the requests are cut, where that can be.
            progress: told the share that is done.
        """
        budget = self.budget
        queue = self.pack(None, budget)
        whole, done = sum(map(self.tokens, queue)), 0
        if least > 1:
            budget = max(1, min(budget, whole // least))
            queue = self.pack(None, budget)

        def smaller(queue: list[Any]) -> list[Any]:
            nonlocal budget, whole
            padded = self.padded(queue[0])
            budget = min(budget, padded) // 2
            cut = self.pack([one for batch in queue for one in batch], max(1, budget))
            if self.padded(cut[0]) >= padded:
                raise OutOfMemory(
                    f"a backward pass over one sequence does not fit into the memory of {self.scorer.device}: "
                    "name fewer matrices, or use a smaller dtype or a device with more memory"
                )
            self.scorer.note(f"out of memory: token budget of the backward pass halved to {budget}")
            whole = done + sum(map(self.tokens, cut))
            return cut

        for batch, found in memory.batch_by_batch(queue, self._gradients, smaller):
            yield found
            done += self.tokens(batch)
            progress(done / whole)

    def _gradients(self, batch: Any) -> tuple[list[Tensor], float]:
        found = self.run(batch)
        last, count = found.states, found.requests
        if not last.requires_grad:  # no token came by any of the matrices
            return [torch.zeros_like(p, dtype=_wide(p)) for p in self.parameters], count
        tokens, shares = (one.to(last.device) for one in (found.tokens, found.shares))
        above = _behind(self.scorer.head, last.detach(), tokens, shares)
        slopes = torch.autograd.grad(last, self.parameters, above, allow_unused=True, materialize_grads=True)
        return [slope.to(_wide(slope)) for slope in slopes], count


@dataclass(frozen=True, eq=False)
class _Scored:
    """Scored positions: the states there, the tokens they must predict, their weights in the loss.

    `requests` is how many requests these positions are, one of k positions of a request for a k-th. The weights of a
    request need not add up to 1: where its length is said to be one token more, they do not.
    """

    states: Tensor
    tokens: Tensor
    shares: Tensor
    requests: float


class _NextSweep(_Sweep):
    """Of a model that predicts next tokens: beginnings that requests have in common are run once."""

    scorer: Scorer

    def __init__(
        self, scorer: Scorer, requests: Sequence[Request], parameters: Sequence[nn.Parameter], budget: int
    ) -> None:
        super().__init__(scorer, requests, parameters, budget)
        self.pieces = scorer.pieces(requests)
        self.trees = scorer.trees(self.pieces)
        words: dict[int, int] = {}
        for piece in self.pieces:
            words[piece.request] = words.get(piece.request, 0) + len(piece.targets)
        self.shares = [1 / max(1, words[piece.request]) for piece in self.pieces]  # of one token in its request

    def pack(self, items: Sequence[Node] | None, budget: int) -> list[list[Node]]:
        return self.scorer.pack(self.trees if items is None else items, budget)

    def padded(self, batch: Sequence[Node]) -> int:
        return lay_out(batch).padded

    def tokens(self, batch: Sequence[Node]) -> int:
        return sum(tree.size for tree in batch)

    def run(self, batch: Sequence[Node]) -> _Scored:
        scorer, forest = self.scorer, lay_out(batch)
        levels = prepare(scorer.model, scorer.body, forest, scorer.device)
        states = [level.hidden for level in levels]
        for layer in range(scorer.body.depth):
            states = call_layer(scorer.body, layer, levels, states)
        found: list[list[tuple[int, int, int, float]]] = [[] for _ in forest.levels]
        for sequence in sorted(forest.ends):
            targets, share = self.pieces[sequence].targets, self.shares[sequence]
            for (level, row, column), token in zip(forest.tail(sequence, len(targets)), targets, strict=True):
                found[level].append((row, column, token, share))
        requests = sum(share for spots in found for *_, share in spots)
        return _gathered(states, found, requests, scorer.device)


class _MaskedSweep(_Sweep):
    """Of a model that predicts masked tokens: sequences that requests have in common are run once."""

    scorer: MaskedScorer

    def __init__(
        self, scorer: MaskedScorer, requests: Sequence[Request], parameters: Sequence[nn.Parameter], budget: int
    ) -> None:
        super().__init__(scorer, requests, parameters, budget)
        self.sheet = scorer.sheet(requests)

    def pack(self, items: Sequence[tuple[int, ...]] | None, budget: int) -> list[list[tuple[int, ...]]]:
        return self.sheet.batches(budget) if items is None else packed(items, budget)

    def padded(self, batch: Sequence[tuple[int, ...]]) -> int:
        return padded(batch)

    def tokens(self, batch: Sequence[tuple[int, ...]]) -> int:
        return sum(map(len, batch))

    def run(self, batch: Sequence[tuple[int, ...]]) -> _Scored:
        owners = [request for row in batch for request, _ in self.sheet.wanted[row]]
        spots = [
            (*spot, 1 / int(self.sheet.tokens[request]))
            for spot, request in zip(self.sheet.spots(batch), owners, strict=True)
        ]
        requests = sum(1 / len(self.sheet.asked[request].targets) for request in owners)
        return _gathered([self.scorer.through(batch)], [spots], requests, self.scorer.device)


def _gathered(
    states: Sequence[Tensor],
    spots: Sequence[Sequence[tuple[int, int, int, float]]],
    requests: float,
    device: torch.device,
) -> _Scored:
    """What stands at the spots (row, column, token, share) of each level's states, level by level."""
    picked = []
    for state, here in zip(states, spots, strict=True):
        rows, columns = (torch.tensor([spot[i] for spot in here], dtype=torch.long).to(state.device) for i in (0, 1))
        picked.append(state[..., rows, columns, :].to(device))
    return _Scored(
        torch.cat(picked, dim=-2),
        torch.tensor([token for here in spots for _, _, token, _ in here], dtype=torch.long),
        torch.tensor([share for here in spots for *_, share in here], dtype=torch.float32),
        requests,
    )


def _behind(head: Head, states: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """How the loss changes with the states behind the last layer; the head runs on a few positions at a time.

    Args:
        head: the head.
        states: (n, channels), or (copies, n, channels).
        tokens: (n,) what each position must predict.
        shares: (n,) the weight of each position's negative log-likelihood.

    Returns:
        The gradient of sum(shares * -log p(tokens)), of the shape of `states`.
    """
    words = head.model.get_output_embeddings().weight.shape[0]
    step = max(1, LOGITS.get(states.device.type, LOGITS["cuda"]) // words)
    found: list[Tensor] = []
    for low in range(0, states.shape[-2], step):
        some = states[..., low : low + step, :].requires_grad_()
        logits = head.logits(some).to(states.device)
        logits = logits.to(_wide(logits))
        own = logits.gather(-1, tokens[low : low + step, None])[:, 0]
        loss = (shares[low : low + step] * (logits.logsumexp(-1) - own)).sum()
        found += torch.autograd.grad(loss, some)
    return torch.cat(found, dim=-2)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextlib.contextmanager
def _followed(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters and for no others, for the length of a `with` block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = set(map(id, wanted))
    try:
        for parameter, flag in before:
            if flag != (id(parameter) in chosen):
                parameter.requires_grad_(not flag)
        yield
    finally:
        for parameter, flag in before:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
