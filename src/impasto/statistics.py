"""How sure a number is: paired bootstrap intervals, exact tests, corrections for many comparisons.

Recipes answer the same documents, so they are compared document by document; this removes the spread between
easy and hard documents, which is most of the noise. Everything is computed from per-example scores as they
stand in `Result.scores`: one number per document, None (or NaN) where there is no finite value. Such a document
is left out of the comparison it is missing from, on both sides.

Intervals are 95 % percentile bootstrap intervals over documents (10,000 resamples, fixed seed: same scores,
same interval). A plain bootstrap is too narrow for few units, by the factor sqrt((n - 1) / n) and by using the
normal where Student's t belongs; so the deviation of every resample is stretched by
sqrt(n / (n - 1)) * t(n - 1) / z, which tends to one. Intervals of a mean of several seeds treat the seeds as
units too. Tasks are fixed: the intervals speak about more documents of these tasks, not about other tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from impasto.result import Estimate, Verdict

LEVEL = 0.95
RESAMPLES = 10_000
CELLS = 4_000_000  # resampling weights held at once: 32 MB

Floats = NDArray[np.float64]
Scores = Sequence[float | None] | Sequence[int] | Sequence[bool] | NDArray[np.generic]


@dataclass(frozen=True)
class Panel:
    """What several recipes and the full model scored on the documents of one task.

    Args:
        full: the untouched model, one score per document.
        recipes: one entry per recipe, each of the shape [documents], or [seeds, documents] for a recipe that
            is the mean over several seeds.
        chance: what guessing scores on these documents.
    """

    full: Scores
    recipes: Sequence[Scores | Sequence[Scores]]
    chance: float = 0.0

    @cached_property
    def baseline(self) -> Floats:
        """Scores of the full model, [documents]."""
        return _floats(self.full)

    @cached_property
    def rows(self) -> Floats:
        """Scores of all recipes and seeds below each other, [rows, documents]."""
        rows = [row for recipe in self._tables for row in recipe]
        return np.array(rows, np.float64).reshape(len(rows), len(self.baseline))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """How many of the rows belong to each recipe."""
        return tuple(len(table) for table in self._tables)

    @cached_property
    def _tables(self) -> tuple[Floats, ...]:
        tables = tuple(np.atleast_2d(_floats(recipe)) for recipe in self.recipes)
        for table in tables:
            if table.ndim != 2 or table.shape[1] != len(self.baseline):
                raise ValueError(
                    f"a recipe has scores of the shape {table.shape}, but the full model answered "
                    f"{len(self.baseline)} documents: compare only results of the same protocol"
                )
        return tables


@dataclass(frozen=True, slots=True)
class Correlation:
    """A rank correlation and its two-sided p-value against "no relation"; both NaN where it is undefined."""

    value: float
    p: float


@dataclass(frozen=True, slots=True)
class Line:
    """A least-squares line `slope * x + intercept`."""

    slope: Estimate
    intercept: Estimate


# ── intervals ────────────────────────────────────────────────────────────────────────────────────────────────


def interval(values: Scores, *, n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean with its interval: Wilson's for scores that are all 0 or 1, else the bootstrap.

    Wilson's stays inside 0..1 and has a width even where every answer is right, which no bootstrap has.

    >>> print(interval([1] * 20))
    1.000 [0.839, 1.000]
    """
    scores = _floats(values)
    scores = scores[np.isfinite(scores)]
    if len(scores) and _is_binary(scores):
        wilson = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(LEVEL, "wilson")
        return Estimate(float(scores.mean()), float(wilson.low), float(wilson.high))
    return over_seeds(scores, n=n, seed=seed)


def paired_bootstrap(a: Scores, b: Scores, *, n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of `a - b` over the documents that both answered."""
    return differences(Panel(full=b, recipes=[a]), n=n, seed=seed)[0]


def over_seeds(scores: Scores | Sequence[Scores], *, n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of scores [seeds, documents] with the interval of other seeds and other documents.

    Seeds and documents are resampled independently of each other, so that both count as units. With one seed
    (or scores of the shape [documents]) only the documents vary: nothing is known about other seeds.
    """
    table = np.atleast_2d(_floats(scores))
    nothing = np.zeros(table.shape[1])
    return differences(Panel(full=nothing, recipes=[table]), n=n, seed=seed)[0]


def differences(panel: Panel, *, n: int = RESAMPLES, seed: int = 0) -> list[Estimate]:
    """For each recipe the mean of (recipe - full), each with its own 95 % interval.

    All recipes see the same resampled documents, which also makes this much faster than one call for each. Where
    documents are right or wrong, no interval reaches further than one.
    """
    values, resampled = _difference_resamples(panel, n, seed)
    most = _most(panel)
    return [_estimate(value, column) for value, column in zip(values, resampled.clip(-most, most).T, strict=True)]


def _most(panel: Panel) -> float:
    """How large a difference can be: one, where documents are right or wrong."""
    scores = np.append(panel.rows, panel.baseline)
    return 1.0 if _is_binary(scores[np.isfinite(scores)]) else math.inf


def simultaneous_differences(panel: Panel, *, n: int = 4_000, seed: int = 0) -> list[Estimate]:
    """Like `differences`, with intervals that hold for all recipes at once with 95 % confidence.

    The half-widths are one multiple of the standard errors: the 95 % quantile of the largest |t| of a
    resample over all recipes (max-t). Similar recipes cost little, as their errors go together.
    """
    values, resampled = _difference_resamples(panel, n, seed)
    errors = resampled.std(axis=0)
    varies = np.isfinite(errors) & (errors > 1e-15)
    if not varies.any():
        return [_estimate(value, column) for value, column in zip(values, resampled.T, strict=True)]
    largest = np.abs((resampled[:, varies] - values[varies]) / errors[varies]).max(axis=1)
    factor, most = float(np.quantile(largest, LEVEL)), _most(panel)
    return [
        Estimate(float(value), float(max(value - factor * error, -most)), float(min(value + factor * error, most)))
        if np.isfinite(error)
        else Estimate(float(value))
        for value, error in zip(values, errors, strict=True)
    ]


# ── normalised scores ────────────────────────────────────────────────────────────────────────────────────────


def normalised(score: float, full: float, chance: float) -> float | None:
    """(score - chance) / (full - chance): 1 is the full model, 0 is guessing; None if full is not above chance."""
    return (score - chance) / (full - chance) if full > chance else None


def normalised_scores(panel: Panel, *, n: int = RESAMPLES, seed: int = 0) -> list[Estimate | None]:
    """For each recipe the normalised score with its interval; all None if full is not clearly above chance.

    Recipe and full model are resampled together. A limit is None where the interval has no end on that side,
    because resamples of the full model reach down to chance.
    """
    return median_normalised([panel], n=n, seed=seed)


def median_normalised(panels: Iterable[Panel], *, n: int = RESAMPLES, seed: int = 0) -> list[Estimate | None]:
    """For each recipe the median over tasks of its normalised scores, with its interval.

    Documents are resampled within each task. A recipe's seeds are the same draws in every task, so they are
    resampled together. Tasks on which the full model is not clearly above chance are left out; if that
    leaves none, every recipe has None.

    Args:
        panels: one per task, with the same recipes in the same order.
        n: how many resamples.
        seed: of the resampling.
    """
    panels = list(panels)
    if len({len(panel.seeds) for panel in panels}) > 1:
        raise ValueError("the tasks have different numbers of recipes: give each task the same recipes")
    usable = [panel for panel in panels if clearly_above(panel.full, panel.chance)]
    if not usable:
        return [None] * max((len(panel.seeds) for panel in panels), default=0)
    values, lows, highs = [], [], []
    for index, panel in enumerate(usable):
        score, full = _means(panel, np.full((1, len(panel.baseline)), 1 / len(panel.baseline)))
        values.append(_by_recipe(panel, (score - panel.chance) / (full - panel.chance))[0])
        scores, fulls = _resampled_means(panel, n, seed, index)
        above, room = scores - panel.chance, fulls - panel.chance
        # Where a resample of the full model does not beat guessing, the ratio could be anything.
        ratio = np.divide(above, room, out=np.full_like(above, math.nan), where=room > 0)
        unbounded = ~(room > 0)
        lows.append(np.where(unbounded, -math.inf, ratio))
        highs.append(np.where(unbounded, math.inf, ratio))
    middle = np.median(np.array(values), axis=0)
    low = np.quantile(np.median(np.array(lows), axis=0), (1 - LEVEL) / 2, axis=0, method="lower")
    high = np.quantile(np.median(np.array(highs), axis=0), (1 + LEVEL) / 2, axis=0, method="higher")
    return [
        Estimate(float(value), _finite(bottom), _finite(top))
        for value, bottom, top in zip(middle, low, high, strict=True)
    ]


# ── tests and verdicts ───────────────────────────────────────────────────────────────────────────────────────


def mcnemar(a: Scores, b: Scores) -> float:
    """Exact two-sided p-value that two recipes with 0/1 scores are equally often right on the same documents.

    Only documents on which they differ count: under the hypothesis each is a fair coin.
    """
    first, second = _pairs(a, b)
    if not (_is_binary(first) and _is_binary(second)):
        raise ValueError("McNemar's test compares scores that are 0 or 1; use paired_bootstrap for others")
    gained, lost = int((first > second).sum()), int((first < second).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def p_above(scores: Scores, chance: float) -> float:
    """One-sided p-value that the mean is above chance: exact binomial for 0/1 scores, else Student's t."""
    values = _floats(scores)
    values = values[np.isfinite(values)]
    if not len(values):
        return 1.0
    if _is_binary(values):
        return float(stats.binomtest(int(values.sum()), len(values), chance, "greater").pvalue)
    if len(values) < 2 or np.ptp(values) == 0:
        return 1.0 if len(values) < 2 or values.mean() <= chance else 0.0
    return float(stats.ttest_1samp(values, chance, alternative="greater").pvalue)


def clearly_above(scores: Scores, chance: float, *, alpha: float = (1 - LEVEL) / 2) -> bool:
    """Whether the mean is above chance beyond doubt; `alpha` is the one-sided error rate (2.5 %)."""
    return p_above(scores, chance) < alpha


def holm(pvalues: Sequence[float]) -> Floats:
    """P-values adjusted so that the chance of even one false alarm among them stays at the level (Holm)."""
    p = np.asarray(pvalues, np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def benjamini_hochberg(pvalues: Sequence[float]) -> Floats:
    """P-values adjusted so that the share of false alarms among the alarms stays at the level."""
    p = np.asarray(pvalues, np.float64)
    return np.asarray(stats.false_discovery_control(p), np.float64) if len(p) else p


def verdict(estimate: Estimate | None, threshold: float = 0.0) -> Verdict:
    """Whether a quantity is above a threshold: "yes" or "no" if its whole interval is on one side.

    >>> verdict(Estimate(0.3, 0.1, 0.5)), verdict(Estimate(0.3, -0.1, 0.5)), verdict(Estimate(0.3))
    ('yes', 'unclear', 'unclear')
    """
    if estimate is not None and estimate.low is not None and estimate.low > threshold:
        return "yes"
    if estimate is not None and estimate.high is not None and estimate.high < threshold:
        return "no"
    return "unclear"


# ── relations ────────────────────────────────────────────────────────────────────────────────────────────────


def kendall(x: Scores, y: Scores) -> Correlation:
    """Kendall's tau-b of pairs."""
    a, b = _pairs(x, y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan)
    found = stats.kendalltau(a, b)
    return Correlation(float(found.statistic), float(found.pvalue))


def spearman(x: Scores, y: Scores) -> Correlation:
    """Spearman's rank correlation of pairs."""
    a, b = _pairs(x, y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan)
    found = stats.spearmanr(a, b)
    return Correlation(float(found.statistic), float(found.pvalue))


def fit_line(x: Scores, y: Scores, *, n: int = RESAMPLES, seed: int = 0) -> Line:
    """The least-squares line through points, with intervals from resampled residuals.

    The abscissae stay as they are, since they were chosen and not drawn. Fewer than three points have no interval.

    Raises:
        ValueError: if there are no two different abscissae.
    """
    a, b = _pairs(x, y)
    if len(a) < 2 or np.ptp(a) == 0:
        raise ValueError("a line needs points at two different places at least")
    centre = a.mean()
    lever = (a - centre) / np.square(a - centre).sum()
    slope = float(lever @ b)
    intercept = float(b.mean() - slope * centre)
    if len(a) < 3:
        return Line(Estimate(slope), Estimate(intercept))
    residuals = b - slope * a - intercept
    rng = np.random.default_rng(seed)
    draws = residuals[rng.integers(len(a), size=(n, len(a)))] * _stretch(len(a), len(a) - 2)
    slopes = slope + draws @ lever
    intercepts = intercept + draws.mean(axis=1) - (slopes - slope) * centre
    return Line(_estimate(slope, slopes), _estimate(intercept, intercepts))


# ── resampling ───────────────────────────────────────────────────────────────────────────────────────────────


def _weights(units: int, n: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Weights of resamples, [some, units], n rows in all; each row sums to one."""
    stretch = _stretch(units, units - 1)
    step = max(1, CELLS // max(units, 1))
    for start in range(0, n, step):
        rows = min(step, n - start)
        draws = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units)
        yield 1 / units + stretch * (counts / units - 1 / units)


def _stretch(units: int, freedom: int) -> float:
    """What makes the spread of resampled means that of Student's t instead of a too narrow normal."""
    if freedom < 1:
        return 1.0
    quantile = (1 + LEVEL) / 2
    return math.sqrt(units / freedom) * float(stats.t.ppf(quantile, freedom) / stats.norm.ppf(quantile))


def _means(panel: Panel, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted means of the rows and of the full model on the documents of each row, [weights, rows]."""
    there = np.isfinite(panel.rows) & np.isfinite(panel.baseline)
    rows = np.where(there, panel.rows, 0)
    full = np.where(there, panel.baseline, 0)
    if there.all():
        scores = weights @ rows.T
        return scores, np.broadcast_to((weights @ panel.baseline)[:, None], scores.shape)
    share = weights @ there.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights @ rows.T / share, weights @ full.T / share


def _by_recipe(panel: Panel, rows: Floats) -> Floats:
    """Plain means over the seeds of each recipe: [any, rows] to [any, recipes]."""
    starts = np.cumsum([0, *panel.seeds[:-1]])
    totals: Floats = np.add.reduceat(rows, starts, axis=1)
    return totals / np.array(panel.seeds, np.float64)


def _resampled_means(panel: Panel, n: int, seed: int, stream: int = 0) -> tuple[Floats, Floats]:
    """Means of resamples, of the recipes and of the full model, both [n, recipes].

    `stream` numbers the tasks: documents of different tasks are drawn independently, seeds are not.
    """
    documents = np.random.default_rng([seed, 0, stream])
    parts = [_means(panel, weights) for weights in _weights(len(panel.baseline), n, documents)]
    scores, fulls = (np.concatenate(column) for column in zip(*parts, strict=True))
    if max(panel.seeds, default=1) == 1:
        return scores, fulls
    blocks_scores, blocks_fulls = [], []
    starts = np.cumsum([0, *panel.seeds])
    for recipe, (first, last) in enumerate(pairwise(starts.tolist())):
        draws = np.random.default_rng([seed, 1, recipe])
        weights = np.concatenate(list(_weights(last - first, n, draws)))
        blocks_scores.append((scores[:, first:last] * weights).sum(axis=1))
        blocks_fulls.append((fulls[:, first:last] * weights).sum(axis=1))
    return np.stack(blocks_scores, axis=1), np.stack(blocks_fulls, axis=1)


def _difference_resamples(panel: Panel, n: int, seed: int) -> tuple[Floats, Floats]:
    """Mean differences to the full model, [recipes], and those of resamples, [n, recipes]; NaN if too few."""
    documents = len(panel.baseline)
    if not panel.seeds:
        return np.empty(0), np.empty((n, 0))
    if not documents:
        return np.full(len(panel.seeds), math.nan), np.full((n, len(panel.seeds)), math.nan)
    # Subtracted before averaging, so that equal scores differ by exactly nothing.
    table = np.split(panel.rows - panel.baseline, np.cumsum(panel.seeds)[:-1])
    delta = Panel(full=np.zeros(documents), recipes=table)
    values = _by_recipe(delta, _means(delta, np.full((1, documents), 1 / documents))[0])[0]
    resampled, _ = _resampled_means(delta, n, seed)
    few = np.minimum.reduceat(np.isfinite(delta.rows).sum(axis=1), np.cumsum([0, *panel.seeds[:-1]])) < 2
    resampled[:, few] = math.nan
    return values, resampled


def _estimate(value: float, resampled: Floats) -> Estimate:
    if not np.isfinite(resampled).all():
        return Estimate(float(value))
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


# ── plain numbers ────────────────────────────────────────────────────────────────────────────────────────────


def _floats(values: object) -> Floats:
    return np.asarray(values, np.float64)  # None becomes NaN


def _pairs(a: Scores, b: Scores) -> tuple[Floats, Floats]:
    first, second = _floats(a), _floats(b)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} values are not pairs: compare the same documents")
    there = np.isfinite(first) & np.isfinite(second)
    return first[there], second[there]


def _is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
