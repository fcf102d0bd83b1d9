"""A recipe on a live model: its edits and its schedule together, for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from impasto.edit import Edit
from impasto.models import LoadedModel
from impasto.runtime import KV, Probe, scheduled
from impasto.schedule import Schedule
from impasto.surgery import edited


@contextlib.contextmanager
def applied(
    model: nn.Module | LoadedModel,
    schedule: Schedule | str | None = None,
    edits: Iterable[Edit | str] = (),
    *,
    kv: KV = "exact",
    probe: Probe | None = None,
) -> Iterator[Any]:
    """Run a model with other layers, in another order, with edited weights.

        with applied(model, "0:8 {8:12} 12:28", edits=["27.mlp.down_proj@0.01"]) as changed:
            changed.generate(**inputs)

    Inside, the model is used as always, by `generate` or any library. On leaving it is as before, bit for bit.

    Args:
        model: a transformers model, or what `load` gave.
        schedule: which layers run, as a value or a text; None keeps the model's own order.
        edits: changes of weight matrices, as values or texts.
        kv: see `impasto.runtime.scheduled`.
        probe: see `impasto.runtime.scheduled`.

    Raises:
        NotationError: a text that cannot be read, or that does not fit this model.
        UnsupportedModel: the model's layers cannot be scheduled, or its weights not edited.
    """
    live = model.model if isinstance(model, LoadedModel) else model
    edits = list(edits)
    with contextlib.ExitStack() as stack:
        if edits:
            stack.enter_context(edited(live, edits))
        if schedule is not None:
            stack.enter_context(scheduled(live, schedule, kv=kv, probe=probe))
        yield live
