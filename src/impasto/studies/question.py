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
        scores: whether it is about scores, so that it has no answer where none can be compared.
    """

    key: str
    text: str
    find: Callable[[Evidence], Found | None]
    needs: str
    unit: str
    rule: str
    figure: str
    arises: Callable[[Evidence], bool] = lambda _: True
    scores: bool = True

    def answer(self, evidence: Evidence, paper: str, shown: Collection[str], *, incomparable: str = "") -> Answer:
        """The answer for a model.

        Args:
            evidence: what was measured; what was not is unclear, and the answer says what it needs.
            paper: what the paper found.
            shown: keys of the figures that the page has.
            incomparable: why the scores that were measured say nothing; empty where they do.
        """
        found = self.find(evidence)
        lacking = incomparable if self.scores and incomparable else f"Not measured: this needs {self.needs}."
        return Answer(
            key=self.key,
            question=self.text,
            verdict=found.verdict if found else "unclear",
            effect=found.effect if found else lacking,
            estimate=found.estimate if found else None,
            unit=self.unit,
            paper=paper,
            rule=self.rule,
            figure=self.figure if self.figure in shown else None,
        )
