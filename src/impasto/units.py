"""A sweep cut into units of work, each a subtrie of recipes on a shard of requests, for workers to share out.

Pure values and counting: no tensor, no model, no cluster. Two facts decide where to cut. Requests that stand in
different batches share nothing, so cutting between batches costs nothing. Recipes share what they begin with, so every
cut between recipes runs a beginning twice. Hence requests are cut first, along the batches that one process would run,
and recipes only where there are too few batches, at the places where little is run twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from impasto.forest import Node, batches, lay_out
from impasto.recipe import Recipe
from impasto.result import Request
from impasto.trie import Dressed, Symbol, count, dress, plant
from impasto.trie import Node as Place

PER_WORKER = 8  # units for each worker: the last ones to finish leave the others idle for at most about an eighth
SLACK = 0.1  # how much more than the evenest cut a part may cost, where that spares work done twice
TWICE = 0.1  # share of the layer calls that may be run twice to have more units than workers

Adds = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Unit:
    """Recipes that one worker runs on the same requests, all of which are to be scored, or all answered with text.

    Attributes:
        recipes: the subtrie; a single recipe where text is written.
        requests: the shard.
        cost: layer calls times tokens, as they will be run.
    """

    recipes: tuple[Recipe, ...]
    requests: tuple[Request, ...]
    cost: int

    @property
    def writes(self) -> bool:
        """Whether texts are asked for."""
        return self.requests[0].kind == "generate"

    def without(self, answered: Collection[int]) -> Unit | None:
        """What is left when the requests at these places are answered by all recipes; None if nothing is."""
        left = tuple(request for place, request in enumerate(self.requests) if place not in answered)
        return replace(self, requests=left, cost=self.cost * len(left) // len(self.requests)) if left else None


@dataclass(frozen=True, slots=True)
class Shard:
    """Requests that are run together.

    Attributes:
        requests: their places in the list that was asked, ascending.
        tokens: padded tokens that they take.
    """

    requests: tuple[int, ...]
    tokens: int


def to_score(
    recipes: Sequence[Recipe],
    requests: Sequence[Request],
    trees: Sequence[Node],
    owners: Sequence[int],
    *,
    budget: int,
    workers: int,
    wanted: int,
) -> list[Unit]:
    """Units in which every recipe meets every request exactly once.

    Args:
        recipes: what to run.
        requests: to be scored.
        trees: the requests' token sequences, as `forest.grow` has them.
        owners: for each sequence the place of its request in `requests`.
        budget: padded tokens of one batch.
        workers: how many work at the same time: at least so many units, if there is anything to cut.
        wanted: about how many units there should be.
    """
    if not recipes or not requests:
        return []
    cut = shards(len(requests), trees, owners, budget=budget, parts=wanted)
    return [
        Unit(part, tuple(requests[place] for place in shard.requests), calls * shard.tokens)
        for part, calls in _sparingly(recipes, -(-workers // len(cut)), round(wanted / len(cut)))
        for shard in cut
    ]


def to_write(recipes: Sequence[Recipe], requests: Sequence[Request], *, wanted: int) -> list[Unit]:
    """Units for requests that are answered with text: one recipe each, on requests of like length."""
    if not recipes or not requests:
        return []
    lengths = [len(request.context) for request in requests]
    order = sorted(range(len(requests)), key=lambda place: (-lengths[place], place))
    runs = _runs(lambda first, item: lengths[order[item]] + 1, len(order), max(1, round(wanted / len(recipes))))
    return [
        Unit(
            (recipe,),
            tuple(requests[place] for place in sorted(order[low:high])),
            recipe.schedule.calls * sum(lengths[place] + 1 for place in order[low:high]),
        )
        for recipe in recipes
        for low, high in runs
    ]


# Recipes ------------------------------------------------------------------------------------------------------------


def subtries(recipes: Sequence[Recipe], parts: int) -> list[tuple[Recipe, ...]]:
    """The recipes in about so many parts of like cost, with little work done in several of them.

    The recipes are put in the order of a walk over their tree and cut into runs. No part makes more than 1 + `SLACK`
    times the layer calls of the largest part of the evenest such cut.
    """
    ordered = [recipes[place] for place in _walked(plant(recipes))]
    before = _made_before(ordered)
    runs = _runs(lambda first, item: bisect_left(before[item], first), len(ordered), parts)
    return [tuple(ordered[low:high]) for low, high in runs]


def _sparingly(recipes: Sequence[Recipe], least: int, most: int) -> list[tuple[tuple[Recipe, ...], int]]:
    """Subtries with their layer calls: as many as `most` if few calls are made twice, else down to `least`."""
    whole = count(plant(recipes)).calls
    parts = max(least, most, 1)
    while True:
        cut = [(part, count(plant(part)).calls) for part in subtries(recipes, parts)]
        if parts <= least or sum(calls for _, calls in cut) <= (1 + TWICE) * whole:
            return cut
        parts = max(least, parts // 2)


def _walked(root: Place) -> list[int]:
    """The recipes in the order of a walk over the tree that leaves no branch before it is done."""
    order: list[int] = []
    waiting = [root]
    while waiting:
        place = waiting.pop()
        order += place.recipes
        waiting += reversed([*place.symbols.values(), *place.bundles.values()])
    return order


def _made_before(recipes: Sequence[Recipe]) -> list[list[int]]:
    """For each recipe and each of its layer calls, the last recipe before it that makes the same call, or -1; sorted.

    So a run of recipes that begins with number `first` makes as many new calls at a recipe as there are entries
    below `first`.
    """
    names: dict[tuple[int, Dressed], int] = {}
    last: dict[int, int] = {}
    made: list[list[int]] = []
    for number, recipe in enumerate(recipes):
        calls = set(_calls(dress(recipe), 0, names))
        made.append(sorted(last.get(call, -1) for call in calls))
        last.update(dict.fromkeys(calls, number))
    return made


def _calls(steps: Sequence[Dressed], state: int, names: dict[tuple[int, Dressed], int]) -> Iterator[int]:
    """A number for each layer call of the steps; two calls have the same if they run one layer on one hidden state."""
    for step in steps:
        following = names.setdefault((state, step), len(names) + 1)
        if isinstance(step, Symbol):
            yield following
        else:
            for branch in step.branches:
                yield from _calls(branch, state, names)
        state = following


# Requests -----------------------------------------------------------------------------------------------------------


def shards(requests: int, trees: Sequence[Node], owners: Sequence[int], *, budget: int, parts: int) -> list[Shard]:
    """The requests in at most about so many shards, none of which shares tokens with another within a batch.

    Batches are never cut, and all sequences of a request (the windows of a long text) stay together. They are packed
    with as little padding as there can be, which cuts finest; whoever runs a shard packs it anew by what a batch costs.

    Args:
        requests: how many there are.
        trees: their token sequences with what they have in common.
        owners: the request of each sequence.
        budget: padded tokens of one batch.
        parts: how many shards are wanted; there are no more than batches.
    """
    atoms = _atoms(trees, owners, budget)
    idle = sorted(set(range(requests)) - {place for atom in atoms for place in atom.requests})
    if not atoms:
        return [Shard(tuple(idle), 0)]
    found = [
        Shard(
            tuple(sorted(place for atom in atoms[low:high] for place in atom.requests)),
            sum(atom.tokens for atom in atoms[low:high]),
        )
        for low, high in _runs(lambda first, item: atoms[item].tokens, len(atoms), parts)
    ]
    return [replace(found[0], requests=tuple(sorted((*found[0].requests, *idle)))), *found[1:]]


def _atoms(trees: Sequence[Node], owners: Sequence[int], budget: int) -> list[Shard]:
    """The batches, those joined that have parts of one request."""
    forests = [lay_out(batch) for batch in batches(trees, budget)]
    joined = list(range(len(forests)))  # for each batch an earlier one it belongs with, or itself

    def first(batch: int) -> int:
        while joined[batch] != batch:
            batch = joined[batch]
        return batch

    home: dict[int, int] = {}
    for batch, forest in enumerate(forests):
        for sequence in forest.ends:
            low, high = sorted((first(batch), first(home.setdefault(owners[sequence], batch))))
            joined[high] = low
    places: dict[int, set[int]] = {}
    tokens: dict[int, int] = {}
    for batch, forest in enumerate(forests):
        atom = first(batch)
        places.setdefault(atom, set()).update(owners[sequence] for sequence in forest.ends)
        tokens[atom] = tokens.get(atom, 0) + forest.padded
    return [Shard(tuple(sorted(places[atom])), tokens[atom]) for atom in sorted(places)]


# Cutting a row ------------------------------------------------------------------------------------------------------


def _runs(adds: Adds, items: int, parts: int) -> list[tuple[int, int]]:
    """A row of items cut into about `parts` runs of like cost that cost as little as possible together.

    Args:
        adds: `adds(first, item)` is what an item adds to a run that begins with `first`; a run that begins earlier
            never gains more by an item.
        items: how many there are, at least one.
        parts: how many runs the evenest cut has, which says how much one run may cost.

    Returns:
        (low, high) of each run, in order.
    """
    if parts <= 1 or items == 1:
        return [(0, items)]
    low, high = 0, sum(adds(0, item) for item in range(items))
    while low < high:  # the smallest largest run
        middle = (low + high) // 2
        if _fits(adds, items, parts, middle):
            high = middle
        else:
            low = middle + 1
    limit = int((1 + SLACK) * high)
    cheapest: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first so many items: cost, runs, where the last begins
    cheapest += [(-1, 0, 0)] * items
    for first in range(items):
        before, runs, _ = cheapest[first]
        cost = 0
        for item in range(first, items):
            cost += adds(first, item)
            if cost > limit:
                break
            best = cheapest[item + 1]
            if best[0] < 0 or (before + cost, runs + 1) < best[:2]:
                cheapest[item + 1] = (before + cost, runs + 1, first)
    found: list[tuple[int, int]] = []
    end = items
    while end:
        found.append((cheapest[end][2], end))
        end = cheapest[end][2]
    return found[::-1]


def _fits(adds: Adds, items: int, parts: int, limit: int) -> bool:
    """Whether the row can be cut into so many runs that cost at most `limit` each; every run takes what it can."""
    first = cost = 0
    for item in range(items):
        cost += adds(first, item)
        if cost > limit:
            first, cost, parts = item, adds(item, item), parts - 1
            if parts < 1 or cost > limit:
                return False
    return True
