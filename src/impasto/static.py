"""Key and value slots that stay where they are: what a step needs that is recorded once and replayed.

A `DynamicCache` grows by a new tensor in every step. Here each layer call owns two tensors as long as the whole
context; a pass writes its new columns in place, at a position that lives on the device, so that one and the same
sequence of kernels serves every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Clock:
    """Where a pass writes and how far it sees; one for all slots of a decoder.

    Attributes:
        context: columns that every slot has.
        position: how many columns are filled, an int64 scalar on the device.
        visible: how many columns attention sees in this pass, from the first one on. Columns that are not filled
            yet are among them; the model's own causal mask hides them.
        columns: the columns that this pass fills, int64 (new positions,).
        fresh: this pass fills an empty context, and sees nothing but what it brings.
    """

    def __init__(self, context: int, device: torch.device) -> None:
        self.context = context
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self.visible = context
        self.columns = self.position.view(1)
        self.fresh = False

    def begin(self, length: int) -> None:
        """The pass to come fills the first `length` columns of an empty context."""
        self.visible, self.fresh = length, True
        self.columns = torch.arange(length, device=self.position.device)

    def go_on(self, visible: int) -> None:
        """The pass to come adds one column and sees the first `visible`."""
        self.visible, self.fresh = visible, False
        self.columns = self.position.view(1)


class Slot(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer call, each (batch, heads, context, width of a head)."""

    is_compileable = True
    is_sliding = False

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: D102
        self.keys, self.values = (
            new.new_zeros((*new.shape[:2], self.clock.context, new.shape[-1])) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is new; returns all that this pass sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        clock = self.clock
        if clock.fresh:
            self.keys[:, :, : key_states.shape[2]].copy_(key_states)
            self.values[:, :, : value_states.shape[2]].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, clock.columns, key_states)
        self.values.index_copy_(2, clock.columns, value_states)
        return self.keys[:, :, : clock.visible], self.values[:, :, : clock.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: D102
        return self.clock.visible, 0

    def get_seq_length(self) -> Any:  # noqa: D102
        return 0 if self.clock.fresh else self.clock.position

    def get_max_length(self) -> int:  # noqa: D102
        return self.clock.context

    get_max_cache_shape = get_max_length

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0


class StaticSlots(Cache):  # type: ignore[misc]
    """One `Slot` per layer call. What the model asks of its cache as a whole, the clock answers."""

    def __init__(self, clock: Clock, count: int) -> None:
        super().__init__(layers=[Slot(clock) for _ in range(count)])
        self.clock = clock
        self._together: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def is_compileable(self) -> bool:  # noqa: D102
        return True

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: D102
        return self.clock.visible, 0

    def get_seq_length(self, layer_idx: int = 0) -> Any:  # noqa: D102
        return 0 if self.clock.fresh else self.clock.position

    def get_query_offset(self, layer_idx: int = 0) -> Any:  # noqa: D102
        return self.get_seq_length(layer_idx)

    def together(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values of some filled slots as one tensor each, (slots, ...), of which the slots become views."""
        if slots not in self._together:
            layers = [self.layers[slot] for slot in slots]
            keys, values = torch.stack([s.keys for s in layers]), torch.stack([s.values for s in layers])
            for layer, key, value in zip(layers, keys, values, strict=True):
                layer.keys, layer.values = key, value
            self._together[slots] = keys, values
        return self._together[slots]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.nbytes for slot in self.layers)
