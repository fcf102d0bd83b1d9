"""What the rules of edits leave of one matrix; tensors in, tensors out, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from impasto.edit import Rule
from impasto.errors import UsageError
from impasto.svd import (
    Factors,
    decompose,
    decompose_randomly,
    decompose_weighed,
    noise_rank,
    quartile_rank,
)

Method = Literal["exact", "lowrank"]


@dataclass(frozen=True, slots=True)
class Solver:
    """How components of matrices are found.

    Attributes:
        method: "exact", or "lowrank" for random projection as in the LASER paper's code.
        folder: where exact components are kept between runs.
        niter: power iterations of "lowrank".
        seed: of "lowrank".
    """

    method: Method = "exact"
    folder: Path | None = None
    niter: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("exact", "lowrank"):
            raise UsageError(f"svd is 'exact' or 'lowrank', not {self.method!r}")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a matrix was multiplied with in calibration.

    Attributes:
        moment: (n, n) sum of x x^T over its inputs x.
        axis: the side of the matrix, as stored, that the inputs lie along: 1 for (out, in), 0 for (in, out).
        count: how many inputs there were.
    """

    moment: Tensor
    axis: int
    count: int


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a matrix.

    Attributes:
        dense: the matrix, in the type of the original; the original itself where nothing was taken away.
        rank: how many components it has; None where that was not asked for (pruning).
        factors: the same as components, where they are fewer than all.
    """

    dense: Tensor
    rank: int | None = None
    factors: Factors | None = None


def reduced(matrix: Tensor, rules: Sequence[Rule], solver: Solver, inputs: Inputs | None = None) -> Kept:
    """Carry out rules on a matrix, one after the other; `impasto.edit.in_order` says in which order.

    Args:
        matrix: (m, n); it stays as it is.
        rules: what to keep, and of that what to keep, and so on.
        solver: how components are found.
        inputs: of a calibration, for the rules that need them.

    Raises:
        UsageError: a rule that cannot be carried out like this.
    """
    kept = Kept(matrix)
    for rule in rules:
        check(rule, solver, inputs is not None)
        kept = _pruned(kept, rule) if rule.kind == "prune" else _cut(kept, rule, solver, inputs)
    return kept


def check(rule: Rule, solver: Solver, calibrated: bool) -> None:
    """Make sure that a rule can be carried out.

    Raises:
        UsageError: it needs a calibration, or all singular values.
    """
    weighed = rule.kind in ("whitened", "whitened_rank")
    if weighed and not calibrated:
        raise UsageError(
            f"the rule {rule} needs the matrix's inputs: make them with impasto.calibration.calibrate and hand them "
            "over as calibration"
        )
    if solver.method == "lowrank" and (weighed or rule.kind in ("tail", "mp", "mpl")):
        raise UsageError(f"the rule {rule} needs all singular values: use svd='exact'")


def _pruned(kept: Kept, rule: Rule) -> Kept:
    dense = kept.dense.clone(memory_format=torch.contiguous_format)
    flat = dense.view(-1)
    count = floor(rule.value * flat.numel()) if rule.value is not None else 0
    flat[flat.abs().argsort(stable=True)[:count]] = 0
    return Kept(dense)


def _cut(kept: Kept, rule: Rule, solver: Solver, inputs: Inputs | None) -> Kept:
    matrix = kept.dense
    rows, columns = matrix.shape
    full = min(rows, columns)
    now = full if kept.rank is None else kept.rank
    rank = rule.rank(rows, columns)
    if rank is not None and rank >= now:
        return Kept(matrix, now, kept.factors)
    if rank == 0:
        return Kept(matrix.new_zeros(rows, columns), 0)
    if rule.kind in ("whitened", "whitened_rank") and inputs is not None:
        factors = _weighed(matrix, inputs, solver)
    elif kept.factors is not None:
        factors = kept.factors
    elif solver.method == "lowrank" and rank is not None:
        factors = decompose_randomly(matrix, rank, niter=solver.niter, seed=solver.seed)
    else:
        factors = decompose(matrix, folder=solver.folder)
    if rank is None:
        found = (
            noise_rank(matrix, factors.values) if rule.kind == "mp" else quartile_rank(rows, columns, factors.values)
        )
        rank = min(found, now)
    factors = factors.smallest(rank) if rule.kind == "tail" else factors.largest(rank)
    return Kept(factors.dense().to(matrix.dtype), rank, factors if 0 < rank < full else None)


def _weighed(matrix: Tensor, inputs: Inputs, solver: Solver) -> Factors:
    if inputs.axis == 1:
        return decompose_weighed(matrix, inputs.moment, folder=solver.folder)
    return decompose_weighed(matrix.mT, inputs.moment, folder=solver.folder).transposed()
