"""Run any schedule of a model's layers, with the model's own forward doing everything around them.

During one forward pass the taps on layers 0 .. T-2 only record how they were called and hand the hidden state on
untouched; the tap on the last layer then plays the schedule, each layer with the context recorded for it. Embeddings,
masks, rotary tables, final norm and head are the model's own; there is no per-model code.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from impasto.anatomy import Anatomy, anatomy
from impasto.errors import UnsupportedModel, UsageError
from impasto.halves import halves
from impasto.schedule import Schedule
from impasto.shares import Share
from impasto.slots import MeanSlot, SlotView, count, lay_out
from impasto.steps import Call, Group, Step, leaves
from impasto.taps import Context, handler_of, hidden_of, real_call, same, tapped
from impasto.teams import Team, assigned, check_present, partial

KV = Literal["exact", "mean"]
_GENERATION = ("_valid_auto_compile_criteria", "_cache")  # what `generate` looks up on the model itself


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
    model: nn.Module,
    schedule: Schedule | str,
    *,
    kv: KV = "exact",
    probe: Probe | None = None,
    team: Team | None = None,
) -> Iterator[nn.Module]:
    """Run `model` under `schedule` for the length of a `with` block.

        with scheduled(model, "0:8 {8:12} 12:28"):
            model.generate(**inputs)  # and anything else that calls the model

    Inside, the model is used as always: forward, `generate` with any cache, training through it. Its
    `hidden_states` are those of the layer *calls*: the embeddings, one state per call, the last one as the model
    itself makes it (behind its final norm, where it has one). On leaving it is as before, bit for bit, also after an
    error. Several threads may run forward passes at once. A cache belongs to the schedule that filled it.

    Args:
        model: a Hugging Face model with one stack of layers.
        schedule: a `Schedule` or its text.
        kv: "exact" gives each layer call a cache slot of its own; "mean" shares one slot of averages among the
            members of a parallel group, as the painters paper's code does (for comparison only).
        probe: called with an `Event` for the embeddings, every call's output and every merge, in order.
        team: processes that share the members of parallel groups, as `impasto.teams.join` gives them; all of them make
            the same calls at the same time. Probes and `hidden_states` then see the calls of this process only.

    Raises:
        NotationError: the schedule does not fit this model.
        UnsupportedModel: the model's layers cannot be scheduled, or a block cannot be halved.
        UsageError: the model already runs under a schedule, `kv="mean"` does not fit this one, weights were left to
            other processes, or the processes of the team do not play the same.
    """
    body = anatomy(model)
    schedule = Schedule.fitting(schedule, body.depth)
    player = Player(model, body, schedule, kv, probe, team)
    if any(map(handler_of, body.layers)):
        raise UsageError("this model already runs under a schedule: leave that `with` block first")
    with _generation_settings(model), _whole_passes(model, body, player), tapped(body.layers, player):
        yield model


class _Pass(threading.local):
    """What is known of the forward pass that runs in this thread."""

    def __init__(self) -> None:
        self.begin(wanted=False)

    def begin(self, wanted: bool) -> None:
        self.contexts: list[Context] = []
        self.entering: Tensor | None = None
        self.played = False
        self.slot = self.place = 0
        self.states: list[Tensor] | None = [] if wanted else None  # outputs of the calls
        self.extras: list[Any] = []  # what the calls return beside their hidden states


class Player:
    """Records one forward pass's layer contexts, then plays the schedule on them."""

    def __init__(
        self,
        model: nn.Module,
        body: Anatomy,
        schedule: Schedule,
        kv: KV,
        probe: Probe | None = None,
        team: Team | None = None,
    ) -> None:
        if kv not in ("exact", "mean"):
            raise UsageError(f"kv is 'exact' or 'mean', not {kv!r}")
        self.body = body
        self.schedule = schedule
        self.kv = kv
        self.probe = probe
        self.team = team
        if team is None:
            check_present(body, schedule.layers_used)
            self.steps = schedule.steps
        else:
            self.steps = assigned(body, schedule, team, kv).steps[team.rank]
        self.slots = _slots(self.steps, kv)
        self.halves = {
            call.layer: halves(model, body, call.layer) for call in leaves(self.steps) if call.half != "whole"
        }
        self.key = f"{schedule.fingerprint}/{kv}" + (f"/{team.rank} of {team.size}" if team is not None else "")
        self.now = _Pass()
        # Muting half of a block changes the block for everyone, so then only one thread at a time may call it.
        self.turn: contextlib.AbstractContextManager[Any] = threading.RLock() if self.halves else nullcontext()

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model calls layer `index`: remember how, and on the last one play the schedule."""
        hidden, context = Context.split(args, kwargs)
        now = self.now
        if index == 0:
            now.contexts = []
        elif index != len(now.contexts):
            raise UnsupportedModel(
                f"layer {index} was called after {len(now.contexts)} others: the model skips layers by itself"
            )
        elif now.entering is None or not same(hidden, now.entering):
            raise UnsupportedModel(f"the model changed the hidden state before layer {index}, outside of any layer")
        now.contexts.append(context)
        now.entering = hidden
        if index == self.body.depth - 1:
            try:
                hidden = self.run(hidden)
            finally:
                now.contexts, now.entering = [], None
            now.played = True
        return self.body.wrap(index, hidden)

    def run(self, hidden: Tensor) -> Tensor:
        """Play the whole schedule on the embeddings `hidden`."""
        cache = self.cache()
        if cache is not None:
            lay_out(cache, self.slots, self.body.depth, self.key)
            count(cache, hidden)
        self.now.slot = self.now.place = 0
        self.tell(None, hidden)
        return self.series(self.steps, hidden)

    def cache(self) -> Cache | None:
        """The cache that the model handed to its layers in this pass."""
        return next((v for v in self.now.contexts[0].values() if isinstance(v, Cache)), None)

    def tell(self, step: Step | None, hidden: Tensor) -> None:
        """Hand a new hidden state to whoever wants it."""
        if self.probe is not None:
            self.probe(Event(self.now.place, step, hidden))
        self.now.place += 1
        if self.now.states is not None and not isinstance(step, Group):
            self.now.states.append(hidden)

    def series(self, steps: tuple[Step, ...], hidden: Tensor) -> Tensor:
        """Play steps one after the other."""
        for step in steps:
            hidden = self.call(step, hidden) if isinstance(step, Call) else self.group(step, hidden)
        return hidden

    def call(self, call: Call, hidden: Tensor, shared: MeanSlot | None = None) -> Tensor:
        """Call one layer, or half of it, in a slot of its own or in the `shared` one of its group."""
        slot = self.now.slot
        if shared is None and call.half != "mlp":
            self.now.slot += 1

        def seen(value: Any) -> Any:
            if isinstance(value, Cache):
                return shared.member() if shared is not None else SlotView(value, slot, self.body.depth)
            return value

        args, kwargs = self.now.contexts[call.layer].map(seen).join(hidden)
        block = self.body.layers[call.layer]
        with self.turn:
            if call.half == "whole":
                output = real_call(block, args, kwargs)
            else:
                with self.halves[call.layer].only(block, call.half):
                    output = real_call(block, args, kwargs)
        if self.now.states is not None or isinstance(output, tuple | list):
            self.now.extras.append(_attention(output))
        hidden = hidden_of(output)
        self.tell(call, hidden)
        return hidden

    def group(self, group: Group, hidden: Tensor) -> Tensor:
        """Play the branches of a group on one and the same input and merge what they make of it."""
        shared = self.shared_slot()
        if shared is None:
            outputs = [self.series(branch, hidden) for branch in group.branches]
        else:
            outputs = [self.call(call, hidden, shared) for call in leaves((group,))]
            shared.write()
        merged = self.merged(group, outputs, hidden)
        self.tell(group.group if isinstance(group, Share) else group, merged)
        return merged

    def merged(self, group: Group, outputs: list[Tensor], hidden: Tensor) -> Tensor:
        """What the branches of a group make of `hidden`, those that other processes have run among them."""
        if isinstance(group, Share):
            return self.meet(partial(outputs, hidden, group), hidden)
        return merge(outputs, hidden, group.merge)

    def meet(self, part: Tensor, hidden: Tensor) -> Tensor:
        """The sum of the parts that all processes of the team have, in the form of `hidden`."""
        assert self.team is not None
        if part.requires_grad or hidden.requires_grad:
            raise UsageError("gradients do not travel between processes: run the model under torch.no_grad()")
        return self.team.sum(part).to(hidden.dtype)

    def shared_slot(self) -> MeanSlot | None:
        """The next slot, for all members of a group, where that is asked for."""
        cache = self.cache()
        if self.kv == "exact" or cache is None:
            return None
        self.now.slot += 1
        return MeanSlot(cache, self.now.slot - 1, self.body.depth)


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
    kind = torch.promote_types(hidden.dtype, torch.float32)
    wide = hidden.to(kind)
    return (wide + sum(out.to(kind) - wide for out in outputs)).to(hidden.dtype)


def _slots(steps: tuple[Step, ...], kv: KV) -> tuple[tuple[int, ...], ...]:
    """The layers in each cache slot, in the order of the calls; several only where members of a group share one."""
    slots: list[tuple[int, ...]] = []
    for step in steps:
        if isinstance(step, Call):
            if step.half != "mlp":
                slots.append((step.layer,))
        elif kv == "mean":
            members = tuple(leaves((step,)))
            if len(members) != len(step.branches) or any(call.half != "whole" for call in members):
                raise UsageError("kv='mean' is defined for groups of whole single layers only, as in {8:12}")
            slots.append(tuple(call.layer for call in members))
        else:
            for branch in step.branches:
                slots.extend(_slots(branch, kv))
    return tuple(slots)


@contextlib.contextmanager
def _generation_settings(model: nn.Module) -> Iterator[None]:
    """Keep `generate` from compiling the tapped forward, and a cache it keeps on the model from leaking out."""
    if not hasattr(model, "_valid_auto_compile_criteria"):
        yield
        return
    before = {name: model.__dict__[name] for name in _GENERATION if name in model.__dict__}
    model.__dict__.pop("_cache", None)
    model.__dict__["_valid_auto_compile_criteria"] = lambda *args, **kwargs: False
    try:
        yield
    finally:
        for name in _GENERATION:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


@contextlib.contextmanager
def _whole_passes(model: nn.Module, body: Anatomy, player: Player) -> Iterator[None]:
    """Make sure that every pass plays the schedule, and give `hidden_states` and `attentions` of the layer calls.

    Models that collect those through hooks on their layers give them anyway; those that collect them in their own
    loop see T times the embeddings, and are corrected here.
    """
    owner = body.owner(model)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        config = getattr(owner, "config", None)
        names = ("output_hidden_states", "output_attentions")
        asked = [kwargs[n] if kwargs.get(n) is not None else getattr(config, n, False) for n in names]
        player.now.begin(wanted=any(value is not None and value is not False for value in asked))

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        played, states, extras = player.now.played, player.now.states, player.now.extras
        player.now.begin(wanted=False)
        if not played:
            raise UnsupportedModel("the model did not call its last layer: it skips layers by itself")
        return None if states is None else _corrected(output, states, extras, body.depth)

    handles = [
        owner.register_forward_pre_hook(before, with_kwargs=True),
        owner.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(output: Any) -> Tensor | None:
    """The attention weights (batch, heads, queries, keys) that a layer returns beside its hidden state."""
    rest = output[1:] if isinstance(output, tuple | list) else ()
    return next((value for value in rest if isinstance(value, Tensor) and value.dim() == 4), None)


def _corrected(output: Any, states: list[Tensor], extras: list[Tensor | None], depth: int) -> Any:
    """`output` with what the model's own loop collected replaced; untouched where that is of the calls already."""

    def correct(own: Any) -> Any:
        if not isinstance(own, tuple) or not own:
            return own
        if len(own) == depth + 1 and all(value is own[0] for value in own[:-1]) and isinstance(own[0], Tensor):
            return (*states[:-1], own[-1])  # the last is the model's own, behind its final norm where it has one
        if len(own) == depth and all(value is None for value in own):
            return tuple(extras)
        return own

    if isinstance(output, tuple):
        return tuple(correct(value) for value in output)
    for name in ("hidden_states", "attentions"):
        own = getattr(output, name, None)
        corrected = correct(own)
        if corrected is not own:
            output[name] = corrected
    return output
