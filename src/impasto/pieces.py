"""One decoding step in compiled pieces: what stands before the layers, each layer call, what stands behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from impasto.levels import record
from impasto.program import Program
from impasto.regions import Compiled, Region, compile_region, interpret_region, trace
from impasto.schedule import Call, Group
from impasto.shares import Share
from impasto.stacks import Stacks, Unit, plain_branches, stack
from impasto.taps import Context

Compile = Literal["off", "traced", "inductor"]


class Pieces:
    """A decoding step as regions, for one number of visible columns.

    Made from a program that stands in the middle of a text; its state moves on by the steps it is traced on.

    Args:
        program: what to compile.
        visible: how many columns attention sees.
        stacks: where groups find the stacked weights of their branches; None leaves branches apart.

    Attributes:
        notes: which groups could not be stacked, and why.
    """

    def __init__(self, program: Program, visible: int, stacks: Stacks | None = None) -> None:
        self.program = program
        self.visible = visible
        self.stacks = stacks
        self.notes: list[str] = []
        self._units: dict[int, Unit] = {}  # by the number of the (first) call
        self._examples: dict[str, list[Tensor]] = {}  # by key: what a region is compiled on
        self._work: dict[str, Compiled] = {}
        self._trace()

    @property
    def regions(self) -> list[Region]:
        """What stands before the layers, layer calls and stacked groups, what stands behind."""
        return [self._head, *[unit.region for unit in self._units.values()], self._tail]

    @property
    def kernels(self) -> int:
        """How many regions differ."""
        return len({region.key for region in self.regions})

    def compile(self, how: Compile, options: dict[str, Any]) -> None:
        """Make every region callable; equal ones share their kernels."""
        make = compile_region if how == "inductor" else interpret_region
        for region in self.regions:
            if region.key not in self._work:
                self._work[region.key] = make(region, self._examples[region.key], options)
        self._examples = {}

    def run(self) -> None:
        """The step."""
        program, player = self.program, self.program.player
        program.clock.go_on(self.visible)
        hidden, *tensors = self._call(self._head, [program.ids, program.pads, program.clock.position])

        def unit(number: int, hidden: Tensor) -> Tensor:
            now = self._units[number]
            return self._call(now.region, [hidden, *now.own, *[tensors[i] for i in now.reads]])[0]

        def group(group: Group, hidden: Tensor) -> Tensor:
            number = player.now.place
            stacked = self._units.get(number)
            if stacked is None or stacked.group is not group:
                return player.apart(group, hidden)
            player.now.place += stacked.calls
            player.now.slot += stacked.slots
            merged = unit(number, hidden)
            return player.meet(merged, hidden) if isinstance(group, Share) else merged

        player.around = lambda number, call, slot, hidden: unit(number, hidden)
        player.beside = group
        try:
            hidden = player.run(hidden)
        finally:
            player.around = player.beside = None
        (program.logits,) = self._call(self._tail, [hidden, program.pads, *program.state])

    def _call(self, region: Region, inputs: list[Tensor]) -> list[Tensor]:
        return list(self._work[region.key]([*region.constants, *inputs]))

    def _slot(self, call: Call, slot: int) -> tuple[Tensor, ...]:
        """The column a call writes, and the tensors of its slot; nothing for a call without attention."""
        if call.half == "mlp":
            return ()
        own = self.program.memory.layers[slot]
        return self.program.clock.columns, own.keys, own.values

    def _trace(self) -> None:
        program, player = self.program, self.program.player
        contexts: tuple[Context, ...] = ()
        places: dict[int, int] = {}  # by tensor: its place among the outputs of the first region

        def head(*_: Tensor) -> list[Tensor]:
            nonlocal contexts
            program.clock.go_on(self.visible)
            hidden, contexts = record(program.model, program.body, program.inputs(program.ids))
            outputs = {id(t): t for context in contexts for t in _tensors(context)}
            places.update({key: place for place, key in enumerate(outputs)})
            return [hidden, *outputs.values()]

        inputs = [program.ids, program.pads, program.clock.position]
        self._head = trace(head, inputs)
        hidden, *tensors = self._note(self._head, inputs)

        noted: dict[Call, Region] = {}  # a layer that is called again does the same again, in another slot

        def call(number: int, call: Call, slot: int, hidden: Tensor) -> Tensor:
            context = contexts[call.layer]
            reads = [places[id(t)] for t in _tensors(context)]
            known = {id(old): tensors[place] for old, place in zip(_tensors(context), reads, strict=True)}
            player.now.contexts = [context.map(lambda v: known.get(id(v), v))] * (call.layer + 1)
            own = self._slot(call, slot)
            inputs = [hidden, *own, *[tensors[i] for i in reads]]
            if call not in noted:
                noted[call] = trace(lambda *_: [player.live(number, call, slot, hidden)], inputs)
            self._units[number] = Unit(noted[call], own, tuple(reads), slots=int(call.half != "mlp"))
            return self._note(noted[call], inputs)[0]

        def group(group: Group, hidden: Tensor) -> Tensor:
            first, slot = player.now.place, player.now.slot
            merged = player.apart(group, hidden)
            self._stack(group, range(first, player.now.place), slot, hidden, tensors)
            return merged

        program.clock.go_on(self.visible)
        player.around, player.beside = call, group if self.stacks is not None else None
        player.alone = True  # a process whose tracing fails must not leave the others waiting
        try:
            hidden = player.run(hidden)
        finally:
            player.around, player.beside, player.now.contexts, player.alone = None, None, [], False

        def tail(hidden: Tensor, *_: Tensor) -> list[Tensor]:
            program.clock.go_on(self.visible)
            player.result = hidden
            try:
                program.finish(program.inputs(program.ids))
            finally:
                player.result = None
            assert program.logits is not None
            return [program.logits]

        inputs = [hidden, program.pads, *program.state]
        self._tail = trace(tail, inputs)
        self._note(self._tail, inputs)
        if self.stacks is not None:
            for number, unit in self._units.items():
                self._units[number] = replace(unit, region=self.stacks.now(unit.region))

    def _stack(self, group: Group, numbers: range, slot: int, hidden: Tensor, tensors: list[Tensor]) -> None:
        """Put one unit in the place of those of a group's calls, if its branches are of equal structure."""
        calls = plain_branches(group)
        if calls is None or self.stacks is None or len(calls) < 2:
            return
        length = len(calls[0])
        units = [self._units[number] for number in numbers]
        branches = [units[first : first + length] for first in range(0, len(units), length)]
        if len({tuple(unit.region.key for unit in branch) for branch in branches}) > 1:
            self.notes.append(
                f"the {len(branches)} branches from call {numbers[0]} on differ in structure: one stream each"
            )
            return
        wanted = [unit.slots for unit in branches[0]]
        for depth in range(length):
            slots = [slot + lane * sum(wanted) + sum(wanted[:depth]) for lane in range(len(branches))]
            if wanted[depth]:
                self.stacks.adopt(*self.program.memory.together(tuple(slots)))
            for branch, branch_calls, own in zip(branches, calls, slots, strict=True):
                branch[depth] = replace(branch[depth], own=self._slot(branch_calls[depth], own))
        made = stack(group, branches, hidden, tensors, self.stacks)
        for number in numbers:
            del self._units[number]
        self._units[numbers[0]] = made
        self._note(made.region, [hidden, *made.own, *[tensors[i] for i in made.reads]])

    def _note(self, region: Region, inputs: list[Tensor]) -> list[Tensor]:
        """Keep what a region is compiled on, and give what its graph returns."""
        self._examples.setdefault(region.key, inputs)
        with torch.no_grad():
            return list(region.graph(*region.constants, *inputs))


def _tensors(context: Context) -> list[Tensor]:
    """The tensors among the arguments of a layer call, each once."""
    found: dict[int, Tensor] = {}

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            found[id(value)] = value
        return value

    context.map(note)
    return list(found.values())
