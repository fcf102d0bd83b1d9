"""Run any schedule of a model's layers, with the model's own forward doing everything around them.

During one forward pass the taps on layers 0 .. T-2 only record how they were called and hand the hidden state on
untouched; the tap on the last layer then plays the schedule, each layer with the context recorded for it. Embeddings,
masks, rotary tables, final norm and head are the model's own; there is no per-model code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from impasto.anatomy import Anatomy, anatomy
from impasto.errors import UnsupportedModel, UsageError
from impasto.halves import halves
from impasto.schedule import Schedule
from impasto.slots import MeanSlot, SlotView, lay_out
from impasto.steps import Call, Group, Step, leaves
from impasto.taps import Context, hidden_of, real_call, tapped

KV = Literal["exact", "mean"]


@dataclass(frozen=True, slots=True)
class Event:
    """One hidden state as it comes into being; handed to a probe and then forgotten.

    `hidden` has shape (batch, positions, width). `step` is None for the embeddings that enter the schedule, the
    `Call` whose output this is, or the `Group` whose branches were just merged. `place` counts events from 0.
    """

    place: int
    step: Step | None
    hidden: Tensor


Probe = Callable[[Event], None]


@contextlib.contextmanager
def scheduled(
    model: nn.Module, schedule: Schedule | str, *, kv: KV = "exact", probe: Probe | None = None
) -> Iterator[nn.Module]:
    """Run `model` under `schedule` for the length of a `with` block.

        with scheduled(model, "0:8 {8:12} 12:28"):
            model.generate(**inputs)  # and anything else that calls the model

    Inside, the model is used as always: forward, `generate` with any cache, training through it. Its
    `hidden_states` are those of the layer *calls*. On leaving it is as before, bit for bit, also after an error.

    Args:
        model: a Hugging Face model with one stack of layers.
        schedule: a `Schedule` or its text.
        kv: "exact" gives each layer call a cache slot of its own; "mean" shares one slot of averages among the
            members of a parallel group, as the painters paper's code does (for comparison only).
        probe: called with an `Event` for the embeddings, every call's output and every merge, in order.

    Raises:
        NotationError: the schedule does not fit this model.
        UnsupportedModel: the model's layers cannot be scheduled, or a block cannot be halved.
    """
    body = anatomy(model)
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, layers=body.depth)
    schedule.check(body.depth)
    player = Player(model, body, schedule, kv, probe)
    with _generation_settings(model), _hidden_states(model, body, player), tapped(body.layers, player):
        yield model


class Player:
    """Records one forward pass's layer contexts, then plays the schedule on them."""

    def __init__(
        self, model: nn.Module, body: Anatomy, schedule: Schedule, kv: KV, probe: Probe | None = None
    ) -> None:
        if kv not in ("exact", "mean"):
            raise UsageError(f"kv is 'exact' or 'mean', not {kv!r}")
        self.model = model
        self.body = body
        self.schedule = schedule
        self.kv = kv
        self.probe = probe
        self.slots = _slot_layers(schedule.steps, kv)
        self.halves = {
            call.layer: halves(model, body, call.layer)
            for call in leaves(schedule.steps)
            if call.half != "whole"
        }
        self.key = f"{schedule.fingerprint}/{kv}"
        self.contexts: list[Context] = []
        self.entering: Tensor | None = None
        self.states: list[Tensor] | None = None  # outputs of the calls, where the caller wants hidden_states
        self.slot = 0
        self.place = 0

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, context = Context.split(args, kwargs)
        if index == 0:
            self.contexts, self.entering = [], hidden
        if index != len(self.contexts):
            raise UnsupportedModel(
                f"layer {index} was called after {len(self.contexts)} others: the model skipped layers by itself"
            )
        if hidden is not self.entering:
            raise UnsupportedModel(
                f"the model changed the hidden state before layer {index}, outside of any layer"
            )
        self.contexts.append(context)
        if index == self.body.depth - 1:
            hidden = self.run(hidden)
            self.contexts, self.entering = [], None
        return self.body.wrap(index, hidden)

    def run(self, hidden: Tensor) -> Tensor:
        """Play the whole schedule on the embeddings `hidden`."""
        cache = next((v for v in self.contexts[0].values() if isinstance(v, Cache)), None)
        if cache is not None:
            lay_out(cache, self.slots, self.body.depth, self.key)
        self.slot = self.place = 0
        self.tell(None, hidden)
        return self.series(self.schedule.steps, hidden)

    def tell(self, step: Step | None, hidden: Tensor) -> None:
        if self.probe is not None:
            self.probe(Event(self.place, step, hidden))
        self.place += 1
        if self.states is not None and not isinstance(step, Group):
            self.states.append(hidden)

    def series(self, steps: tuple[Step, ...], hidden: Tensor) -> Tensor:
        for step in steps:
            hidden = self.call(step, hidden) if isinstance(step, Call) else self.group(step, hidden)
        return hidden

    def call(self, call: Call, hidden: Tensor, shared: MeanSlot | None = None) -> Tensor:
        slot = self.slot
        if shared is None and call.half != "mlp":
            self.slot += 1

        def seen(value: Any) -> Any:
            if isinstance(value, Cache):
                return shared.member() if shared is not None else SlotView(value, slot)
            return value

        args, kwargs = self.contexts[call.layer].map(seen).join(hidden)
        block = self.body.layers[call.layer]
        if call.half == "whole":
            output = hidden_of(real_call(block, args, kwargs))
        else:
            with self.halves[call.layer].only(block, call.half):
                output = hidden_of(real_call(block, args, kwargs))
        self.tell(call, output)
        return output

    def group(self, group: Group, hidden: Tensor) -> Tensor:
        shared = self.shared_slot(group)
        if shared is None:
            outputs = [self.series(branch, hidden) for branch in group.branches]
        else:
            calls = [step for branch in group.branches for step in branch if isinstance(step, Call)]
            outputs = [self.call(call, hidden, shared) for call in calls]
            shared.write()
        merged = merge(outputs, hidden, group.merge)
        self.tell(group, merged)
        return merged

    def shared_slot(self, group: Group) -> MeanSlot | None:
        cache = next((v for v in self.contexts[0].values() if isinstance(v, Cache)), None)
        if self.kv == "exact" or cache is None:
            return None
        self.slot += 1
        return MeanSlot(cache, self.slot - 1)


def merge(outputs: list[Tensor], hidden: Tensor, how: str) -> Tensor:
    """Merge the branches of a group: the mean of their outputs, or `hidden` plus the sum of their changes.

    Args:
        outputs: one tensor per branch, each (batch, positions, width); moved to the device of `hidden`.
        hidden: what every branch read.
        how: "mean" or "sum".
    """
    outputs = [out.to(hidden.device) for out in outputs]
    if how == "mean":
        return torch.stack(outputs).mean(0)
    wide = hidden.float()
    return (wide + sum(out.float() - wide for out in outputs)).to(hidden.dtype)


def _slot_layers(steps: tuple[Step, ...], kv: KV) -> tuple[int, ...]:
    """The layer in each cache slot, in the order of the calls."""
    slots: list[int] = []
    for step in steps:
        if isinstance(step, Call):
            if step.half != "mlp":
                slots.append(step.layer)
        elif kv == "mean":
            members = [s for branch in step.branches for s in branch]
            if any(not isinstance(s, Call) or s.half != "whole" for s in members) or len(members) != len(
                step.branches
            ):
                raise UsageError("kv='mean' is defined for groups of whole single layers only, as in {8:12}")
            slots.append(next(s.layer for s in members if isinstance(s, Call)))
        else:
            for branch in step.branches:
                slots.extend(_slot_layers(branch, kv))
    return tuple(slots)


@contextlib.contextmanager
def _generation_settings(model: nn.Module) -> Iterator[None]:
    """Keep `generate` from compiling the tapped forward by itself."""
    if not hasattr(model, "_valid_auto_compile_criteria"):
        yield
        return
    model.__dict__["_valid_auto_compile_criteria"] = lambda *args, **kwargs: False
    try:
        yield
    finally:
        model.__dict__.pop("_valid_auto_compile_criteria", None)


@contextlib.contextmanager
def _hidden_states(model: nn.Module, body: Anatomy, player: Player) -> Iterator[None]:
    """Make `hidden_states` those of the layer calls in models that collect them in their own loop.

    Models that collect through hooks on their layers do that by themselves.
    """
    owner = body.owner(model)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        config = getattr(owner, "config", None)
        wanted = kwargs.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(config, "output_hidden_states", False)
        player.states = [] if wanted else None

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        states, player.states = player.states, None
        if not states:
            return None
        return _with_states(output, tuple(states), body.depth)

    handles = [
        owner.register_forward_pre_hook(before, with_kwargs=True),
        owner.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_states(output: Any, states: tuple[Tensor, ...], depth: int) -> Any:
    """`output` with its own-loop hidden states replaced; untouched where its states are those of the calls."""

    def stale(own: Any) -> bool:
        return isinstance(own, tuple) and len(own) == depth + 1 and all(t is own[0] for t in own[:-1])

    if isinstance(output, tuple):
        return tuple(_replace(value, states) if stale(value) else value for value in output)
    own = getattr(output, "hidden_states", None)
    if stale(own):
        output["hidden_states"] = _replace(own, states)
    return output


def _replace(own: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Entry 0 is the embeddings; the last stays the model's own (after the final norm, where it has one)."""
    return (*states[:-1], own[-1])
