"""How much the painters study measures: its protocols, and every schedule that one of them asks for.

Experiments E1 to E11 and E17 of *Transformer Layers as Painters* become `Variant`s: distinct schedules, each with all
the uses that the study makes of it. One schedule often serves several experiments (leaving out a middle of one layer
is leaving out that layer), and then it is run once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from impasto import moves
from impasto.errors import UsageError
from impasto.recipe import Recipe
from impasto.schedule import Schedule

TASKS = (
    "basic_skills_arithmetic",
    "basic_skills_logical_reasoning",
    "basic_skills_string_operations",
    "basic_skills_pattern",
    "basic_skills_common_knowledge",
    "lambada_openai",
    "hellaswag",
    "winogrande",
)
"""The default tasks: skills that should need the order of the layers, and others that should not."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "skip_one": "One layer left out",
        "swap": "Two neighbours swapped",
        **{name: method.title for name, method in moves.METHODS.items()},
        "heat_map": "Looped parallel, width by iterations",
    }
)
"""What a study may run beside the full model, with the titles that figures use."""

FULL = "full"
LAST_UNLOOPED = 4  # the heat map's iterations end at T - 4


@dataclass(frozen=True, slots=True)
class Heat:
    """Which cells of the iterations by width map are run.

    Args:
        widths: how many of the widths M, see `spread`; None is all.
        iterations: numbers of iterations; None is 1 .. T - 4, the paper's 28 of 32 layers.
        narrowest: the least width M; the paper's map begins with 5.
    """

    widths: int | None = None
    iterations: tuple[int, ...] | None = None
    narrowest: int = 5


@dataclass(frozen=True, slots=True)
class Protocol:
    """How much a study measures.

    Args:
        name: "quick", "standard" or "paper".
        limit: examples of a task; None is all of them.
        limits: other limits for some tasks, in (task, limit) pairs.
        starts: how many start layers N, see `spread`; None is all.
        seeds: random orders per start layer, seeded 0, 1, ...
        widest: the widest middle as a share of the depth; hardly anything is left of a model with a wider one.
        iterations: of looped parallel; the paper's curves have 3.
        swap_step: swap every so manyth pair of neighbours; 1 is all of them.
        repeats: how often the middle runs in block and in-place repeat.
        repeat_starts: how many start layers these two have; None is all.
        heat: cells of the heat map.
        methods: what is run, names in `METHODS`.
        tasks: names of tasks.
        texts: texts whose hidden states are compared; the paper's code had 100.
        prompts: prompts continued under exact and averaged KV caches.
    """

    name: str
    limit: int | None
    starts: int | None
    seeds: int
    repeat_starts: int | None
    heat: Heat
    texts: int
    prompts: int
    limits: tuple[tuple[str, int | None], ...] = ()
    widest: float = 1.0
    iterations: int = 3
    swap_step: int = 1
    repeats: tuple[int, ...] = (2, 3)
    methods: tuple[str, ...] = tuple(METHODS)
    tasks: tuple[str, ...] = TASKS

    def limit_of(self, task: str) -> int | None:
        """How many examples of a task are asked; None is all."""
        return dict(self.limits).get(task, self.limit)


# The costs of a study are its layer calls (see `impasto.trie.count`) times its tokens, and these numbers set both.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "quick": Protocol(
            name="quick",
            limit=32,
            limits=(
                ("basic_skills_logical_reasoning", 12),
                ("basic_skills_string_operations", 6),
                ("lambada_openai", 16),
                ("hellaswag", 4),
                ("winogrande", 8),
            ),
            starts=4,
            widest=0.5,
            seeds=3,
            swap_step=3,
            repeat_starts=1,
            heat=Heat(widths=2, iterations=(1, 2, 3), narrowest=3),
            texts=16,
            prompts=6,
        ),
        "standard": Protocol(
            name="standard",
            limit=300,
            starts=None,
            seeds=5,
            repeat_starts=None,
            heat=Heat(widths=7, iterations=(1, 2, 3, 4, 6, 8, 11, 14), narrowest=3),
            texts=100,
            prompts=32,
        ),
        "paper": Protocol(
            name="paper",
            limit=None,
            starts=None,
            seeds=10,
            repeat_starts=None,
            heat=Heat(),
            texts=100,
            prompts=100,
            tasks=(*TASKS, "arc_challenge"),
        ),
    }
)


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True, slots=True)
class Use:
    """What a schedule is in the study.

    Args:
        method: "full", or a name in `METHODS` other than "heat_map", whose cells are uses of "looped_parallel".
        start: the start layer N; None for the full model, one layer left out and neighbours swapped.
        affected: how many layers the method changes (M).
        parameter: seed, iterations, times, or the layer that is left out or swapped with the next; else None.
    """

    method: str
    start: int | None = None
    affected: int = 0
    parameter: int | None = None

    def __str__(self) -> str:
        if self.method == FULL:
            return "Full model"
        if self.start is None:
            return f"{METHODS[self.method]}, layer {self.parameter}"
        name = moves.METHODS[self.method].parameter
        more = f", {name} {self.parameter}" if name else ""
        return f"{METHODS[self.method]}, N = {self.start}{more}"


@dataclass(frozen=True)
class Variant:
    """One schedule of the study and everything that it is used for."""

    schedule: Schedule
    uses: tuple[Use, ...]

    @cached_property
    def recipe(self) -> str:
        """The fingerprint under which results are kept; it does not depend on the model's name."""
        return Recipe("", self.schedule).fingerprint


def check_methods(names: Iterable[str]) -> None:
    """Make sure that methods of these names exist.

    Raises:
        UsageError: an unknown name.
    """
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"no method {name!r}{hint} (there are {', '.join(METHODS)})")


def variants(
    depth: int,
    protocol: Protocol,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
) -> tuple[Variant, ...]:
    """Every schedule that a study of a model with so many layers runs, each once; the full model is the first.

    Example:
        ```python
        len(variants(18, PROTOCOLS["quick"]))
        variants(32, PROTOCOLS["paper"], methods=["skip", "random_order"], seeds=3)
        ```

    Args:
        depth: the model's number of layers T.
        protocol: how much to run.
        methods: names in `METHODS` instead of the protocol's own.
        seeds: random orders per start layer instead of the protocol's own number.

    Raises:
        UsageError: an unknown method, no seeds, or a model of fewer than two layers.
    """
    chosen = tuple(protocol.methods if methods is None else methods)
    count = protocol.seeds if seeds is None else seeds
    check_methods(chosen)
    if count < 1:
        raise UsageError(f"random orders need at least 1 seed, not {count}")
    plan = _Plan(depth, protocol, count)
    found: dict[Schedule, dict[Use, None]] = {moves.identity(depth): {Use(FULL): None}}
    for name in dict.fromkeys(chosen):
        for use, schedule in plan.experiment(name):
            found.setdefault(schedule, {})[use] = None
    return tuple(Variant(schedule, tuple(uses)) for schedule, uses in found.items())


def state_schedules(depth: int) -> dict[str, Schedule]:
    """Schedules whose hidden states the study compares: "full", and "skip" and "middle_repeat" at `state_start`."""
    start = state_start(depth)
    return {
        FULL: moves.identity(depth),
        "skip": moves.skip(depth, start),
        "middle_repeat": moves.middle_repeat(depth, start),
    }


def state_start(depth: int) -> int:
    """The start layer N of these: the paper's 13 of 32 layers, that is M = 5 (6 for an odd number of layers)."""
    return max(0, (depth - 6) // 2)


def cache_schedules(depth: int, protocol: Protocol) -> tuple[Variant, ...]:
    """Schedules whose texts are compared under exact and averaged caches, one use each: parallel, once and looped.

    The start layer is that of the paper's printed example: 14 of 32 layers, that is M = 3 (4 for an odd number of
    layers).
    """
    start = max(0, (depth - 4) // 2)
    width = moves.affected(depth, start)
    looped = moves.looped_parallel(depth, start, protocol.iterations)
    return (
        Variant(moves.parallel(depth, start), (Use("parallel", start, width),)),
        Variant(looped, (Use("looped_parallel", start, width, protocol.iterations),)),
    )


def moderate(depth: int, affected: Iterable[int]) -> tuple[int, ...]:
    """The widths M that methods are compared at: three layers at least, and at most five or a third of the model.

    With fewer every method is nearly the full model, with more nothing is left to compare. A model too shallow
    for that is compared at all its widths of two layers or more.
    """
    widths = sorted({width for width in affected if width > 1})
    between = tuple(width for width in widths if 3 <= width <= max(5, depth / 3))
    return between or tuple(widths)


def spread(values: Sequence[int], count: int | None) -> tuple[int, ...]:
    """So many of the values, with the first and the last, closer together towards the last.

    Start layers in ascending order end with the narrowest middles, where curves are steepest. All values are
    chosen where `count` is None or too large.

    Example:
        >>> [17 - 2 * start for start in spread(range(9), 6)]    # widths M of 18 layers
        [17, 13, 9, 5, 3, 1]
    """
    if count is None or count >= len(values):
        return tuple(values)
    last = len(values) - 1
    places: list[int] = []  # counted from the narrow end
    for step in range(count):
        wanted = int(last * (step / max(count - 1, 1)) ** 1.5 + 0.5)
        places.append(max(wanted, places[-1] + 1) if places else wanted)
    return tuple(values[last - place] for place in reversed(places))


@dataclass(frozen=True, slots=True)
class _Plan:
    """The experiments of one study, by the names of their methods."""

    depth: int
    protocol: Protocol
    seeds: int
    starts: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", moves.starts(self.depth))

    def experiment(self, name: str) -> Iterator[tuple[Use, Schedule]]:
        if name in ("skip_one", "swap"):
            return self.single(name)
        return self.heat_map() if name == "heat_map" else self.sweep(name)

    def single(self, name: str) -> Iterator[tuple[Use, Schedule]]:
        """One layer after the other left out, or swapped with the next."""
        width = 1 if name == "skip_one" else 2
        build: Callable[[int, int], Schedule] = moves.skip_one if name == "skip_one" else moves.swap_adjacent
        step = self.protocol.swap_step if name == "swap" else 1
        for layer in range(0, self.depth + 1 - width, step):
            yield Use(name, None, width, layer), build(self.depth, layer)

    def sweep(self, name: str) -> Iterator[tuple[Use, Schedule]]:
        """A method over its start layers and its seeds, iterations or times."""
        method = moves.METHODS[name]
        parameters: Mapping[str, Sequence[int]] = {
            "seed": range(self.seeds),
            "iterations": (self.protocol.iterations,),
            "times": self.protocol.repeats,
        }
        wanted = self.protocol.repeat_starts if method.parameter == "times" else self.protocol.starts
        starts = spread(self.within, self.protocol.starts)
        if method.parameter == "times" and wanted is not None:
            # Where methods are compared: with a wider middle little is left of any model.
            starts = spread([start for start in starts if self.affected(start) in self.compared(starts)], wanted)
        for start in starts:
            width = self.affected(start)
            if not method.parameter:
                yield Use(name, start, width), method.build(self.depth, start)
                continue
            for value in parameters[method.parameter]:
                yield Use(name, start, width, value), method.build(self.depth, start, value)

    def heat_map(self) -> Iterator[tuple[Use, Schedule]]:
        heat = self.protocol.heat
        most = max(self.depth - LAST_UNLOOPED, 1)
        iterations = heat.iterations or range(1, most + 1)
        wide = [start for start in self.within if self.affected(start) >= heat.narrowest]
        for start in spread(wide, heat.widths):
            for k in iterations:
                if k <= most:
                    schedule = moves.looped_parallel(self.depth, start, k)
                    yield Use("looped_parallel", start, self.affected(start), k), schedule

    @property
    def within(self) -> Sequence[int]:
        """The start layers whose middles are narrow enough for the protocol; the narrowest always is."""
        most = self.protocol.widest * self.depth
        return [start for start in self.starts if self.affected(start) <= most] or self.starts[-1:]

    def affected(self, start: int) -> int:
        return moves.affected(self.depth, start)

    def compared(self, starts: Sequence[int]) -> tuple[int, ...]:
        return moderate(self.depth, map(self.affected, starts))
