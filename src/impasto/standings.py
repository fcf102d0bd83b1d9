"""How a race went, as values: who was dropped, when and why, what it took, and what may be concluded.

Nothing here imports torch, so a race can be read and printed anywhere. `impasto.race` runs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from impasto.elimination import Reason, Rules
from impasto.recipe import Recipe
from impasto.records import to_json


@dataclass(frozen=True, slots=True)
class Effort:
    """What answering takes, whether or not the answers were in a store already.

    Attributes:
        answers: pairs of a recipe and a request.
        layer_tokens: layer calls times tokens, shared as they are run; text generation is not counted in it.
    """

    answers: int = 0
    layer_tokens: int = 0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.answers + other.answers, self.layer_tokens + other.layer_tokens)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A recipe that was not dropped, and its mean score over all documents of the race (larger is better)."""

    recipe: Recipe
    score: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """A recipe that left the race; see `impasto.elimination.Drop` for the interval.

    Attributes:
        recipe: who.
        round: after which round, from 1.
        documents: how many it had answered.
        reason: "worse" (clearly), "halved" (in the worse half, without an error rate) or "not finite".
        against: the recipe at the last place worth keeping, to which it lost; None if its scores were not finite.
        difference: its mean score minus that of `against`.
        low: lower end of the interval of the difference.
        high: upper end.
    """

    recipe: Recipe
    round: int
    documents: int
    reason: Reason
    against: Recipe | None
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a race.

    Attributes:
        documents: asked up to its end.
        recipes: that were asked.
        dropped: after it.
        effort: of this round.
    """

    documents: int
    recipes: int
    dropped: int
    effort: Effort


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        rules: how it was run.
        seed: of the order of the documents.
        documents: that could have been asked.
        survivors: best first; more than `rules.keep` if the documents did not tell them apart.
        dropped: all others, in the order in which they left.
        rounds: those that were run.
        whole: the effort of asking every recipe everything.
        level: of the test of one pair in one round.
    """

    rules: Rules
    seed: int
    documents: int
    survivors: tuple[Survivor, ...]
    dropped: tuple[Dropped, ...]
    rounds: tuple[Round, ...]
    whole: Effort
    level: float

    @property
    def best(self) -> tuple[Survivor, ...]:
        """The first `keep` survivors; among more survivors than that, chosen by their means alone."""
        return self.survivors[: self.rules.keep]

    @property
    def effort(self) -> Effort:
        """What the race took."""
        return sum((round.effort for round in self.rounds), Effort())

    @property
    def share(self) -> float:
        """The effort as a share of measuring all: of layer calls times tokens, or of answers for generated text."""
        if self.whole.layer_tokens:
            return self.effort.layer_tokens / self.whole.layer_tokens
        return self.effort.answers / self.whole.answers

    @property
    def error(self) -> float | None:
        """The most that the probability of having lost one of the best can be; None if recipes were just halved."""
        return None if any(drop.reason == "halved" for drop in self.dropped) else self.rules.error

    def text(self) -> str:
        """The race as plain lines: rounds, survivors, who was dropped when and why, cost, what may be concluded."""
        asked = self.rounds[-1].documents
        lines = [
            f"race for the best {self.rules.keep} of {len(self.survivors) + len(self.dropped)} recipes: "
            f"{asked} of {self.documents} documents asked, seed {self.seed}",
            "",
            *_table(
                ["round", "documents", "recipes", "dropped"],
                [[i, one.documents, one.recipes, one.dropped] for i, one in enumerate(self.rounds, 1)],
            ),
            "",
            *_table(
                ["kept", "score", "recipe"], [[i, f"{s.score:.4f}", s.recipe] for i, s in enumerate(self.survivors, 1)]
            ),
        ]
        if self.dropped:
            lines += ["", *_table(["dropped in", "after", "reason", "difference", "recipe", "lost to"], self._drops())]
        return "\n".join([*lines, "", *self._conclusions()])

    def to_json(self) -> str:
        """The race as JSON text; numbers that are not finite as the store writes them."""
        effort = self.effort
        return to_json(
            {
                "schema_version": 1,
                "keep": self.rules.keep,
                "error": self.error,
                "level": self.level,
                "rules": {
                    "error": self.rules.error,
                    "first": self.rules.first,
                    "growth": self.rules.growth,
                    "reach": self.rules.reach,
                    "halve": self.rules.halve,
                },
                "seed": self.seed,
                "documents": self.documents,
                "survivors": [{"recipe": _named(s.recipe), "score": s.score} for s in self.survivors],
                "dropped": [
                    {
                        "recipe": _named(drop.recipe),
                        "round": drop.round,
                        "documents": drop.documents,
                        "reason": drop.reason,
                        "against": drop.against.fingerprint if drop.against else None,
                        "difference": drop.difference,
                        "low": drop.low,
                        "high": drop.high,
                    }
                    for drop in self.dropped
                ],
                "rounds": [
                    {
                        "documents": one.documents,
                        "recipes": one.recipes,
                        "dropped": one.dropped,
                        "answers": one.effort.answers,
                        "layer_tokens": one.effort.layer_tokens,
                    }
                    for one in self.rounds
                ],
                "answers": effort.answers,
                "layer_tokens": effort.layer_tokens,
                "answers_of_all": self.whole.answers,
                "layer_tokens_of_all": self.whole.layer_tokens,
            }
        )

    def _drops(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for drop in self.dropped:
            change = "" if drop.difference is None else f"{drop.difference:+.4f} [{drop.low:+.4f}, {drop.high:+.4f}]"
            when = f"round {drop.round}"
            rows.append([when, drop.documents, drop.reason, change, drop.recipe, drop.against or ""])
        return rows

    def _conclusions(self) -> list[str]:
        effort, whole = self.effort, self.whole
        lines = [f"work: {self.share:.1%} of measuring all ({effort.answers} of {whole.answers} answers)"]
        keep = self.rules.keep
        if self.error is None:
            count = sum(drop.reason == "halved" for drop in self.dropped)
            lines.append(f"{count} recipes were dropped by halving, sure or not: this choice has no error rate")
        else:
            lines.append(f"the probability that one of the truly best {keep} was dropped is at most {self.error:g}")
        if len(self.survivors) > keep:
            lines.append(f"{len(self.survivors)} recipes are left: the documents do not tell the best {keep} apart")
        elif len(self.survivors) < keep:
            lines.append(f"only {len(self.survivors)} recipes have finite scores")
        lines.append("these scores chose the recipes and flatter them: measure the winners on other documents")
        return lines


def _named(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.to_dict(), "fingerprint": recipe.fingerprint}


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their widest entry; numbers to the right, texts to the left."""
    texts = [list(head), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    right = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if side else cell.ljust(width)
            for cell, width, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in texts
    ]
