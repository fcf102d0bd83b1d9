"""The schedules of *Transformer Layers as Painters* (arXiv 2407.09298), as pure functions of the depth.

The paper splits a model of T layers at a start layer N:

    PRE   0 .. N              run as they are       N + 1 layers
    MID   N+1 .. T-N-1        the affected layers   M = T - 2N - 1
    POST  T-N .. T-1          run as they are       N layers

The paper's text contradicts itself on these indices; its released code does not, and agrees with the paper's
own checks, so the convention here is the code's. The paper has even T only, where M is odd and the centre layer
c = T // 2 stands exactly in the middle of MID. For odd T the same formulas hold: M is even, PRE is still one
layer longer than POST, and c is the lower one of the two middle layers. N is valid while M is at least 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from impasto.errors import UsageError
from impasto.schedule import Merge, Schedule, Step, calls, side_by_side


def starts(depth: int) -> range:
    """The valid start layers N of a model with so many layers; the last one affects the fewest layers."""
    if depth < 2:
        raise UsageError(f"the paper's schedules need a model of at least 2 layers, not {depth}")
    return range(depth // 2)


def middle(depth: int, start: int) -> range:
    """The affected layers MID = N+1 .. T-N-1: `middle(32, 13)` is 14 .. 18."""
    if start not in starts(depth):
        last = depth // 2 - 1
        raise UsageError(f"start layer {start} is out of range: a model of {depth} layers has 0..{last}")
    return range(start + 1, depth - start)


def affected(depth: int, start: int) -> int:
    """How many layers a schedule with this start layer changes: M = T - 2N - 1."""
    return len(middle(depth, start))


def centre(depth: int) -> int:
    """The layer whose weights middle repeat uses: T // 2."""
    return depth // 2


def identity(depth: int) -> Schedule:
    """Every layer once, in order: the untouched model."""
    return Schedule.identity(depth)


def skip_one(depth: int, layer: int) -> Schedule:
    """Every layer but one."""
    _within("layer", layer, range(depth), depth)
    if depth == 1:
        raise UsageError("a model of 1 layer has no layer to spare")
    return Schedule(calls(range(layer)) + calls(range(layer + 1, depth)))


def swap_adjacent(depth: int, layer: int) -> Schedule:
    """Every layer once, with this one and the next in each other's place."""
    _within("layer to swap with the next", layer, range(depth - 1), depth)
    return Schedule(calls((*range(layer), layer + 1, layer, *range(layer + 2, depth))))


def skip(depth: int, start: int) -> Schedule:
    """PRE and POST; the middle is left out."""
    middle(depth, start)
    return _around(depth, start, ())


def middle_repeat(depth: int, start: int) -> Schedule:
    """The centre layer in every place of the middle."""
    return _around(depth, start, calls([centre(depth)]) * affected(depth, start))


def reverse(depth: int, start: int) -> Schedule:
    """The middle from last to first."""
    return _around(depth, start, calls(reversed(middle(depth, start))))


def random_order(depth: int, start: int, seed: int) -> Schedule:
    """The middle shuffled, as Python's `random.seed(seed); random.shuffle(list(MID))` does.

    The generator is a fresh one, so that the process-wide one is neither read nor changed.
    """
    order = list(middle(depth, start))
    random.Random(seed).shuffle(order)
    return _around(depth, start, calls(order))


def parallel(depth: int, start: int, merge: Merge = "mean") -> Schedule:
    """All middle layers on the same input, their outputs merged."""
    return looped_parallel(depth, start, 1, merge)


def looped_parallel(depth: int, start: int, iterations: int = 3, merge: Merge = "mean") -> Schedule:
    """The middle in parallel, its merged output fed back as input: so many iterations in all."""
    _at_least_once("iterations", iterations)
    group = side_by_side([calls([layer]) for layer in middle(depth, start)], merge)
    return _around(depth, start, group * iterations)


def block_repeat(depth: int, start: int, times: int) -> Schedule:
    """The whole middle, run so many times in a row: the likelier reading of the paper's "double repeat"."""
    _at_least_once("times", times)
    return _around(depth, start, calls(middle(depth, start)) * times)


def inplace_repeat(depth: int, start: int, times: int) -> Schedule:
    """Every middle layer so many times before the next one: the other reading of "double repeat"."""
    _at_least_once("times", times)
    return _around(depth, start, calls(layer for layer in middle(depth, start) for _ in range(times)))


@dataclass(frozen=True, slots=True)
class Method:
    """One of the paper's methods that are swept over the start layer.

    Args:
        name: key in `METHODS` and in files.
        title: what figures call it.
        build: the schedule of `build(depth, start)`; random orders take a seed, loops a number as third.
        parameter: name of that third argument, empty if there is none.
    """

    name: str
    title: str
    build: Callable[..., Schedule]
    parameter: str = ""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("skip", "Skip", skip),
            Method("middle_repeat", "Middle repeat", middle_repeat),
            Method("reverse", "Reverse", reverse),
            Method("random_order", "Random order", random_order, "seed"),
            Method("parallel", "Parallel", parallel),
            Method("looped_parallel", "Looped parallel", looped_parallel, "iterations"),
            Method("block_repeat", "Block repeat", block_repeat, "times"),
            Method("inplace_repeat", "In-place repeat", inplace_repeat, "times"),
        )
    }
)


def _around(depth: int, start: int, inner: tuple[Step, ...]) -> Schedule:
    """PRE, then what takes the place of the middle, then POST."""
    return Schedule(calls(range(start + 1)) + inner + calls(range(depth - start, depth)))


def _within(what: str, value: int, valid: range, depth: int) -> None:
    if value not in valid:
        bounds = f"{valid.start}..{valid.stop - 1}" if valid else "none"
        raise UsageError(f"{what} {value} is out of range: a model of {depth} layers has {bounds}")


def _at_least_once(what: str, number: int) -> None:
    if number < 1:
        raise UsageError(f"{what} is at least 1, not {number}")
