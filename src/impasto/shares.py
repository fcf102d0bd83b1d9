"""Which of several processes runs which members of a parallel group: a pure function of the schedule.

The branches of a group read one hidden state and end in one, so they can run on different devices, and one sum over
all of them is all that has to travel. What runs in series runs everywhere alike. So a schedule of two groups needs two
sums for each token, however many layers the groups hold; splitting every matrix needs two sums for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from impasto.errors import UsageError
from impasto.schedule import Schedule
from impasto.steps import Call, Group, Step, leaves

Cost = Callable[[Call], float]
_SUMMED = 4  # bytes per number that travels: float32


@dataclass(frozen=True, slots=True)
class Share(Group):
    """What one process runs of a group: some of its branches, or none.

    It stands in the group's place among the steps that a process plays, and never in a `Schedule`.

    Args:
        branches: those that the process runs, in the order of the group.
        merge: as in the group.
        group: the whole group.
        leads: the process adds what is to be added once: the hidden state beside a sum of deltas.
    """

    group: Group = field(kw_only=True)
    leads: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        """Any number of branches, in the order in which they come."""


@dataclass(frozen=True)
class Plan:
    """The steps that each of several processes plays of one schedule.

    Example:
        ```python
        two = plan(Schedule.parse("0 {1:4} 4"), 2)
        two.layers(0), two.layers(1)      # (frozenset({0, 1, 2, 4}), frozenset({0, 3, 4}))
        two.sums                          # 1
        ```

    Attributes:
        schedule: what they compute together.
        steps: for each process, its steps; outermost groups are replaced by its `Share` of them.
    """

    schedule: Schedule
    steps: tuple[tuple[Step, ...], ...]

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.steps)

    @property
    def sums(self) -> int:
        """How often in one pass the processes add up what they have: once for each outermost group."""
        return sum(isinstance(step, Group) for step in self.schedule.steps) if self.size > 1 else 0

    def layers(self, rank: int) -> frozenset[int]:
        """The layers that process `rank` calls, and whose weights it needs."""
        return frozenset(call.layer for call in leaves(self.steps[rank]))

    @property
    def common(self) -> frozenset[int]:
        """The layers that all processes call together, and never one of them alone."""
        grouped = [step for step in self.schedule.steps if isinstance(step, Group)]
        return self.schedule.layers_used - {call.layer for call in leaves(tuple(grouped))}

    def loads(self, cost: Cost) -> tuple[float, ...]:
        """For each process, the cost of all its calls together."""
        return tuple(sum(map(cost, leaves(steps))) for steps in self.steps)

    def slots(self, rank: int) -> int:
        """How many layer calls of process `rank` keep keys and values."""
        return sum(call.half != "mlp" for call in leaves(self.steps[rank]))

    def weights(self, bytes_of: Sequence[int]) -> tuple[int, ...]:
        """For each process, the bytes of all layers that it needs, given those of each layer of the model."""
        return tuple(sum(bytes_of[layer] for layer in self.layers(rank)) for rank in range(self.size))

    def sent(self, width: int, positions: int = 1) -> int:
        """Bytes that each process sends in one pass over so many positions (tokens of all rows).

        A sum over n processes of one hidden state of `width` float32 numbers sends 2 (n - 1) / n of it from each, as
        rings do; what the network adds is not counted.
        """
        return self.sums * 2 * (self.size - 1) * width * positions * _SUMMED // self.size

    def describe(self) -> str:
        """One line for each process: `process 0 of 2: layers 0 1 2 4; 4 of 5 calls`."""
        return "\n".join(
            f"process {rank} of {self.size}: layers {' '.join(map(str, sorted(self.layers(rank))))}; "
            f"{sum(1 for _ in leaves(steps))} of {self.schedule.calls} calls"
            for rank, steps in enumerate(self.steps)
        )


def even(call: Call) -> float:
    """The same cost for every layer, and half of it for half a layer."""
    return 1.0 if call.half == "whole" else 0.5


def by_size(sizes: Sequence[int]) -> Cost:
    """What a call costs where reading weights is what takes time: the size of its layer, half of it for a half."""
    return lambda call: sizes[call.layer] * even(call)


def plan(schedule: Schedule, size: int, cost: Cost = even) -> Plan:
    """Give the branches of every outermost group to `size` processes; each branch to one.

    A process gets neighbouring branches, the dearest share is as cheap as it can be, and the others are as equal as
    that allows. Equal groups are shared alike, so a loop needs each layer's weights once. A group inside of a branch
    belongs to the branch.

    Args:
        schedule: what is to be computed.
        size: how many processes, from 1 on; more than a group has branches leave some without any.
        cost: of a layer call, in any unit.

    Raises:
        UsageError: no process at all.
    """
    if size < 1:
        raise UsageError(f"a plan is for at least one process, not {size}")
    if size == 1:
        return Plan(schedule, (schedule.steps,))
    cuts = {step: _cuts(step, size, cost) for step in set(schedule.steps) if isinstance(step, Group)}

    def own(step: Step, rank: int) -> Step:
        if isinstance(step, Call):
            return step
        first, last = cuts[step][rank : rank + 2]
        return Share(step.branches[first:last], step.merge, group=step, leads=rank == 0)

    return Plan(schedule, tuple(tuple(own(step, rank) for step in schedule.steps) for rank in range(size)))


def _cuts(group: Group, size: int, cost: Cost) -> tuple[int, ...]:
    """Where each process's branches begin, and where the last one's end."""
    return cut([sum(map(cost, leaves(branch))) for branch in group.branches], size)


def cut(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut a row of costs into `parts` neighbouring pieces, some of them perhaps empty.

    The dearest piece is as cheap as possible; among such cuts the sum of squares of the pieces is the smallest.

    Returns:
        `parts + 1` places, from 0 to `len(costs)`; piece i is `costs[places[i]:places[i + 1]]`.
    """
    upto = [0.0, *accumulate(costs)]
    count = len(costs)

    def best(worth: Callable[[float, float], float], limit: float) -> tuple[float, tuple[int, ...]]:
        # rows[end]: the worth of the best cut of the first `end` costs, and its places
        nothing: tuple[int, ...] = (0,)
        rows = [(0.0, nothing), *[(float("inf"), nothing)] * count]
        for _ in range(parts):
            rows = [
                min(
                    (worth(rows[start][0], upto[end] - upto[start]), (*rows[start][1], end))
                    for start in range(end + 1)
                    if upto[end] - upto[start] <= limit or start == end
                )
                for end in range(count + 1)
            ]
        return rows[count]

    dearest, _ = best(max, float("inf"))
    return best(lambda before, piece: before + piece * piece, dearest)[1]
