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
        size: nodes from here on, itself and the trees of branches left out; known when the tree is planted.
    """

    symbols: dict[Symbol, Node] = field(default_factory=dict)
    bundles: dict[Bundle, Node] = field(default_factory=dict)
    recipes: list[int] = field(default_factory=list)
    branches: Node | None = None
    arrivals: list[tuple[Node, Bundle]] = field(default_factory=list)
    size: int = 1

    @property
    def children(self) -> list[Node]:
        """The nodes that follow."""
        return [*self.symbols.values(), *self.bundles.values()]


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
    _measure(root)
    return root


def _measure(root: Node) -> None:
    """Note the size of every node."""
    order = [root]
    for node in order:
        order += node.children
        if node.branches is not None:
            order.append(node.branches)
    for node in reversed(order):
        node.size = 1 + sum(child.size for child in node.children)


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
class Kept:
    """The layer call whose output waits until all else that follows from its input is done.

    Attributes:
        symbol: the call.
        now: places in trees of branches: groups need them, and they do not go on.
        later: where the walk goes on in the end.
    """

    symbol: Symbol
    now: tuple[Node, ...]
    later: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Fork:
    """What follows from one state, in the order in which it is walked.

    The largest part comes last, when the state itself and all sums begun on it are free again. What has to be walked
    while a state is held is then at most half of what follows, so the states alive at once grow with the logarithm
    of the tree, not with its depth.

    Attributes:
        here: all places that share the state, see `together`.
        sides: layer calls, each walked to its end.
        kept: the call that is walked last; without it the last group is.
        groups: parallel groups with the places where they begin: those inside of branches, then the largest last.
    """

    here: tuple[Node, ...]
    sides: tuple[tuple[Symbol, list[Node]], ...]
    kept: Kept | None
    groups: tuple[tuple[Node, Bundle], ...]


def fork(nodes: Sequence[Node]) -> Fork:
    """The order of what follows from the state that all of these nodes have in common."""
    here = together(nodes)
    following = next_symbols(here)
    inner = [(node, bundle) for node in reversed(here[len(nodes) :]) for bundle in node.bundles]
    outer = [(node, bundle) for node in nodes for bundle in node.bundles]
    outer.sort(key=lambda group: group[0].bundles[group[1]].size)
    largest = max((node.bundles[bundle].size for node, bundle in outer), default=0)
    kept: Kept | None = None
    for symbol, children in following.items():
        later = tuple(node.symbols[symbol] for node in nodes if symbol in node.symbols)
        now = tuple(child for child in children if all(child is not other for other in later))
        size = sum(node.size for node in later)
        if size > largest and not any(node.children for node in now):
            kept, largest = Kept(symbol, now, later), size
    sides = tuple((s, children) for s, children in following.items() if kept is None or s != kept.symbol)
    return Fork(tuple(here), sides, kept, (*inner, *outer))


@dataclass(frozen=True, slots=True)
class Count:
    """What running a tree takes: layer calls, and how many hidden states live at once at the most."""

    calls: int
    alive: int


def count(root: Node, weigh: Callable[[Symbol], int] = lambda symbol: 1) -> Count:
    """Layer calls that the shared walk makes (each weighed by `weigh`), and the states alive at once."""
    total = 0
    peak = 0

    def visit(nodes: Sequence[Node], alive: int) -> None:
        nonlocal total, peak
        while True:
            way = fork(nodes)
            sums = len(way.groups)
            peak = max(peak, alive + sums + 1 + (way.kept is not None))
            total += sum(weigh(symbol) for symbol, _ in way.sides)
            for _, children in way.sides:
                visit(children, alive + sums + 1)
            if way.kept is not None:
                total += weigh(way.kept.symbol)
            for done, (place, bundle) in enumerate(way.groups[: None if way.kept else -1], 1):
                # the output that waits, the sums that are not finished, and the state that these began on
                waiting = (way.kept is not None) + (sums - done) + (done < sums)
                visit([place.bundles[bundle]], alive + waiting)
            if way.kept is not None:
                nodes = way.kept.later
            elif way.groups:
                place, bundle = way.groups[-1]
                nodes = [place.bundles[bundle]]
            else:
                return

    visit([root], 0)
    return Count(total, peak)


def naive_calls(recipes: Iterable[Recipe]) -> int:
    """Layer calls of the recipes one by one."""
    return sum(recipe.schedule.calls for recipe in recipes)
