"""A recipe on a live model: its edits and its schedule together, for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from impasto.anatomy import anatomy
from impasto.calibration import Calibration, calibrate
from impasto.edit import Edit
from impasto.fetch import cache_root
from impasto.halves import find_halves
from impasto.models import LoadedModel
from impasto.runtime import KV, Probe, scheduled
from impasto.schedule import Schedule
from impasto.surgery import Report, edited
from impasto.teams import Team, own_steps


@contextlib.contextmanager
def applied(
    model: nn.Module | LoadedModel,
    schedule: Schedule | str | None = None,
    edits: Iterable[Edit | str] = (),
    *,
    kv: KV = "exact",
    probe: Probe | None = None,
    team: Team | None = None,
    calibration: Calibration | None = None,
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
        team: see `impasto.runtime.scheduled`.
        calibration: inputs of the matrices, for rules with w; made from a few built-in texts where it is None and
            `model` is what `load` gave.

    Raises:
        NotationError: a text that cannot be read, or that does not fit this model.
        UnsupportedModel: the model's layers cannot be scheduled, or its weights not edited.
    """
    live = model.model if isinstance(model, LoadedModel) else model
    edits = list(edits)
    if schedule is not None and edits:
        body = anatomy(live)
        schedule = Schedule.fitting(schedule, body.depth)
        find_halves(live, body, own_steps(body, schedule, team))
    with contextlib.ExitStack() as stack:
        if edits and isinstance(model, LoadedModel) and calibration is None:
            stack.enter_context(worn(model, edits))
        elif edits:
            stack.enter_context(edited(live, edits, calibration=calibration))
        if schedule is not None:
            stack.enter_context(scheduled(live, schedule, kv=kv, probe=probe, team=team))
        yield live


def worn(loaded: LoadedModel, edits: Iterable[Edit | str]) -> AbstractContextManager[Report]:
    """Edits on a loaded model for the length of a `with` block.

    Rules that weigh a matrix by its inputs (`@0.1w`) are calibrated on the texts of `impasto.calibration`, once: what
    was heard is kept in the cache.
    """
    body = anatomy(loaded.model)
    values = [Edit.parse(edit, body.depth) if isinstance(edit, str) else edit for edit in edits]
    calibration = None
    if any(edit.rule.kind in ("whitened", "whitened_rank") for edit in values):
        kept = cache_root() / "calibration"
        weights = loaded.setting.weights
        calibration = calibrate(loaded.model, values, tokenizer=loaded.tokenizer, folder=kept, weights=weights)
    return edited(loaded.model, values, calibration=calibration, folder=cache_root() / "svd")
