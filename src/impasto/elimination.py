"""Which of many are among the best few, told from as few documents as that takes: successive elimination.

`contest` asks all competitors a few documents, drops those that are clearly too weak, asks the others more, and so on
with growing rounds. It knows nothing of models: scores come from a function, so its error rate can be simulated.

**The rule.** A competitor is dropped when `keep` others each beat it on the documents seen so far. To beat it is to be
better by a paired one-sided test at the level

    error / (rounds * keep * (competitors - keep)).

**Why a wrong drop has a probability of at most `error`.** Let B be `keep` competitors with the largest true means; of
equal ones, any choice that does not look at the scores. Let i be in B and be dropped. Then `keep` competitors beat it,
and B has only `keep` - 1 others, so at least one j outside of B beat it, though it is truly no better. Hence in some
round a test rejected one of the true hypotheses "j is no better than i", j outside of B and i in it. These are
keep * (competitors - keep) in each round, and the levels of all these tests add up to `error`. It plays no part how
competitors or rounds depend on each other, when the race stops, or who is still in it: the sum runs over all of them,
dropped or not. For this reason the rule is a sum and not a bootstrap of the largest statistic (max-t): who was dropped
has no later scores to resample, and the survivors alone are a family that the same scores have chosen.

It follows that the survivors hold `keep` competitors as good as the best, with a probability of at least 1 - `error`.
Where many are exactly equal at the last place, some of them may go; a given one goes with a probability below `error`.

**The test** is a bet against "j is no better than i". Let d be the differences j - i on n documents, none below -c. The
evidence is the mean, over a fixed set of stakes b below 1, of the product of 1 + b d / c. If j is no better, its
expectation is at most 1: documents are independent, so that of a product is the product of 1 + b E(d) / c, and this is
at most (1 + b mean / c)**n, since a geometric mean is never above the arithmetic one. So evidence above 1 / level has a
probability of at most the level (Markov), for any n and any shape of scores. Documents of several strata need not have
the same mean for this, and for documents drawn without replacement the first step is Maclaurin's inequality: the rule
holds for the mean over the documents at hand as well as for the mean over those they come from. The bet is Waudby-Smith
and Ramdas's (Estimating means of bounded random variables by betting, 2024), with stakes that are mixed, not learnt.

Student's t would need fewer documents, but at levels this small it is not valid for skewed scores (at 1 in 1000 and
with 32 documents it rejects 10 to 700 times too often): a competitor that is a little better on most documents and far
worse on a few looks surely better until one of the few turns up. For the same reason no test can do without c, the
largest difference possible. For scores of 0 and 1 it is known. For others `Rules.reach` may say it; without it, it is
the largest difference seen between any two that are still in the race, and the error rate holds if no other document
would tell them apart by more.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from impasto.errors import UsageError

Floats = NDArray[np.float64]
Place: TypeAlias = tuple[int, int]
"""A document: its stratum, and its number in it."""
Reason = Literal["worse", "halved", "not finite"]
Ask = Callable[[Sequence[int], Sequence[Place]], Floats]
"""Takes competitors and documents to scores [competitors, documents], larger is better; NaN where there is none."""

STAKES = 0.95 * 0.6 ** np.arange(8)
SAME = 1e-12  # means that differ by less, relative to their size, differ by rounding alone


@dataclass(frozen=True, slots=True)
class Rules:
    """How a contest is run.

    Args:
        keep: how many are wanted.
        error: the probability that one of the truly best `keep` is dropped as worse is at most this.
        first: documents of the first round; at least one of each stratum is taken.
        growth: each round ends with so many times the documents of the one before.
        reach: the largest difference that two competitors can have on a document; None takes the largest seen.
        halve: also drop the worse half in every round, as classic successive halving does, sure or not. These drops
            have no error rate.

    Raises:
        UsageError: a number that cannot be.
    """

    keep: int
    error: float = 0.05
    first: int = 32
    growth: float = 2.0
    reach: float | None = None
    halve: bool = False

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError(f"a race keeps at least one, not {self.keep}")
        if not 0 < self.error < 0.5:
            raise UsageError(f"an error rate is between 0 and 0.5, not {self.error}")
        if self.first < 1:
            raise UsageError(f"the first round needs at least one document, not {self.first}")
        if not 1.1 <= self.growth < math.inf:
            raise UsageError(f"each round must have 1.1 times the documents of the last at least, not {self.growth}")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise UsageError(f"the largest difference of two scores is a positive number, not {self.reach}")

    def level(self, competitors: int, rounds: int) -> float:
        """The level of one test of one pair in one round."""
        return self.error / (rounds * self.keep * (competitors - self.keep))


@dataclass(frozen=True, slots=True)
class Drop:
    """Who left the contest, when and why.

    Attributes:
        who: number of the competitor.
        round: the round it left after, from 1.
        documents: how many it had answered.
        reason: "worse" (clearly), "halved" (in the worse half, without any error rate) or "not finite".
        against: the weakest of the best `keep` that it lost to; None if its scores are not finite.
        difference: its mean score minus that one's.
        low: lower end of the interval of the difference, which is wrong with the level of the test on either side.
        high: upper end; not above zero where the reason is "worse".
    """

    who: int
    round: int
    documents: int
    reason: Reason
    against: int | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """How a contest went.

    Attributes:
        survivors: who is left, best first; equal ones in their given order.
        scores: their mean scores.
        dropped: all others, in the order in which they left.
        rounds: for each round that was run, the documents asked up to its end.
        racing: for each of these rounds, who was asked.
        level: the level of each test.
    """

    survivors: tuple[int, ...]
    scores: tuple[float, ...]
    dropped: tuple[Drop, ...]
    rounds: tuple[int, ...]
    racing: tuple[tuple[int, ...], ...]
    level: float


def contest(ask: Ask, strata: Sequence[int], competitors: int, rules: Rules, *, seed: int = 0) -> Course:
    """Run rounds until `keep` are left, or until all documents are asked.

    Args:
        ask: gives the scores of some competitors on some documents that they have not been asked before.
        strata: documents of each stratum. What counts is the mean over strata of the mean over their documents.
        competitors: how many there are.
        rules: how to run it.
        seed: of the order of the documents.

    Raises:
        UsageError: no documents, no more competitors than are to be kept, or scores that reach too far.
    """
    if not strata or min(strata) < 1:
        raise UsageError("a race needs documents")
    if competitors <= rules.keep:
        raise UsageError(f"nothing to race for: {competitors} recipes, of which {rules.keep} are to be kept")
    order = drawing_order(strata, seed)
    ends = round_ends(len(order), rules.first, rules.growth, len(strata))
    level = rules.level(competitors, len(ends))
    racing = np.arange(competitors)
    scores: Floats = np.empty((competitors, 0))
    means: Floats = np.empty(competitors)
    dropped: list[Drop] = []
    asked: list[tuple[int, ...]] = []
    for number, end in enumerate(ends, 1):
        asked.append(tuple(racing.tolist()))
        scores = np.hstack([scores, ask(asked[-1], order[scores.shape[1] : end])])
        weight = weights([stratum for stratum, _ in order[:end]])
        values = scores * weight
        drops = judge(values, asked[-1], rules, level, number, float(weight.max()) * largest(scores, rules.reach))
        left = ~np.isin(racing, [drop.who for drop in drops])
        racing, scores, means = racing[left], scores[left], values[left].mean(axis=1)
        dropped += drops
        if len(racing) <= rules.keep:
            break
    ranked = _ranked(means)
    return Course(
        survivors=tuple(racing[ranked].tolist()),
        scores=tuple(means[ranked].tolist()),
        dropped=tuple(dropped),
        rounds=ends[: len(asked)],
        racing=tuple(asked),
        level=level,
    )


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────


def drawing_order(strata: Sequence[int], seed: int) -> tuple[Place, ...]:
    """All documents in random order, one of each stratum in turn for as long as it has some.

    Every beginning of the order is thus as even as it can be. A stratum's own order depends on the seed and its place.

    >>> [stratum for stratum, _ in drawing_order([2, 4], seed=0)]
    [0, 1, 0, 1, 1, 1]
    """
    columns = []
    for stratum, size in enumerate(strata):
        documents = list(range(size))
        random.Random(f"race {seed} {stratum}").shuffle(documents)
        columns.append(documents)
    longest = max(strata, default=0)
    return tuple(
        (stratum, column[turn])
        for turn in range(longest)
        for stratum, column in enumerate(columns)
        if turn < len(column)
    )


def round_ends(documents: int, first: int, growth: float, strata: int = 1) -> tuple[int, ...]:
    """Documents asked by the end of each round: growing geometrically, all in the last, which is not a small one.

    Before the last each is a multiple of the number of strata, so that strata have equal shares.

    >>> round_ends(1000, 32, 2), round_ends(20, 32, 2)
    ((32, 64, 128, 256, 512, 1000), (20,))
    """
    ends: list[int] = []
    size = float(first)
    while (end := math.ceil(size / strata) * strata) * math.sqrt(growth) < documents:
        if end not in ends:
            ends.append(end)
        size *= growth
    return (*ends, documents)


def weights(strata: Sequence[int]) -> Floats:
    """Weights of documents, of mean one, under which each stratum counts the same: those of the strata given."""
    _, kind, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    found: Floats = len(strata) / (len(counts) * counts[kind].astype(np.float64))
    return found


# ── one round ────────────────────────────────────────────────────────────────────────────────────────────────


def judge(values: Floats, who: Sequence[int], rules: Rules, level: float, number: int, reach: float) -> list[Drop]:
    """Who is to go after a round.

    Competitors of equal scores share their fate, and so do those of equal means where the worse half goes.

    Args:
        values: weighted scores [competitors, documents].
        who: the number of each row's competitor.
        rules: of the contest.
        level: of each test.
        number: of the round.
        reach: the largest difference that two values on a document can have.
    """
    documents = values.shape[1]
    whole = np.isfinite(values).all(axis=1)
    rows = np.flatnonzero(whole)
    table = values[rows]
    means = table.mean(axis=1)
    ranked = _ranked(means)
    beaten = beats(table, level, reach).T
    lost = beaten.sum(axis=1) >= rules.keep

    def drop(place: int, against: int, reason: Reason) -> Drop:
        change = table[place] - table[against]
        ends = interval(change, level, reach)
        return Drop(who[rows[place]], number, documents, reason, who[rows[against]], float(change.mean()), *ends)

    drops = [Drop(who[row], number, documents, "not finite") for row in np.flatnonzero(~whole).tolist()]
    for place in np.flatnonzero(lost).tolist():
        winners = ranked[beaten[place, ranked]]
        drops.append(drop(place, int(winners[rules.keep - 1]), "worse"))
    half = max(rules.keep, math.ceil(len(values) / 2))
    left = ranked[~lost[ranked]]
    if rules.halve and len(left) > half:
        last = int(left[half - 1])
        clear = means[last] - SAME * (1 + np.abs(means[last]))
        drops += [drop(place, last, "halved") for place in left.tolist() if means[place] < clear]
    return drops


def largest(scores: Floats, reach: float | None) -> float:
    """The largest difference between two competitors with finite scores on a document: as given, or as seen.

    Raises:
        UsageError: more was seen than was given.
    """
    table = scores[np.isfinite(scores).all(axis=1)]
    seen = float(np.ptp(table, axis=0).max()) if table.size else 0.0
    if reach is not None and seen > reach * (1 + SAME):
        raise UsageError(f"two scores of one document differ by {seen:.6g}, which is more than reach={reach:g}")
    return seen if reach is None else reach


def beats(table: Floats, level: float, reach: float) -> NDArray[np.bool_]:
    """Whether the row's competitor is better than the column's beyond doubt, [competitors, competitors].

    Args:
        table: finite scores [competitors, documents].
        level: probability of a wrong yes, for one pair.
        reach: no difference is larger.
    """
    found = np.zeros((len(table), len(table)), np.bool_)
    if not reach > 0:
        return found
    totals = table.sum(axis=1)
    needed = -math.log(level)
    for row, total in enumerate(totals):
        # log(1 + x) <= x, so a pair below this bound cannot have the evidence
        rivals = np.flatnonzero(STAKES[0] * (total - totals) > (1 - SAME) * needed * reach)
        if len(rivals):
            found[row, rivals] = log_evidence(table[row] - table[rivals], reach) >= needed
    return found


def log_evidence(change: Floats, reach: float, mean: float = 0.0) -> Floats:
    """Logarithm of the evidence that changes [..., documents] have a larger mean than `mean`.

    Args:
        change: none below -reach.
        reach: a positive number.
        mean: above -reach.
    """
    outcome = (change + reach) / (reach + mean) - 1
    logs = np.stack([np.log1p(stake * outcome).sum(axis=-1) for stake in STAKES], axis=-1)
    return np.asarray(np.logaddexp.reduce(logs, axis=-1) - math.log(len(STAKES)), np.float64)


def interval(change: Floats, level: float, reach: float) -> tuple[float, float]:
    """Ends between which the mean change lies, each wrong with probability `level`: means not refuted by the test."""
    return _lower(change, level, reach), -_lower(-change, level, reach)


def _lower(change: Floats, level: float, reach: float) -> float:
    """The largest mean that the changes refute, or -reach if they refute none."""
    least, value = (SAME - 1) * reach, float(change.mean())

    def missing(mean: float) -> float:
        return -math.log(level) - float(log_evidence(change, reach, mean))

    if value <= least or missing(least) > 0:
        return -reach
    return float(optimize.brentq(missing, least, value))


def _ranked(means: Floats) -> NDArray[np.intp]:
    """Places from the best mean to the worst, equal ones in their order."""
    return np.argsort(-means, kind="stable")
