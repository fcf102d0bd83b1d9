from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from impasto import statistics
from impasto.result import Estimate
from impasto.statistics import Panel

BINARY = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= truth <= estimate.high


def coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


# 400 simulated studies of a true 95 % interval lie within 0.917..0.983 in 99.7 % of all worlds; one that covers
# 90 % or 99.5 % leaves the band.
BAND = (0.915, 0.985)


@pytest.mark.parametrize("documents", [8, 100])
def test_the_paired_interval_covers_the_true_difference(documents: int) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(400):
        difficulty = rng.normal(size=documents)
        a = difficulty + rng.normal(0.3, 0.5, documents)
        b = difficulty + rng.normal(0.0, 0.5, documents)
        hits.append(covers(statistics.paired_bootstrap(a, b, n=800), 0.3))
    assert BAND[0] < coverage(hits) < BAND[1]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_the_interval_of_an_accuracy_covers_it(p: float) -> None:
    rng = np.random.default_rng(2)
    hits = [covers(statistics.interval((rng.random(100) < p).astype(int)), p) for _ in range(400)]
    assert 0.91 < coverage(hits) < 0.99


def test_the_interval_over_seeds_covers_when_seeds_matter_most_and_documents_alone_do_not() -> None:
    rng = np.random.default_rng(3)
    both, documents_only = [], []
    for _ in range(300):
        seeds = rng.normal(0, 0.3, 5)[:, None]
        scores = 1 + seeds + rng.normal(0, 0.5, 100) + rng.normal(0, 0.5, (5, 100))
        both.append(covers(statistics.over_seeds(scores, n=800), 1.0))
        documents_only.append(covers(statistics.over_seeds(scores.mean(axis=0), n=800), 1.0))
    assert 0.90 < coverage(both) < 0.995
    assert coverage(documents_only) < 0.75


def test_the_normalised_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(300):
        full = rng.random(200) < 0.7
        recipe = np.where(rng.random(200) < 0.6, full, rng.random(200) < 0.25)  # 0.6 * 0.7 + 0.4 * 0.25 = 0.52
        (found,) = statistics.normalised_scores(Panel(full, [recipe], 0.25), n=800)
        assert found is not None
        hits.append(covers(found, (0.52 - 0.25) / (0.7 - 0.25)))
    assert BAND[0] < coverage(hits) < BAND[1]


def test_simultaneous_intervals_hold_for_all_recipes_at_once_and_separate_ones_do_not() -> None:
    rng = np.random.default_rng(5)
    together, apart = [], []
    for _ in range(200):
        full = rng.normal(size=100)
        panel = Panel(full, list(full + rng.normal(0, 0.5, (30, 100))))
        together.append(all(covers(e, 0) for e in statistics.simultaneous_differences(panel, n=600)))
        apart.append(all(covers(e, 0) for e in statistics.differences(panel, n=600)))
    assert 0.89 < coverage(together) < 0.995
    assert coverage(apart) < 0.5


def test_pairing_tightens() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.normal(size=200)
    a, b = (difficulty + rng.normal(0, 0.3, 200) for _ in range(2))
    paired = statistics.paired_bootstrap(a, b)
    shuffled = statistics.paired_bootstrap(a, rng.permutation(b))
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)  # type: ignore[operator]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_a_difference_keeps_its_interval_under_shift_and_mirrors_under_swap(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    a, b = np.array(pairs).T
    plain = statistics.paired_bootstrap(a, b, n=300)
    shifted = statistics.paired_bootstrap(a + shift, b + shift, n=300)
    mirrored = statistics.paired_bootstrap(b, a, n=300)
    numbers = (plain.value, plain.low, plain.high)
    assert numbers == pytest.approx((shifted.value, shifted.low, shifted.high), abs=1e-9)
    assert numbers == pytest.approx((-mirrored.value, -mirrored.high, -mirrored.low), abs=1e-9)  # type: ignore[operator]


def test_the_same_scores_have_the_same_interval_and_another_seed_nearly_so() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 50))
    first = statistics.paired_bootstrap(a, b)
    assert first == statistics.paired_bootstrap(a, b)
    second = statistics.paired_bootstrap(a, b, seed=1)
    assert first != second
    assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.03)


def test_a_difference_of_right_and_wrong_answers_is_at_most_one() -> None:
    few = statistics.paired_bootstrap([1, 1, 1, 0], [0, 0, 1, 1]), statistics.paired_bootstrap([0, 0, 0], [1, 0, 1])
    assert all(-1 <= one.low <= one.value <= one.high <= 1 for one in few)
    assert few[1].low == -1
    every = Panel(full=[1, 1, 1, 1, 0], recipes=[[0] * 5, [1, 1, 0, 1, 0]])
    assert statistics.simultaneous_differences(every)[0].low == -1
    assert statistics.paired_bootstrap([1, 2, 5], [0, 0, 0]).high > 5  # other scores have no such end


def test_a_recipe_equal_to_the_full_model_differs_by_exactly_nothing() -> None:
    scores = np.random.default_rng(8).normal(size=40)
    panel = Panel(scores, [scores, scores + 1])
    assert statistics.differences(panel)[0] == Estimate(0, 0, 0)
    assert statistics.simultaneous_differences(panel)[0] == Estimate(0, 0, 0)
    (one,) = statistics.normalised_scores(Panel(scores + 5, [scores + 5]))
    assert one is not None and (one.value, one.low, one.high) == pytest.approx((1, 1, 1))


def test_documents_without_a_score_are_left_out_on_both_sides() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(2, 30))
    with_gaps = statistics.paired_bootstrap([*a, None, 7.0], [*b, 3.0, None])
    assert with_gaps.value == pytest.approx(float((a - b).mean()))
    assert with_gaps.low < with_gaps.value < with_gaps.high  # type: ignore[operator]
    gappy = Panel([*b, 3.0], [[*a, None], [*a, 3.0]])
    complete = Panel(b, [a, a])
    assert statistics.differences(gappy)[0].value == pytest.approx(statistics.differences(complete)[0].value)


@pytest.mark.parametrize("scores", [[], [None, None]])
def test_nothing_to_compare_is_no_number(scores: list[None]) -> None:
    found = statistics.paired_bootstrap(scores, scores)
    assert np.isnan(found.value) and (found.low, found.high) == (None, None)


def test_one_document_has_a_value_but_no_interval() -> None:
    assert statistics.paired_bootstrap([3.0], [1.0]) == Estimate(2.0)


def test_results_of_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="compare only results of the same protocol"):
        statistics.paired_bootstrap([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="3 and 2 values are not pairs: compare the same documents"):
        statistics.mcnemar([1, 0, 1], [1, 0])


@given(BINARY)
@settings(deadline=None)
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_documents(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    gained = sum(x and not y for x, y in pairs)
    lost = sum(y and not x for x, y in pairs)
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(a, b) == pytest.approx(expected)
    assert statistics.mcnemar(a, b) == pytest.approx(statistics.mcnemar(b, a))


def test_mcnemar_refuses_scores_that_are_not_right_or_wrong() -> None:
    with pytest.raises(ValueError, match=r"use paired_bootstrap for others"):
        statistics.mcnemar([0.5, 1], [1, 0])


def test_holm_and_benjamini_hochberg_on_worked_numbers() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    assert statistics.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert len(statistics.holm([])) == len(statistics.benjamini_hochberg([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_adjusted_p_values_keep_the_order_and_never_fall(p: list[float]) -> None:
    for adjust in (statistics.holm, statistics.benjamini_hochberg):
        adjusted = adjust(p)
        assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()
        assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-12).all()
    assert (statistics.benjamini_hochberg(p) <= statistics.holm(p) + 1e-12).all()


def test_clearly_above_chance_is_rare_when_there_is_only_chance() -> None:
    rng = np.random.default_rng(10)
    alarms = [statistics.clearly_above(rng.random(100) < 0.25, 0.25) for _ in range(1000)]
    assert sum(alarms) < 45  # 25 expected at most
    assert statistics.clearly_above(rng.random(100) < 0.6, 0.25)
    assert not statistics.clearly_above([None, None], 0.25)
    assert statistics.clearly_above([0.5, 0.6, 0.7], 0.25) and not statistics.clearly_above([0.2, 0.4], 0.25)


def test_the_normalised_score_is_undefined_where_the_full_model_guesses() -> None:
    rng = np.random.default_rng(11)
    guesses = rng.random(200) < 0.25
    assert statistics.normalised_scores(Panel(guesses, [guesses], 0.25)) == [None]
    assert statistics.median_normalised([]) == []
    assert statistics.normalised(0.5, 0.25, 0.25) is None
    assert statistics.normalised(0.5, 0.75, 0.25) == 0.5


def test_the_median_is_that_of_the_usable_tasks() -> None:
    rng = np.random.default_rng(12)

    def panel(share: float, full: float = 0.8) -> Panel:
        right = np.arange(400) < 400 * full
        kept = np.arange(400) < 400 * (0.2 + share * (full - 0.2))
        order = rng.permutation(400)
        return Panel(right[order], [kept[order], right[order]], 0.2)

    guessing = Panel(rng.random(400) < 0.2, [np.ones(400), np.zeros(400)], 0.2)
    first, second = statistics.median_normalised([panel(0.1), guessing, panel(0.5), panel(0.9)])
    assert first is not None and first.value == pytest.approx(0.5, abs=0.01) and covers(first, 0.5)
    assert second is not None and (second.value, second.low, second.high) == pytest.approx((1, 1, 1))


def test_several_seeds_of_a_recipe_are_one_recipe() -> None:
    rng = np.random.default_rng(13)
    full = rng.normal(1, 1, 100)
    table = full + rng.normal(-0.3, 0.2, (4, 100))
    found = statistics.differences(Panel(full, [table, table[0], full]))
    assert [e.value for e in found] == pytest.approx([(table - full).mean(), (table[0] - full).mean(), 0])
    alone = statistics.differences(Panel(full, [table[0]]))[0]
    assert (alone.low, alone.high) == pytest.approx((found[1].low, found[1].high))
    assert (found[2].low, found[2].high) == (0, 0)


def test_a_line_through_exact_points_is_exact_and_a_noisy_one_covers_its_slope() -> None:
    exact = statistics.fit_line([0, 1, 2, 3], [1, 3, 5, 7])
    assert exact.slope.value == pytest.approx(2) and exact.intercept.value == pytest.approx(1)
    assert exact.slope.low == pytest.approx(2) and exact.slope.high == pytest.approx(2)
    rng = np.random.default_rng(14)
    x = np.arange(2, 12)
    lines = [statistics.fit_line(x, 0.5 * x + 1 + rng.normal(size=10), n=800) for _ in range(400)]
    assert BAND[0] < coverage([covers(line.slope, 0.5) for line in lines]) < BAND[1]
    assert BAND[0] < coverage([covers(line.intercept, 1) for line in lines]) < BAND[1]
    assert statistics.fit_line([1, 2], [3, 5]).slope == Estimate(2)
    with pytest.raises(ValueError, match="two different places"):
        statistics.fit_line([1, 1], [2, 3])


def test_rank_correlations_agree_with_scipy_and_ignore_monotone_changes() -> None:
    rng = np.random.default_rng(15)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    for ours, theirs in ((statistics.kendall, stats.kendalltau), (statistics.spearman, stats.spearmanr)):
        expected = theirs(x, y)
        assert (ours(x, y).value, ours(x, y).p) == pytest.approx((expected.statistic, expected.pvalue))
        assert ours(np.exp(x), y**3).value == pytest.approx(ours(x, y).value)
        assert ours(x, -x).value == pytest.approx(-1)
        assert np.isnan(ours(x, np.ones(25)).value)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.5, 0.3, 0.7), "yes"),
        (Estimate(-0.5, -0.7, -0.3), "no"),
        (Estimate(0.5, -0.1, 0.7), "unclear"),
        (Estimate(0.5, 0.0, 0.7), "unclear"),
        (Estimate(0.5, 0.3, None), "yes"),
        (Estimate(0.5), "unclear"),
        (None, "unclear"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(estimate: Estimate | None, expected: str) -> None:
    assert statistics.verdict(estimate) == expected


def test_hundreds_of_recipes_on_thousands_of_documents_take_seconds() -> None:
    rng = np.random.default_rng(16)
    full = rng.random(3000) < 0.6
    panel = Panel(full, list(rng.random((300, 3000)) < 0.5))
    start = time.process_time()
    statistics.simultaneous_differences(panel)
    assert time.process_time() - start < 10  # about 1 s; a loop over recipes takes minutes
