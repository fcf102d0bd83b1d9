"""Several processes that compute one schedule together, each with its own device and its share of the groups.

All processes make the same calls in the same order. What runs in series, they compute alike; where a group ends, each
brings the sum of its own branches, and all receive the sum of these sums.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from impasto.anatomy import Anatomy
from impasto.errors import UsageError
from impasto.schedule import Schedule
from impasto.shares import Plan, Share, by_size, plan
from impasto.steps import Step

_EXACT = 12  # hexadecimal digits of a fingerprint that a float64 holds exactly
_FUNCTIONAL = torch.ops._c10d_functional  # sums that a graph can hold: they change nothing in place
_SPLIT = "_impasto_split"  # attribute of a layer that several processes run together


class Team(Protocol):
    """The processes that work together, as one of them sees them. `join` gives those that torchrun started."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0 on."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def sum(self, part: Tensor) -> Tensor:
        """The sum of what all processes bring, the same bits in all of them; `part` may be overwritten."""

    def lowest(self, value: float) -> float:
        """The lowest of what all processes bring."""


class Processes:
    """The processes of a group of torch's (`torch.distributed`).

    Args:
        device: where this process computes.
        group: a group of processes; None takes all of them.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self.group = group

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes the group has."""
        return dist.get_world_size(self.group)

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all processes; on a CUDA device a kernel like any other, which can be recorded and traced."""
        if get_proxy_mode() is None:
            part = part.contiguous()
            dist.all_reduce(part, group=self.group)
            return part
        everyone = self.group or dist.group.WORLD
        assert everyone is not None
        total: Tensor = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_reduce(part, "sum", everyone.group_name))
        return total

    def lowest(self, value: float) -> float:
        """The lowest of what all processes bring."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return float(found)


def join() -> Processes:
    """Meet the other processes that `torchrun` started, one for each device; again in the same process: the same.

    Each process takes the CUDA device of its number on this machine, and NCCL; without CUDA the processor, and gloo.
    Leave with `torch.distributed.destroy_process_group()`, after decoders that have recorded their steps are gone.

    Raises:
        UsageError: no torchrun, or more processes on this machine than devices.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UsageError(
            f"{missing[0]} is not set: start the processes with `torchrun --nproc-per-node N`, one for each device"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= found:
            raise UsageError(f"process {here} of this machine has no device: it has {found}; start {found} processes")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Processes(device)


def partial(outputs: list[Tensor], hidden: Tensor, share: Share) -> Tensor:
    """What one process adds to the end of a group: all processes' parts together are its merge.

    Args:
        outputs: of the process's own branches, each (batch, positions, width); none where it has none.
        hidden: what every branch read.
        share: which branches these are, and how they are merged.

    Returns:
        (batch, positions, width) in float32 at least, so that rounding happens once, behind the sum.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.stack(outputs).sum(0, dtype=wide) if outputs else torch.zeros_like(hidden, dtype=wide)
    if share.merge == "mean":
        return total / len(share.group.branches)
    return total.add(hidden, alpha=share.leads - len(outputs))


def absent(layer: nn.Module) -> bool:
    """Whether a layer's weights were left to other processes (and are not kept elsewhere by accelerate)."""
    gone = any(parameter.is_meta for parameter in layer.parameters())
    return gone and not any(hasattr(module, "_hf_hook") for module in layer.modules())


def planned(body: Anatomy, schedule: Schedule, size: int) -> Plan:
    """The plan for a model's own layers, by the number of their weights."""
    return plan(schedule, size, by_size([body.parameters(layer) for layer in range(body.depth)]))


def own_steps(body: Anatomy, schedule: Schedule, team: Team | None) -> tuple[Step, ...]:
    """The steps of a schedule that this process plays: all of them, or its part among those of a team."""
    return schedule.steps if team is None else planned(body, schedule, team.size).steps[team.rank]


def mark_split(layer: nn.Module) -> None:
    """Remember that all processes have to call this layer together."""
    layer.__dict__[_SPLIT] = True


def is_split(layer: nn.Module) -> bool:
    """Whether all processes have to call this layer together, since each has a part of its weights."""
    return _SPLIT in layer.__dict__


def assigned(body: Anatomy, schedule: Schedule, team: Team, kv: str) -> Plan:
    """The plan that a team is about to play; all processes ask at the same time.

    Raises:
        UsageError: the processes play different schedules, or one lacks a layer's weights, or keys and values were to
            be averaged over processes.
    """
    found = planned(body, schedule, team.size)
    check_present(body, found.layers(team.rank), team)
    if alone := sorted(layer for layer in schedule.layers_used - found.common if is_split(body.layers[layer])):
        raise UsageError(
            f"the weights of layers {' '.join(map(str, alone))} are split over the processes, and members of groups "
            "run in one of them: load the model again for this schedule"
        )
    mine = float(int(schedule.fingerprint[:_EXACT], 16))
    if -team.lowest(-mine) != team.lowest(mine):
        raise UsageError(f"process {team.rank} plays {schedule}, and others play another schedule: all play the same")
    if kv != "exact":
        raise UsageError(
            "kv='mean' averages keys over the members of a group, which several processes hold: kv='exact'"
        )
    return found


def check_present(body: Anatomy, layers: frozenset[int], team: Team | None = None) -> None:
    """Make sure that the weights of all these layers are here, and that all processes of a team have theirs.

    Raises:
        UsageError: here or in another process they are not.
    """
    if team is None and any(map(is_split, body.layers)):
        raise UsageError("the weights of this model are split over processes: name the team that plays, team=team")
    lacking = sorted(layer for layer in layers if absent(body.layers[layer]))
    complete = not lacking if team is None else team.lowest(not lacking) == 1
    if lacking:
        where = "this process" if team is None else f"process {team.rank} of {team.size}"
        raise UsageError(
            f"the weights of layers {' '.join(map(str, lacking))} were left to other processes, and {where} needs "
            "them: load the model again for this schedule"
        )
    if not complete:
        raise UsageError("another process of the team lacks weights of its share: see what it says")
