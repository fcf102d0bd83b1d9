"""One half of a block: its attention or its MLP, the other half muted; found by listening, checked by numbers.

The attention is the child of the block that mixes positions; the MLP is the last child with a weight matrix beside
it. A muted child hands on nothing (zeros) or one of its own inputs, whichever makes a block with both halves muted
the exact identity. If `attn` then `mlp` gives the whole block it is sequential; if the two changes add up to the
block's, its residual is parallel. Anything else is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from impasto.anatomy import Anatomy, probe_inputs, quietly
from impasto.errors import UnsupportedModel
from impasto.steps import Step, leaves
from impasto.taps import Context, Enough, hidden_of, real_call, tapped

_CHECKPOINT = "_gradient_checkpointing_func"  # where a block keeps what runs it again in the backward pass


@dataclass(frozen=True, eq=False)
class Mute:
    """How one child of a block is silenced.

    Attributes:
        name: the child's name inside the block.
        source: None for zeros, else the positional index or keyword of the input that is handed on.
        width: size of the last dimension of what the child returns.
        length: 0 where the child returns a tensor, else the length of the tuple it returns.
    """

    name: str
    source: int | str | None
    width: int
    length: int

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the silenced child returns for these arguments."""
        if self.source is None:
            first = _first_tensor(args, kwargs)
            hidden = first.new_zeros((*first.shape[:-1], self.width))
        else:
            hidden = args[self.source] if isinstance(self.source, int) else kwargs[self.source]
        return (hidden, *[None] * (self.length - 1)) if self.length else hidden


@dataclass(frozen=True, eq=False)
class Halves:
    """The two halves of one block."""

    kind: Literal["sequential", "parallel"]
    attention: Mute
    mlp: Mute

    @contextlib.contextmanager
    def only(self, block: nn.Module, half: str) -> Iterator[None]:
        """Inside, `block` runs its `half` ("attn" or "mlp") alone; so it does when checkpointing runs it again."""
        mutes = (self.mlp if half == "attn" else self.attention,)
        checkpoint = block.__dict__.get(_CHECKPOINT)

        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **options: Any) -> Any:
                with _muted(block, mutes):
                    return function(*inputs, **options)

            return checkpoint(again, *args, **kwargs)  # type: ignore[misc]

        with _muted(block, mutes):
            if checkpoint is None:
                yield
                return
            block.__dict__[_CHECKPOINT] = checkpointed
            try:
                yield
            finally:
                block.__dict__[_CHECKPOINT] = checkpoint


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Halves] = weakref.WeakKeyDictionary()
_MEMBERS: weakref.WeakKeyDictionary[nn.Module, Mapping[str, str]] = weakref.WeakKeyDictionary()


def halves(model: nn.Module, anatomy: Anatomy, layer: int) -> Halves:
    """The halves of one layer, found once per layer.

    Raises:
        UnsupportedModel: the block cannot be split exactly; says what was tried.
    """
    block = anatomy.layers[layer]
    known = _KNOWN.get(block)
    if known is None:
        known = _split(model, block, layer)
        _KNOWN[block] = known
    return known


def find_halves(model: nn.Module, anatomy: Anatomy, steps: tuple[Step, ...]) -> None:
    """Find the halves that some steps of a schedule run, before edits silence what they are known by.

    Raises:
        UnsupportedModel: a block cannot be split exactly.
    """
    for call in leaves(steps):
        if call.half != "whole":
            halves(model, anatomy, call.layer)


def members(model: nn.Module, anatomy: Anatomy, layer: int) -> Mapping[str, str]:
    """Which half each child of a block that holds weight matrices works for, "attn" or "mlp", by the child's name.

    Found once per layer.

    The child that is muted is the last of its half; some blocks keep what comes before it in children of their own. A
    child belongs to a half if it makes no difference without it and does with it; those of neither half are left out.

    Raises:
        UnsupportedModel: the block cannot be split.
    """
    block = anatomy.layers[layer]
    known = _MEMBERS.get(block)
    if known is None:
        known = MappingProxyType(_owners(model, block, halves(model, anatomy, layer)))
        _MEMBERS[block] = known
    return known


def _owners(model: nn.Module, block: nn.Module, found: Halves) -> dict[str, str]:
    owners = {found.attention.name: "attn", found.mlp.name: "mlp"}
    with quietly(model):
        hidden, context = _heard(model, block)
        args, kwargs = context.join(hidden)
        for name, child in block.named_children():
            if name in owners or not any(p.dim() >= 2 for p in child.parameters()):
                continue
            matters = []
            for half in ("attn", "mlp"):
                with found.only(block, half), _spoilt(child):
                    if bool(hidden_of(real_call(block, args, kwargs)).isnan().any()):
                        matters.append(half)
            if len(matters) == 1:
                owners[name] = matters[0]
    return owners


def _spoilt(child: nn.Module) -> AbstractContextManager[None]:
    """A child that returns nothing but NaN in its first tensor, for the length of a `with` block."""

    def spoil(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = real_call(child, args, kwargs)
        spoilt = torch.full_like(hidden_of(output), torch.nan)
        return (spoilt, *output[1:]) if isinstance(output, tuple | list) else spoilt

    return tapped([child], spoil)


def _heard(model: nn.Module, block: nn.Module) -> tuple[Tensor, Context]:
    """How a model calls one of its blocks on a few tokens; what comes behind the block is not run."""
    captured: list[tuple[Tensor, Context]] = []

    def capture(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        captured.append(Context.split(args, kwargs))
        raise Enough

    with tapped([block], capture), contextlib.suppress(Enough):
        options = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}
        model(**probe_inputs(model), **options)
    return captured[0]


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


@contextlib.contextmanager
def _muted(block: nn.Module, mutes: tuple[Mute, ...]) -> Iterator[None]:
    modules = [block.get_submodule(m.name) for m in mutes]
    with tapped(modules, lambda i, args, kwargs: mutes[i].answer(args, kwargs)):
        yield


def _split(model: nn.Module, block: nn.Module, layer: int) -> Halves:
    where = f"layer {layer} ({type(block).__name__})"
    with quietly(model):
        hidden, context = _heard(model, block)

        def run(h: Tensor, mutes: tuple[Mute, ...] = ()) -> Tensor:
            args, kwargs = context.join(h)
            with _muted(block, mutes):
                return hidden_of(real_call(block, args, kwargs)).to(h.device)  # a layer may stand elsewhere

        whole = run(hidden)
        attention, mlp = _children(block, run, hidden, where)
        for one, two in itertools.product(attention, mlp):
            if not torch.equal(run(hidden, (one, two)), hidden):
                continue
            attn_only, mlp_only = run(hidden, (two,)), run(hidden, (one,))
            scale = 256 * torch.finfo(whole.dtype).eps * whole.abs().max()
            if (run(attn_only, (one,)) - whole).abs().max() <= scale:
                return Halves("sequential", one, two)
            if (attn_only + mlp_only - hidden - whole).abs().max() <= scale:
                return Halves("parallel", one, two)
    raise UnsupportedModel(
        f"{where} cannot be split into halves: muting '{attention[0].name}' and '{mlp[0].name}' does not leave the "
        "hidden state untouched, so its halves are not separate steps; schedule it whole"
    )


def _children(block: nn.Module, run: Any, hidden: Tensor, where: str) -> tuple[list[Mute], list[Mute]]:
    """Candidate ways to mute the attention and the MLP of a block."""
    names = [name for name, _ in block.named_children()]
    modules = [child for _, child in block.named_children()]
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    order: list[int] = []

    def listen(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = real_call(modules[i], args, kwargs)
        seen[i] = (args, kwargs, output)
        order.append(i)
        return output

    with tapped(modules, listen):
        run(hidden)
        plain, sequence = dict(seen), list(dict.fromkeys(order))
        other = hidden.clone()
        other[:, 0] = other[:, 0].flip(-1) + 1
        run(other)
    mixing = [i for i in sequence if _mixes(plain[i][2], seen[i][2], hidden.shape[1])]
    heavy = [i for i in sequence if any(p.dim() >= 2 for p in modules[i].parameters())]
    if not mixing:
        raise UnsupportedModel(f"{where} has no child that mixes positions, so it has no attention half")
    attention = mixing[0]
    rest = [i for i in heavy if i != attention]
    if not rest:
        raise UnsupportedModel(f"{where} has no child with weights beside '{names[attention]}', so it has no MLP half")
    return _mutes(names[attention], *plain[attention]), _mutes(names[rest[-1]], *plain[rest[-1]])


def _mixes(before: Any, after: Any, positions: int) -> bool:
    one, two = hidden_of(before), hidden_of(after)
    if one.dim() < 3:
        one, two = one.reshape(-1, positions, one.shape[-1]), two.reshape(-1, positions, two.shape[-1])
    return not torch.equal(one[:, 1:], two[:, 1:])


def _mutes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Mute]:
    result = hidden_of(output)
    length = len(output) if isinstance(output, tuple | list) else 0
    sources: list[int | str | None] = [None]
    sources += [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.shape == result.shape]
    sources += [k for k, a in kwargs.items() if isinstance(a, Tensor) and a.shape == result.shape]
    return [Mute(name, source, result.shape[-1], length) for source in sources]
