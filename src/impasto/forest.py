"""Token sequences as a forest: what several of them begin with stands once.

A multiple-choice question is asked once and its choices hang below it; the worked examples before a whole task hang
above its questions. A forest has a few *levels*; each level is a rectangle of rows (padded on the right), and each row
below the first level continues one row of the level above. Pure values: no tensor, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_LEVELS = 4
CUTS = 64  # places in a full batch where it may be cut
MIN_SAVING = 0.15  # a common beginning stands alone where that spares this share of the tokens below it


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens that stand together, and what continues them."""

    tokens: tuple[int, ...]
    children: tuple[Node, ...]
    members: tuple[int, ...]  # indices of the sequences that end here

    @property
    def size(self) -> int:
        """Tokens of this node and everything below it."""
        return len(self.tokens) + sum(child.size for child in self.children)

    @property
    def height(self) -> int:
        """Tokens on the longest path from here down."""
        return len(self.tokens) + max((child.height for child in self.children), default=0)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a level."""

    tokens: tuple[int, ...]
    parent: int  # row in the level above, -1 at the top
    past: int  # tokens on the path above this row


@dataclass(frozen=True)
class Forest:
    """Sequences laid out in levels.

    `levels[i]` are the rows of level i. `ends[s]` is, for sequence s, the (level, row) in which it ends.
    """

    levels: tuple[tuple[Row, ...], ...]
    ends: dict[int, tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Tokens run, padding left out."""
        return sum(len(row.tokens) for level in self.levels for row in level)

    @property
    def padded(self) -> int:
        """Tokens run, padding included."""
        return sum(len(level) * max(len(row.tokens) for row in level) for level in self.levels)

    def tail(self, sequence: int, count: int) -> list[tuple[int, int, int]]:
        """Where the last `count` tokens of a sequence stand, in reading order: (level, row, column) of each."""
        level, row = self.ends[sequence]
        found: list[tuple[int, int, int]] = []
        while len(found) < count:
            own = len(self.levels[level][row].tokens)
            first = max(0, own - (count - len(found)))
            found = [(level, row, column) for column in range(first, own)] + found
            row, level = self.levels[level][row].parent, level - 1
        return found


def grow(sequences: Sequence[tuple[int, ...]], *, share: bool = True) -> list[Node]:
    """The common beginnings of `sequences`, as a list of trees.

    A beginning becomes a node of its own only where that spares at least `MIN_SAVING` of the tokens below it; equal
    sequences are one node.

    Args:
        sequences: token ids; empty ones are not allowed.
        share: False keeps every distinct sequence whole.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    for index in order:
        if groups and groups[-1][0] == sequences[index]:
            groups[-1][1].append(index)
        else:
            groups.append((sequences[index], [index]))
    entries = [(tokens, tuple(members)) for tokens, members in groups]
    if not entries:
        return []
    if not share:
        return [Node(tokens, (), members) for tokens, members in entries]
    return _grow(entries, 0, 1)


Entry = tuple[tuple[int, ...], tuple[int, ...]]


def _common(first: tuple[int, ...], last: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)


def _grow(entries: list[Entry], start: int, level: int) -> list[Node]:
    """Trees for sorted distinct sequences that agree on their first `start` tokens."""
    nodes: list[Node] = []
    for low, high in _families(entries, start, level):
        block = entries[low:high]
        tokens, members = block[0]
        if len(block) == 1:
            nodes.append(Node(tokens[start:], (), members))
            continue
        shared = _common(block[0][0], block[-1][0])
        own = members if len(tokens) == shared else ()
        children = _grow(block[1:] if own else block, shared, level + 1)
        nodes.append(Node(tokens[start:shared], tuple(children), own))
    return nodes


def _families(entries: list[Entry], start: int, level: int) -> Iterator[tuple[int, int]]:
    """Cut sorted entries into runs; a run of more than one entry becomes a node with its common beginning."""
    if level >= MAX_LEVELS:
        yield from ((i, i + 1) for i in range(len(entries)))
        return
    yield from _runs(entries, 0, len(entries), start)


def _runs(entries: list[Entry], low: int, high: int, start: int) -> Iterator[tuple[int, int]]:
    if high - low == 1:
        yield low, high
        return
    shared = _common(entries[low][0], entries[high - 1][0])
    below = sum(len(tokens) - start for tokens, _ in entries[low:high])
    spared = (shared - start) * (high - low - 1)
    if shared > start and spared >= MIN_SAVING * below:
        yield low, high
        return
    first = low
    for i in range(low + 1, high + 1):
        if i == high or entries[i][0][: shared + 1] != entries[first][0][: shared + 1]:
            yield from _runs(entries, first, i, start)
            first = i


def lay_out(trees: Sequence[Node]) -> Forest:
    """The levels of a list of trees; rows of one level are sorted so that neighbours have like lengths."""
    levels: list[tuple[Row, ...]] = []
    ends: dict[int, tuple[int, int]] = {}
    current = [(tree, -1, 0) for tree in trees]
    while current:
        current.sort(key=lambda item: len(item[0].tokens))
        level = len(levels)
        levels.append(tuple(Row(node.tokens, parent, past) for node, parent, past in current))
        following: list[tuple[Node, int, int]] = []
        for row, (node, _, past) in enumerate(current):
            ends.update((member, (level, row)) for member in node.members)
            following.extend((child, row, past + len(node.tokens)) for child in node.children)
        current = following
    return Forest(tuple(levels), ends)


Shape = tuple[tuple[int, int], ...]  # (rows, longest row) of each level


def _shape(tree: Node) -> Shape:
    """The rectangles that a tree takes, level by level."""
    below: Shape = ()
    for child in tree.children:
        below = _beside(below, _shape(child))
    return ((1, len(tree.tokens)), *below)


def _beside(one: Shape, other: Shape) -> Shape:
    """The rectangles of two forests laid out together."""
    long, short = (one, other) if len(one) >= len(other) else (other, one)
    both = tuple((a + b, max(v, w)) for (a, v), (b, w) in zip(long, short, strict=False))
    return both + long[len(short) :]


def _padded(shape: Shape) -> int:
    return sum(rows * width for rows, width in shape)


def _cost(shape: Shape, overhead: int) -> int:
    """Tokens, padding included, and what the levels cost beside them."""
    return _padded(shape) + overhead * len(shape)


def batches(trees: Sequence[Node], budget: int, overhead: int = 0) -> list[list[Node]]:
    """Pack trees into batches of at most `budget` padded tokens each; a tree that is larger is split below its top.

    Trees of like height come together, longest first, so that the first batch shows whether memory suffices. They are
    cut where that makes the whole cheapest: few batches run few passes, many batches have little padding.

    Args:
        trees: what is to be packed.
        budget: padded tokens of a batch at the most.
        overhead: what one more level of one more batch costs, in tokens; 0 packs as little padding as there can be,
            and more drops levels that spare less.
    """
    parts = [part for tree in trees for part in _split(tree, budget)]
    parts.sort(key=lambda tree: (tree.height, len(tree.tokens)), reverse=True)
    # Cutting anywhere is quadratic in the trees of a batch: of many, some are kept together.
    usual = max(1, sum(part.size for part in parts) // max(1, len(parts)))
    together = 1 + budget // (CUTS * usual)
    blocks = [parts[i : i + together] for i in range(0, len(parts), together)]
    if any(_padded(_shape_of(block)) > budget for block in blocks):
        blocks = [[part] for part in parts]
    shapes = [_shape_of(block) for block in blocks]
    best: list[tuple[int, int]] = [(0, 0)]  # least cost of the blocks before a place, and where their last batch begins
    for end in range(1, len(blocks) + 1):
        found: tuple[int, int] | None = None
        shape: Shape = ()
        for first in range(end - 1, -1, -1):
            shape = _beside(shapes[first], shape)
            if _padded(shape) > budget and first < end - 1:
                break
            cost = best[first][0] + _cost(shape, overhead)
            if found is None or cost <= found[0]:
                found = cost, first
        assert found is not None
        best.append(found)
    packed: list[list[Node]] = []
    end = len(blocks)
    while end:
        first = best[end][1]
        packed.append([part for block in blocks[first:end] for part in block])
        end = first
    return [_shallower(batch, budget, overhead) for batch in packed[::-1]]


def _shallower(trees: list[Node], budget: int, overhead: int) -> list[Node]:
    """The same sequences in fewer levels where that is cheaper: a short common beginning is not worth a level."""
    best, shape = trees, _shape_of(trees)
    for depth in range(1, len(shape) if overhead else 0):
        flat = [part for tree in trees for part in _cut(tree, depth)]
        other = _shape_of(flat)
        if _cost(other, overhead) < _cost(shape, overhead) and _padded(other) <= budget:
            best, shape = flat, other
    return best


def _cut(tree: Node, depth: int) -> list[Node]:
    """The sequences of a tree in at most so many levels; what is below is spelt out for each of them."""
    if not tree.children:
        return [tree]
    if depth > 1:
        return [
            Node(tree.tokens, tuple(part for child in tree.children for part in _cut(child, depth - 1)), tree.members)
        ]
    below = [part for child in tree.children for part in _cut(child, 1)]
    own = [Node(tree.tokens, (), tree.members)] if tree.members else []
    return own + [Node(tree.tokens + part.tokens, (), part.members) for part in below]


def _shape_of(trees: Sequence[Node]) -> Shape:
    shape: Shape = ()
    for tree in trees:
        shape = _beside(shape, _shape(tree))
    return shape


def _split(tree: Node, budget: int) -> list[Node]:
    """The tree itself, or several with the same top whose rectangles fit the budget."""
    if len(tree.children) < 2 or _padded(_shape(tree)) <= budget:
        return [tree]
    parts: list[Node] = []
    held: list[Node] = []
    taken: Shape = ()
    children = sorted(
        (part for child in tree.children for part in _split(child, max(1, budget - len(tree.tokens)))),
        key=lambda child: child.height,
        reverse=True,
    )
    for child in children:
        shape = _shape(child)
        both = _beside(taken, shape)
        if held and len(tree.tokens) + _padded(both) > budget:
            parts.append(Node(tree.tokens, tuple(held), tree.members if not parts else ()))
            held, both = [], shape
        held.append(child)
        taken = both
    parts.append(Node(tree.tokens, tuple(held), tree.members if not parts else ()))
    return parts
