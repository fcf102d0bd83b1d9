"""Questions of the LASER study: what the evidence says to each, or None where it was not measured.

Every number is of documents that no choice has seen, but for those that are about choosing. A question over several
tasks is answered by the plain mean over them, whose interval is made of theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

from impasto import statistics
from impasto.result import Estimate, Verdict
from impasto.statistics import verdict
from impasto.studies.facts import Compared, Robustness, nestedness, robustness
from impasto.studies.laser.evidence import BASE, CHOSEN, Evidence, Floats, Point, Trial, benchmark_of, pooled
from impasto.studies.laser.protocol import SCHEDULES, Use, rho_of
from impasto.studies.protocol import spread
from impasto.studies.reading import MINUS, Found, listed, said

WORTH = 0.01
"""A difference of accuracy that somebody would care about: one document in a hundred."""

SAME = 0.02
"""Two accuracies that differ by less than this are called the same."""

FAR = 0.1
"""Of the rank, at most: where more than 90 % of the components are gone."""

KEPT = 0.9
"""The share of corrected documents that must stay right for sets to be called nested."""

RANKS = 4
"""At how many ranks corrected sets are compared, pair by pair."""

KINDS = 8
"""Of cuts at least, for a question about the grid."""

MOSTLY = 0.9
"""A model that gives one answer to this share of the documents answers next to nothing else."""


# ── one task ─────────────────────────────────────────────────────────────────────────────────────────────────


def gain(trial: Trial) -> Found | None:
    """Whether the edit that was chosen on other documents raises the accuracy here."""
    change = trial.difference(CHOSEN)
    if change is None or trial.chosen is None:
        return None
    fair = trial.difference(CHOSEN, measure="balanced")
    before, after = trial.mean(BASE), trial.mean(CHOSEN)
    parts = [
        f"{trial.chosen} moves it from {percent(before)} to {percent(after)} on {trial.test:,} held-out documents: "
        f"{in_points(change)}.",
        f"It was the best of {_tried(trial)} on {trial.validation:,} others{_gained(trial)}.",
    ]
    if fair is not None:
        what = "balanced accuracy" if trial.classes else "accuracy with all right answers weighed alike"
        parts.append(f"The {what} changes by {in_points(fair)}.")
    if trial.majority is not None:
        parts.append(f"Always giving the most frequent right answer gets {percent(trial.majority)}.")
    if _one_answer(trial):
        parts.append("With it the model gives one answer to nine tenths of the documents or more.")
        return Found("no", " ".join(parts), change)
    return Found(_both(change, fair), " ".join(parts), change)


def _one_answer(trial: Trial) -> bool:
    """Whether the edit moves the model towards saying next to nothing but one class, which is not right as often."""
    before, after = trial.predictions(BASE), trial.predictions(CHOSEN)
    if not before or not after:
        return False
    most = max(range(len(after)), key=after.__getitem__)
    return after[most] >= MOSTLY > (trial.majority or 0.0) and after[most] >= before[most]


def _both(change: Estimate, fair: Estimate | None) -> Verdict:
    """Yes only if nothing speaks against it; no as soon as one of the two is not worth a point."""
    each = [one for one in (change, fair) if one is not None]
    if all(verdict(one) == "yes" for one in each):
        return "yes"
    return "no" if any(verdict(one, WORTH) == "no" for one in each) else "unclear"


def _tried(trial: Trial) -> str:
    measured = trial.raced["recipes"] if trial.raced else len(trial.points)
    if not trial.screened:
        return f"{trial.grid:,} candidates"
    return f"{measured:,} candidates that a backward pass left of {trial.grid:,}"


def _gained(trial: Trial) -> str:
    if trial.chosen is None or trial.base is None or trial.chosen not in trial.points:
        return ""
    return f", where it gained {points(trial.points[trial.chosen].accuracy - trial.base.accuracy)}"


def constant(trial: Trial) -> str | None:
    """A warning where a gain is a move to one constant answer; None where it is not, or there is no gain."""
    change, fair = trial.difference(CHOSEN), trial.difference(CHOSEN, measure="balanced")
    if change is None or fair is None:
        return None
    if not trial.classes:
        return _commonest(trial, change, fair)
    before, after = trial.predictions(BASE), trial.predictions(CHOSEN)
    if not before or not after:
        return None
    share = max(after)
    label = trial.labels[after.index(share)]
    more = share - before[after.index(share)]
    one_answer = share >= MOSTLY
    if not one_answer and not (change.value > 0 and verdict(fair) != "yes" and more > 0.1):
        return None
    what = "answers next to nothing but" if one_answer else "moves towards the answer"
    return (
        f"{trial.title}: with {trial.chosen} the model {what} \u201c{label}\u201d: {percent(share)} of its answers, "
        f"{percent(before[after.index(share)])} without. Its accuracy of {percent(trial.mean(CHOSEN))} is not to be "
        f"read as knowledge; the balanced accuracy is {percent(trial.mean(CHOSEN, 'balanced'))}.{_always(trial)}"
    )


def _commonest(trial: Trial, change: Estimate, fair: Estimate) -> str | None:
    """The warning for answers in free text, whose wrong ones are not known: whether one right answer makes the gain."""
    base, edited = trial.values(BASE), trial.values(CHOSEN)
    if change.value <= 0 or base is None or edited is None or not _binary([base, edited]):
        return None
    mode, _ = Counter(trial.groups).most_common(1)[0]
    mended = [group for group, a, b in zip(trial.groups, base, edited, strict=True) if b > a]
    mostly = mended.count(mode) > len(mended) / 2
    if not mostly and not (verdict(change) == "yes" and verdict(fair) != "yes"):
        return None
    return (
        f"{trial.title}: of the {len(mended):,} documents that only {trial.chosen} gets right, {mended.count(mode):,} "
        f"have the most frequent right answer, \u201c{trial.commonest}\u201d. With all right answers weighed alike the "
        f"accuracy changes by {in_points(fair)}.{_always(trial)}"
    )


def _always(trial: Trial) -> str:
    return "" if trial.majority is None else f" Always giving the most frequent one gets {percent(trial.majority)}."


# ── all tasks ────────────────────────────────────────────────────────────────────────────────────────────────


def loss(evidence: Evidence) -> Found | None:
    """Whether the chosen edit lowers the loss of the right answers."""
    found = _each(evidence, lambda trial: trial.difference(BASE, CHOSEN, "loss"))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{t.title} {nats(t.mean(BASE, 'loss'))} \u2192 {nats(t.mean(CHOSEN, 'loss'))}" for t, _ in found]
    effect = f"Nats per token of the right answer, without and with the chosen edit: {'; '.join(tasks)}."
    return Found(verdict(total), effect, total)


def flattered(evidence: Evidence) -> Found | None:
    """Whether the gain on the documents that chose the edit is larger than on others."""
    found = _each(evidence, _optimism)
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{t.title} {_size(t.selected)} there, {_size(t.difference(CHOSEN))} here" for t, _ in found]
    effect = f"Gain where the edit was chosen (there) and on held-out documents (here): {'; '.join(tasks)}."
    return Found(clear(total), effect, total)


def _optimism(trial: Trial) -> Estimate | None:
    here, there = trial.selected, trial.difference(CHOSEN)
    return None if here is None or there is None else minus(here, there)


def _size(estimate: Estimate | None) -> str:
    return "?" if estimate is None else points(estimate.value)


def balanced(evidence: Evidence) -> Found | None:
    """Whether classification gets better in all classes, not by answering one class more often."""
    found = _each(evidence, lambda trial: trial.difference(CHOSEN, measure="balanced"))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{trial.title} {in_points(one)}" for trial, one in found]
    return Found(
        clear(total),
        f"With all right answers weighed alike, chosen edit minus the model itself: {'; '.join(tasks)}.",
        total,
    )


def strong(evidence: Evidence) -> Found | None:
    """Whether more than nine tenths of the chosen matrix's components can go without harm."""
    found = _each(evidence, lambda trial: _against(trial, _hardest(trial)))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{t.title} {in_points(one)} ({_place(t)} at {_hardest(t).parameter})" for t, one in found if _hardest(t)]
    effect = f"The chosen matrix cut to a tenth of its rank or less, minus the model itself: {'; '.join(tasks)}."
    return Found(verdict(total, -WORTH), effect, total)


def zero(evidence: Evidence) -> Found | None:
    """Whether a low rank is better than no matrix at all."""
    found = _each(evidence, lambda trial: _unless(trial, "zero", trial.difference(CHOSEN, Use("zero"))))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{trial.title} {in_points(one)}" for trial, one in found]
    return Found(clear(total), f"The chosen edit minus its matrix taken away: {'; '.join(tasks)}.", total)


def pruning(evidence: Evidence) -> Found | None:
    """Whether zeroing the smallest entries does the same as cutting the rank."""
    found = _each(evidence, lambda trial: trial.difference(CHOSEN, _pruned(trial)))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{trial.title} {in_points(one)}" for trial, one in found]
    effect = f"The chosen edit minus pruning the same share of its matrix's entries: {'; '.join(tasks)}."
    return Found(same(total), effect, total)


def composed(evidence: Evidence) -> Found | None:
    """Whether several edits together do better than the best one."""
    found = _each(evidence, lambda trial: _against(trial, last_composed(trial), CHOSEN))
    total = pooled([one for _, one in found])
    if total is None:
        return None
    tasks = [f"{trial.title} {in_points(one)} with {_edits(last_composed(trial))}" for trial, one in found]
    return Found(clear(total), f"Several edits minus the best single one: {'; '.join(tasks)}.", total)


def nested(evidence: Evidence) -> Found | None:
    """Whether documents that a mild cut corrects stay corrected under stronger ones."""
    shares: list[Estimate] = []
    chances: list[float] = []
    for trial in evidence.reported:
        base = trial.values(BASE)
        uses = _uses(trial, "kept")
        rows = {float(use.parameter): trial.values(use) for use in _some(uses)}
        known = {rho: row for rho, row in rows.items() if row is not None}
        if base is None or len(known) < 2 or not _binary([base, *known.values()]):
            continue
        found = nestedness(base, known, facts=trial.units)
        if found.share is not None:
            shares.append(found.share)
            chances.append(found.chance or 0.0)
    total = pooled(shares)
    if total is None:
        return None
    effect = (
        f"{percent(total.value)} of what a milder cut of the chosen matrix corrects, a stronger one corrects too; by "
        f"the sizes of these sets alone it would be {percent(float(np.mean(chances)))}."
    )
    return Found(verdict(total, KEPT), effect, total)


def robust(evidence: Evidence) -> Found | None:
    """Whether more facts are right in all their wordings."""
    found: list[tuple[Trial, Robustness]] = []
    for trial in evidence.reported:
        base, edited = trial.values(BASE), trial.values(CHOSEN)
        if worded(trial) and base is not None and edited is not None and _binary([base, edited]):
            found.append((trial, robustness(base, edited, trial.units)))
    total = pooled([one.everything.difference for _, one in found])
    if total is None:
        return None
    tasks = [f"{trial.title} {_in_all(one)}" for trial, one in found]
    return Found(clear(total), f"Facts that are right in all their wordings: {'; '.join(tasks)}.", total)


def worded(trial: Trial) -> bool:
    """Whether a task asks most of its facts in several wordings."""
    return benchmark_of(trial.name) == "counterfact" and 3 * len(set(trial.units)) <= 2 * len(trial.units)


def _in_all(found: Robustness) -> str:
    both, given = found.everything, found.given
    text = f"{_from_to(both)} of {both.facts:,} facts in {found.wordings} wordings"
    if given is None:
        return text
    return f"{text}; of the {given.facts:,} whose first wording the model itself has right, {_from_to(given)}"


def _from_to(both: Compared) -> str:
    return f"{percent(both.base.value)} \u2192 {percent(both.edited.value)}"


def moved(evidence: Evidence) -> Found | None:
    """Whether the chosen edit does the same when the layers around it, or its own, are rearranged."""
    found = _each(evidence, interaction)
    total = pooled([one for _, one in found])
    if total is None:
        return None
    names = dict.fromkeys(use.parameter for trial, _ in found for use in _uses(trial, "moved") if use.edited)
    tasks = [f"{trial.title} {in_points(one)}" for trial, one in found]
    effect = (
        f"What the edit does under other schedules ({listed([SCHEDULES[name] for name in names])}) minus what it "
        f"does to the model as it is: {'; '.join(tasks)}."
    )
    return Found(same(total), effect, total)


def interaction(trial: Trial) -> Estimate | None:
    """The edit's effect under all schedules on average minus its effect as it is, document by document."""
    parts = [effect for use in _uses(trial, "moved") if use.edited and (effect := under(trial, use)) is not None]
    here = _minus(trial.values(CHOSEN), trial.values(BASE))
    if not parts or here is None:
        return None
    return trial.contrast(np.mean(parts, axis=0) - here)


def under(trial: Trial, use: Use) -> Floats | None:
    """What the chosen edit does to each document under a schedule."""
    return _minus(trial.values(use), trial.values(Use("moved", use.parameter, edited=False)))


# ── the grid ─────────────────────────────────────────────────────────────────────────────────────────────────


def late(evidence: Evidence) -> Found | None:
    """Whether cuts in the later half of the layers leave more of the accuracy than the same cuts in the earlier."""
    middle = evidence.depth / 2
    found = _contrasts(evidence, lambda edit_layer, half: edit_layer >= middle, by_layer=False)
    if found is None:
        return None
    total, count = found
    effect = (
        f"The same cut of the same kind of matrix leaves {in_points(total)} more accuracy in the later half of the "
        f"layers than in the earlier, over {count} kinds of cuts, on the documents to choose on."
    )
    return Found(verdict(total), effect, total)


def halves(evidence: Evidence) -> Found | None:
    """Whether cuts of the MLP move the accuracy more than cuts of attention in the same layer."""
    found = _contrasts(evidence, lambda edit_layer, half: half == "mlp", by_layer=True, size=True)
    if found is None:
        return None
    total, count = found
    effect = (
        f"In one layer and at one share of the rank, cuts of the MLP move accuracy by {in_points(total)} more than "
        f"cuts of attention, whichever way, over {count} such pairs, on the documents to choose on."
    )
    return Found(verdict(total), effect, total)


def screening(evidence: Evidence) -> Found | None:
    """Whether the change of the loss that one backward pass foretells orders the measured changes."""
    each: list[tuple[Trial, float, int]] = []
    for trial in evidence.trials:
        pairs = foretold(trial)
        if len(pairs) > 4:
            found = statistics.spearman(*np.array(pairs).T)
            if math.isfinite(found.value):
                each.append((trial, found.value, len(pairs)))
    if not each:
        return None
    weight = sum(n - 3 for _, _, n in each)
    mean = sum((n - 3) * math.atanh(min(max(r, -0.999), 0.999)) for _, r, n in each) / weight
    reach = float(stats.norm.ppf((1 + statistics.LEVEL) / 2)) * math.sqrt(1.06 / weight)
    total = Estimate(math.tanh(mean), math.tanh(mean - reach), math.tanh(mean + reach))
    tasks = [f"{trial.title} {said(r)} ({n} edits)" for trial, r, n in each]
    effect = f"Rank correlation of the foretold with the measured change of the loss: {'; '.join(tasks)}."
    return Found(verdict(total), effect, total)


def foretold(trial: Trial) -> list[tuple[float, float]]:
    """(foretold, measured) change of the loss of every edit that has both."""
    base = trial.base.loss if trial.base is not None else None
    if base is None:
        return []
    return [
        (trial.screened[edit], point.loss - base)
        for edit, point in trial.points.items()
        if edit in trial.screened and point.loss is not None
    ]


def _contrasts(
    evidence: Evidence, side: Callable[[int, str], bool], *, by_layer: bool, size: bool = False
) -> tuple[Estimate, int] | None:
    """Mean change of accuracy on one side minus that on the other, over kinds of cuts that both sides have.

    A kind is a task, a share of the rank, and a layer (`by_layer`) or a matrix; `size` takes changes without their
    sign. The interval is that of other kinds of cuts.
    """
    kinds: dict[tuple[object, ...], tuple[list[float], list[float]]] = {}
    for trial in evidence.trials:
        for edit, point in trial.points.items() if trial.base is not None else ():
            change = _change(point, trial.base)
            half = evidence.halves.get((edit.layers[0], edit.matrix), "")
            kind = (trial.name, rho_of(edit), edit.layers[0] if by_layer else edit.matrix)
            sides = kinds.setdefault(kind, ([], []))
            sides[0 if side(edit.layers[0], half) else 1].append(abs(change) if size else change)
    gaps = [float(np.mean(one) - np.mean(other)) for one, other in kinds.values() if one and other]
    return (statistics.over_seeds(gaps), len(gaps)) if len(gaps) >= KINDS else None


def _change(point: Point, base: Point | None) -> float:
    return point.accuracy - (base.accuracy if base is not None else math.nan)


# ── shared pieces ────────────────────────────────────────────────────────────────────────────────────────────


def last_composed(trial: Trial) -> Use | None:
    """The end of the composition, as a use; None where nothing was composed."""
    found = _uses(trial, "composed")
    return found[-1] if found else None


def same(estimate: Estimate) -> Verdict:
    """Whether a difference is nothing to speak of: yes if its interval lies within `SAME`, no if outside."""
    if estimate.low is None or estimate.high is None:
        return "unclear"
    if estimate.low > -SAME and estimate.high < SAME:
        return "yes"
    return "no" if estimate.low > SAME or estimate.high < -SAME else "unclear"


def minus(a: Estimate, b: Estimate) -> Estimate:
    """The difference of two independent estimates, with its interval; see `pooled`."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(a.value - b.value)
    value = a.value - b.value
    low, high = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, value - low, value + high)


def points(value: float) -> str:
    """A difference of accuracies in a sentence."""
    return f"{said(100 * value, 1)} points"


def in_points(estimate: Estimate) -> str:
    """A difference of accuracies with its interval in a sentence."""
    if estimate.low is None or estimate.high is None:
        return points(estimate.value)
    return f"{points(estimate.value)} [{said(100 * estimate.low, 1)}, {said(100 * estimate.high, 1)}]"


def percent(value: float | None) -> str:
    """A share in a sentence."""
    return "?" if value is None else f"{said(100 * value, 1)} %"


def nats(value: float | None) -> str:
    """A loss in a sentence."""
    return "?" if value is None else said(value)


def clear(estimate: Estimate) -> Verdict:
    """Yes if an accuracy is clearly higher, no if it is clearly not higher by what anybody would care about."""
    return "yes" if verdict(estimate) == "yes" else "no" if verdict(estimate, WORTH) == "no" else "unclear"


def _each(evidence: Evidence, ask: Callable[[Trial], Estimate | None]) -> list[tuple[Trial, Estimate]]:
    """What each task that was reported says, without those that say nothing."""
    found = ((trial, ask(trial)) for trial in evidence.reported)
    return [(trial, one) for trial, one in found if one is not None]


def _against(trial: Trial, use: Use | None, other: Use = BASE) -> Estimate | None:
    return None if use is None else trial.difference(use, other)


def _unless(trial: Trial, kind: str, found: Estimate | None) -> Estimate | None:
    """Nothing where the chosen edit is itself of a kind."""
    return None if trial.chosen is None or trial.chosen.rule.kind == kind else found


def _hardest(trial: Trial) -> Use:
    """The largest share at which nine tenths of the rank are gone."""
    shares = [use for use in _uses(trial, "kept") if float(use.parameter) <= FAR]
    return max(shares, key=lambda use: float(use.parameter), default=Use("kept"))


def _pruned(trial: Trial) -> Use:
    value = trial.chosen.rule.value if trial.chosen is not None else None
    return Use("pruned", f"{value:f}" if value is not None else "")


def _uses(trial: Trial, role: str) -> list[Use]:
    return [use for use in (trial.report.uses if trial.report is not None else ()) if use.role == role]


def _minus(a: Floats | None, b: Floats | None) -> Floats | None:
    return None if a is None or b is None else a - b


def _binary(rows: Iterable[Floats]) -> bool:
    return all(bool(np.isin(row, (0.0, 1.0)).all()) for row in rows)


def _some(uses: Sequence[Use]) -> list[Use]:
    """At most `RANKS` of some uses, the first and the last among them."""
    return [uses[place] for place in spread(range(len(uses)), RANKS)]


def _edits(use: Use | None) -> str:
    return "no edit" if use is None else "1 edit" if use.parameter == "1" else f"{use.parameter} edits"


def _place(trial: Trial) -> str:
    return f"{trial.chosen.matrix} of layer {trial.chosen.layers[0]}" if trial.chosen is not None else MINUS
