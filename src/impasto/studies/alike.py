"""Where models agree and where they differ: the answers of a comparison, computed from its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import stats

from impasto.result import Answer, Estimate, Verdict
from impasto.statistics import LEVEL, verdict
from impasto.studies.protocol import METHODS
from impasto.studies.question import Question
from impasto.studies.reading import Found, Reading, listed, with_interval
from impasto.studies.sides import Number, Side, mean_scores, on_one_grid
from impasto.studies.table import Floats

ALIKE = 0.1
"""Mean normalised scores of two models that are no further apart than this are called alike."""


@dataclass(frozen=True)
class Compared:
    """One question of the study and what every run that measured it says."""

    question: Question[Reading]
    found: Mapping[str, Found]

    @classmethod
    def of(cls, question: Question[Reading], sides: Sequence[Side]) -> Compared:
        """The question put to every run."""
        found = {side.name: question.find(side.reading) for side in sides}
        return cls(question, {name: answer for name, answer in found.items() if answer is not None})

    @property
    def label(self) -> str:
        """A short name for figures and lists."""
        return self.question.key.replace("-", " ")

    @property
    def verdicts(self) -> set[Verdict]:
        """The different answers that were given."""
        return {found.verdict for found in self.found.values()}

    @property
    def together(self) -> str:
        """Whether all models give the "same" clear answer, two of them "opposite" ones, or some none ("open")."""
        if {"yes", "no"} <= self.verdicts:
            return "opposite"
        return "open" if "unclear" in self.verdicts else "same"

    @cached_property
    def gap(self) -> tuple[str, str, Estimate] | None:
        """The two models whose effects are furthest apart, and their difference; None without two effects."""
        sizes = {name: found.estimate for name, found in self.found.items() if found.estimate is not None}
        pairs = list(combinations(sizes, 2))
        gaps = [(a, b, difference(sizes[a], sizes[b], len(pairs))) for a, b in pairs]
        return max(gaps, key=lambda gap: abs(gap[2].value), default=None)

    @property
    def more(self) -> tuple[str, str, Estimate] | None:
        """The model with the clearly larger effect, the one with the smaller, and by how much; None if not clear."""
        if self.gap is None or verdict(self.gap[2]) == "unclear":
            return None
        first, second, gap = self.gap
        return self.gap if gap.value > 0 else (second, first, difference(Estimate(0.0, 0.0, 0.0), gap))


def difference(a: Estimate, b: Estimate, comparisons: int = 1) -> Estimate:
    """The difference of two independent estimates, with an interval made from theirs.

    Each side's distance from value to end stands in for its standard error, so intervals need not be symmetric
    (Zou and Donner, Statistics in Medicine 2008). The intervals of so many comparisons hold for all at once.

    Example:
        >>> print(difference(Estimate(0.5, 0.2, 0.8), Estimate(0.1, -0.3, 0.5)))
        0.400 [-0.100, 0.900]
    """
    tail = (1 - LEVEL) / 2
    wider = float(stats.norm.ppf(1 - tail / comparisons) / stats.norm.ppf(1 - tail))
    value = a.value - b.value
    down = None if a.low is None or b.high is None else wider * float(np.hypot(a.value - a.low, b.high - b.value))
    up = None if a.high is None or b.low is None else wider * float(np.hypot(a.high - a.value, b.value - b.low))
    return Estimate(value, None if down is None else value - down, None if up is None else value + up)


# ── the answers ────────────────────────────────────────────────────────────────────────────────────────────────


def answers(sides: Sequence[Side], asked: Sequence[Compared]) -> Iterator[Answer]:
    """What can be said about all models together; a question that the runs cannot answer is left out."""
    if asked:
        yield _same_answers(asked)
    found = (_same_skip(sides), _same_places(sides), _same_ranks(sides))
    yield from (answer for answer in found if answer is not None)


def _same_answers(asked: Sequence[Compared]) -> Answer:
    groups = {kind: [one for one in asked if one.together == kind] for kind in ("same", "opposite", "open")}
    parts = []
    if same := groups["same"]:
        agreed = [(word, one.label) for one in same for word in one.verdicts]
        parts.append(f"{len(same)} have the same clear answer ({_grouped(agreed)})")
    if opposite := groups["opposite"]:
        parts.append(f"{len(opposite)} have opposite ones ({_grouped([(_who(one), one.label) for one in opposite])})")
    if groups["open"]:
        parts.append(f"{len(groups['open'])} are unclear for at least one model")
    apart = _grouped([(f"larger in {more[0]} than in {more[1]}", one.label) for one in asked if (more := one.more)])
    found: Verdict = "no" if groups["opposite"] else "yes" if groups["same"] else "unclear"
    return Answer(
        key="same-answers",
        question="Do the models answer the paper's questions alike?",
        verdict=found,
        effect=(
            f"Of {len(asked)} questions {listed(parts)}. Effects of clearly different size: {apart or 'none'}. "
            "The page has a table of every question."
        ),
        estimate=None,
        unit="",
        paper=(
            "Mostly: two of its models of 7 billion weights are much alike; a third is less robust, above all to "
            "changes of order."
        ),
        rule="Yes if every question that is clear for all models has one answer, no if any question has opposite ones.",
        figure="effects",
    )


def _grouped(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels by what is said about them: "yes: a and b; no: c"."""
    groups: dict[str, list[str]] = {}
    for said, label in pairs:
        groups.setdefault(said, []).append(label)
    return "; ".join(f"{said}: {listed(labels, 30)}" for said, labels in groups.items())


def _who(asked: Compared) -> str:
    sides = {kind: [name for name, found in asked.found.items() if found.verdict == kind] for kind in ("yes", "no")}
    return ", ".join(f"{kind} for {listed(names)}" for kind, names in sides.items())


def _same_skip(sides: Sequence[Side]) -> Answer | None:
    skip = METHODS["skip"]
    mine = [side for side in sides if skip in side.methods]
    curves = on_one_grid([side.methods[skip] for side in mine]) if len(mine) > 1 else []
    if not curves:
        return None
    means = {side.name: curve.mean() for side, curve in zip(mine, curves, strict=True)}
    pairs = list(combinations(means, 2))
    gaps = {(a, b): (means[a] - means[b]).estimate(len(pairs)) for a, b in pairs}
    (first, second), largest = max(gaps.items(), key=lambda gap: abs(gap[1].value))
    inside = all(verdict(gap, -ALIKE) == "yes" and verdict(gap, ALIKE) == "no" for gap in gaps.values())
    beyond = any(verdict(gap, ALIKE) == "yes" or verdict(gap, -ALIKE) == "no" for gap in gaps.values())
    kept = [f"{name} keeps {with_interval(number.estimate())}" for name, number in means.items()]
    return Answer(
        key="same-skip",
        question="Do the models lose the same when the same share of their layers is left out?",
        verdict="yes" if inside else "no" if beyond else "unclear",
        effect=(
            f"On average over shares from 0 to {curves[0].places[-1]:.0f} % of the layers {listed(kept)} of the score; "
            f"{first} minus {second} is {with_interval(largest)}."
        ),
        estimate=largest,
        unit=f"difference of mean normalised score, {first} minus {second}",
        paper="Yes: with 7, 13 and 70 billion weights of one family, the curves coincide against the share left out.",
        rule=(
            f"Yes if no two models are further apart than {ALIKE}, no if two clearly are; intervals hold for all pairs "
            "at once. All curves are read at the shares of the one with the fewest."
        ),
        figure="skip-share",
    )


def _same_places(sides: Sequence[Side]) -> Answer | None:
    single = METHODS["skip_one"]
    mine = [side for side in sides if single in side.layers]
    curves = on_one_grid([side.layers[single] for side in mine]) if len(mine) > 1 else []
    if not curves or len(curves[0].places) < 4:
        return None
    value, draws = (
        np.mean([_spearman(a, b) for a, b in combinations(heights, 2)], axis=0)
        for heights in ([curve.values[None] for curve in curves], [curve.draws for curve in curves])
    )
    alike = Number(float(value[0]), draws).estimate()
    own = {side.name: side.layers[single] for side in mine}
    worst = [f"{curve.places[int(curve.values.argmin())]:.2f} in {name}" for name, curve in own.items()]
    return Answer(
        key="same-places",
        question="Do the same relative depths matter in every model?",
        verdict=verdict(alike),
        effect=(
            "The scores without one layer, read at the same relative depths, have a rank correlation of "
            f"{with_interval(alike)}. The layer that costs most lies at {listed(worst)}."
        ),
        estimate=alike,
        unit="rank correlation" + (" (mean over pairs of models)" if len(curves) > 2 else ""),
        paper="Not asked in this form; in all three models that it shows, the first layers and the last cost most.",
        rule=(
            "Spearman's rank correlation of the models' curves, at the depths of the shallowest: yes if the interval "
            "lies above zero, no if below."
        ),
        figure="single-layers",
    )


def _spearman(a: Floats, b: Floats) -> Floats:
    """Rank correlations of rows, [rows, points] twice to [rows]; 0 where all values of a row are equal."""
    first, second = (stats.rankdata(each, axis=-1) for each in (a, b))
    first, second = (each - each.mean(axis=-1, keepdims=True) for each in (first, second))
    room = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    return np.asarray((first * second).sum(axis=-1) / np.where(room > 0, room, 1), np.float64)


def _same_ranks(sides: Sequence[Side]) -> Answer | None:
    means = {title: found for title, found in mean_scores(sides).items() if len(found) == len(sides)}
    if len(means) < 4:
        return None
    by_side = [[found[side.name] for found in means.values()] for side in sides]
    value = float(_tau([[np.array(number.value) for number in mine] for mine in by_side]))
    alike = Number(value, _tau([[number.draws for number in mine] for mine in by_side])).estimate()
    orders = []
    for side, mine in zip(sides, by_side, strict=True):
        by_harm = sorted(zip(mine, means, strict=True), key=lambda pair: pair[0].value)
        orders.append(f"{side.name}: {', '.join(title.lower() for _, title in by_harm)}")
    return Answer(
        key="same-ranks",
        question="Do the methods do harm in the same order in every model?",
        verdict=verdict(alike),
        effect=f"From most to least harmful, {'; '.join(orders)}.",
        estimate=alike,
        unit="Kendall's tau" + (" (mean over pairs of models)" if len(sides) > 2 else ""),
        paper="In part: on decoders and on an encoder alike, looped parallel did least harm and middle repeat most.",
        rule=(
            "Rank correlation of the methods' mean scores over the common shares, from -1 to 1: yes if the interval "
            "lies above zero, no if below."
        ),
        figure="prices",
    )


def _tau(heights: Sequence[Sequence[Floats]]) -> Floats:
    """Agreement about the order of things, mean over pairs of judges: [judges][things] arrays to one such array."""
    things = list(combinations(range(len(heights[0])), 2))
    signs = [np.array([np.sign(mine[a] - mine[b]) for a, b in things]) for mine in heights]
    return np.asarray(np.mean([(a * b).mean(axis=0) for a, b in combinations(signs, 2)], axis=0), np.float64)
