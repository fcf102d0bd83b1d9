"""Edits carried out on a loaded model, and taken back bit for bit.

An edit names matrices as the model itself does inside its blocks. Where a block stacks its experts in one tensor
(experts, m, n), each expert is a matrix of its own, named with its number behind the tensor's name. How a matrix is
stored, as (out, in) or (in, out), makes no difference to its singular values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import floor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.anatomy import Anatomy, anatomy
from impasto.edit import Edit, Rule
from impasto.errors import UnsupportedModel, UsageError
from impasto.svd import Factors, decompose, decompose_randomly, noise_rank, quartile_rank

Method = Literal["exact", "lowrank"]
Form = Literal["dense", "factored"]


@dataclass(frozen=True, slots=True)
class Touched:
    """One matrix that an edit has changed.

    Attributes:
        edit: which edit.
        layer: the layer it is in.
        matrix: its name inside the block; with an expert's number where experts are stacked.
        shape: its two sides, as stored.
        rank: components kept; None for pruning.
        form: how it runs: as one dense matrix or as two thin ones.
        also: other names in the model of the same tensor, which changes there too.
    """

    edit: Edit
    layer: int
    matrix: str
    shape: tuple[int, int]
    rank: int | None
    form: Form
    also: tuple[str, ...] = ()

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
        return sum(one.edit == edit for one in self.touched)

    @property
    def shared(self) -> tuple[Touched, ...]:
        """Those whose tensor the model uses in other places too."""
        return tuple(one for one in self.touched if one.also)


@dataclass(frozen=True, slots=True)
class _Site:
    """One matrix in the model: a parameter, or one expert's part of it."""

    layer: int
    parameter: str  # name of the parameter inside the block
    expert: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """What an edit may call it; the first name is its own."""
        name = self.parameter.removesuffix(".weight")
        return (name,) if self.expert is None else (f"{name}.{self.expert}", name)


@contextlib.contextmanager
def edited(
    model: nn.Module,
    edits: Iterable[Edit | str],
    *,
    svd: Method = "exact",
    form: Form = "dense",
    folder: Path | None = None,
    niter: int = 2,
    seed: int = 0,
) -> Iterator[Report]:
    """Change a model's weights for the length of a `with` block.

        with edited(model, ["27.mlp.down_proj@0.01"]) as report:
            model.generate(**inputs)

    Goes together with `scheduled`, in either order; a layer that runs twice carries its edit twice. Afterwards every
    parameter holds the tensor it held before. What is learned inside the block by a changed weight is lost with it.

    Args:
        model: a Hugging Face model on one device, weights not packed.
        edits: values or texts; no two of them for one matrix.
        svd: "exact" components, or "lowrank" for random projection as in the LASER paper's code.
        form: "dense" writes the product back; "factored" also runs linear layers as two thin products, where that
            is what the edit leaves (not for pruning, zeros and stacked experts). No gradient reaches their weights.
        folder: where to keep exact components between runs.
        niter: power iterations of "lowrank".
        seed: of "lowrank".

    Raises:
        NotationError: an edit cannot be read, or names a layer that does not exist.
        UsageError: an edit matches no matrix, or two edits the same one.
        UnsupportedModel: a matrix is packed, quantised or not in memory.
    """
    if svd not in ("exact", "lowrank"):
        raise UsageError(f"svd is 'exact' or 'lowrank', not {svd!r}")
    if form not in ("dense", "factored"):
        raise UsageError(f"form is 'dense' or 'factored', not {form!r}")
    body = anatomy(model)
    values = tuple(Edit.parse(e, body.depth) if isinstance(e, str) else e for e in edits)
    plan = _plan(body, values)
    names = _names(model)
    touched: list[Touched] = []
    with contextlib.ExitStack() as undo:
        weights: dict[int, Tensor] = {}  # by parameter: the tensor that replaces its data
        for site, edit in plan.items():
            block = body.layers[site.layer]
            parameter = block.get_parameter(site.parameter)
            if id(parameter) not in weights:
                _check(parameter, site)
                weights[id(parameter)] = parameter.data.clone()
                undo.callback(setattr, parameter, "data", parameter.data)
            whole = weights[id(parameter)]
            matrix = whole if site.expert is None else whole[site.expert]
            rank, factors = _apply(edit.rule, matrix, svd, folder, niter, seed)
            parameter.data = whole
            used: Form = "dense"
            owner = block.get_submodule(site.parameter.rpartition(".")[0])
            if form == "factored" and factors is not None and (product := _product(owner, site.parameter)):
                undo.enter_context(_thin(owner, factors, whole.dtype, product))
                used = "factored"
            rows, columns = matrix.shape
            own = f"{body.path}.{site.layer}.{site.parameter}"
            also = tuple(name for name in names[id(parameter)] if name != own)
            touched.append(Touched(edit, site.layer, site.names[0], (rows, columns), rank, used, also))
        yield Report(tuple(touched))


def _plan(body: Anatomy, edits: tuple[Edit, ...]) -> dict[_Site, Edit]:
    """Which edit goes to which matrix; a tensor that several layers share is changed once."""
    plan: dict[_Site, Edit] = {}
    seen: dict[tuple[int, int | None], _Site] = {}
    for edit in edits:
        edit.check(body.depth)
        found = 0
        for layer in edit.layers:
            for site in _sites(body.layers[layer], layer):
                if not any(edit.matches(name) for name in site.names):
                    continue
                found += 1
                key = id(body.layers[layer].get_parameter(site.parameter)), site.expert
                if (first := seen.setdefault(key, site)) == site and site not in plan:
                    plan[site] = edit
                elif plan[first] != edit:
                    raise UsageError(
                        f"{plan[first]} and {edit} both change {site.names[0]} of layer {site.layer}: keep one of them"
                    )
        if not found:
            raise UsageError(_nothing(body, edit))
    return plan


def _sites(block: nn.Module, layer: int) -> Iterator[_Site]:
    for name, parameter in block.named_parameters(remove_duplicate=False):
        owner = block.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if parameter.dim() == 2:
            yield _Site(layer, name, None)
        elif parameter.dim() == 3:
            yield from (_Site(layer, name, expert) for expert in range(parameter.shape[0]))


def _nothing(body: Anatomy, edit: Edit) -> str:
    names = dict.fromkeys(name for i in edit.layers for site in _sites(body.layers[i], i) for name in site.names)
    ends = {name.rpartition(".")[2]: name for name in names}
    near = get_close_matches(edit.matrix, names, 3, 0.5)
    near += [ends[end] for end in get_close_matches(edit.matrix.rpartition(".")[2], ends, 3, 0.6)]
    listed = list(dict.fromkeys(near)) or [name for name in names if not name.rpartition(".")[2].isdigit()]
    layers = f"layer {edit.layers[0]}" if len(edit.layers) == 1 else f"layers {edit.layers[0]}..{edit.layers[-1]}"
    return f"{edit} matches no matrix of {layers}; " + (
        f"nearest: {', '.join(listed)}" if listed else "there is none that is stored as plain numbers"
    )


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _check(parameter: nn.Parameter, site: _Site) -> None:
    where = f"{site.names[0]} of layer {site.layer}"
    if parameter.device.type == "meta":
        raise UnsupportedModel(f"{where} is not in memory (its weights are offloaded): load the model on one device")
    plain = type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor
    if not plain or not parameter.is_floating_point() or parameter.element_size() < 2:
        kind = str(parameter.dtype).removeprefix("torch.") if plain else type(parameter).__name__
        raise UnsupportedModel(f"{where} is stored packed or quantised ({kind}): load the model unquantised to edit it")


def _apply(
    rule: Rule, matrix: Tensor, svd: Method, folder: Path | None, niter: int, seed: int
) -> tuple[int | None, Factors | None]:
    """Write what the rule keeps into `matrix`; returns the rank, and the components where they are fewer than all."""
    rows, columns = matrix.shape
    full = min(rows, columns)
    if rule.kind == "prune":
        count = floor(rule.value * matrix.numel()) if rule.value is not None else 0
        flat = matrix.view(-1)
        flat[flat.abs().argsort(stable=True)[:count]] = 0
        return None, None
    if rule.kind == "whitened":
        raise UsageError(f"the rule {rule} needs the inputs of a calibration run, which a plain edit does not have")
    if svd == "lowrank" and rule.kind in ("tail", "mp", "mpl"):
        raise UsageError(f"the rule {rule} needs all singular values: use svd='exact'")
    rank = rule.rank(rows, columns)
    if rank == 0:
        matrix.zero_()
        return 0, None
    if rank == full:
        return full, None
    if svd == "lowrank" and rank is not None:
        factors = decompose_randomly(matrix, rank, niter=niter, seed=seed)
    else:
        factors = decompose(matrix, folder=folder)
        if rank is None:
            rank = (
                noise_rank(matrix, factors.values)
                if rule.kind == "mp"
                else quartile_rank(rows, columns, factors.values)
            )
        factors = factors.smallest(rank) if rule.kind == "tail" else factors.largest(rank)
    matrix.copy_(factors.dense())
    return rank, factors if 0 < rank < full else None


def _product(owner: nn.Module, parameter: str) -> Literal["out_in", "in_out"] | None:
    """Which plain product a module computes with its weight, if that is all it does; found by trying it."""
    weight, bias = getattr(owner, "weight", None), getattr(owner, "bias", None)
    if not parameter.endswith("weight") or not isinstance(weight, Tensor) or any(True for _ in owner.children()):
        return None
    with torch.no_grad(), contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        for form, matrix in (("out_in", weight), ("in_out", weight.mT)):
            hidden = torch.linspace(-1, 1, matrix.shape[1], device=weight.device, dtype=weight.dtype)[None]
            with contextlib.suppress(RuntimeError):  # of the wrong width
                output = type(owner).forward(owner, hidden)
                expected = F.linear(hidden, matrix, bias)
                scale = 64 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
                if output.shape == expected.shape and bool((output - expected).abs().max() <= scale):
                    return "out_in" if form == "out_in" else "in_out"
    return None


@contextlib.contextmanager
def _thin(owner: nn.Module, factors: Factors, dtype: torch.dtype, product: str) -> Iterator[None]:
    """Run a linear layer as two thin products; its hooks run as always."""
    root = factors.values.sqrt()
    first, second = (root[:, None] * factors.right).to(dtype), (factors.left * root).to(dtype)
    if product == "in_out":  # the product runs the other way round
        first, second = second.mT, first.mT
    first, second = first.contiguous(), second.contiguous()
    bias = getattr(owner, "bias", None)

    def forward(hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden, first), second, bias)

    before: dict[str, Any] = {k: v for k, v in vars(owner).items() if k == "forward"}
    vars(owner)["forward"] = forward
    try:
        yield
    finally:
        vars(owner).pop("forward", None)
        vars(owner).update(before)
