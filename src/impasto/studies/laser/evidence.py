"""What a LASER study measured, as plain values, and the paired differences that its answers are read from.

Everything that chooses (screening, racing, composition) is of the validation part, and everything that is reported is
of the test part. `Trial` keeps the two apart: `points` are means on the first, `sheets` are single documents of the
second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from impasto import statistics
from impasto.edit import Edit
from impasto.result import Estimate
from impasto.studies.evidence import TITLES
from impasto.studies.laser.protocol import Matrix, Protocol, Report, Use

Floats = NDArray[np.float64]
Measure = Literal["score", "loss", "balanced"]

RESAMPLES = 4000
MANY = 4000
Z = 1.959963984540054  # the normal distribution's 97.5 %

BASE, CHOSEN = Use("base", edited=False), Use("chosen")

BENCHMARKS: Mapping[str, str] = MappingProxyType(
    {
        "counterfact": "CounterFact",
        "hotpotqa": "HotPotQA",
        "fever": "FEVER",
        "bios_gender": "Bios Gender",
        "bios_profession": "Bios Profession",
        "truthfulqa": "TruthfulQA",
        "epistemic": "Epistemic Reasoning",
        "wikidataqa": "WikidataQA",
    }
)
"""The paper's benchmarks, with its names for them."""


def benchmark_of(task: str) -> str:
    """Which of the paper's benchmarks a task is a form of; empty for others."""
    if not task.startswith("laser_"):
        return ""
    return next((name for name in BENCHMARKS if task.removeprefix("laser_").startswith(name)), "")


def title_of(task: str) -> str:
    """What figures call a task."""
    return BENCHMARKS.get(benchmark_of(task)) or TITLES.get(task) or task.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Point:
    """What a recipe gets on a validation part.

    Attributes:
        accuracy: mean of the task's first metric, its sign turned where less is better.
        loss: mean over documents of the right answer's negative log-likelihood per token; None where unknown.
        balanced: mean accuracy over the classes; None where there are none.
        commonest: share of the class that is predicted most; None likewise.
    """

    accuracy: float
    loss: float | None = None
    balanced: float | None = None
    commonest: float | None = None


@dataclass(frozen=True)
class Sheet:
    """What a recipe answered on a test part, document by document; a field is empty where it is unknown.

    Attributes:
        scores: the task's first metric, its sign turned where less is better.
        loss: negative log-likelihood of the right answer per token, in nats.
        predicted: number of the likeliest choice.
        rank: how many tokens are likelier than the right answer's first, 10 for as many or more.
    """

    scores: tuple[float | None, ...]
    loss: tuple[float | None, ...] = ()
    predicted: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One place of a composition: what was tried there and what came of it, all on the validation part.

    Attributes:
        layer: of the matrix.
        matrix: its name.
        edit: the best of those that were tried; None if none was.
        tried: how many.
        before: accuracy of the state before.
        after: accuracy with `edit`.
        accepted: whether the state now has it.
    """

    layer: int
    matrix: str
    edit: Edit | None
    tried: int
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True, slots=True)
class Mentions:
    """How often the fact of each test document stands in a corpus.

    Attributes:
        name: how mentions were matched, or what the count is called.
        corpus: what was counted in, in words; may be empty.
        counts: documents of the corpus with subject and answer; None where a fact was not counted.
    """

    name: str
    corpus: str
    counts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Tail:
    """What a model says with only the smallest components of one matrix, question by question.

    Attributes:
        share: the share of the components that is kept; 1 is the model itself.
        said: the likeliest next token as text; empty where the output was not finite.
        right: whether it is the right answer's first token.
        likeness: cosine of the embeddings of the two; None where there is no token.
    """

    share: float
    said: tuple[str, ...]
    right: tuple[bool, ...]
    likeness: tuple[float | None, ...]


@dataclass(frozen=True)
class Spoken:
    """What the components of the chosen matrix say when the largest are gone.

    Attributes:
        layer: of the matrix.
        matrix: its name.
        corrected: how many of the questions the chosen edit corrects; they come first.
        golds: first token of each right answer, as text.
        relations: what each question asks for; empty texts where that is not known.
        units: what each question is about, as numbers.
        tails: from the smallest share to the largest.
    """

    layer: int
    matrix: str
    corrected: int
    golds: tuple[str, ...]
    relations: tuple[str, ...]
    units: tuple[int, ...]
    tails: tuple[Tail, ...]


@dataclass(frozen=True)
class Text:
    """A plain text that was read.

    Attributes:
        name: of its file.
        tokens: that were scored.
        reads: by recipe fingerprint the losses of its windows, whose mean is the loss in nats per token.
    """

    name: str
    tokens: int
    reads: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Trial:
    """Everything about one task.

    Attributes:
        name: of the task in the harness.
        metric: its first metric.
        chance: what guessing gets on the test part; None where it has no meaning.
        majority: what always giving the most frequent right answer gets there; None likewise.
        labels: names of the classes, where every document has the same choices.
        golds: number of the right choice of each test document; empty for tasks without choices.
        groups: number of each test document's right answer among all right answers; empty where right answers are
            places in a list of choices that differ from document to document, which mean nothing.
        commonest: the right answer that most documents have; empty likewise.
        units: what each test document is about, as numbers: documents about one thing are one unit of the intervals.
        validation: documents of the validation part.
        test: documents of the test part.
        grid: how many candidates there were before screening.
        screened: predicted change of the loss by candidate; empty where nothing was screened.
        raced: what a race was told and how it went; None where all candidates were measured whole.
        points: what candidates that were measured whole get on the validation part.
        base: what the untouched model gets there; None where not measured yet.
        chosen: the candidate with the best validation accuracy; None where not chosen yet.
        by_loss: the one with the lowest validation loss, if that is another.
        selected: what the chosen candidate gained on the documents that chose it.
        trace: the composition's steps.
        report: what is measured on the test part; None where nothing is chosen yet.
        sheets: by recipe fingerprint, on the test part.
        mentions: how often its facts stand in a corpus, one for each count.
        spoken: what the chosen matrix's smallest components say; None where that was not asked.
    """

    name: str
    metric: str
    chance: float | None
    majority: float | None
    labels: tuple[str, ...]
    golds: tuple[int, ...]
    groups: tuple[int, ...]
    commonest: str
    units: tuple[int, ...]
    validation: int
    test: int
    grid: int
    screened: Mapping[Edit, float] = field(default_factory=dict)
    raced: Mapping[str, Any] | None = None
    points: Mapping[Edit, Point] = field(default_factory=dict)
    base: Point | None = None
    chosen: Edit | None = None
    by_loss: Edit | None = None
    selected: Estimate | None = None
    trace: tuple[Step, ...] = ()
    report: Report | None = None
    sheets: Mapping[str, Sheet] = field(default_factory=dict)
    mentions: tuple[Mentions, ...] = ()
    spoken: Spoken | None = None

    @property
    def title(self) -> str:
        """What figures call it."""
        return title_of(self.name)

    @property
    def classes(self) -> int:
        """How many classes the right answers have, where a constant answer has a meaning; else 0."""
        return len(set(self.golds)) if self.labels else 0

    def sheet(self, use: Use) -> Sheet | None:
        """What was measured for a use."""
        recipe = self.report.uses.get(use) if self.report is not None else None
        return None if recipe is None else self.sheets.get(recipe.fingerprint)

    def values(self, use: Use, measure: Measure = "score") -> Floats | None:
        """A measure document by document, NaN where a document has none; None where it was not measured.

        Of "balanced" the mean is the balanced accuracy: a right answer weighs the more the rarer it is. Of tasks
        without classes that is the mean over all different right answers of the share of their documents.
        """
        sheet = self.sheet(use)
        if sheet is None:
            return None
        if measure == "balanced":
            return self._balanced(sheet)
        found = sheet.scores if measure == "score" else sheet.loss
        return np.asarray(found, np.float64) if found else None

    def _balanced(self, sheet: Sheet) -> Floats | None:
        if len(set(self.groups)) < 2:
            return None
        right = np.asarray(sheet.scores, np.float64)
        if self.classes and sheet.predicted:
            right = np.asarray(sheet.predicted) == np.asarray(self.golds)
        return balanced(right, self.groups) if np.isin(right, (0.0, 1.0)).all() else None

    def mean(self, use: Use, measure: Measure = "score") -> float | None:
        """The mean of a measure; None where it was not measured or is not finite."""
        values = self.values(use, measure)
        return None if values is None or not np.isfinite(values).all() else float(values.mean())

    def level(self, use: Use, measure: Measure = "score") -> Estimate | None:
        """The mean of a measure with its interval."""
        values = self.values(use, measure)
        if values is None or not np.isfinite(values).all():
            return None
        return statistics.interval(grouped(values, self.units))

    def difference(self, use: Use, other: Use = BASE, measure: Measure = "score") -> Estimate | None:
        """By how much a use is above another one, document by document, with its interval."""
        key = (use, other, measure)
        if key not in self._differences:
            first, second = self.values(use, measure), self.values(other, measure)
            self._differences[key] = None if first is None or second is None else self.contrast(first - second)
        return self._differences[key]

    @cached_property
    def _differences(self) -> dict[tuple[Use, Use, Measure], Estimate | None]:
        """Differences that were asked for: questions, figures and tables share them."""
        return {}

    def contrast(self, differences: Floats) -> Estimate | None:
        """The mean of differences of test documents with its interval; None if one is missing."""
        return contrast(differences, self.units)

    def predictions(self, use: Use) -> tuple[float, ...]:
        """The share of each class among the likeliest choices; empty without classes."""
        sheet = self.sheet(use)
        if sheet is None or not sheet.predicted or not self.labels:
            return ()
        counts = Counter(sheet.predicted)
        return tuple(counts[i] / len(sheet.predicted) for i in range(len(self.labels)))

    def among(self, use: Use, k: int) -> Floats | None:
        """Document by document, whether the right answer's first token is among the k likeliest; None where unknown."""
        sheet = self.sheet(use)
        return None if sheet is None or not sheet.rank else np.asarray(np.asarray(sheet.rank) < k, np.float64)

    def top(self, use: Use, k: int) -> float | None:
        """The share of documents whose right answer is among the k likeliest first tokens."""
        found = self.among(use, k)
        return None if found is None else float(found.mean())


@dataclass(frozen=True)
class Evidence:
    """Everything that a page of the LASER study is made from; any part may be missing.

    Attributes:
        depth: the model's number of layers.
        protocol: how much was to be measured.
        matrices: those of the grid.
        trials: one for each task, in the order of the figures.
        facts: provenance; "model" also stands in the subtitle.
        texts: plain texts that were read.
        masked: whether the model predicts masked tokens, and so has no perplexity.
    """

    depth: int
    protocol: Protocol
    matrices: tuple[Matrix, ...]
    trials: tuple[Trial, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[Text, ...] = ()
    masked: bool = False

    @cached_property
    def reported(self) -> tuple[Trial, ...]:
        """Tasks on which both the untouched model and the chosen edit were measured on the test part."""
        return tuple(trial for trial in self.trials if trial.difference(CHOSEN) is not None)

    @cached_property
    def halves(self) -> Mapping[tuple[int, str], str]:
        """By layer and name, which half of the block a matrix is in."""
        return {(one.layer, one.name): one.half for one in self.matrices}


def balanced(right: ArrayLike, groups: Sequence[int]) -> Floats:
    """Right (1) and wrong (0) answers, weighed so that their mean is the mean over the groups of the share of right.

    Example:
        >>> balanced([1, 1, 1, 0], [0, 0, 0, 1]).mean().item()
        0.5
    """
    sizes = Counter(groups)
    weights = np.array([len(groups) / (len(sizes) * sizes[group]) for group in groups], np.float64)
    return np.asarray(np.asarray(right, np.float64) * weights, np.float64)


def grouped(values: Floats, units: Sequence[int]) -> Floats:
    """One number for each unit, with the same mean: sums over its documents, on the scale of one document.

    Example:
        >>> grouped(np.array([1.0, 1.0, 0.0, 1.0]), (0, 0, 1, 1)).tolist()
        [1.0, 0.5]
    """
    if len(set(units)) == len(values) or not len(units):
        return values
    _, place = np.unique(np.asarray(units), return_inverse=True)
    sums = np.bincount(place.reshape(-1), weights=values)
    return np.asarray(sums * (len(sums) / len(values)), np.float64)


def contrast(differences: Floats, units: Sequence[int]) -> Estimate | None:
    """The mean of differences of documents with its interval over what they are about; None if one is missing.

    Where no document differs at all, the interval is that of no event in so many trials: 3 / n on either side. Of
    more than `MANY` units the mean is normal, and nothing is resampled.
    """
    if not len(differences) or not np.isfinite(differences).all():
        return None
    if not differences.any():
        return Estimate(0.0, -3 / len(differences), 3 / len(differences))
    found = grouped(differences, units)
    if len(found) <= MANY:
        return statistics.over_seeds(found, n=RESAMPLES)
    value, reach = float(found.mean()), Z * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Estimate(value, value - reach, value + reach)


def pooled(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean of independent estimates, with an interval from theirs (Zou and Donner 2008, doi 10.1002/sim.3095).

    The distances to the ends add up as squares, each side by itself, which is right for intervals that are lopsided.
    None without estimates; without an interval where one of them has none.
    """
    if not estimates:
        return None
    n = len(estimates)
    value = sum(one.value for one in estimates) / n
    lows = [one.value - one.low for one in estimates if one.low is not None]
    highs = [one.high - one.value for one in estimates if one.high is not None]
    if len(lows) < n or len(highs) < n:
        return Estimate(value)
    return Estimate(value, value - math.hypot(*lows) / n, value + math.hypot(*highs) / n)
