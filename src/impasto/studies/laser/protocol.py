"""How much the LASER study measures: its protocols, the grid of single edits, and what is asked of a chosen one.

A *candidate* is one matrix of one layer cut to one rank. A *use* is what a recipe is reported for on the test part:
the untouched model, the chosen candidate, the same matrix cut harder or pruned, the candidate under other schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal, TypedDict, TypeVar

from impasto import moves
from impasto.edit import Edit, Rule
from impasto.errors import NotationError, UsageError
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.studies.protocol import spread

Value = TypeVar("Value")
Select = Literal["race", "full"]
Compose = Literal["greedy", "authors", "none"]
Role = Literal["base", "chosen", "by_loss", "composed", "kept", "pruned", "zero", "moved"]

SELECTS: tuple[Select, ...] = ("race", "full")
COMPOSES: tuple[Compose, ...] = ("greedy", "authors", "none")

RHOS = tuple(map(Decimal, ("0.9", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05", "0.01")))
"""The paper's shares of the full rank that are kept, with the 0.4 that its results have and its list lacks."""

TASKS = (
    "laser_counterfact",
    "laser_hotpotqa_likelihood",
    "laser_fever",
    "laser_bios_gender",
    "laser_bios_profession",
    "laser_truthfulqa",
    "laser_epistemic",
    "laser_wikidataqa_likelihood",
)
"""The paper's benchmarks in their cheap form: where answers are texts, how likely the right one is."""

ELSEWHERE = ("basic_skills_common_knowledge", "basic_skills_logical_reasoning", "winogrande")
"""What is asked by default where the data of the paper's benchmarks cannot be had: benchmarks that come with pip."""

EACH = 2  # candidates of one matrix that screening lets through, so that it does not choose one matrix at all ranks
TEST = 4  # documents of the test part for each one of the validation part, as in the paper


@dataclass(frozen=True, slots=True)
class Protocol:
    """How much a study measures.

    Args:
        name: "quick", "standard" or "paper".
        validation: documents of each task to choose on; four times as many are reported on. None is all.
        limits: other numbers for some tasks, in (task, documents) pairs.
        types: which matrices, as globs of their names inside a block; "mlp" and "attention" are those of the two
            halves, "all" is every matrix.
        layers: which layers, as in a schedule; empty is all.
        rhos: shares of the full rank that are kept; 0 takes the matrix away.
        screen: how many candidates a backward pass leaves to be measured; None is all of them.
        select: "race" drops candidates as soon as they are clearly worse, "full" measures all of them whole.
        compose: how several edits are put together.
        ladder: how many matrices composition tries, the most promising; None is all.
        rungs: how many ranks of each it tries; None is all.
        sweep: shares of the rank (and of the entries) at which the chosen matrix is cut (and pruned).
        schedules: names in `SCHEDULES` under which the chosen edit is tried.
        pass_on: right answers that the backward pass is made of.
        tail: test documents that are asked what the discarded components say; 0 asks none, None all.
        tasks: names of tasks.
    """

    name: str
    validation: int | None
    limits: tuple[tuple[str, int | None], ...] = ()
    types: tuple[str, ...] = ("mlp",)
    layers: str = ""
    rhos: tuple[Decimal, ...] = RHOS
    screen: int | None = None
    select: Select = "race"
    compose: Compose = "greedy"
    ladder: int | None = None
    rungs: int | None = None
    sweep: tuple[Decimal, ...] = RHOS
    schedules: tuple[str, ...] = ("skip", "swap", "pair", "middle")
    pass_on: int = 256
    tail: int | None = 400
    tasks: tuple[str, ...] = TASKS

    def validation_of(self, task: str) -> int | None:
        """How many documents of a task's validation part are asked; None is all of them."""
        return dict(self.limits).get(task, self.validation)


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "quick": Protocol(
            name="quick",
            validation=100,
            limits=(
                ("laser_fever", 64),
                ("laser_truthfulqa", 64),
                ("laser_epistemic", 32),
                ("basic_skills_common_knowledge", 32),
                ("basic_skills_logical_reasoning", 12),
                ("winogrande", 32),
            ),
            rhos=tuple(map(Decimal, ("0.6", "0.2", "0.05", "0.01"))),
            screen=20,
            ladder=3,
            rungs=2,
            sweep=tuple(map(Decimal, ("0.6", "0.2", "0.05", "0.01"))),
            schedules=("skip", "swap", "middle"),
            pass_on=32,
            tail=48,
            tasks=("laser_counterfact", "laser_fever", "laser_wikidataqa_likelihood"),
        ),
        "standard": Protocol(
            name="standard",
            validation=250,
            types=("all",),
            screen=64,
            ladder=12,
            rungs=3,
            tasks=(
                "laser_counterfact",
                "laser_fever",
                "laser_truthfulqa",
                "laser_epistemic",
                "laser_wikidataqa_likelihood",
            ),
        ),
        "paper": Protocol(name="paper", validation=None, select="full", tail=None),
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


class Changes(TypedDict, total=False):
    """What a user wants otherwise than a protocol has it; what is missing or None stays as it is there.

    Attributes:
        limit: documents of each validation part; four times as many are reported on.
        types: globs of the matrices' names inside a block, or "mlp", "attention", "all".
        layers: such as "9:18"; all where it is empty.
        rhos: shares of the full rank that are kept; numbers or their texts.
        select: "race" or "full".
        screen: how many candidates screening leaves; 0 is all.
        compose: "greedy", "authors" or "none".
    """

    limit: int | None
    types: Sequence[str] | None
    layers: str | None
    rhos: Sequence[str | float] | None
    select: str | None
    screen: int | None
    compose: str | None


def adapted(
    chosen: Protocol,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    types: Sequence[str] | None = None,
    layers: str | None = None,
    rhos: Sequence[str | float] | None = None,
    select: str | None = None,
    screen: int | None = None,
    compose: str | None = None,
) -> Protocol:
    """A protocol with what a user wants otherwise, see `Changes`; None keeps the protocol's own, also of the tasks.

    Raises:
        UsageError: a name that there is not, or a rho outside of 0 to 1.
    """
    if select is not None and select not in SELECTS:
        raise UsageError(_no("way to select", select, SELECTS))
    if compose is not None and compose not in COMPOSES:
        raise UsageError(_no("way to compose", compose, COMPOSES))
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    if screen is not None and screen < 0:
        raise UsageError(f"the number of candidates that screening leaves cannot be negative: {screen}")
    shares = None if rhos is None else tuple(sorted({share(rho) for rho in rhos}, reverse=True))
    return replace(
        chosen,
        validation=chosen.validation if limit is None else limit,
        limits=chosen.limits if limit is None else (),
        types=tuple(types) if types else chosen.types,
        layers=chosen.layers if layers is None else layers,
        rhos=shares or chosen.rhos,
        sweep=tuple(rho for rho in shares if 0 < rho < 1) if shares else chosen.sweep,
        screen=chosen.screen if screen is None else screen or None,
        select=select or chosen.select,
        compose=compose or chosen.compose,
        tasks=tuple(tasks) if tasks else chosen.tasks,
    )


def share(rho: str | float) -> Decimal:
    """A share of the full rank from what a user wrote.

    Raises:
        UsageError: it is no number from 0 to 1.
    """
    try:
        found = Decimal(str(rho).strip())
    except InvalidOperation:
        found = Decimal("NaN")
    if found.is_nan() or not 0 <= found <= 1:
        raise UsageError(f"rho {rho} is not a number from 0 to 1: it is the share of the full rank that is kept")
    Rule("keep", found) if found else None  # so that too many digits are refused here
    return found.normalize()


def layers_of(text: str, depth: int) -> tuple[int, ...]:
    """The layers that a text such as `9:18` or `-4:` names; an empty text is all of them.

    Raises:
        UsageError: it names none, or one that the model does not have.
    """
    if not text.strip():
        return tuple(range(depth))
    try:
        return Edit.parse(f"{text.strip()}.x@1", depth).layers
    except NotationError as problem:
        raise UsageError(f"layers {text.strip()!r}: {problem.problem} (numbers and slices as in 0,4:8,-1)") from None


# ── the grid ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of the model, or the experts of one stack, and how many components matter in it.

    Attributes:
        layer: the layer that it is in.
        name: what edits call it inside its block.
        half: "mlp" or "attention"; "" where the block could not be split.
        rows: one of its sides.
        columns: the other.
        effective: exp of the entropy of its singular values (Roy and Vetterli 2007); None where not computed.
    """

    layer: int
    name: str
    half: str
    rows: int
    columns: int
    effective: float | None = None

    @property
    def full(self) -> int:
        """Its full rank."""
        return min(self.rows, self.columns)


def candidates(matrices: Sequence[Matrix], rhos: Sequence[Decimal]) -> tuple[Edit, ...]:
    """Every matrix at every share of its rank; shares at which nothing is taken away are left out."""
    return tuple(edit(matrix.layer, matrix.name, rho) for matrix in matrices for rho in rhos if rho < 1)


def edit(layer: int, matrix: str, rho: Decimal) -> Edit:
    """One matrix cut to a share of its full rank; to nothing where the share is 0."""
    return Edit((layer,), matrix, Rule("keep", rho) if rho else Rule("zero"))


def rho_of(edit: Edit) -> float:
    """The share of the rank that a candidate keeps."""
    return float(edit.rule.value or 0)


def spaced(values: Sequence[Value], count: int | None) -> tuple[Value, ...]:
    """So many of the values, evenly spaced, with the first and the last; all where `count` is None or too large."""
    if count is None or count >= len(values):
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count))


def promising(changes: Mapping[Edit, float], count: int | None) -> tuple[Edit, ...]:
    """The candidates whose predicted change of the loss is lowest, at most `EACH` of one matrix while others are left.

    The prediction is a straight line, and a line is steepest where it is followed furthest: without the limit one
    matrix at all its ranks would take most places.
    """
    ordered = sorted(changes, key=lambda edit: (changes[edit], str(edit)))
    if count is None or count >= len(ordered):
        return tuple(ordered)
    taken: dict[tuple[int, str], int] = {}
    first: list[Edit] = []
    later: list[Edit] = []
    for one in ordered:
        place = (one.layers[0], one.matrix)
        taken[place] = taken.get(place, 0) + 1
        (first if taken[place] <= EACH else later).append(one)
    return tuple([*first, *later][:count])


# ── what is asked of a chosen edit ───────────────────────────────────────────────────────────────────────────

SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "skip": "a neighbour left out",
        "swap": "trading places with a neighbour",
        "pair": "in parallel with a neighbour",
        "middle": "the middle in parallel",
        "twice": "run twice",
    }
)
"""Schedules under which an edited layer is tried, with what figures call them."""

AS_IT_IS = "as it is"


def schedules(depth: int, layer: int, names: Sequence[str]) -> dict[str, Schedule]:
    """Schedules around an edited layer, by name; those that a model this shallow does not have are left out.

    The neighbour is the layer before, but for the first two layers the one behind: leaving out the first layer ruins
    any model.
    """
    found: dict[str, Schedule] = {}
    if depth < 3:
        return found
    near = layer - 1 if layer > 1 else layer + 1
    low, high = sorted((layer, near))
    texts = {"pair": f"{{{low} {high}}}", "twice": f"{layer}x2"}
    for name in names:
        if name == "skip":
            found[name] = moves.skip_one(depth, near)
        elif name == "swap":
            found[name] = moves.swap_adjacent(depth, low)
        elif name == "middle":
            found[name] = moves.parallel(depth, max(0, (depth - 4) // 2))
        else:
            first, last = (low, high) if name == "pair" else (layer, layer)
            around = [f"0:{first}" if first else "", texts[name], f"{last + 1}:{depth}" if last + 1 < depth else ""]
            found[name] = Schedule.parse(" ".join(part for part in around if part), depth)
    return found


@dataclass(frozen=True, slots=True)
class Use:
    """What a recipe is reported for.

    Attributes:
        role: see `Role`.
        parameter: the share that is kept ("kept", "pruned"), the name of a schedule ("moved"), or how many edits
            ("composed"); else empty.
        edited: whether it has the chosen edit ("moved").
    """

    role: Role
    parameter: str = ""
    edited: bool = True


@dataclass(frozen=True)
class Report:
    """What is measured on the test part of one task, once an edit is chosen.

    Attributes:
        depth: the model's number of layers.
        chosen: the edit with the best validation accuracy.
        by_loss: the one with the lowest validation loss; may be the same.
        composed: the edits of each accepted state of a composition, from the first.
        protocol: how much to report.
    """

    depth: int
    chosen: Edit
    by_loss: Edit | None
    composed: tuple[tuple[Edit, ...], ...]
    protocol: Protocol
    uses: Mapping[Use, Recipe] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses", dict(self._uses()))

    def _uses(self) -> Iterator[tuple[Use, Recipe]]:
        plain = Schedule.identity(self.depth)
        layer, matrix = self.chosen.layers[0], self.chosen.matrix
        yield Use("base", edited=False), Recipe("", plain)
        yield Use("chosen"), Recipe("", plain, (self.chosen,))
        if self.by_loss is not None:
            yield Use("by_loss"), Recipe("", plain, (self.by_loss,))
        for edits in self.composed:
            yield Use("composed", str(len(edits))), Recipe("", plain, edits)
        for rho in self.protocol.sweep:
            yield Use("kept", f"{rho:f}"), Recipe("", plain, (edit(layer, matrix, rho),))
            pruned = Edit((layer,), matrix, Rule("prune", 1 - rho))
            yield Use("pruned", f"{rho:f}"), Recipe("", plain, (pruned,))
        yield Use("zero"), Recipe("", plain, (edit(layer, matrix, Decimal(0)),))
        for name, schedule in schedules(self.depth, layer, self.protocol.schedules).items():
            yield Use("moved", name, edited=False), Recipe("", schedule)
            yield Use("moved", name), Recipe("", schedule, (self.chosen,))


def composed_of(states: Sequence[tuple[Edit, ...]], most: int = 6) -> tuple[tuple[Edit, ...], ...]:
    """The accepted states of a composition that are reported: all, or some of many, the last among them."""
    return tuple(states[i] for i in spread(range(len(states)), most))


def _no(what: str, name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"no {what} {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (there are {', '.join(names)})"
