"""The forest holds every sequence once, whole, whatever is shared and however it is cut into batches."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from impasto import forest as cutting
from impasto.forest import MAX_LEVELS, Forest, Node, batches, grow, lay_out

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=25)


def path(forest: Forest, sequence: int) -> tuple[int, ...]:
    level, row = forest.ends[sequence]
    tokens: tuple[int, ...] = ()
    while level >= 0:
        tokens = forest.levels[level][row].tokens + tokens
        row, level = forest.levels[level][row].parent, level - 1
    return tokens


@given(SEQUENCES, st.booleans(), st.integers(1, 80), st.sampled_from((0, 1, 5, 100)))
@settings(max_examples=300, deadline=None)
def test_every_sequence_stands_once_and_whole(sequences, share, budget, overhead):
    packed = [lay_out(batch) for batch in batches(grow(sequences, share=share), budget, overhead)]
    found = [s for forest in packed for s in forest.ends]
    assert sorted(found) == list(range(len(sequences)))
    for forest in packed:
        assert len(forest.levels) <= MAX_LEVELS
        for s in forest.ends:
            assert path(forest, s) == sequences[s]
            for count in range(len(sequences[s]) + 1):
                places = forest.tail(s, count)
                found = tuple(forest.levels[level][row].tokens[column] for level, row, column in places)
                assert found == sequences[s][len(sequences[s]) - count :]
        for level, rows in enumerate(forest.levels):
            for row in rows:
                above = forest.levels[level - 1][row.parent] if level else None
                assert row.past == (0 if above is None else above.past + len(above.tokens))


@given(SEQUENCES)
@settings(deadline=None)
def test_sharing_never_runs_more_tokens(sequences):
    shared = lay_out(grow(sequences)).tokens
    assert shared <= lay_out(grow(sequences, share=False)).tokens <= sum(map(len, sequences))


def test_the_choices_of_a_question_share_it_and_questions_share_the_examples_before_them():
    examples, sequences = tuple(range(100, 200)), []
    for question in range(5):
        asked = examples + tuple(range(1000 + 20 * question, 1020 + 20 * question))
        sequences += [(*asked, choice) for choice in range(4)]
    laid = lay_out(grow(sequences))
    assert [len(level) for level in laid.levels] == [1, 5, 20]
    assert laid.tokens == 100 + 5 * 20 + 20


def test_a_single_common_token_is_not_worth_a_level():
    sequences = [(1, *range(10 * i, 10 * i + 9)) for i in range(5, 9)]
    assert [len(level) for level in lay_out(grow(sequences)).levels] == [4]


def cheapest(trees: list[Node], budget: int, overhead: int) -> int:
    """The oracle: the least cost of any way to cut the sorted trees into batches, each laid out."""
    if not trees:
        return 0
    costs = []
    for count in range(1, len(trees) + 1):
        forest = lay_out(trees[:count])
        if forest.padded <= budget or count == 1:
            costs.append(forest.padded + overhead * len(forest.levels) + cheapest(trees[count:], budget, overhead))
    return min(costs)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.integers(0, 20))
@settings(deadline=None)
def test_batches_are_cut_where_that_is_cheapest(sequences, overhead):
    trees = grow(sequences)
    budget = max(lay_out([tree]).padded for tree in trees) + 15  # no tree is split
    packed = [lay_out(batch) for batch in batches(trees, budget, overhead)]
    ordered = sorted(trees, key=lambda tree: (tree.height, len(tree.tokens)), reverse=True)
    spent = sum(map(cost(overhead), packed))
    assert spent <= cheapest(ordered, budget, overhead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_shallower", lambda trees, *_: trees)
        packed = [lay_out(batch) for batch in batches(trees, budget, overhead)]
    assert sum(map(cost(overhead), packed)) == cheapest(ordered, budget, overhead)


def cost(overhead: int) -> Callable[[Forest], int]:
    return lambda laid: laid.padded + overhead * len(laid.levels)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.integers(1, 40))
@settings(deadline=None)
def test_levels_that_spare_less_than_they_cost_are_dropped(sequences, overhead):
    (batch,) = batches(grow(sequences), 10_000, 10_000)  # so dear that one batch of one level is best
    assert len(lay_out(batch).levels) == 1
    for batch in batches(grow(sequences), 10_000, overhead):
        laid = lay_out(batch)
        flat = lay_out(grow([sequences[s] for s in laid.ends], share=False))
        assert cost(overhead)(laid) <= cost(overhead)(flat)


def test_a_long_common_beginning_stays_a_level():
    sequences = [(*range(100), 1000 + i) for i in range(4)]
    (batch,) = batches(grow(sequences), 10_000, 50)
    assert [len(level) for level in lay_out(batch).levels] == [1, 4]
    (batch,) = batches(grow(sequences), 10_000, 400)
    assert [len(level) for level in lay_out(batch).levels] == [4]
    (batch,) = batches(grow(sequences), 120, 400)  # without it the batch would be too large
    assert [len(level) for level in lay_out(batch).levels] == [1, 4]


def test_no_requests_are_no_batches():
    assert grow([]) == [] and batches([], 100) == []


@given(SEQUENCES, st.integers(30, 100))
@settings(deadline=None)
def test_a_batch_keeps_to_its_budget_unless_one_sequence_is_longer(sequences, budget):
    for batch in batches(grow(sequences), budget):
        forest = lay_out(batch)
        longest = max(len(sequences[s]) for s in forest.ends)
        assert forest.padded <= budget or len(forest.ends) == 1 or longest * 2 > budget


@pytest.mark.parametrize("length", [1500])
def test_long_chains_of_prefixes_do_not_exhaust_the_stack(length):
    sequences = [tuple(range(n)) for n in range(1, length)]
    forests = [lay_out(batch) for batch in batches(grow(sequences), 100_000)]
    assert sum(len(forest.ends) for forest in forests) == length - 1
