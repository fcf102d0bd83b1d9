"""Branches of equal structure as one region: the same operations on stacked weights, one kernel for all branches.

A group of twelve layers on streams of their own is twelve times as many kernels, and starting them takes longer than
running them. Branches that perform the same operations on weights of the same shapes are one function of those
weights; mapped over a new first dimension it needs as many kernels as a single branch. The weights are not kept twice:
they move into the stack, and the parameters of the model become views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from impasto.regions import Region, trace
from impasto.runtime import merge
from impasto.schedule import Call, Group
from impasto.shares import Share
from impasto.teams import partial


@dataclass(frozen=True, eq=False)
class Unit:
    """A region, and what it is called on beside the hidden state.

    Attributes:
        region: takes constants, the hidden state, `own`, and then what is read.
        own: tensors that stay the same from step to step: slots, positions, stacked weights.
        reads: which outputs of the region before all layers it reads.
        calls: how many layer calls it stands for.
        slots: how many slots they fill.
        group: the group whose branches it stands for, if it is no single call.
    """

    region: Region
    own: tuple[Tensor, ...]
    reads: tuple[int, ...]
    calls: int = 1
    slots: int = 1
    group: Group | None = None


class Stacks:
    """Equal tensors of several layers as one tensor each, with one more dimension in front.

    Args:
        model: whose parameters become views of the stacks they are put into.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.data_ptr(): p for p in model.parameters()}
        self._made: dict[tuple[int, ...], Tensor] = {}
        self._moved: dict[int, nn.Parameter] = {}
        self._views: dict[int, Tensor] = {}  # by the address a tensor had

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The stack of some tensors of one shape. Those that are parameters move into it."""
        key = tuple(t.data_ptr() for t in tensors)
        if key in self._made:
            return self._made[key]
        with torch.inference_mode(False), torch.no_grad():  # parameters that move into it are to be trained again
            stack = torch.stack([t.detach() for t in tensors])
        for old, new in zip(tensors, stack, strict=True):
            parameter = self._parameters.get(old.data_ptr())
            if parameter is None or parameter.shape != new.shape or parameter.data_ptr() in self._moved:
                continue
            self._views[old.data_ptr()] = new
            parameter.data = new
            self._parameters[new.data_ptr()] = self._moved[new.data_ptr()] = parameter
        self._made[key] = self._made[tuple(t.data_ptr() for t in stack)] = stack
        return stack

    def adopt(self, *stacks: Tensor) -> None:
        """Know tensors whose parts are already where they belong."""
        for stack in stacks:
            self._made[tuple(t.data_ptr() for t in stack)] = stack

    def now(self, region: Region) -> Region:
        """The region on the constants where they are now, so that nothing holds the memory they have left."""
        constants = [self._views.get(t.data_ptr()) for t in region.constants]
        kept = [
            new if new is not None and new.shape == old.shape else old
            for old, new in zip(region.constants, constants, strict=True)
        ]
        return replace(region, constants=tuple(kept))

    def close(self) -> None:
        """Give every parameter that moved memory of its own again."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter in self._moved.values():
                parameter.data = parameter.data.clone()
        self._moved = {}


def plain_branches(group: Group) -> list[tuple[Call, ...]] | None:
    """The calls of every branch, if each is a series of equally many calls and nothing else."""
    branches = [tuple(step for step in branch if isinstance(step, Call)) for branch in group.branches]
    plain = all(len(calls) == len(branch) for calls, branch in zip(branches, group.branches, strict=True))
    return branches if plain and len({len(calls) for calls in branches}) == 1 else None


def _mixed(flow: Tensor, hidden: Tensor, group: Group) -> Tensor:
    """The merge of branches whose outputs are (branches, batch, positions, width), or a share's part of it."""
    if isinstance(group, Share):
        return partial(list(flow.unbind()), hidden, group)
    return flow.mean(0) if group.merge == "mean" else merge(list(flow.unbind()), hidden, group.merge)


def stack(
    group: Group, branches: Sequence[Sequence[Unit]], hidden: Tensor, tensors: Sequence[Tensor], stacks: Stacks
) -> Unit:
    """The units of a group's branches and their merge as one unit; of a share, what it adds to the merge.

    Args:
        group: the group.
        branches: the units of every branch, equally many and of equal regions.
        hidden: what the group reads, for its shape.
        tensors: outputs of the region before all layers, which units read.
        stacks: where stacked weights and slots are kept.
    """
    depths = list(zip(*branches, strict=True))
    own: list[Tensor] = []
    reads: list[int] = []
    plans: list[list[tuple[str, list[int]]]] = []  # per depth and argument: where it comes from, and its number there
    for units in depths:
        plan: list[tuple[str, list[int]]] = []
        for column in zip(*[(*unit.region.constants, *unit.own) for unit in units], strict=True):
            same = len({t.data_ptr() for t in column}) == 1
            plan.append(("same" if same else "stack", [len(own)]))
            own.append(column[0] if same else stacks.of(column))
        for places in zip(*[unit.reads for unit in units], strict=True):
            wanted = [places[0]] if len(set(places)) == 1 else list(places)
            reads += [place for place in wanted if place not in reads]
            plan.append(("read", [reads.index(place) for place in wanted]))
        plans.append(plan)

    def together(hidden: Tensor, *given: Tensor) -> list[Tensor]:
        kept, read = given[: len(own)], given[len(own) :]
        flow = hidden
        lane: int | None = None
        for units, plan in zip(depths, plans, strict=True):
            values = [
                kept[numbers[0]]
                if origin != "read"
                else read[numbers[0]]
                if len(numbers) == 1
                else torch.stack([read[number] for number in numbers])
                for origin, numbers in plan
            ]
            lanes = [0 if origin == "stack" or len(numbers) > 1 else None for origin, numbers in plan]
            region, count = units[0].region, len(units[0].region.constants)
            (flow,) = torch.vmap(
                lambda *all, graph=region.graph: tuple(graph(*all)),
                in_dims=(*lanes[:count], lane, *lanes[count:]),
            )(*values[:count], flow, *values[count:])
            lane = 0
        return [_mixed(flow, hidden, group)]

    region = trace(together, [hidden, *own, *[tensors[place] for place in reads]])
    all_units = [unit for branch in branches for unit in branch]
    return Unit(
        region,
        tuple(own),
        tuple(reads),
        sum(unit.calls for unit in all_units),
        sum(unit.slots for unit in all_units),
        group,
    )
