"""The analyses of single facts: laws, and slow oracles that count one by one."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.studies.facts import (
    STOP_WORDS,
    bin_boost,
    frequency_curve,
    nestedness,
    rarity_effect,
    relations,
    robustness,
    same_relation_share,
    series,
    stop_word_share,
)

RIGHT = st.sampled_from([0.0, 1.0])
ROW = st.tuples(RIGHT, RIGHT, st.integers(0, 2000), st.integers(0, 6))
ROWS = st.lists(ROW, min_size=1, max_size=25)
few = settings(max_examples=25, deadline=None)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def by_fact(rows, chosen):
    """Slow oracle: the mean over facts of the means over their wordings, of both models."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[3]].append(row)
    means = [
        [sum(row[column] for row in group) / len(group) for column in (0, 1)]
        for group in groups.values()
        if chosen(sum(row[2] for row in group) / len(group))
    ]
    return [sum(column) / len(means) for column in zip(*means, strict=True)] if means else None


# ── frequency ────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(ROWS)
def test_the_curve_is_the_mean_over_facts_up_to_each_frequency(rows) -> None:
    base, edited, frequency, facts = columns(rows)
    for point in frequency_curve(base, edited, frequency, facts=facts):
        expected = by_fact(rows, lambda often, x=point.frequency: often <= x)
        assert (point.both.base.value, point.both.edited.value) == pytest.approx(expected)
        assert point.both.difference.value == pytest.approx(expected[1] - expected[0])
    assert point.both.facts == len(set(facts)) and point.both.documents == len(rows)


@few
@given(ROWS)
def test_equal_models_differ_by_nothing_at_every_frequency(rows) -> None:
    base, _, frequency, facts = columns(rows)
    for point in frequency_curve(base, base, frequency, facts=facts):
        one, other = point.both.base, point.both.edited
        for mine, theirs in ((one.value, other.value), (one.low, other.low), (one.high, other.high)):
            assert mine == theirs or mine == pytest.approx(theirs, rel=1e-14)
        assert point.both.difference.value == 0.0
    for bar in bin_boost(base, base, frequency, facts=facts):
        assert (bar.corrected, bar.lost) == (0, 0)


def test_points_below_all_frequencies_are_left_out_and_the_last_has_all() -> None:
    points = frequency_curve([0, 1, 1], [1, 1, 1], [7, 30, 40])
    assert [point.frequency for point in points] == [10, 20, 50]
    assert [point.both.facts for point in points] == [1, 1, 3]
    assert [point.frequency for point in frequency_curve([0, 1], [1, 1], [7, 30], at=[100, 8, 3])] == [8, 100]
    assert frequency_curve([], [], []) == ()


@pytest.mark.parametrize("largest", [0, 0.5, 1, 2, 3, 49, 50, 51, 12345])
def test_the_series_reaches_the_largest_and_stops(largest: float) -> None:
    found = series(largest)
    assert found[0] == 0 and found[-1] >= largest and all(a < b for a, b in itertools.pairwise(found))
    assert len(found) == 1 or found[-2] < largest


def test_documents_without_a_score_or_a_frequency_are_left_out_on_both_sides() -> None:
    complete = frequency_curve([0, 1], [1, 1], [3, 3])
    holes = frequency_curve([0, None, 1, 1, math.nan], [1, 1, None, 1, 0], [3, 3, 3, 3, 3])
    assert holes == complete
    assert frequency_curve([0, 1, 1], [1, 1, 0], [3, 3, None]) == complete


@few
@given(ROWS)
def test_bars_count_what_is_corrected_and_lost(rows) -> None:
    base, edited, frequency, _ = columns(rows)
    bars = bin_boost(base, edited, frequency)
    ranges = {
        "fewer than 50": lambda often: often < 50,
        "50 to 1,000": lambda often: 50 <= often <= 1000,
        "more than 1,000": lambda often: often > 1000,
    }
    assert [bar.name for bar in bars] == [name for name, inside in ranges.items() if any(map(inside, frequency))]
    for bar in bars:
        inside = [row for row in rows if ranges[bar.name](row[2])]
        right, wrong = [row for row in inside if row[0]], [row for row in inside if not row[0]]
        corrected, lost = sum(row[1] for row in wrong), sum(1 - row[1] for row in right)
        assert (bar.right, bar.corrected, bar.lost) == (len(right), corrected, lost)
        assert bar.both.difference.value == pytest.approx((corrected - lost) / len(inside))
        for estimate, above, below in (
            (bar.ratio, corrected, len(right)),
            (bar.mended, corrected, len(wrong)),
            (bar.spoilt, lost, len(right)),
        ):
            assert (estimate is None) == (below == 0)
            if estimate is not None:
                assert estimate.value == pytest.approx(above / below)


def test_wordings_of_one_fact_are_no_further_evidence() -> None:
    rng = np.random.default_rng(0)
    base, edited = rng.integers(0, 2, (2, 60))
    frequency = np.full(60, 10)
    once = bin_boost(base, edited, frequency)[0]
    thrice = bin_boost(*(np.repeat(column, 3) for column in (base, edited, frequency)), facts=np.repeat(range(60), 3))[
        0
    ]
    assert thrice.both.base == once.both.base and thrice.both.difference == once.both.difference
    assert thrice.both.documents == 180 and once.both.documents == 60
    assert (thrice.ratio.low, thrice.ratio.high) == pytest.approx((once.ratio.low, once.ratio.high))
    pretended = bin_boost(*(np.repeat(column, 3) for column in (base, edited, frequency)))[0]
    assert pretended.ratio.high - pretended.ratio.low < 0.8 * (once.ratio.high - once.ratio.low)


def test_the_edges_of_ranges_are_the_papers_and_others() -> None:
    frequency = [49, 50, 1000, 1001]
    assert [bar.both.documents for bar in bin_boost([0] * 4, [1] * 4, frequency)] == [1, 2, 1]
    assert [bar.name for bar in bin_boost([0] * 2, [1] * 2, [49, 50], edges=[50])] == ["fewer than 50", "50 or more"]
    three = bin_boost([0] * 5, [1] * 5, [1, 2, 4, 5, 8], edges=[2, 4, 8])
    assert [(bar.name, bar.both.documents) for bar in three] == [
        ("fewer than 2", 1),
        ("2 to 4", 2),
        ("more than 4 to 8", 2),
    ]
    with pytest.raises(ValueError, match="the edges of frequency ranges ascend"):
        bin_boost([0], [1], [1], edges=[5, 5])


def test_the_effect_of_rarity_is_the_difference_of_two_gains_with_a_sound_interval() -> None:
    rng = np.random.default_rng(1)
    frequency = np.where(rng.random(2000) < 0.3, 5, 5000)
    base = rng.random(2000) < np.where(frequency < 50, 0.1, 0.5)
    edited = np.where(rng.random(2000) < 0.2, rng.random(2000) < 0.5, base)
    found = rarity_effect(base, edited, frequency)
    gain = edited.astype(float) - base
    rare, frequent = gain[frequency < 50], gain[frequency > 1000]
    assert found.value == pytest.approx(rare.mean() - frequent.mean())
    error = math.sqrt(rare.var() / len(rare) + frequent.var() / len(frequent))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert rarity_effect(base, edited, np.full(2000, 5)) is None


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="columns of 2 and 3 documents do not belong together"):
        frequency_curve([0, 1], [1, 1, 1], [3, 3])
    with pytest.raises(ValueError, match="columns of 1 and 2 documents do not belong together"):
        frequency_curve([0, 1], [1, 1], [3, 3], facts=["a"])


# ── wordings ─────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(st.lists(st.lists(st.tuples(RIGHT, RIGHT), min_size=3, max_size=3), min_size=1, max_size=12))
def test_robustness_is_what_counting_says(facts) -> None:
    flat = [pair for fact in facts for pair in fact]
    found = robustness(*columns(flat), [number for number in range(len(facts)) for _ in range(3)])
    whole = [[all(pair[side] for pair in fact) for side in (0, 1)] for fact in facts]
    start = [both for both, fact in zip(whole, facts, strict=True) if fact[0][0]]
    assert (found.wordings, found.left_out) == (3, 0)
    assert found.everything.facts == len(facts) and found.everything.documents == len(flat)
    sums = np.array(whole).sum(axis=0) / len(facts)
    assert (found.everything.base.value, found.everything.edited.value) == pytest.approx(tuple(sums))
    assert (found.given is None) == (not start)
    if start:
        sums = np.array(start).sum(axis=0) / len(start)
        assert (found.given.base.value, found.given.edited.value) == pytest.approx(tuple(sums))
        assert found.given.difference.value == pytest.approx(sums[1] - sums[0])


def test_facts_lacking_wordings_or_scores_are_left_out_and_further_wordings_do_not_count() -> None:
    facts = ["a"] * 3 + ["b"] * 2 + ["c"] * 4 + ["d"] * 3
    base = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1, None, 1]
    found = robustness(base, [1] * 12, facts)
    assert (found.wordings, found.left_out, found.everything.facts) == (3, 2, 2)
    assert found.everything.base.value == 1.0
    assert robustness(base, [1] * 12, facts, wordings=2).everything.facts == 3
    with pytest.raises(ValueError, match="facts in one wording cannot be right in one and wrong in another"):
        robustness([1, 0], [1, 1], ["a", "b"])


# ── corrected sets ───────────────────────────────────────────────────────────────────────────────────────────


@few
@given(st.lists(st.tuples(RIGHT, RIGHT, RIGHT, RIGHT), min_size=1, max_size=20))
def test_nestedness_is_what_sets_say(rows) -> None:
    base, *edited = columns(rows)
    found = nestedness(base, dict(zip((0.1, 0.9, 0.5), edited, strict=True)))
    wrong = {i for i, right in enumerate(base) if not right}
    sets = {rho: {i for i in wrong if scores[i]} for rho, scores in zip((0.1, 0.9, 0.5), edited, strict=True)}
    assert [(pair.mild, pair.strong) for pair in found.pairs] == [(0.9, 0.5), (0.9, 0.1), (0.5, 0.1)]
    for pair in found.pairs:
        small, large = sets[pair.mild], sets[pair.strong]
        assert (pair.size, pair.strong_size, pair.shared) == (len(small), len(large), len(small & large))
        assert pair.contained == (small <= large if small else None)
        assert pair.chance == (pytest.approx(len(large) / len(wrong)) if wrong else None)
        if small:
            assert pair.share.value == pytest.approx(len(small & large) / len(small))
            assert 0 <= pair.share.low <= pair.share.value <= pair.share.high <= 1
    full = [pair.contained for pair in found.pairs if pair.size]
    assert found.contained == (sum(full) / len(full) if full else None)


def test_what_chance_gives_is_the_mean_over_random_sets_of_the_same_sizes() -> None:
    rng = np.random.default_rng(2)
    base = rng.integers(0, 2, 40)
    edited = {rho: np.where(base, 1, rng.random(40) < 0.4) for rho in (0.9, 0.5)}
    found = nestedness(base, edited)
    wrong = np.flatnonzero(base == 0)
    small = {i for i in wrong if edited[0.9][i]}
    size = found.pairs[0].strong_size
    drawn = [len(small & set(rng.choice(wrong, size, replace=False))) / len(small) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(found.pairs[0].chance, abs=0.01)
    assert found.chance == pytest.approx(found.pairs[0].chance)


def test_chains_are_nested_and_strangers_are_not() -> None:
    base = [0] * 6
    chain = {0.9: [1, 0, 0, 0, 0, 0], 0.5: [1, 1, 1, 0, 0, 0], 0.1: [1, 1, 1, 1, 1, 0]}
    found = nestedness(base, chain, facts="aabbcc")
    assert found.contained == 1.0 and found.share.value == 1.0 and found.chance < 1
    apart = nestedness(base, {0.9: [1, 1, 0, 0, 0, 0], 0.1: [0, 0, 1, 1, 0, 0]})
    assert apart.contained == 0.0 and apart.share.value == 0.0
    nothing = nestedness([1, 1], {0.9: [1, 1], 0.1: [0, 1]})
    assert (nothing.contained, nothing.share, nothing.chance) == (None, None, None)
    assert nestedness([0, 0, None], {0.9: [1, None, 1], 0.1: [1, 1, 1]}).pairs[0].size == 1


# ── what is said instead ─────────────────────────────────────────────────────────────────────────────────────


def test_stop_words_are_found_whatever_their_case_and_spaces() -> None:
    found = stop_word_share([" the", "Of", "a ", " Paris", "\n", "theatre"])
    assert found.value == pytest.approx(0.5) and found.low < 0.5 < found.high
    assert math.isnan(stop_word_share([]).value)
    assert {"the", "of", "to", "a", "and"} <= STOP_WORDS
    assert not {"paris", "english", "new", "north", "united", "king", "first", ""} & STOP_WORDS
    assert all(word == word.strip().casefold() for word in STOP_WORDS)


ANSWERS = st.sampled_from(["French", "Dutch", "Paris", "Rome", "the"])


@few
@given(st.lists(st.tuples(ANSWERS, ANSWERS, st.sampled_from(["", "language", "city"])), min_size=1, max_size=20))
def test_wrong_answers_of_the_right_kind_are_counted_one_by_one(rows) -> None:
    found = same_relation_share(*columns(rows))
    known = [row for row in rows if row[2]]
    missed = [(said, gold, kind) for said, gold, kind in known if said != gold]
    fits = [any(said == other and kind == also for _, other, also in known) for said, _, kind in missed]
    assert found.wrong == len(missed)
    if not missed:
        assert (found.share, found.chance) == (None, None)
        return
    assert found.share.value == pytest.approx(sum(fits) / len(missed))
    swapped = [
        other != gold and any(other == right and kind == also for _, right, also in known)
        for (_, gold, kind), (other, _, _) in itertools.product(missed, missed)
    ]
    assert found.chance == pytest.approx(sum(swapped) / len(swapped))


def test_texts_are_compared_without_case_and_spaces() -> None:
    found = same_relation_share([" french", " Dutch", "the"], ["French", "English", "Dutch"], ["l", "l", "l"])
    assert found.wrong == 2 and found.share.value == 0.5


def test_relations_are_the_datas_own_or_the_words_of_the_question() -> None:
    def document(record: int, prompt: str, about: str, **more: str) -> dict[str, object]:
        return {"record": record, "prompt": prompt, "about": about, **more}

    documents = [
        document(1, "The mother tongue of Ada is", "Ada", relation=""),
        document(1, "Where Ada is from, people speak", "Ada", relation=""),
        document(2, "The mother tongue of Max Planck is", "Max Planck"),
        document(3, "Ada was born in", "Ada", relation="P19"),
        document(4, "Nobody knows", "Someone"),
    ]
    mother = "The mother tongue of {} is"
    assert relations(documents) == (mother, mother, mother, "P19", "")


def test_no_heavy_package_is_imported() -> None:
    program = "import sys, impasto.studies.facts; assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
