"""Which layers run, in what order: in series, in parallel, in loops, in halves.

A `Schedule` is an immutable value. Two spellings of one computation are equal, print alike and share one
fingerprint. The text form is described in `docs/notation.md` and read by `impasto.notation`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from impasto import notation
from impasto.errors import UsageError
from impasto.steps import (
    MAX_CALLS,
    Call,
    Group,
    Half,
    Merge,
    Step,
    calls,
    canonical,
    count,
    depth,
    leaves,
    side_by_side,
)

__all__ = ["Call", "Group", "Half", "Merge", "Schedule", "Step", "calls", "side_by_side"]


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """A series of layer calls and parallel groups, to be run instead of the model's own order.

    Example:
        ```python
        short = Schedule.parse("0:8 12:28")
        str(short), short.calls, short.depth       # ('0:8 12:28', 24, 24)
        Schedule.parse("{8:12}x2").steps           # two equal Groups of four branches
        Schedule.parse("0 1 2 3") == Schedule.parse("0:4")
        ```

    Args:
        steps: the calls and groups in series, at least one call.

    Attributes:
        fingerprint: sixteen hexadecimal digits that name the computation, the same in every process.
    """

    steps: tuple[Step, ...]
    fingerprint: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        steps = tuple(self.steps)
        if not steps:
            raise UsageError("a schedule holds at least one layer call")
        if (total := count(steps)) > MAX_CALLS:
            raise UsageError(f"a schedule holds at most {MAX_CALLS:,} layer calls, not {total:,}")
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "fingerprint", _digest(steps))

    @classmethod
    def parse(cls, text: str, layers: int | None = None) -> Schedule:
        """Read the text form.

        Args:
            text: such as `"0:8 {8:12} 12:28"`; see `docs/notation.md`.
            layers: the model's depth. Needed for negative indices and open slices, and then every layer is
                checked to exist.

        Raises:
            NotationError: the text is no schedule, or not one of a model this deep.
        """
        return cls(notation.read(text, layers))

    @classmethod
    def identity(cls, layers: int) -> Schedule:
        """The untouched order of a model with so many layers."""
        return cls(calls(range(layers)))

    @classmethod
    def fitting(cls, schedule: Schedule | str, layers: int) -> Schedule:
        """A schedule, given as it is or as its text, that a model with so many layers can run.

        Raises:
            NotationError: the text is no schedule, or a layer does not exist.
        """
        if isinstance(schedule, str):
            return cls.parse(schedule, layers=layers)
        schedule.check(layers)
        return schedule

    @property
    def layers_used(self) -> frozenset[int]:
        """The layers that are called at least once, whole or in part."""
        return frozenset(call.layer for call in leaves(self.steps))

    @property
    def calls(self) -> int:
        """How many layer calls one forward pass makes; a half counts as a call."""
        return count(self.steps)

    @property
    def halves(self) -> int:
        """How many of the calls run only one half of their layer."""
        return sum(call.half != "whole" for call in leaves(self.steps))

    @property
    def depth(self) -> int:
        """Calls on the longest path: what would take time if parallel branches cost none."""
        return depth(self.steps)

    @property
    def is_series(self) -> bool:
        """Whether the schedule is a plain series of whole layers: no groups, no halves."""
        return all(isinstance(step, Call) and step.half == "whole" for step in self.steps)

    def check(self, layers: int) -> None:
        """Make sure that a model with so many layers can run the schedule.

        Raises:
            NotationError: a layer does not exist; points at it in the text form.
        """
        if max(self.layers_used) >= layers:
            notation.read(str(self), layers)

    def describe(self, layers: int) -> str:
        """One line for people: `0:8 12:28 (24 of 28 layers, 24 layer calls, depth 24)`."""
        self.check(layers)
        halves = f" ({self.halves} of them halves)" if self.halves else ""
        noun = "call" if self.calls == 1 else "calls"
        return (
            f"{self} ({len(self.layers_used)} of {layers} layers, "
            f"{self.calls} layer {noun}{halves}, depth {self.depth})"
        )

    def __str__(self) -> str:
        return notation.write(self.steps)

    def __repr__(self) -> str:
        return f"Schedule({str(self)!r})"

    def __hash__(self) -> int:
        return int(self.fingerprint, 16)


def _digest(steps: tuple[Step, ...]) -> str:
    return hashlib.sha256(f"schedule 1\n{canonical(steps)}".encode()).hexdigest()[:16]
