"""Edits carried out on a loaded model, and taken back bit for bit.

An edit names matrices as the model itself does inside its blocks (`impasto.matrices` finds them). How a matrix is
stored, as (out, in) or (in, out), makes no difference to its singular values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from impasto.anatomy import Anatomy, anatomy
from impasto.breakeven import break_even
from impasto.calibration import Calibration
from impasto.edit import Edit, Rule, in_order
from impasto.errors import UsageError
from impasto.linear import by_weight, product, thin
from impasto.matrices import Site, check, check_rank, holders, matched, parts, place
from impasto.reduction import Inputs, Kept, Method, Solver, reduced
from impasto.reduction import check as check_rule

Form = Literal["dense", "factored"]


@dataclass(frozen=True, slots=True)
class Touched:
    """One matrix that edits have changed.

    Attributes:
        edits: which ones, in the order in which they were carried out.
        layer: the layer it is in.
        matrix: its name inside the block; with an expert's number where experts are stacked.
        shape: its two sides, as stored.
        rank: components kept; None for pruning alone.
        form: how it runs: as one dense matrix or as two thin ones.
        also: other names in the model of the same tensor, which changes there too.
        notes: sentences that its reader should not miss.
    """

    edits: tuple[Edit, ...]
    layer: int
    matrix: str
    shape: tuple[int, int]
    rank: int | None
    form: Form
    also: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the matrix needs in its form."""
        rows, columns = self.shape
        return rows * columns if self.form == "dense" or self.rank is None else self.rank * (rows + columns)


@dataclass(frozen=True, slots=True)
class Report:
    """What a set of edits has touched."""

    touched: tuple[Touched, ...]

    def count(self, edit: Edit) -> int:
        """How many matrices one edit has changed."""
        return sum(edit in one.edits for one in self.touched)

    @property
    def shared(self) -> tuple[Touched, ...]:
        """Those whose tensor the model uses in other places too."""
        return tuple(one for one in self.touched if one.also)

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be said of these edits beside their texts: tied weights, ranks that came out as 0 or full."""
        return tuple(dict.fromkeys(note for one in self.touched for note in one.notes))


@dataclass(slots=True)
class _Tensor:
    """One tensor of the model that edits change, and what is done to each matrix in it."""

    parameter: nn.Parameter
    owner: nn.Module
    steps: dict[Site, list[Edit]] = field(default_factory=dict)


@contextlib.contextmanager
def edited(
    model: nn.Module,
    edits: Iterable[Edit | str],
    *,
    svd: Method = "exact",
    form: Form | Literal["auto"] = "dense",
    calibration: Calibration | None = None,
    folder: Path | None = None,
    niter: int = 2,
    seed: int = 0,
) -> Iterator[Report]:
    """Change a model's weights for the length of a `with` block.

        with edited(model, ["27.mlp.down_proj@0.01"]) as report:
            model.generate(**inputs)

    Goes together with `scheduled`, in either order; a layer that runs twice carries its edit twice. Several edits of
    one matrix are carried out one after the other as `in_order` says, those of the whole before those of its parts,
    so the order in which they are given makes no difference. Afterwards every parameter holds the tensor it held
    before. What is learned inside the block by a changed weight is lost with it.

    Args:
        model: a Hugging Face model, weights not packed; the matrices that change are in memory and whole.
        edits: values or texts.
        svd: "exact" components, or "lowrank" for random projection as in the LASER paper's code.
        form: "dense" writes the product back; "factored" also runs linear layers as two thin products, where that
            is what the edits leave (not for pruning, zeros, stacked experts and parts of fused projections); "auto"
            does so only up to the rank that `break_even` measures on the device. No gradient reaches thin weights.
        calibration: the matrices' inputs, for rules with w; see `impasto.calibration.calibrate`.
        folder: where to keep exact components and measured break-even ranks between runs.
        niter: power iterations of "lowrank".
        seed: of "lowrank".

    Raises:
        NotationError: an edit cannot be read, or names a layer that does not exist.
        UsageError: an edit matches no matrix, asks for more components than there are, or lacks its calibration.
        UnsupportedModel: a matrix is packed, quantised, split over processes or not in memory, or has no such parts.
    """
    solver = Solver(svd, folder, niter, seed)
    if form not in ("dense", "factored", "auto"):
        raise UsageError(f"form is 'dense', 'factored' or 'auto', not {form!r}")
    body = anatomy(model)
    values = in_order(Edit.parse(e, body.depth) if isinstance(e, str) else e for e in edits)
    for edit in values:
        check_rule(edit.rule, solver, calibration is not None)
    names = holders(model)
    touched: list[Touched] = []
    with contextlib.ExitStack() as undo:
        for key, tensor in _plan(model, body, values).items():
            for _, parameter in names[key]:
                undo.callback(setattr, parameter, "data", parameter.data)
            undo.enter_context(by_weight(tensor.owner))
            whole = tensor.parameter.data.clone()
            outcomes = list(_outcomes(model, body, tensor, whole, solver, calibration))
            for _, parameter in names[key]:
                parameter.data = whole
            for site, kept, notes in outcomes:
                alone = site.expert is None and len(outcomes) == 1 and site.part is None
                used = _run(undo, tensor.owner, site, kept, form, folder) if alone else "dense"
                own = f"{body.path}.{site.layer}.{site.parameter}"
                also = tuple(name for name, _ in names[key] if name != own)
                if also:
                    notes = (*notes, f"{site} is also {', '.join(also)}, which changes with it")
                rows, columns = kept.dense.shape
                chosen = tuple(tensor.steps[site])
                touched.append(Touched(chosen, site.layer, site.name, (rows, columns), kept.rank, used, also, notes))
        yield Report(tuple(touched))


def _plan(model: nn.Module, body: Anatomy, edits: tuple[Edit, ...]) -> dict[Hashable, _Tensor]:
    """Which edits go to which matrices, by tensor: one that several layers share is changed once."""
    plan: dict[Hashable, _Tensor] = {}
    seen: dict[Hashable, Site] = {}
    for edit in edits:
        sites = matched(model, body, edit)
        check_rank(model, body, edit, sites)
        for site in sites:
            block = body.layers[site.layer]
            parameter = block.get_parameter(site.parameter)
            check(parameter, site)
            key = place(parameter)
            owner = block.get_submodule(site.parameter.rpartition(".")[0])
            first = seen.setdefault((key, site.expert, site.part), site)
            steps = plan.setdefault(key, _Tensor(parameter, owner)).steps.setdefault(first, [])
            if edit not in steps:
                steps.append(edit)
    return plan


def _outcomes(
    model: nn.Module, body: Anatomy, tensor: _Tensor, whole: Tensor, solver: Solver, calibration: Calibration | None
) -> Iterator[tuple[Site, Kept, tuple[str, ...]]]:
    """Carry out the edits of one tensor in `whole`, matrix by matrix; tells what is left and what is to be said."""
    for site in sorted(tensor.steps, key=lambda site: site.part is not None):
        rules = [edit.rule for edit in tensor.steps[site]]
        weighed = any(rule.kind in ("whitened", "whitened_rank") for rule in rules)
        inputs = calibration.of(site) if calibration is not None and weighed else None
        matrix = whole if site.expert is None else whole[site.expert]
        fused = parts(model, body, site)
        if fused is None or site.part is None:
            kept = reduced(matrix, rules, solver, inputs)
            matrix.copy_(kept.dense)
        else:
            kept = reduced(fused.take(matrix, site.part), rules, solver, inputs)
            fused.put(matrix, site.part, kept.dense)
        yield site, kept, tuple(_notes(site, rules, kept, inputs))


def _notes(site: Site, rules: list[Rule], kept: Kept, inputs: Inputs | None) -> Iterator[str]:
    rows, columns = kept.dense.shape
    if kept.rank == 0 and not any(rule.kind == "zero" for rule in rules):
        yield f"{site} ({rows} x {columns}) is left with rank 0, which is all zeros"
    for rule in rules:
        if rule.kind in ("rank", "whitened_rank") and rule.value is not None and rule.value > min(rows, columns):
            yield f"{site} ({rows} x {columns}) has fewer than {rule.value} components and keeps all of them"
    if inputs is not None and not inputs.count:
        yield f"{site} was given no input in calibration, so it is cut as without w"


def _run(
    undo: contextlib.ExitStack,
    owner: nn.Module,
    site: Site,
    kept: Kept,
    form: Form | Literal["auto"],
    folder: Path | None,
) -> Form:
    """Run a matrix in the form that is asked for, where it can; returns the form."""
    if form == "dense" or kept.factors is None or kept.rank is None:
        return "dense"
    (rows, columns), dtype, device = kept.dense.shape, kept.dense.dtype, kept.dense.device
    if form == "auto" and kept.rank > break_even(rows, columns, dtype=dtype, device=device, folder=folder):
        return "dense"
    way = product(owner, site.parameter)
    if way is None:
        return "dense"
    left, right = kept.factors.thin()
    undo.enter_context(thin(owner, left.to(dtype), right.to(dtype), way))
    return "factored"
