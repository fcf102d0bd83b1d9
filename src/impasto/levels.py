"""A forest of token sequences on the device, ready for its layers to be called.

For each level the model itself is asked once how it calls its layers on those tokens (masks, rotary tables, whatever
it has), with the keys and values of the levels above announced by a cache of that length. After that a layer call is
one call per level: keys and values flow from a level to the one below and are forgotten when the call is done, so no
cache is kept between layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from impasto.anatomy import Anatomy
from impasto.forest import Forest, Row
from impasto.taps import Context, Enough, hidden_of, real_call, tapped


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a forest on the device.

    Attributes:
        hidden: the embeddings that enter layer 0, (rows, width, channels).
        contexts: how the model calls each layer on these tokens.
        past: number of key columns that come from the levels above.
        parents: (rows, 1) row in the level above; None at the top.
        columns: (rows, past) key column of the level above for each past column; None where one parent row serves
            all rows as it stands.
    """

    hidden: Tensor
    contexts: tuple[Context, ...]
    past: int
    parents: Tensor | None
    columns: Tensor | None


class _LevelKeys(Cache):  # type: ignore[misc]
    """Stands for the cache during one layer call on one level: joins past and new keys, and remembers them."""

    def __init__(self, level: Level, above: _LevelKeys | None) -> None:
        self.level = level
        self.above = above
        self.joined: tuple[Tensor, Tensor] | None = None
        self.layers: list[Any] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.above is None or self.above.joined is None:
            self.joined = key_states, value_states
        else:
            keys, values = self.above.joined
            self.joined = self._join(keys, key_states), self._join(values, value_states)
        return self.joined

    def _join(self, above: Tensor, new: Tensor) -> Tensor:
        parents, columns = self.level.parents, self.level.columns
        if columns is None or parents is None:
            past = above.expand(new.shape[0], -1, -1, -1)
        else:
            past = above.transpose(1, 2)[parents.to(above.device), columns.to(above.device)].transpose(1, 2)
        return torch.cat([past, new], dim=2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.level.past


def record(model: nn.Module, body: Anatomy, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Context, ...]]:
    """How the model would call its layers on these inputs, without running any: embeddings and contexts."""
    heard: list[tuple[Tensor, Context]] = []

    def listen(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        heard.append(Context.split(args, kwargs))
        if index == body.depth - 1:
            raise Enough
        return body.wrap(index, heard[-1][0])

    with tapped(body.layers, listen), contextlib.suppress(Enough):
        model(**inputs)
    return heard[0][0], tuple(context for _, context in heard)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; through pinned memory and without waiting where that is a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prepare(model: nn.Module, body: Anatomy, forest: Forest, device: torch.device) -> tuple[Level, ...]:
    """Put a forest on the device, level by level.

    Rows are padded on the right, where causal attention never looks; past columns are padded on the left and masked.
    """
    levels: list[Level] = []
    width = 0
    for depth, rows in enumerate(forest.levels):
        above = forest.levels[depth - 1] if depth else ()
        past, level_width = max(row.past for row in rows), max(len(row.tokens) for row in rows)
        ids = torch.zeros(len(rows), level_width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        inputs: dict[str, Any] = {"input_ids": send(ids, device)}
        if "position_ids" in body.arguments:
            start = torch.tensor([row.past for row in rows])[:, None]
            inputs["position_ids"] = send(start + torch.arange(level_width), device)
        parents = columns = None
        if depth:
            parents, columns = _wiring(rows, above, past, width - max(len(row.tokens) for row in above))
            mask = torch.ones(len(rows), past + level_width, dtype=torch.long)
            mask[:, :past] = torch.arange(past) >= past - torch.tensor([row.past for row in rows])[:, None]
            inputs["attention_mask"] = send(mask, device)
            parents = send(parents, device)
            columns = None if columns is None else send(columns, device)
        inputs |= _cache_inputs(body, len(rows), past, device)
        hidden, contexts = record(model, body, inputs)
        levels.append(Level(hidden, contexts, past, parents, columns))
        width = past + level_width
    return tuple(levels)


def _wiring(rows: Sequence[Row], above: Sequence[Row], past: int, above_past: int) -> tuple[Tensor, Tensor | None]:
    """Which key columns of the level above each row continues, aligned to the right."""
    parents = torch.tensor([row.parent for row in rows])
    if len(above) == 1 and above[0].past == above_past:
        return parents[:, None], None
    first = torch.tensor([above_past - above[row.parent].past for row in rows])
    length = torch.tensor([row.past for row in rows])
    offset = torch.arange(past)[None] - (past - length)[:, None]
    return parents[:, None], first[:, None] + offset.clamp(min=0)


def _cache_inputs(body: Anatomy, rows: int, past: int, device: torch.device) -> dict[str, Any]:
    """A cache that holds `past` tokens as far as the model can tell, where layers only keep keys and values."""
    if not body.cached or body.stateful:
        return {"use_cache": False} if "use_cache" in body.arguments else {}
    cache = DynamicCache()
    if past:
        blank = torch.zeros(1, 1, past, 1, device=device)
        cache.update(blank, blank, 0)
    return {"past_key_values": cache, "use_cache": True}


def call_layer(body: Anatomy, layer: int, levels: Sequence[Level], states: Sequence[Tensor]) -> list[Tensor]:
    """One layer on every level.

    Args:
        body: the model's anatomy.
        layer: which layer.
        levels: the prepared forest.
        states: one hidden state per level, (rows, width, channels).

    Returns:
        What the layer makes of them, same shapes.
    """
    keys: _LevelKeys | None = None
    outputs: list[Tensor] = []
    for level, hidden in zip(levels, states, strict=True):
        keys = here = _LevelKeys(level, keys)

        def seen(value: Any, here: _LevelKeys = here) -> Any:
            return here if isinstance(value, Cache) else value

        args, kwargs = level.contexts[layer].map(seen).join(hidden)
        outputs.append(hidden_of(real_call(body.layers[layer], args, kwargs)))
    return outputs
