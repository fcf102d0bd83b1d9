"""The tree of recipes: what it shares, and that it loses nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from impasto import moves
from impasto.recipe import Recipe
from impasto.trie import count, naive_calls, plant

LAYERS = 8


def recipe(text: str, *edits: str) -> Recipe:
    return Recipe.of("any", text, edits, layers=LAYERS)


def calls(*texts: str) -> int:
    return count(plant([recipe(text) for text in texts])).calls


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0:8"], 8),
        (["0:8", "0:8"], 8),
        (["0:8", "0:4"], 8),
        (["0:8", "0:4 5:8"], 8 + 3),
        (["0 {1:5}x3 5:8", "0 {1:5}x2 5:8", "0 {1:5} 5:8"], 1 + 3 * 4 + 3 * 3),
        (["0 {1:5} 5:8", "0:8"], 1 + 4 + 3 + 6),  # layer 1 at the same state runs once
        (["{0 1}", "{1 2}", "sum{0 1}"], 3),  # members are shared between groups and merges
        (["{0 1, 2}", "0 1 2"], 4),
        (["{{0 1} 2} 3"], 4),
        (["0.attn 0.mlp", "0"], 3),
    ],
)
def test_shared_calls(texts, expected):
    assert calls(*texts) == expected


def test_an_edited_layer_is_another_symbol():
    plain, edited = recipe("0:4"), recipe("0:4", "2.mlp.down_proj@0.1")
    assert count(plant([plain, edited])).calls == 4 + 2
    assert count(plant([edited, edited])).calls == 4


def test_an_edit_of_a_layer_that_does_not_run_changes_nothing():
    assert count(plant([recipe("0:4"), recipe("0:4", "7.mlp.down_proj@0.1")])).calls == 4


@given(st.lists(st.sampled_from(list(range(4))), min_size=1, max_size=6), st.integers(0, 3))
@settings(deadline=None)
def test_sharing_never_costs_and_every_recipe_arrives(starts, seed):
    schedules = [moves.reverse(9, n) for n in starts] + [moves.looped_parallel(9, n, 2) for n in starts]
    schedules += [moves.random_order(9, n, seed) for n in starts]
    recipes = [Recipe("any", schedule) for schedule in schedules]
    root = plant(recipes)
    arrived: list[int] = []
    queue = [root]
    while queue:
        node = queue.pop()
        arrived += node.recipes
        queue += [*node.symbols.values(), *node.bundles.values()]
    assert sorted(arrived) == list(range(len(recipes)))
    assert count(root).calls <= naive_calls(recipes)


def test_the_papers_study_of_32_layers_takes_about_a_tenth_of_the_naive_work():
    depth, schedules = 32, []
    for start in moves.starts(32):
        schedules += [moves.skip(depth, start), moves.middle_repeat(depth, start), moves.reverse(depth, start)]
        schedules += [moves.parallel(depth, start), moves.looped_parallel(depth, start, 3)]
        schedules += [moves.random_order(depth, start, seed) for seed in range(10)]
    for start in range(14):
        schedules += [moves.looped_parallel(depth, start, k) for k in range(1, 29)]
    recipes = list({s.fingerprint: Recipe("any", s) for s in schedules}.values())
    shared = count(plant(recipes))
    assert shared.calls < 0.15 * naive_calls(recipes)
    assert shared.alive <= 8  # hidden states at once, for 600 recipes


@pytest.mark.parametrize("depth", [6, 24, 80])
def test_live_states_do_not_grow_with_depth(depth):
    starts = moves.starts(depth)
    schedules = [moves.identity(depth), *(moves.swap_adjacent(depth, n) for n in range(depth - 1))]
    schedules += [moves.skip_one(depth, n) for n in range(depth)]
    schedules += [build(depth, n) for n in starts for build in (moves.skip, moves.reverse, moves.parallel)]
    schedules += [moves.looped_parallel(depth, n, 3) for n in starts]
    assert count(plant([Recipe("any", schedule) for schedule in schedules])).alive <= 8


def test_live_states_do_not_grow_with_the_number_of_recipes():
    def alive(seeds: int) -> int:
        return count(plant([Recipe("any", moves.random_order(32, 4, s)) for s in range(seeds)])).alive

    assert alive(200) <= alive(10) + 10
