"""KV cache slots: one per layer *call*, of the kind (full or sliding) that the layer in it needs.

A model numbers its cache by layer. Under a schedule a layer may run twice, or beside others, so each call gets a
slot of its own: the cache's list of layers is laid out anew, once, while it is still empty, and every call sees
the cache through a `SlotView` in which its layer number means its slot.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from impasto.errors import UsageError

_LAYOUT = "_impasto_layout"  # attribute of a cache that was laid out


@dataclass(slots=True)
class _Layout:
    """What a cache remembers of being laid out."""

    key: str
    kinds: list[Any]  # the cache's layers as they were before
    counter: DynamicLayer | None  # counts tokens where no slot does


def _length(cache: Cache) -> int:
    return max((int(s.get_seq_length()) for s in cache.layers if hasattr(s, "get_seq_length")), default=0)


def lay_out(cache: Cache, slots: Sequence[tuple[int, ...]], depth: int, key: str) -> None:
    """Give `cache` one slot per entry of `slots`, each of the kind its layer has in this model.

    Nothing happens where that was done before for the same `key`.

    Args:
        cache: an empty cache, or one that the same schedule has filled.
        slots: per slot the layer numbers that run in it: one, or all members of a group that shares a slot.
        depth: how many layers the model has.
        key: names the layout (a schedule's fingerprint).

    Raises:
        UsageError: the cache holds tokens of another schedule, or is of a kind that has no slots to lay out.
    """
    known: _Layout | None = getattr(cache, _LAYOUT, None)
    if known is not None and known.key == key:
        return
    if not isinstance(getattr(cache, "layers", None), list):
        raise UsageError(f"a {type(cache).__name__} has no list of layers that a schedule could lay out anew")
    if _length(cache) > 0:
        if known is None and list(slots) == [(layer,) for layer in range(depth)]:
            return
        raise UsageError(
            "this cache already holds tokens that another schedule (or the untouched model) has written: pass an "
            "empty cache, or keep one cache per schedule"
        )
    kinds = list(known.kinds if known is not None else cache.layers)
    if kinds and len(kinds) != depth:
        raise UsageError(f"this cache was made for a model of {len(kinds)} layers; the model has {depth}")
    make = getattr(cache, "layer_class_to_replicate", None) or DynamicLayer
    own = kinds or [make() for _ in range(depth)]
    for members in slots:
        _check_shared(members, [own[layer] for layer in members])
    cache.layers = [copy.deepcopy(own[members[0]]) for members in slots]
    counter = None if any(hasattr(s, "get_seq_length") for s in cache.layers) else DynamicLayer()
    if counter is not None:
        cache.layers.append(counter)
    setattr(cache, _LAYOUT, _Layout(key, kinds, counter))


def count(cache: Cache, hidden: Tensor) -> None:
    """Note that the positions of `hidden` (batch, positions, width) were seen, where no slot of `cache` notes it.

    A schedule without any attention writes no keys; positions after the prompt are known from this all the same.
    """
    layout: _Layout | None = getattr(cache, _LAYOUT, None)
    if layout is not None and layout.counter is not None:
        blank = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], 1))
        layout.counter.update(blank, blank)


def _check_shared(members: tuple[int, ...], kinds: list[Any]) -> None:
    if len(members) < 2:
        return
    if not all(isinstance(kind, DynamicLayer) and not hasattr(kind, "_quantize") for kind in kinds):
        raise UsageError("kv='mean' needs a dynamic cache; static, quantised and offloaded ones have no shared slot")
    if len({(type(kind), getattr(kind, "sliding_window", None)) for kind in kinds}) > 1:
        raise UsageError(
            f"kv='mean' shares one slot among layers {list(members)}, but some of them keep a sliding window of keys "
            "and some keep all: their keys have no mean"
        )
    if any(hasattr(kind, "update_conv_state") for kind in kinds):
        raise UsageError(f"kv='mean' is defined for keys and values; layers {list(members)} keep other states too")


class SlotView(Cache):  # type: ignore[misc]
    """A cache as one layer call sees it: whatever layer number is asked for, its own slot answers."""

    def __init__(self, cache: Cache, slot: int, depth: int = 0) -> None:
        self.__dict__["_cache"] = cache
        self.__dict__["_slot"] = slot
        self.__dict__["_depth"] = depth  # how many layer numbers the model knows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)

    @property
    def layers(self) -> list[Any]:  # noqa: D102
        cache, slot = self.__dict__["_cache"], self.__dict__["_slot"]
        return [cache.layers[slot]] * max(len(cache.layers), self.__dict__["_depth"])

    def __len__(self) -> int:
        return len(self.__dict__["_cache"])

    def __repr__(self) -> str:
        return f"SlotView({self.__dict__['_slot']})"


def _redirected(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    name = function.__name__

    def method(self: SlotView, *args: Any, **kwargs: Any) -> Any:
        target = getattr(self.__dict__["_cache"], name)
        slot = self.__dict__["_slot"]
        if len(args) > place:
            return target(*args[:place], slot, *args[place + 1 :], **kwargs)
        return target(*args, **{**kwargs, "layer_idx": slot})

    return method


for _name, _function in inspect.getmembers(Cache, inspect.isfunction):
    _parameters = list(inspect.signature(_function).parameters)[1:]
    if "layer_idx" in _parameters and not _name.startswith("__"):
        setattr(SlotView, _name, _redirected(_function, _parameters.index("layer_idx")))


class MeanSlot:
    """The shortcut of the painters paper's code: all members of a parallel group share one slot of averages.

    While a member runs it attends to [the averaged past, its own new keys and values]; when all have run, the mean
    of their new keys and values is written. That is not what a full forward pass computes; it is here so that the
    difference can be measured.
    """

    def __init__(self, cache: Cache, slot: int, depth: int) -> None:
        self.cache = cache
        self.slot = slot
        self.depth = depth
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def member(self) -> Cache:
        """A cache for one member: reads the shared past, remembers what is new."""
        return _MeanMember(self)

    def write(self) -> None:
        """Store the mean of what the members brought."""
        if self.keys:
            self.cache.update(torch.stack(self.keys).mean(0), torch.stack(self.values).mean(0), self.slot)


class _MeanMember(SlotView):
    def __init__(self, shared: MeanSlot) -> None:
        super().__init__(shared.cache, shared.slot, shared.depth)
        self.__dict__["_shared"] = shared

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shared: MeanSlot = self.__dict__["_shared"]
        own = shared.cache.layers[shared.slot]
        here = key_states.device
        home = shared.keys[0].device if shared.keys else here  # members may run on different devices
        shared.keys.append(key_states.to(home))
        shared.values.append(value_states.to(home))
        keys, values = copy.copy(own).update(shared.keys[-1], shared.values[-1], *args, **kwargs)
        return keys.to(here), values.to(here)
