"""What a painters study measured, as plain values, and which of it can be used for what.

A result counts only if it is whole: one with a score that is not finite is a gap, and one of another protocol than
the full model's is no result of this study. Both are named on the page, never averaged in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impasto import statistics
from impasto.result import Result
from impasto.statistics import Panel
from impasto.studies.protocol import FULL, Protocol, Use, Variant

Floats = NDArray[np.float64]

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "basic_skills_arithmetic": "Arithmetic",
        "basic_skills_logical_reasoning": "Logical reasoning",
        "basic_skills_string_operations": "String operations",
        "basic_skills_pattern": "Pattern",
        "basic_skills_coding": "Coding",
        "basic_skills_common_knowledge": "Common knowledge",
        "lambada_openai": "LAMBADA",
        "hellaswag": "HellaSwag",
        "winogrande": "WinoGrande",
        "piqa": "PIQA",
        "arc_easy": "ARC-Easy",
        "arc_challenge": "ARC-Challenge",
        "gsm8k": "GSM8K",
    }
)


@dataclass(frozen=True)
class Task:
    """What the study needs to know of a benchmark.

    Attributes:
        name: in the harness.
        title: in figures.
        chance: what guessing scores; None where guessing has no meaning, and then no score can be normalised.
        majority: what always choosing the most frequent right position scores; None likewise.
        order_sensitive: whether it is arithmetic or reasoning, which the paper found to need the order of the
            layers; None where nobody said.
        metric: primary metric, a key of `Result.scores`.
        higher_is_better: of that metric.
        n: examples.
    """

    name: str
    title: str
    chance: float | None
    majority: float | None
    order_sensitive: bool | None
    metric: str
    higher_is_better: bool
    n: int

    @classmethod
    def of(cls, result: Result) -> Task:
        """The task of a result, from what the result says about it."""
        info = result.info
        return cls(
            name=result.task,
            title=TITLES.get(result.task, result.task.replace("_", " ")),
            chance=info.get("chance"),
            majority=info.get("majority"),
            order_sensitive=info.get("order_sensitive"),
            metric=info.get("metric") or next(iter(result.metrics)),
            higher_is_better=bool(info.get("higher_is_better", True)),
            n=result.n,
        )


@dataclass(frozen=True)
class Cached:
    """Texts that one schedule wrote with an exact and with an averaged KV cache, prompt by prompt.

    The judge of both is the same schedule without any cache: every token from one pass over the whole text so far.

    Attributes:
        method: such as "parallel".
        start: start layer N.
        affected: layers in the group, M.
        task: where the prompts are from.
        exact: per prompt, whether the text with the exact cache is the text without a cache.
        mean: the same for the averaged cache.
        exact_first: per prompt, the first token (from 0) at which the text with the exact cache leaves the one
            without; None where it never does.
        mean_first: the same for the averaged cache.
        exact_right: per prompt, whether the answer is right under the exact cache; empty where nothing judges it.
        mean_right: the same for the averaged cache.
    """

    method: str
    start: int
    affected: int
    task: str
    exact: tuple[bool, ...]
    mean: tuple[bool, ...]
    exact_first: tuple[int | None, ...] = ()
    mean_first: tuple[int | None, ...] = ()
    exact_right: tuple[float, ...] = ()
    mean_right: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a curve: a method at one place, over all its seeds where it has any."""

    method: str
    start: int | None
    affected: int
    parameter: int | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that a page of the painters study is made from.

    Any part may be missing, as in a study that was interrupted: the page then says so.

    Attributes:
        depth: the model's number of layers T.
        protocol: how much was to be measured.
        variants: what was to be run, see `impasto.studies.protocol.variants`.
        tasks: the tasks, in the order of the figures.
        results: by (recipe fingerprint, task name).
        similarity: by "full", "skip" and "middle_repeat" (`state_schedules`), as `Similarity.to_json()` makes it.
        groups: by measure, the groups of the full model's states as plain data: `dataclasses.asdict` of
            `impasto.similarity.groups(full.matrix(measure))`.
        kv: texts under exact and averaged caches.
        facts: provenance; "model" also stands in the subtitle.
    """

    depth: int
    protocol: Protocol
    variants: tuple[Variant, ...]
    tasks: tuple[Task, ...]
    results: Mapping[tuple[str, str], Result]
    similarity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kv: tuple[Cached, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def full(self) -> Variant:
        """The untouched model."""
        return next(variant for variant in self.variants if any(use.method == FULL for use in variant.uses))

    @cached_property
    def cells(self) -> Mapping[Cell, tuple[Variant, ...]]:
        """Every point of a curve with its variants: one, or one per seed; in the order of the variants' uses."""
        found: dict[Cell, list[tuple[Use, Variant]]] = {}
        for variant in self.variants:
            for use in variant.uses:
                seeded = use.method == "random_order"
                cell = Cell(use.method, use.start, use.affected, None if seeded else use.parameter)
                found.setdefault(cell, []).append((use, variant))
        return {
            cell: tuple(variant for _, variant in sorted(pairs, key=lambda pair: pair[0].parameter or 0))
            for cell, pairs in found.items()
        }

    def result(self, variant: Variant, task: Task) -> Result | None:
        """What was measured, if it was asked the same as the full model."""
        mine = self.results.get((variant.recipe, task.name))
        full = self.results.get((self.full.recipe, task.name))
        return mine if mine is not None and full is not None and mine.protocol == full.protocol else None

    def scores(self, variant: Variant, task: Task) -> Floats | None:
        """Scores per example in the primary metric; None where there are none or one of them is not finite."""
        return self._scores.get((variant.recipe, task.name))

    @cached_property
    def _scores(self) -> Mapping[tuple[str, str], Floats]:
        found = {}
        for task in self.tasks:
            for variant in self.variants:
                result = self.result(variant, task)
                scores = np.asarray((result and result.scores.get(task.metric)) or (), np.float64)  # None becomes NaN
                if result is not None and not result.nonfinite and len(scores) and np.isfinite(scores).all():
                    found[variant.recipe, task.name] = scores
        return found

    def metric(self, variant: Variant, task: Task) -> float | None:
        """The primary metric itself; None where it is not finite or was not measured."""
        if self.scores(variant, task) is None:
            return None
        result = self.result(variant, task)
        return result.metrics.get(task.metric) if result is not None else None

    @cached_property
    def usable(self) -> tuple[Task, ...]:
        """Tasks on which the full model is clearly above guessing, so that scores can be normalised."""
        return tuple(task for task in self.tasks if self._above(task))

    def _above(self, task: Task) -> bool:
        scores = self.scores(self.full, task)
        if scores is None or task.chance is None or not task.higher_is_better:
            return False
        return statistics.clearly_above(scores, task.chance)

    @cached_property
    def complete(self) -> tuple[Task, ...]:
        """Usable tasks with a result of every variant; all usable ones where none is complete."""
        whole = tuple(task for task in self.usable if not self.missing(task))
        return whole or self.usable

    def missing(self, task: Task) -> tuple[Variant, ...]:
        """Variants that have not been measured on a task."""
        return tuple(variant for variant in self.variants if self.result(variant, task) is None)

    def broken(self, task: Task) -> tuple[Variant, ...]:
        """Variants that were measured on a task and have a score that is not finite."""
        return tuple(
            variant
            for variant in self.variants
            if self.result(variant, task) is not None and self.scores(variant, task) is None
        )

    def panel(self, task: Task, cells: Iterable[Cell]) -> Panel:
        """The scores of cells beside the full model's.

        Raises:
            ValueError: a cell is a gap in this task; ask `whole` first.
        """
        full = self.scores(self.full, task)
        if full is None:
            raise ValueError(f"the full model has not been measured on {task.name}")
        rows = []
        for cell in cells:
            scores = [self.scores(variant, task) for variant in self.cells[cell]]
            rows.append([row for row in scores if row is not None])
            if len(rows[-1]) < len(scores):
                raise ValueError(f"{cell} has not been measured on {task.name}")
        return Panel(full=full, recipes=rows, chance=task.chance or 0.0)

    def whole(self, cell: Cell, tasks: Sequence[Task]) -> bool:
        """Whether a cell, with all its seeds, has finite scores on all these tasks."""
        variants = self.cells.get(cell, ())
        return bool(variants) and all(self.scores(one, task) is not None for one in variants for task in tasks)
