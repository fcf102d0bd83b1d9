"""One layer with one of its matrices at several ranks: what comes before that matrix is run once.

Ranks of one matrix are nested: with W = U diag(s) V^T, a product with the best approximation of rank k + d is that of
rank k and d components more. So the inputs are projected once, p = V^T x, and y_{k+d} = y_k + U (s p) of these d; all
ranks together cost about as much as one product with W.

The layer itself is called once for each rank, and by its own code, whatever that is. The first call notes what each of
its modules returns until the matrix's turn comes, and what modules return later that are given the same tensors (keys
beside an edited query, say). The other calls get these outputs back. That this is the same computation is proved on
the first use of each matrix, against the layer with the dense matrix in it; where it is not, `call` says None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.anatomy import Anatomy
from impasto.edit import Edit, Kind
from impasto.errors import ImpastoError
from impasto.levels import Level, call_layer
from impasto.linear import Product, product
from impasto.matrices import check, holders, matched, place
from impasto.svd import Factors, decompose
from impasto.taps import real_call, tapped

MEMORY = {"cpu": 1 << 30, "cuda": 1 << 33}  # bytes of components that are kept at hand
RANKS: frozenset[Kind] = frozenset({"keep", "rank", "zero"})  # rules that keep the largest components
TOLERANCE = 1e-4  # of the outputs' mean size, or what the type can tell apart

States = list[Tensor]


@dataclass(frozen=True, eq=False)
class _Stem:
    """A matrix in its layer.

    Attributes:
        layer: the layer's number.
        block: the layer.
        owner: the module that holds the matrix.
        parameter: the matrix.
        form: the product that `owner` is; None where it must run by its own code.
        others: the outermost modules of the layer that have no part of the matrix.
    """

    layer: int
    block: nn.Module
    owner: nn.Module
    parameter: nn.Parameter
    form: Product | None
    others: tuple[nn.Module, ...]


class Nested:
    """Calls layers with one matrix at several ranks; made for weights that stay as they are while it lives.

    Args:
        model: the loaded model.
        body: its anatomy.
        folder: where exact components are kept between runs; None keeps none on disk.
    """

    def __init__(self, model: nn.Module, body: Anatomy, folder: Path | None = None) -> None:
        self.model, self.body, self.folder = model, body, folder
        self._stems: dict[tuple[int, str], _Stem | None] = {}
        self._holders: dict[Hashable, list[tuple[str, nn.Parameter]]] | None = None
        self._components: dict[nn.Parameter, Factors] = {}  # the least recently used first
        self._room: int | None = None  # in bytes; None is by device
        self._proved: set[tuple[_Stem, int]] = set()  # with so many levels

    def call(
        self, layer: int, edits: Sequence[Edit], levels: Sequence[Level], states: Sequence[Tensor]
    ) -> list[States] | None:
        """What a layer makes of its inputs under each of some edits.

        Args:
            layer: which layer.
            edits: one for each call; all name the same matrix of the layer, by the same text.
            levels: see `impasto.levels.call_layer`.
            states: one hidden state per level.

        Returns:
            As many lists of states as edits; None where the calls have nothing to share, and each is to be made alone.
        """
        stem = self._stem(layer, edits[0]) if len(edits) > 1 else None
        ranks = [] if stem is None else [_rank(stem, edit) for edit in edits]
        if stem is None or None in ranks:
            return None
        distinct = sorted({rank for rank in ranks if rank is not None})
        factors = self._factors(stem)
        found = dict(zip(distinct, self._run(stem, factors, distinct, levels, states), strict=True))
        if (stem, len(levels)) not in self._proved:
            last = max((rank for rank in distinct if rank < len(factors.values)), default=distinct[-1])
            with _wearing(stem, _dense(stem, factors, last)):
                expected = call_layer(self.body, layer, levels, states)
            if not all(map(_close, found[last], expected)):
                self._stems[layer, edits[0].matrix] = None
                return None
            self._proved.add((stem, len(levels)))
        return [list(found[rank]) for rank in ranks if rank is not None]

    def wearing(self, layer: int, edits: Sequence[Edit]) -> AbstractContextManager[object] | None:
        """A layer with dense matrices at some ranks, from components at hand, for the length of a `with` block.

        The same as `impasto.surgery.edited`, without its search through the model; None where that is needed.
        """
        stems = [self._stem(layer, edit) for edit in edits]
        plain = [stem for stem in stems if stem is not None]
        if len({stem.parameter for stem in plain}) < len(edits):  # some are None, or name a matrix twice
            return None
        ranks = [_rank(stem, edit) for stem, edit in zip(plain, edits, strict=True)]
        if None in ranks:
            return None
        stack = contextlib.ExitStack()
        for stem, rank in zip(plain, ranks, strict=True):
            if rank is not None:
                stack.enter_context(_wearing(stem, _dense(stem, self._factors(stem), rank)))
        return stack

    def forget(self) -> None:
        """Let go of all components, and from now on keep those of one matrix at a time: memory is short."""
        self._components.clear()
        self._room = 0

    def _stem(self, layer: int, edit: Edit) -> _Stem | None:
        key = (layer, edit.matrix)
        if key not in self._stems:
            self._stems[key] = self._find(layer, edit)
        return self._stems[key]

    def _find(self, layer: int, edit: Edit) -> _Stem | None:
        """The one plain matrix that is meant, if there is one that nothing else uses."""
        block = self.body.layers[layer]
        try:
            [site] = matched(self.model, self.body, replace(edit, layers=(layer,)))
            parameter = block.get_parameter(site.parameter)
            check(parameter, site)
        except (ImpastoError, ValueError):
            return None
        if self._holders is None:
            self._holders = holders(self.model)
        path = site.parameter.rpartition(".")[0]
        owner = block.get_submodule(path)
        alone = site.expert is None and site.part is None and len(self._holders[place(parameter)]) == 1
        if not alone or "forward" in vars(owner):
            return None
        watched = owner._forward_hooks or owner._forward_pre_hooks or hasattr(owner, "_hf_hook")
        form = product(owner, site.parameter) if parameter.dtype in (torch.float32, torch.float64) else None
        return _Stem(
            layer, block, owner, parameter, None if watched else form, tuple(dict.fromkeys(_beside(block, path)))
        )

    def _factors(self, stem: _Stem) -> Factors:
        factors = self._components.pop(stem.parameter, None)
        if factors is None:
            factors = decompose(stem.parameter, folder=self.folder)
        self._components[stem.parameter] = factors
        room = MEMORY.get(stem.parameter.device.type, MEMORY["cuda"]) if self._room is None else self._room
        while len(self._components) > 1 and sum(map(_size, self._components.values())) > room:
            del self._components[next(iter(self._components))]
        return factors

    def _run(
        self, stem: _Stem, factors: Factors, ranks: Sequence[int], levels: Sequence[Level], states: Sequence[Tensor]
    ) -> list[States]:
        """The layer's outputs at each of some rising ranks."""
        products = None if stem.form is None else _Products(stem, factors, ranks)
        tape = _Tape(stem, products)
        found: list[States] = []
        for rank in ranks:
            matrix = stem.parameter.data
            if products is None:
                matrix = _dense(stem, factors, rank)
            else:
                products.begin(rank)
            with _wearing(stem, matrix), tape.running():
                found.append(call_layer(self.body, stem.layer, levels, states))
        return found


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a module returned in the first call of its layer."""

    output: Any
    versions: tuple[int, ...]  # of the tensors in it: what is changed in place later is no longer what was returned
    inputs: tuple[Any, ...] | None  # which it must be given again; None where it comes before the matrix

    def serves(self, args: tuple[Any, ...]) -> bool:
        """Whether another call would return the same."""
        same = self.inputs is None or all(one is other for one, other in zip(self.inputs, args, strict=True))
        return same and self.versions == _versions(self.output)


class _Tape:
    """What the modules of a layer returned in its first call, for the calls that follow."""

    def __init__(self, stem: _Stem, products: _Products | None) -> None:
        self.stem, self.products = stem, products
        self.first = True
        self.kept: dict[tuple[int, int], _Kept] = {}  # by module and number of its call
        self.known: dict[int, Tensor] = {}  # tensors in what is kept, by identity
        self.calls: list[int] = []
        self.passed = False  # the matrix's turn, on this level

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record in the first call of the layer, play in all others."""
        self.calls = [0] * len(self.stem.others)
        handle = self.stem.block.register_forward_pre_hook(self._begin)
        try:
            with tapped(self.stem.others, self._other), tapped([self.stem.owner], self._turn):
                yield
        finally:
            handle.remove()
        self.first = False

    def _begin(self, *_: Any) -> None:
        self.passed = False

    def _turn(self, _: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.passed = True
        if self.products is None:
            return real_call(self.stem.owner, args, kwargs)
        return self.products.following(*args, **kwargs)

    def _other(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (index, self.calls[index])
        self.calls[index] += 1
        kept = self.kept.get(key)
        if kept is not None and kept.serves(args):
            return kept.output
        output = real_call(self.stem.others[index], args, kwargs)
        beside = not kwargs and all(id(value) in self.known for value in args)
        if self.first and (beside or not self.passed):
            self.kept[key] = _Kept(output, _versions(output), args if self.passed else None)
            self.known.update((id(tensor), tensor) for tensor in _tensors(output))
        return output


class _Products:
    """The products of a matrix's inputs with its best approximations, rank after rank, the inputs projected once."""

    def __init__(self, stem: _Stem, factors: Factors, ranks: Sequence[int]) -> None:
        self.stem, self.rank = stem, 0
        full = len(factors.values)
        most = factors.largest(max((rank for rank in ranks if rank < full), default=0))
        turned = most if stem.form == "out_in" else most.transposed()
        self.into = turned.right.to(stem.parameter.dtype).contiguous()
        self.out = (turned.left * turned.values).to(stem.parameter.dtype)
        self.full = full
        self.bias: Tensor | None = getattr(stem.owner, "bias", None)
        self.projected: list[Tensor] = []  # of each level
        self.sums: list[Tensor] = []
        self.level = 0
        self.before = 0

    def begin(self, rank: int) -> None:
        """A call of the layer at this rank follows."""
        self.before, self.rank, self.level = self.rank, rank, 0

    def following(self, inputs: Tensor) -> Tensor:
        """The matrix's output on the next level."""
        level, self.level = self.level, self.level + 1
        if self.rank == self.full:
            whole: Tensor = real_call(self.stem.owner, (inputs,), {})
            return whole
        if level == len(self.projected):
            self.projected.append(F.linear(inputs, self.into))
            self.sums.append(inputs.new_zeros(()))
        new = slice(self.before, self.rank)
        self.sums[level] = self.sums[level] + F.linear(self.projected[level][..., new], self.out[:, new])
        return self.sums[level].clone() if self.bias is None else self.sums[level] + self.bias


def _beside(block: nn.Module, path: str) -> Iterator[nn.Module]:
    """The outermost modules of a block that are not on the way to the module at `path`."""
    names = path.split(".")
    here = block
    for name in names:
        for other, child in here.named_children():
            if other != name:
                yield from child if isinstance(child, nn.ModuleList) else (child,)
        here = here.get_submodule(name)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(one for one in (output if isinstance(output, tuple | list) else (output,)) if isinstance(one, Tensor))


def _versions(output: Any) -> tuple[int, ...]:
    """How often each tensor was changed in place; not known in inference mode."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in _tensors(output))


def _rank(stem: _Stem, edit: Edit) -> int | None:
    """How many of the largest components an edit keeps; None where it does something else."""
    rows, columns = stem.parameter.shape
    if edit.rule.kind == "rank" and edit.rule.value != edit.rule.rank(rows, columns):
        return None  # more than there are: whoever carries this edit out says so
    return edit.rule.rank(rows, columns) if edit.rule.kind in RANKS else None


def _dense(stem: _Stem, factors: Factors, rank: int) -> Tensor:
    """The matrix at a rank, as `impasto.surgery` would write it."""
    if rank == len(factors.values):
        return stem.parameter.data
    return factors.largest(rank).dense().to(stem.parameter.dtype)


@contextlib.contextmanager
def _wearing(stem: _Stem, matrix: Tensor) -> Iterator[None]:
    before = stem.parameter.data
    stem.parameter.data = matrix
    try:
        yield
    finally:
        stem.parameter.data = before


def _close(found: Tensor, expected: Tensor) -> bool:
    wide, other = found.float(), expected.float()
    scale = max(TOLERANCE, 4 * torch.finfo(found.dtype).eps)
    return bool((wide - other).abs().mean() <= scale * other.abs().mean())


def _size(factors: Factors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (factors.left, factors.values, factors.right))
