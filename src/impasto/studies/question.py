"""A question of a study, apart from any model, and how an answer is put together."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from impasto.result import Answer
from impasto.studies.reading import Found

Evidence = TypeVar("Evidence")


@dataclass(frozen=True, slots=True)
class Question(Generic[Evidence]):
    """One question, apart from any model.

    Attributes:
        key: short name.
        text: the question.
        find: what the evidence says to it; None where it was not measured.
        needs: what is lacking then.
        unit: of the estimate.
        rule: how the verdict follows.
        figure: key of the figure that shows it.
        arises: whether the study is one that the question is about.
    """

    key: str
    text: str
    find: Callable[[Evidence], Found | None]
    needs: str
    unit: str
    rule: str
    figure: str
    arises: Callable[[Evidence], bool] = lambda _: True

    def answer(self, evidence: Evidence, paper: str, shown: Collection[str]) -> Answer:
        """The answer for a model.

        Args:
            evidence: what was measured; what was not is unclear, and the answer says what it needs.
            paper: what the paper found.
            shown: keys of the figures that the page has.
        """
        found = self.find(evidence)
        return Answer(
            key=self.key,
            question=self.text,
            verdict=found.verdict if found else "unclear",
            effect=found.effect if found else f"Not measured: this needs {self.needs}.",
            estimate=found.estimate if found else None,
            unit=self.unit,
            paper=paper,
            rule=self.rule,
            figure=self.figure if self.figure in shown else None,
        )
