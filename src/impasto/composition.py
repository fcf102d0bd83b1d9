"""Edits of many layers together: which to add, one matrix after another, by what a judge says of the whole.

    >>> trace = greedy(ladder(Edit.parse(text) for text in candidates), judge)             # doctest: +SKIP
    >>> [str(edit) for edit in trace.edits], trace.end.accuracy                            # doctest: +SKIP

Effects of edits interact, so the best edits of single layers cannot simply be put together. The LASER paper searches
greedily from the last layer down and from the strongest cut up. `greedy` is that search; `authors` is what the
script that the paper's authors published does in its place. Nothing here knows a model: a judge, which is a
function, says how good a set of edits is. Numbers of the judge choose; report others, of documents it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from impasto.edit import Edit, Rule
from impasto.errors import UsageError

AUTHORS = tuple(map(Decimal, ("0.55", "0.10", "0.06", "0.02")))  # the fractions kept, as their script goes through them


@dataclass(frozen=True, slots=True)
class Verdict:
    """How good a set of edits is.

    Attributes:
        accuracy: more is better.
        loss: decides between equal accuracies; less is better.
    """

    accuracy: float
    loss: float

    def beats(self, other: Verdict) -> bool:
        """Whether this is truly better; what is not a number is worse than any number."""
        return self._order() > other._order()

    def _order(self) -> tuple[float, float]:
        accuracy = -math.inf if math.isnan(self.accuracy) else self.accuracy
        return accuracy, -math.inf if math.isnan(self.loss) else -self.loss


Edits = tuple[Edit, ...]
Judge = Callable[[Edits], Verdict]


@dataclass(frozen=True, slots=True)
class Rung:
    """One matrix of one layer, and the edits that it may get.

    Attributes:
        layer: the layer.
        matrix: the matrix's name in it.
        edits: the candidates, in the order in which they are tried.
    """

    layer: int
    matrix: str
    edits: Edits


@dataclass(frozen=True, slots=True)
class Trial:
    """One edit, and what the judge said of it together with all edits accepted before."""

    edit: Edit
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """What came of one rung.

    Attributes:
        layer: its layer.
        matrix: its matrix.
        edit: the edit that was accepted; None where none was.
        tried: all that was judged.
        before: the verdict on the edits accepted before.
        after: the verdict on those and `edit`.
    """

    layer: int
    matrix: str
    edit: Edit | None
    tried: tuple[Trial, ...]
    before: Verdict
    after: Verdict

    @property
    def accepted(self) -> bool:
        """Whether an edit was accepted."""
        return self.edit is not None


@dataclass(frozen=True, slots=True)
class Trace:
    """A search from its start to its end.

    Attributes:
        start: the verdict on the model without edits.
        steps: one for each rung.
    """

    start: Verdict
    steps: tuple[Step, ...]

    @property
    def edits(self) -> Edits:
        """All edits that were accepted, in that order."""
        return tuple(step.edit for step in self.steps if step.edit is not None)

    @property
    def end(self) -> Verdict:
        """The verdict on all of them."""
        return self.steps[-1].after if self.steps else self.start

    @property
    def states(self) -> tuple[Edits, ...]:
        """The edits at the start, which are none, and after each acceptance: what a curve over the search measures."""
        return tuple(self.edits[:count] for count in range(len(self.edits) + 1))

    @property
    def judged(self) -> int:
        """How often the judge was asked."""
        return 1 + sum(len(step.tried) for step in self.steps)


def ladder(edits: Iterable[Edit]) -> tuple[Rung, ...]:
    """Candidates in the order of the search: last layers first, and the strongest cut of a matrix first.

    Matrices of one layer keep the order in which they were first named. Zero is the strongest cut; then come kept
    fractions, small ones first, then ranks, then all other rules as they were given.

    Raises:
        UsageError: an edit names several layers, so it belongs to no single one.
    """
    rungs: dict[str, dict[int, list[Edit]]] = {}
    for edit in dict.fromkeys(edits):
        if len(edit.layers) != 1:
            raise UsageError(f"{edit} names {len(edit.layers)} layers: a search over layers takes edits of one each")
        rungs.setdefault(edit.matrix, {}).setdefault(edit.layers[0], []).append(edit)
    layers = sorted({layer for found in rungs.values() for layer in found}, reverse=True)
    return tuple(
        Rung(layer, matrix, tuple(sorted(found[layer], key=lambda edit: _strength(edit.rule))))
        for layer in layers
        for matrix, found in rungs.items()
        if layer in found
    )


def _strength(rule: Rule) -> tuple[int, Decimal]:
    if rule.kind == "zero":
        return 0, Decimal(0)
    for order, kinds in enumerate((("keep", "whitened"), ("rank", "whitened_rank")), 1):
        if rule.kind in kinds and rule.value is not None:
            return order, Decimal(rule.value)
    return 3, Decimal(0)


def greedy(
    rungs: Sequence[Rung],
    judge: Judge,
    *,
    first: bool = False,
    ahead: Callable[[Sequence[Edits]], None] | None = None,
    tell: Callable[[Step], None] | None = None,
) -> Trace:
    """Accept at each rung the edit that is best together with all accepted before, if it beats having none there.

    So the verdict never gets worse on the way. Better is a higher accuracy, or the same one at a lower loss.

    Args:
        rungs: see `ladder`.
        judge: says how good a set of edits is; asked once for each candidate, and for no edits at all.
        first: accept the first candidate that is better, and try no others.
        ahead: told before each rung which sets of edits may be judged next, so that they can be measured together.
        tell: called with each step as soon as it is taken.
    """
    state: Edits = ()
    start = now = judge(state)
    steps: list[Step] = []
    for rung in rungs:
        if ahead is not None:
            ahead([(*state, edit) for edit in rung.edits])
        tried: list[Trial] = []
        best: Trial | None = None
        for edit in rung.edits:
            trial = Trial(edit, judge((*state, edit)))
            tried.append(trial)
            if trial.verdict.beats(best.verdict if best else now):
                best = trial
                if first:
                    break
        after = best.verdict if best else now
        steps.append(Step(rung.layer, rung.matrix, best.edit if best else None, tuple(tried), now, after))
        if tell is not None:
            tell(steps[-1])
        if best is not None:
            state, now = (*state, best.edit), after
    return Trace(start, tuple(steps))


def authors(
    rungs: Sequence[Rung],
    judge: Judge,
    *,
    ahead: Callable[[Sequence[Edits]], None] | None = None,
    tell: Callable[[Step], None] | None = None,
) -> Trace:
    """What the authors' `laser_compose.py` does, for comparison; its end does not depend on the judge.

    It takes one matrix of each layer, here that of the first rung, and leaves out the last layer. Four fractions are
    kept one after the other: 0.55, 0.10, 0.06 and 0.02. Three slips decide what comes of it. It goes on while the
    accuracy is at least the *smallest* seen so far, its own included, which it always is. It would take a step back
    when the accuracy is below that, which it never is. And the state to go back to is the state itself under a
    second name. So every layer ends at 0.02, which is judged twice: 5 times 27 and 1, or 136 judgements for the 28
    layers it was written for. The order of the judgements is kept.

    Args:
        rungs: see `ladder`; what is used of them are the layers and the first matrix.
        judge: says how good a set of edits is.
        ahead: as in `greedy`.
        tell: as in `greedy`.

    Raises:
        UsageError: fewer than two layers.
    """
    matrix = rungs[0].matrix if rungs else ""
    layers = sorted({rung.layer for rung in rungs if rung.matrix == matrix}, reverse=True)
    if len(layers) < 2:
        raise UsageError("the authors' procedure leaves out the last layer, so it needs at least two")
    state: Edits = ()
    start = now = judge(state)
    steps: list[Step] = []
    for layer in layers[1:]:
        edits = [Edit((layer,), matrix, Rule("keep", fraction)) for fraction in AUTHORS]
        if ahead is not None:
            ahead([(*state, edit) for edit in edits])
        tried = tuple(Trial(edit, judge((*state, edit))) for edit in (*edits, edits[-1]))
        steps.append(Step(layer, matrix, edits[-1], tried, now, tried[-1].verdict))
        if tell is not None:
            tell(steps[-1])
        state, now = (*state, edits[-1]), steps[-1].after
    return Trace(start, tuple(steps))
