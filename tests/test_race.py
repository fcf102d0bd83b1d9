"""Racing: the error rate is what it says, decisions are what the plain formula gives, and nothing is asked twice."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto import elimination, models
from impasto.elimination import Rules, beats, contest, drawing_order, interval, judge, largest, round_ends, weights
from impasto.errors import NotationError, UsageError
from impasto.evaluate import evaluate
from impasto.race import race
from impasto.recipe import Recipe
from impasto.result import Request, Response
from impasto.scoring import Scorer
from impasto.standings import Dropped, Effort, Race, Round, Survivor
from impasto.store import Store
from impasto.tasks import build
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def asking(scores):
    """An `ask` that looks scores [competitors, documents] up, and insists that nothing is asked twice."""
    asked = set()

    def ask(who, places):
        for pair in itertools.product(who, places):
            assert pair not in asked
            asked.add(pair)
        return scores[np.ix_(list(who), [document for _, document in places])]

    return ask


def run(scores, keep, *, seed=0, **rules):
    return contest(asking(scores), [scores.shape[1]], len(scores), Rules(keep, **rules), seed=seed)


# ── the test of one pair ─────────────────────────────────────────────────────────────────────────────────────


def evidence(change, reach=1.0):
    """What the module's text says, written down plainly."""
    stakes = [0.95 * 0.6**k for k in range(8)]
    return sum(math.prod(1 + b * d / reach for d in change) for b in stakes) / len(stakes)


PARTS = st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 9)), min_size=1, max_size=4)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_the_evidence_is_the_plain_formula(change):
    assert elimination.log_evidence(np.array(change), 1.0) == pytest.approx(math.log(evidence(change)), abs=1e-9)


@settings(max_examples=40)
@given(PARTS, st.integers(1, 4))
def test_evidence_against_a_true_hypothesis_is_one_at_most_on_average(parts, n):
    """For any distribution of differences with a mean that is not above zero: all outcomes are summed up."""
    total = sum(weight for _, weight in parts)
    mean = sum(value * weight for value, weight in parts) / total
    shifted = [(value - max(mean, 0), weight / total) for value, weight in parts]
    expected = sum(
        math.prod(share for _, share in outcome) * evidence([value for value, _ in outcome], reach=2.0)
        for outcome in itertools.product(shifted, repeat=n)
    )
    assert expected <= 1 + 1e-9


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-4, 4), min_size=2, max_size=5), min_size=1, max_size=2), st.data())
def test_the_same_without_replacement_and_by_strata(strata, data):
    """The mean over strata is what counts; documents are drawn from each, none twice."""
    off = sum(sum(column) / len(column) for column in strata) / len(strata)
    pool = [[value - max(off, 0) for value in column] for column in strata]
    n = data.draw(st.integers(1, min(map(len, pool))))
    draws = [
        [value for column in chosen for value in column]
        for chosen in itertools.product(*(list(itertools.combinations(column, n)) for column in pool))
    ]
    assert sum(evidence(draw, reach=8.0) for draw in draws) / len(draws) <= 1 + 1e-9


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 60), st.sampled_from([0.2, 0.01, 1e-4]))
def test_who_beats_whom_is_what_the_evidence_says_pair_by_pair(seed, rows, documents, level):
    rng = np.random.default_rng(seed)
    table = rng.normal(rng.normal(0, 1.5, (rows, 1)), 1, (rows, documents)).round(1)
    reach = largest(table, None)
    found = beats(table, level, reach)
    for i, j in itertools.product(range(rows), repeat=2):
        ours = evidence(table[i] - table[j], reach) if reach else 0
        assert found[i, j] == (ours >= 1 / level) or abs(ours * level - 1) < 1e-9
        assert not (found[i, j] and found[j, i]) and (not found[i, j] or table[i].mean() > table[j].mean())


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 80), st.sampled_from([0.2, 0.01, 1e-4]))
def test_the_interval_holds_the_mean_and_agrees_with_the_test(seed, documents, level):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2, (2, documents)) + rng.normal(0, 0.1, (2, documents)) * [[0], [rng.integers(2)]]
    table[1] += rng.random()
    reach = max(largest(table, None), 0.1)
    low, high = interval(table[0] - table[1], level, reach)
    assert -reach <= low <= (table[0] - table[1]).mean() <= high <= reach
    if abs(high) > 1e-9:
        assert (high < 0) == beats(table, level, reach)[1, 0]


def test_the_interval_covers_a_skewed_mean():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(80):
        low, high = interval(0.2 - (rng.random(50) < 0.2), 0.1, 1.0)
        hits.append(low <= 0 <= high)
    assert sum(hits) / len(hits) > 0.8


# ── the error rate ───────────────────────────────────────────────────────────────────────────────────────────


def world(kind, rng, competitors, keep, documents):
    """Scores where no one is truly better than another, the hardest case; the first `keep` stand for the best."""
    shape, rest = (competitors, documents), (competitors - keep, documents)
    easy = rng.normal(size=documents)
    if kind == "zero or one":
        return (rng.random(shape) < 1 / (1 + np.exp(-easy))).astype(float)
    scores = easy + rng.normal(0, 0.2, shape)
    if kind == "mostly a little better, seldom far worse":
        scores[keep:] += 0.1 - 5 * (rng.random(rest) < 0.02)
    if kind == "skewed":
        scores[keep:] += math.exp(0.5) - rng.lognormal(size=rest)
    return scores


WORLDS = ("even", "zero or one", "skewed", "mostly a little better, seldom far worse")


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("keep", [1, 3])
def test_one_of_the_best_is_dropped_no_more_often_than_stated(kind, keep):
    error, wrong = 0.2, 0
    for seed in range(60):
        scores = world(kind, np.random.default_rng([seed, keep]), 8, keep, 160)
        course = run(scores, keep, error=error, first=16, seed=seed)
        wrong += any(drop.who < keep for drop in course.dropped)
    assert wrong / 60 <= error  # far from the edge: a sum over pairs is generous


def test_the_rate_is_not_held_by_never_dropping_anyone():
    """Two equal competitors with scores of 0 and 1: the rule uses a part of the rate that it is given."""
    rng = np.random.default_rng(0)
    courses = [run(rng.integers(0, 2, (2, 100)).astype(float), 1, error=0.4, first=100) for _ in range(300)]
    wrong = sum(course.survivors == (1,) for course in courses)
    assert 0.02 < wrong / 300 <= 0.4


def test_without_the_last_bit_of_care_the_rate_would_be_missed():
    """Why not Student's t: where a few documents decide, it takes the worse for the better nearly always."""
    from scipy import stats

    rng = np.random.default_rng(0)
    change = 0.1 + rng.normal(0, 0.05, (100, 32)) - 5 * (rng.random((100, 32)) < 0.02)  # true mean: zero
    student = stats.ttest_1samp(change, 0, axis=1, alternative="greater").pvalue < 0.001
    ours = np.array([elimination.log_evidence(row, 5.2) >= math.log(1 / 0.001) for row in change])
    assert student.mean() > 0.3 and ours.mean() == 0


def test_the_best_few_are_found_with_a_part_of_the_work():
    rng = np.random.default_rng(0)
    chance = np.linspace(0.05, 0.8, 60)
    hits, work = [], []
    for seed in range(3):
        scores = (rng.random(1000) < chance[:, None]).astype(float)
        course = run(scores, 5, seed=seed)
        hits.append(set(range(55, 60)) <= set(course.survivors))
        asked = np.diff([0, *course.rounds]) @ [len(racing) for racing in course.racing]
        work.append(asked / scores.size)
        assert len(course.survivors) < 15
    assert all(hits) and max(work) < 0.4


# ── a round, a contest ───────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 3))
def test_equal_competitors_share_their_fate(seed, halve, keep):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (5, 60)) * 0.1 + rng.normal(0, 1, (5, 1)).round(1)
    twins = np.repeat(scores, 2, axis=0)[rng.permutation(10)]
    left = set(run(twins, keep, halve=halve, first=8).survivors)
    for i, j in itertools.combinations(range(10), 2):
        if (twins[i] == twins[j]).all():
            assert (i in left) == (j in left)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 5))
def test_a_round_never_takes_one_of_its_best_few_and_says_why_the_others_went(seed, halve, keep):
    rng = np.random.default_rng(seed)
    scores = rng.normal(rng.normal(0, 2, (6, 1)), 1, (6, 80))
    scores[scores > 5] = math.nan
    whole = np.isfinite(scores).all(axis=1)
    course = run(scores, keep, halve=halve, first=10)
    assert sorted([*course.survivors, *(drop.who for drop in course.dropped)]) == list(range(6))
    assert len(course.survivors) >= min(keep, whole.sum())
    assert list(course.scores) == sorted(course.scores, reverse=True)
    for drop in course.dropped:
        if drop.reason == "not finite":
            assert not whole[drop.who] and drop.difference is None and drop.against is None
            continue
        assert drop.low <= drop.difference <= drop.high and drop.difference < 0
        assert drop.high <= 1e-9 or drop.reason == "halved"
        assert drop.documents == course.rounds[drop.round - 1] and drop.who in course.racing[drop.round - 1]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_the_order_of_the_competitors_does_not_matter(seed, halve):
    rng = np.random.default_rng(seed)
    scores = rng.normal(rng.normal(0, 1, (6, 1)), 1, (6, 100))
    shuffled = rng.permutation(6)
    one, two = run(scores, 2, halve=halve, first=8), run(scores[shuffled], 2, halve=halve, first=8)
    assert list(one.survivors) == [int(shuffled[i]) for i in two.survivors]


def test_halving_keeps_the_better_half_and_all_that_tie_with_its_last():
    rows = np.array([[3, 3], [2, 2], [1, 1], [1, 1], [0, 0], [0, 0]], float)
    drops = judge(rows, range(10, 16), Rules(1, halve=True), 0.01, 1, 3.0)
    assert [(drop.who, drop.reason, drop.against) for drop in drops] == [(14, "halved", 12), (15, "halved", 12)]


def test_a_competitor_with_a_score_that_is_not_finite_goes_and_the_others_are_not_touched():
    rng = np.random.default_rng(0)
    scores = rng.random((4, 40))
    scores[0] = 2
    scores[0, 3], scores[2, 5] = math.inf, math.nan
    course = run(scores, 1, first=40)
    assert {drop.who: drop.reason for drop in course.dropped} == {0: "not finite", 2: "not finite"}
    nothing = run(np.full((3, 8), math.nan), 1)
    assert nothing.survivors == () and len(nothing.rounds) == 1


def test_strata_count_the_same_whatever_their_size():
    scores = {0: np.array([[1.0] * 100, [0.0] * 100]), 1: np.array([[0.0] * 4, [1.5] * 4])}

    def ask(who, places):
        return np.array([[scores[stratum][i, document] for stratum, document in places] for i in who])

    course = contest(ask, [100, 4], 2, Rules(1))
    assert course.survivors == (1, 0) and course.scores == (pytest.approx(0.75), pytest.approx(0.5))


def test_an_unequal_stratum_widens_the_reach():
    """Documents that count twice can also tell twice as much."""
    assert weights([0, 0, 0, 1]).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert weights([4, 2, 2, 4]).tolist() == [1, 1, 1, 1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99))
def test_the_order_takes_every_document_once_and_each_beginning_is_even(strata, seed):
    order = drawing_order(strata, seed)
    assert sorted(order) == [(s, d) for s, size in enumerate(strata) for d in range(size)]
    assert order == drawing_order(strata, seed)
    for end in range(len(order)):
        counts = [sum(s == stratum for s, _ in order[:end]) for stratum in range(len(strata))]
        open_ones = [count for count, size in zip(counts, strata, strict=True) if count < size]
        assert not open_ones or max(counts) - min(open_ones) <= 1


def test_another_seed_is_another_order():
    assert drawing_order([50], 0) != drawing_order([50], 1)
    assert [document for _, document in drawing_order([6], 0)] == [1, 3, 0, 5, 2, 4]  # on every machine


@given(st.integers(1, 5000), st.integers(1, 200), st.floats(1.1, 8), st.integers(1, 5))
def test_rounds_grow_geometrically_and_end_with_everything(documents, first, growth, strata):
    ends = round_ends(documents, first, growth, strata)
    assert ends[-1] == documents and list(ends) == sorted(set(ends))
    assert all(end % strata == 0 for end in ends[:-1])
    assert len(ends) == 1 or ends[-1] / ends[-2] > math.sqrt(growth)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0}, "a race keeps at least one, not 0"),
        ({"keep": 1, "error": 0.7}, "an error rate is between 0 and 0.5, not 0.7"),
        ({"keep": 1, "first": 0}, "the first round needs at least one document, not 0"),
        ({"keep": 1, "growth": 1.0}, "each round must have 1.1 times the documents of the last at least, not 1.0"),
        ({"keep": 1, "reach": -1.0}, "the largest difference of two scores is a positive number, not -1.0"),
        ({"keep": 3}, "nothing to race for: 3 recipes, of which 3 are to be kept"),
        ({"keep": 1, "reach": 1.5}, "two scores of one document differ by 2, which is more than reach=1.5"),
    ],
)
def test_numbers_that_cannot_be(options, text):
    scores = np.array([[0.0, 1], [2, 0], [1, 1]])
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        contest(asking(scores), [2], 3, Rules(**options))


def test_no_documents():
    with pytest.raises(UsageError, match="^a race needs documents$"):
        contest(asking(np.empty((2, 0))), [], 2, Rules(1))


def test_deciding_and_showing_need_no_torch():
    program = "import sys, impasto.standings; assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# ── recipes on a model ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(layers=4), tiny_tokenizer(), name="tiny")


RECIPES = [Recipe.of("tiny", text, layers=4) for text in ("0:4", "0 2 1 3", "0 3", "0 {1 2} 3", "3 2 1 0")]


def requests(count=60):
    rng = np.random.default_rng(0)
    return [
        Request("loglikelihood", "".join(rng.choice(list("abcdefgh "), 6)), str(rng.choice(list("abcdefgh"))))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def like_the_full_model(loaded):
    """A score on which the full model wins for certain: minus the distance to its own log-likelihood."""
    asked = requests()
    own = Scorer(loaded.model, loaded.tokenizer).score(RECIPES[:1], asked).loglikelihood[0]
    truth = {request.fingerprint: float(value) for request, value in zip(asked, own, strict=True)}
    return lambda request, response: -min(1.0, abs(response.loglikelihood - truth[request.fingerprint]))


def test_the_race_is_the_contest_of_the_plain_scores(loaded, like_the_full_model):
    asked = requests()
    answers = Scorer(loaded.model, loaded.tokenizer).score(RECIPES, asked).loglikelihood
    scores = np.array(
        [[like_the_full_model(q, Response(float(x))) for q, x in zip(asked, row, strict=True)] for row in answers]
    )
    found = race(loaded, RECIPES, asked, keep=1, first=10, reach=1.0, score=like_the_full_model)
    course = run(scores, 1, first=10, reach=1.0)
    assert [s.recipe for s in found.survivors] == [RECIPES[i] for i in course.survivors]
    assert [s.score for s in found.survivors] == pytest.approx(list(course.scores), abs=1e-4)
    assert [(d.recipe, d.round, d.reason) for d in found.dropped] == [
        (RECIPES[d.who], d.round, d.reason) for d in course.dropped
    ]
    assert found.best[0].recipe == RECIPES[0] and found.dropped and found.share < 1
    assert found.rounds[-1].documents < found.documents == 60


def test_without_a_score_the_log_likelihood_counts(loaded):
    asked = requests(12)
    found = race(loaded, RECIPES, [*asked, asked[0]], keep=2)
    means = Scorer(loaded.model, loaded.tokenizer).score(RECIPES, asked).loglikelihood.mean(axis=1)
    assert found.documents == 12 and len(found.survivors) == len(RECIPES)
    assert {s.recipe: s.score for s in found.survivors} == {
        recipe: pytest.approx(mean, abs=1e-4) for recipe, mean in zip(RECIPES, means, strict=True)
    }
    assert found.share == 1 and found.effort == found.whole


def test_tasks_race_on_the_scores_that_an_evaluation_gives(loaded, tmp_path):
    tasks = build(["impasto_tiny_choice", "impasto_tiny_rolling", "impasto_tiny_generate"])
    with Store(tmp_path / "race") as store:
        found = race(loaded, RECIPES[:3], tasks, keep=1, first=9, store=store)
        assert store.results(store.settings()[0]) == [] and store.tasks() == {}
    assert [one.documents for one in found.rounds] == [9, 18, 36, 52]
    with Store(tmp_path / "whole") as store:
        results = evaluate(loaded, RECIPES[:3], tasks, store)
    expected = {}
    for recipe in RECIPES[:3]:
        means = [
            np.mean(result.scores[task.metric]) * (1 if task.higher_is_better else -1)
            for task in tasks
            for result in results
            if result.recipe == recipe.fingerprint and result.task == task.name
        ]
        expected[recipe] = np.mean(means)
    assert {s.recipe: s.score for s in found.survivors} == {
        recipe: pytest.approx(score, abs=1e-4) for recipe, score in expected.items()
    }
    assert found.effort.answers == found.whole.answers == 3 * len({r.fingerprint for t in tasks for r in t.requests})


def test_an_interrupted_race_goes_on_where_it_was(loaded, like_the_full_model, tmp_path, monkeypatch):
    options = {"keep": 1, "first": 8, "reach": 1.0, "score": like_the_full_model, "batch_tokens": 64}
    whole = race(loaded, RECIPES, requests(), **options)
    asked = []
    score = Scorer.score

    def counted(self, who, what, *, on_batch, progress):
        def note(batch):
            on_batch(batch)
            asked.extend(itertools.product((r.fingerprint for r in who), (what[i].fingerprint for i in batch.requests)))

        return score(self, who, what, on_batch=note, progress=progress)

    monkeypatch.setattr(Scorer, "score", counted)

    def stop(phase, share):
        if phase.startswith("round 2") and share > 0.3:
            raise KeyboardInterrupt

    with Store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            race(loaded, RECIPES, requests(), store=store, progress=stop, **options)
        assert asked
        again = race(loaded, RECIPES, requests(), store=store, **options)
        before = len(asked)
        third = race(loaded, RECIPES, requests(), store=store, **options)
    assert len(asked) == len(set(asked)) == before == whole.effort.answers
    assert third == again
    assert [(d.recipe, d.round, d.reason) for d in again.dropped] == [
        (d.recipe, d.round, d.reason) for d in whole.dropped
    ]
    assert (again.effort, again.whole, again.best[0].recipe) == (whole.effort, whole.whole, whole.best[0].recipe)


def test_a_recipe_that_breaks_is_dropped_for_that_reason():
    import torch

    broken = models.adopt(tiny_model(layers=4), tiny_tokenizer(), name="broken")
    race(broken, RECIPES[:2], requests(4), keep=1)  # its structure is known before the weights break
    with torch.no_grad():
        broken.model.model.layers[2].mlp.up_proj.weight.fill_(math.nan)
    for asked in (requests(20), build(["impasto_tiny_choice"])):
        found = race(broken, [Recipe.of("b", text) for text in ("0 3", "0 1 3", "0 2 3")], asked, keep=1)
        (drop,) = [drop for drop in found.dropped if drop.reason == "not finite"]
        assert str(drop.recipe.schedule) == "0 2 3" and drop.round == 1
        assert "not finite" in found.text()


def test_edits_race_too(loaded, like_the_full_model):
    edited = Recipe.of("tiny", "0:4", ["1:3.mlp.*@0"], layers=4)
    found = race(loaded, [edited, RECIPES[0]], requests(), keep=1, reach=1.0, score=like_the_full_model)
    assert found.best[0].recipe == RECIPES[0] and found.best[0].score == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "score", "text"),
    [
        ("both", None, "a race asks either tasks or single requests, not both"),
        (
            "tasks",
            lambda request, response: 0.0,
            "tasks have scores of their own; a score function is for single requests",
        ),
        ("generate", None, "requests that generate text need a score function"),
        ("nothing", None, "a race needs documents"),
    ],
)
def test_what_cannot_be_asked(loaded, asked, score, text):
    tasks = build(["impasto_tiny_choice"])
    what = {
        "both": [*tasks, *requests(2)],
        "tasks": tasks,
        "generate": [Request("generate", "a", options="{}")],
        "nothing": [],
    }[asked]
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        race(loaded, RECIPES, what, keep=1, score=score)


def test_recipes_that_do_not_fit_or_are_one(loaded):
    with pytest.raises(NotationError):
        race(loaded, [RECIPES[0], Recipe.of("tiny", "0:9")], requests(2), keep=1)
    with pytest.raises(UsageError, match="nothing to race for: 1 recipes, of which 1 are to be kept"):
        race(loaded, [RECIPES[0], RECIPES[0]], requests(2), keep=1)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────


def example(reason="worse"):
    full, swap, short = RECIPES[:3]
    return Race(
        rules=Rules(1, halve=reason == "halved"),
        seed=7,
        documents=100,
        survivors=(Survivor(full, 0.75),),
        dropped=(
            Dropped(swap, 1, 32, "not finite", None, None, None, None),
            Dropped(short, 2, 64, reason, full, -0.5, -0.75, -0.125),
        ),
        rounds=(Round(32, 3, 1, Effort(96, 600)), Round(64, 2, 1, Effort(64, 400))),
        whole=Effort(300, 4000),
        level=0.0125,
    )


def test_the_text():
    assert (
        example().text()
        == """\
race for the best 1 of 3 recipes: 64 of 100 documents asked, seed 7

round  documents  recipes  dropped
    1         32        3        1
    2         64        2        1

kept  score   recipe
   1  0.7500  0:4

dropped in  after  reason      difference                  recipe   lost to
round 1        32  not finite                              0 2 1 3
round 2        64  worse       -0.5000 [-0.7500, -0.1250]  0 3      0:4

work: 25.0% of measuring all (160 of 300 answers)
the probability that one of the truly best 1 was dropped is at most 0.05
these scores chose the recipes and flatter them: measure the winners on other documents"""
    )


def test_a_race_with_halving_claims_no_error_rate():
    halved = example("halved")
    assert halved.error is None and json.loads(halved.to_json())["error"] is None
    assert "1 recipes were dropped by halving, sure or not: this choice has no error rate" in halved.text()


def test_the_json():
    data = json.loads(example().to_json())
    assert data["survivors"] == [
        {"recipe": {**RECIPES[0].to_dict(), "fingerprint": RECIPES[0].fingerprint}, "score": 0.75}
    ]
    assert data["dropped"][1]["against"] == RECIPES[0].fingerprint and data["dropped"][0]["difference"] is None
    assert (data["answers"], data["answers_of_all"], data["layer_tokens"], data["error"]) == (160, 300, 1000, 0.05)


def test_the_page_s_example_runs(tmp_path, capsys):
    text = (ROOT / "docs" / "racing.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    exec(program, {"model": tiny_model(layers=6), "tokenizer": tiny_tokenizer(), "folder": tmp_path})
    assert capsys.readouterr().out.startswith("race for the best 2 of ")
