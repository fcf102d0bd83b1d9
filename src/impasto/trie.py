"""The layer calls of many recipes as one tree, so that what they begin with in common is run once.

Pure values and counting; `impasto.scoring` walks the tree with hidden states. A call of an edited layer is another
symbol than a call of the plain one. At every node the branches of the parallel groups that start there are planted in
a tree of their own, `branches`, which is walked together with the node: a layer that is both the next step of one
recipe and a member of another's group runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from impasto.edit import Edit
from impasto.recipe import Recipe
from impasto.steps import Call, Merge, Step


@dataclass(frozen=True, slots=True)
class Symbol:
    """A layer call together with the edits that its layer wears in this recipe."""

    call: Call
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A parallel group of dressed branches."""

    branches: tuple[tuple[Dressed, ...], ...]
    merge: Merge


Dressed: TypeAlias = Symbol | Bundle


@dataclass(slots=True, eq=False)
class Node:
    """A place in the tree: one hidden state that some recipes have in common.

    Attributes:
        symbols: the next layer calls.
        bundles: the next parallel groups.
        recipes: indices of the recipes that end here.
        branches: the branches of all `bundles`, planted together; its ends are `arrivals`.
        arrivals: groups (of the node that owns this tree of branches) for which a branch ends here, with repetition.
    """

    symbols: dict[Symbol, Node] = field(default_factory=dict)
    bundles: dict[Bundle, Node] = field(default_factory=dict)
    recipes: list[int] = field(default_factory=list)
    branches: Node | None = None
    arrivals: list[tuple[Node, Bundle]] = field(default_factory=list)


def dress(recipe: Recipe) -> tuple[Dressed, ...]:
    """The steps of a recipe with each call's edits beside it."""
    worn: dict[int, tuple[Edit, ...]] = {}
    for edit in recipe.edits:
        for layer in edit.layers:
            worn[layer] = (*worn.get(layer, ()), edit)

    def walk(steps: Iterable[Step]) -> tuple[Dressed, ...]:
        return tuple(
            Symbol(step, worn.get(step.layer, ()))
            if isinstance(step, Call)
            else Bundle(tuple(walk(branch) for branch in step.branches), step.merge)
            for step in steps
        )

    return walk(recipe.schedule.steps)


def plant(recipes: Sequence[Recipe]) -> Node:
    """One tree for all recipes; recipe i is in the `recipes` of the node where it ends."""
    root = Node()
    for index, recipe in enumerate(recipes):
        _insert(root, dress(recipe)).recipes.append(index)
    return root


def _insert(node: Node, steps: tuple[Dressed, ...]) -> Node:
    for step in steps:
        if isinstance(step, Symbol):
            node = node.symbols.setdefault(step, Node())
            continue
        if step not in node.bundles:
            node.bundles[step] = Node()
            if node.branches is None:
                node.branches = Node()
            for branch in step.branches:
                _insert(node.branches, branch).arrivals.append((node, step))
        node = node.bundles[step]
    return node


def together(nodes: Sequence[Node]) -> list[Node]:
    """The nodes and their trees of branches: all that starts from one and the same hidden state, owners first."""
    found = list(nodes)
    for node in found:
        if node.branches is not None:
            found.append(node.branches)
    return found


def next_symbols(nodes: Sequence[Node]) -> dict[Symbol, list[Node]]:
    """The distinct layer calls that follow from one state, each with the nodes it leads to."""
    following: dict[Symbol, list[Node]] = {}
    for node in nodes:
        for symbol, child in node.symbols.items():
            following.setdefault(symbol, []).append(child)
    return following


@dataclass(frozen=True, slots=True)
class Count:
    """What running a tree takes: layer calls, and how many hidden states live at once at the most."""

    calls: int
    alive: int


def count(root: Node, weigh: Callable[[Symbol], int] = lambda symbol: 1) -> Count:
    """Layer calls that the shared walk makes (each weighed by `weigh`), and the states alive at once."""
    total = 0
    peak = 0

    def visit(nodes: list[Node], alive: int) -> None:
        nonlocal total, peak
        while True:
            here = together(nodes)
            sums = sum(len(node.bundles) for node in here)
            peak = max(peak, alive + sums + 1)
            following = list(next_symbols(here).items())
            groups = [child for node in reversed(here) for child in node.bundles.values()]
            total += sum(weigh(symbol) for symbol, _ in following)
            tail = [following.pop()[1]] if following and not groups else [[groups.pop()]] if groups else []
            for _, children in following:
                visit(children, alive + sums + 1)
            for child in groups:
                visit([child], alive + sums)
            if not tail:
                return
            nodes = tail[0]

    visit([root], 0)
    return Count(total, peak)


def naive_calls(recipes: Iterable[Recipe]) -> int:
    """Layer calls of the recipes one by one."""
    return sum(recipe.schedule.calls for recipe in recipes)
