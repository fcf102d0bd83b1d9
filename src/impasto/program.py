"""One pass of a scheduled model with nothing in it that a recording could not repeat.

All that changes from step to step (tokens, position, padding) is read on the device, and what a step leaves behind is
written there, where the next one finds it. Shapes and addresses stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from impasto.anatomy import Anatomy
from impasto.attention import configs, shared
from impasto.errors import UsageError
from impasto.graphs import Backend
from impasto.runtime import Player
from impasto.schedule import Call, Group, Schedule
from impasto.slots import MeanSlot, SlotView
from impasto.static import Clock, StaticSlots
from impasto.taps import handler_of, hidden_of, real_call
from impasto.teams import Team


class StaticPlayer(Player):
    """Plays the schedule on static slots; branches of a group side by side; compiled regions where there are some."""

    def __init__(
        self, model: nn.Module, body: Anatomy, schedule: Schedule, backend: Backend, team: Team | None = None
    ) -> None:
        super().__init__(model, body, schedule, "exact", team=team)
        self.backend = backend
        self.alone = False  # parts of groups are not summed over processes: for tracing, which wants shapes only
        self.around: Callable[[int, Call, int, Tensor], Tensor] | None = None  # called instead of `live`
        self.beside: Callable[[Group, Tensor], Tensor] | None = None  # called instead of `apart`
        self.result: Tensor | None = None  # what the last layer hands on, instead of the schedule's outcome

    def run(self, hidden: Tensor) -> Tensor:
        """The whole schedule on the embeddings `hidden`."""
        if self.result is not None:
            return self.result
        self.now.slot = self.now.place = 0
        return self.series(self.steps, hidden)

    def call(self, call: Call, hidden: Tensor, shared: MeanSlot | None = None) -> Tensor:
        """One layer call, in a slot of its own."""
        number, slot = self.now.place, self.now.slot
        self.now.place += 1
        if call.half != "mlp":
            self.now.slot += 1
        return (self.around or self.live)(number, call, slot, hidden)

    def live(self, number: int, call: Call, slot: int, hidden: Tensor) -> Tensor:
        """One layer call by the layer itself."""

        def seen(value: Any) -> Any:
            return SlotView(value, slot, self.body.depth) if isinstance(value, Cache) else value

        args, kwargs = self.now.contexts[call.layer].map(seen).join(hidden)
        block = self.body.layers[call.layer]
        if call.half == "whole":
            return hidden_of(real_call(block, args, kwargs))
        with self.halves[call.layer].only(block, call.half):
            return hidden_of(real_call(block, args, kwargs))

    def group(self, group: Group, hidden: Tensor) -> Tensor:
        """The branches of a group, and their merge."""
        return (self.beside or self.apart)(group, hidden)

    def apart(self, group: Group, hidden: Tensor) -> Tensor:
        """Each branch where the backend runs it, and their merge."""
        if len(group.branches) < 2:  # of a group that is shared with other processes
            return self.merged(group, [self.series(branch, hidden) for branch in group.branches], hidden)
        outputs: list[Tensor] = []
        with self.backend.fork(len(group.branches)) as places:
            for place, branch in zip(places, group.branches, strict=True):
                with place:
                    outputs.append(self.series(branch, hidden))
        return self.merged(group, outputs, hidden)

    def meet(self, part: Tensor, hidden: Tensor) -> Tensor:
        """The sum of all processes' parts, in the form of `hidden`; while tracing, what this process has of it."""
        return part.to(hidden.dtype) if self.alone else super().meet(part, hidden)


class Program:
    """A model under a schedule, its static slots, and the state of the rows it decodes.

    Attributes:
        ids: what the next step reads, the newest tokens, (batch, 1).
        pads: how many columns of padding each row begins with, (batch,).
        last: column of the prompts' last token, (1,).
        written: the token chosen for each column, (batch, context + 1); -1 where logits were not finite.
        logits: of the newest tokens, (batch, vocabulary); valid until the next pass.
    """

    def __init__(
        self,
        model: nn.Module,
        body: Anatomy,
        schedule: Schedule,
        device: torch.device,
        backend: Backend,
        batch: int,
        context: int,
        team: Team | None = None,
    ) -> None:
        self.model = model
        self.body = body
        self.device = device
        self.clock = Clock(context, device)
        self.player = StaticPlayer(model, body, schedule, backend, team)
        self.memory = StaticSlots(self.clock, len(self.player.slots))
        self.configs = configs(model)
        self.padded = batch > 1 or "position_ids" not in body.arguments
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.pads = torch.zeros(batch, dtype=torch.long, device=device)
        self.last = torch.zeros(1, dtype=torch.long, device=device)
        self.written = torch.zeros(batch, context + 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What a step changes beside its slots."""
        return self.ids, self.clock.position, self.written

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """What the model is called with."""
        asked: dict[str, Any] = {"input_ids": ids, "past_key_values": self.memory, "use_cache": True}
        if self.padded:
            columns = torch.arange(self.clock.visible, device=self.device)
            asked["attention_mask"] = (columns >= self.pads[:, None]).long()
        if "position_ids" in self.body.arguments:
            columns = self.clock.columns[None]
            asked["position_ids"] = (columns - self.pads[:, None]).clamp(min=0) if self.padded else columns
        return asked

    def prompt(self, ids: Tensor) -> None:
        """Read prompts into empty slots: `ids` (batch, width), padded on the left to the longest, then on the right.

        What stands in columns behind the prompts is never seen: each is written anew before attention reaches it.
        """
        self._require()
        self.clock.begin(ids.shape[1])
        asked = self.inputs(ids)
        if "logits_to_keep" in self.body.arguments:
            logits = self.model(**asked, logits_to_keep=self.last).logits[:, 0]
        else:
            logits = self.model(**asked).logits.index_select(1, self.last)[:, 0]
        self.clock.position.copy_(self.last[0] + 1)
        self.choose(logits)

    def step(self, visible: int) -> None:
        """From the newest tokens to the next ones, attention seeing the first `visible` columns."""
        self._require()
        self.clock.go_on(visible)
        with shared(self.configs):
            self.finish(self.inputs(self.ids))

    def _require(self) -> None:
        """Make sure that the model plays the schedule: behind its block it would run, and answer, as it is."""
        if handler_of(self.body.layers[0]) is not self.player:
            raise UsageError(
                "this decoder's `with` block has ended, or another one has begun inside: what it has not recorded "
                "runs only where its model plays its schedule"
            )

    def finish(self, asked: dict[str, Any]) -> None:
        """Call the model, and choose."""
        if "logits_to_keep" in self.body.arguments:
            asked["logits_to_keep"] = 1
        logits = self.model(**asked).logits[:, -1]
        self.clock.position.add_(1)
        self.choose(logits)

    def choose(self, logits: Tensor) -> None:
        """Write the likeliest tokens down, where the next step reads them."""
        self.logits = logits
        best = logits.max(-1)
        self.ids.copy_(best.indices[:, None])
        chosen = torch.where(best.values.isfinite(), best.indices, -1)
        self.written.index_copy_(1, self.clock.position.view(1), chosen[:, None])
