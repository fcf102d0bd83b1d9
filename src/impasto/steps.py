"""The bricks of a schedule: one call of a layer, and a group of branches that run side by side.

A schedule is a series of steps. Series loops and repeats are not structure: they are written out, so that
equal computations are equal values. See `impasto.schedule` for the whole and `impasto.notation` for its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

from impasto.errors import UsageError

Half = Literal["whole", "attn", "mlp"]
Merge = Literal["mean", "sum"]

HALVES: tuple[Half, ...] = get_args(Half)
MERGES: tuple[Merge, ...] = get_args(Merge)
MAX_LAYER = 999_999
MAX_CALLS = 100_000
MAX_GROUPS = 32


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one layer, whole or one half of it (the other half is muted).

    Args:
        layer: index into the model's layers, from 0.
        half: "whole", or "attn" or "mlp" for one half.
    """

    layer: int
    half: Half = "whole"

    def __post_init__(self) -> None:
        if type(self.layer) is not int or not 0 <= self.layer <= MAX_LAYER:
            raise UsageError(f"a layer is a whole number from 0 to {MAX_LAYER}, not {self.layer!r}")
        if self.half not in HALVES:
            raise UsageError(f"a half is one of {', '.join(HALVES)}, not {self.half!r}")


@dataclass(frozen=True, slots=True)
class Group:
    """Two or more branches that all read the same hidden state; each branch is a series of steps.

    The branches are kept in one canonical order, because their order does not change the computation; a
    branch that stands twice counts twice.

    Args:
        branches: the series of each branch, at least two.
        merge: "mean" averages the branches' outputs; "sum" adds their residual deltas,
            `h + sum_i (branch_i(h) - h)`.
    """

    branches: tuple[tuple[Step, ...], ...]
    merge: Merge = "mean"

    def __post_init__(self) -> None:
        branches = tuple(sorted(map(tuple, self.branches), key=_series_key))
        if len(branches) < 2:
            raise UsageError(f"a group has at least two branches, not {len(branches)}")
        if not all(branches):
            raise UsageError("a branch of a group holds at least one layer call")
        if self.merge not in MERGES:
            raise UsageError(f"a merge is one of {', '.join(MERGES)}, not {self.merge!r}")
        object.__setattr__(self, "branches", branches)
        if nesting((self,)) > MAX_GROUPS:
            raise UsageError(f"groups can be nested {MAX_GROUPS} deep, not deeper")


Step: TypeAlias = Call | Group


def calls(layers: Iterable[int], half: Half = "whole") -> tuple[Call, ...]:
    """The calls of these layers one after the other: `calls(range(8, 12))` is layers 8 to 11 in series."""
    return tuple(_call(layer, half) for layer in layers)


def side_by_side(branches: Iterable[tuple[Step, ...]], merge: Merge = "mean") -> tuple[Step, ...]:
    """The branches as one parallel step; a single branch is simply its own series."""
    branches = tuple(branches)
    return branches[0] if len(branches) == 1 else (Group(branches, merge),)


def halved(steps: tuple[Step, ...], half: Half) -> tuple[Step, ...]:
    """The same steps with every call inside reduced to one half.

    Raises:
        UsageError: if a call inside is a half already.
    """
    return tuple(_halved(step, half) for step in steps)


def leaves(steps: tuple[Step, ...]) -> Iterator[Call]:
    """Every call inside the steps, groups opened, in series order."""
    for step in steps:
        if isinstance(step, Call):
            yield step
        else:
            for branch in step.branches:
                yield from leaves(branch)


def count(steps: tuple[Step, ...]) -> int:
    """How many calls the steps make."""
    return sum(1 if isinstance(step, Call) else sum(map(count, step.branches)) for step in steps)


def depth(steps: tuple[Step, ...]) -> int:
    """Length of the longest path in calls: a series adds up, a group is as long as its longest branch."""
    return sum(1 if isinstance(step, Call) else max(map(depth, step.branches)) for step in steps)


def nesting(steps: tuple[Step, ...]) -> int:
    """How many groups lie inside one another at the deepest place; 0 for a plain series."""
    inner = (1 + max(map(nesting, step.branches)) for step in steps if isinstance(step, Group))
    return max(inner, default=0)


def canonical(steps: tuple[Step, ...]) -> str:
    """The steps written out in full, one text per value: what a fingerprint is made of.

    Example:
        `canonical(calls((7, 8)))` is `"7 8"`; a group of 8 and the attention half of 9 is `"mean{8,9.attn}"`.
    """
    return " ".join(map(_canonical, steps))


@lru_cache(maxsize=4096)
def _call(layer: int, half: Half) -> Call:
    """Calls are shared, so that comparing two long series is mostly comparing addresses."""
    return Call(layer, half)


def _halved(step: Step, half: Half) -> Step:
    if isinstance(step, Group):
        return Group(tuple(halved(branch, half) for branch in step.branches), step.merge)
    if step.half != "whole":
        raise UsageError(f"layer {step.layer} is already reduced to its {step.half} half")
    return _call(step.layer, half)


def _canonical(step: Step) -> str:
    if isinstance(step, Group):
        return f"{step.merge}{{{','.join(map(canonical, step.branches))}}}"
    return str(step.layer) if step.half == "whole" else f"{step.layer}.{step.half}"


def _series_key(steps: tuple[Step, ...]) -> tuple[Any, ...]:
    return tuple(map(_key, steps))


def _key(step: Step) -> tuple[Any, ...]:
    """Sorts calls before groups, whole layers before halves, then by layer, so that slices stay together."""
    if isinstance(step, Call):
        return (0, HALVES.index(step.half), step.layer)
    return (1, MERGES.index(step.merge), tuple(map(_series_key, step.branches)))
