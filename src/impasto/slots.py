"""KV cache slots: one per layer *call*, of the kind (full or sliding) that the layer in it needs.

A model numbers its cache by layer. Under a schedule a layer may run twice, or beside others, so each call gets a
slot of its own: the cache's list of layers is laid out anew, once, while it is still empty, and every call sees
the cache through a `SlotView` in which its layer number means its slot.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from impasto.errors import UsageError

_LAYOUT = (
    "_impasto_layout"  # attribute of a cache that was laid out: (key of the layout, the layers it had before)
)


def _length(cache: Cache) -> int:
    return max(
        (int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")), default=0
    )


def lay_out(cache: Cache, layers: Sequence[int], depth: int, key: str) -> None:
    """Give `cache` one slot per entry of `layers`, each of the kind its layer has in this model.

    Nothing happens where that was done before for the same `key`.

    Args:
        cache: an empty cache, or one that the same schedule has filled.
        layers: the layer number that runs in each slot.
        depth: how many layers the model has.
        key: names the layout (a schedule's fingerprint).

    Raises:
        UsageError: the cache holds tokens of another schedule.
    """
    known = getattr(cache, _LAYOUT, None)
    if known is not None and known[0] == key:
        return
    identity = list(layers) == list(range(depth))
    if _length(cache) > 0:
        if known is None and identity:
            return
        raise UsageError(
            "this cache already holds tokens that another schedule has written: pass an empty cache, "
            "or keep one cache per schedule"
        )
    kinds = list(known[1] if known is not None else cache.layers)
    if not kinds:
        make = cache.layer_class_to_replicate or DynamicLayer
        slots = [make() for _ in layers]
    else:
        slots = [copy.deepcopy(kinds[layer % len(kinds)]) for layer in layers]
    cache.layers = slots
    setattr(cache, _LAYOUT, (key, kinds))


class SlotView(Cache):
    """A cache as one layer call sees it: whatever layer number is asked for, its own slot answers."""

    def __init__(self, cache: Cache, slot: int) -> None:
        self.__dict__["_cache"] = cache
        self.__dict__["_slot"] = slot

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)

    @property
    def layers(self) -> list[Any]:
        cache, slot = self.__dict__["_cache"], self.__dict__["_slot"]
        return [cache.layers[slot]] * max(len(cache.layers), slot + 1)

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

    def __init__(self, cache: Cache, slot: int) -> None:
        self.cache = cache
        self.slot = slot
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
        super().__init__(shared.cache, shared.slot)
        self.__dict__["_shared"] = shared

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shared: MeanSlot = self.__dict__["_shared"]
        own = shared.cache.layers[shared.slot]
        if not isinstance(own, DynamicLayer):
            raise UsageError(
                "kv='mean' needs a dynamic cache; static, quantised and offloaded ones have no shared slot"
            )
        shared.keys.append(key_states)
        shared.values.append(value_states)
        seen: tuple[Tensor, Tensor] = copy.copy(own).update(key_states, value_states, *args, **kwargs)
        return seen
