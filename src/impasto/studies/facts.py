"""What an edit does to single facts: rare and frequent ones, their wordings, what is corrected, what is said instead.

The analyses of the LASER paper (arXiv 2312.13558, section 5 and appendix C) as functions of per-document scores
and of texts, so that they can be made of any finished run. Scores are those of `Result.scores`: one number per
document, 1 for right and 0 for wrong, None or NaN where there is none; a document without a score on either side is
left out on both.

Several documents may ask for one fact in other words. They are not independent, so wherever `facts` is
given (a label per document, equal for the wordings of one fact), a fact counts once, with the mean over its
wordings, and intervals are those of other facts. Without it every document is a fact.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from impasto import statistics
from impasto.result import Estimate
from impasto.statistics import Panel, Scores

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Labels: TypeAlias = Sequence[Hashable] | NDArray[np.generic]

CELLS = 40_000_000  # resamples times facts up to which all resamples are drawn; of more facts at least FEWEST
FEWEST = 2_000
EDGES = (50.0, 1000.0)  # of the paper's three groups of facts: fewer than 50 documents, up to 1,000, more

# English words of the closed classes: they say how things hang together, not what is spoken of.
_CLOSED = """
    a an the this that these those some any no every each either neither both all such another other same own
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves who whom whose which what there here
    about above across after against along among around as at before behind below beneath beside between beyond by
    despite down during except for from in inside into like near of off on onto out outside over per since through
    throughout till to toward towards under until up upon via with within without
    and but or nor so yet if because although though unless while whereas than whether when where why how
    am is are was were be been being do does did doing done has have had having will would shall should can could may
    might must ought
    not also only very too just then again once more most less least much many few now ever never s t d ll m re ve
"""
STOP_WORDS = frozenset(_CLOSED.split())


@dataclass(frozen=True, slots=True)
class Compared:
    """Both models on the same facts.

    Attributes:
        facts: how many.
        documents: in how many wordings they were asked.
        base: mean score of the untouched model.
        edited: mean score of the edited model.
        difference: edited - base, fact by fact.
    """

    facts: int
    documents: int
    base: Estimate
    edited: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a frequency curve: all facts that occur in at most `frequency` documents."""

    frequency: float
    both: Compared


@dataclass(frozen=True, slots=True)
class Boost:
    """What an edit corrects among facts of a range of frequencies.

    The paper's ratio has the base model's right answers below the line. It falls with the frequency
    already because the base model knows frequent facts better, whatever the edit does; `mended` and `spoilt` do not.

    Attributes:
        name: the range in words, such as "50 to 1,000".
        both: both models on these facts.
        right: wordings that the base model has right.
        corrected: wordings that only the edited model has right.
        lost: wordings that only the base model has right.
        ratio: corrected / right, the paper's bars; None where nothing is right.
        mended: share corrected of what the base model has wrong; None where nothing is wrong.
        spoilt: share lost of what the base model has right; None where nothing is right.
    """

    name: str
    both: Compared
    right: int
    corrected: int
    lost: int
    ratio: Estimate | None
    mended: Estimate | None
    spoilt: Estimate | None


@dataclass(frozen=True, slots=True)
class Robustness:
    """Whether facts are right in all their wordings.

    Attributes:
        wordings: how many wordings of each fact count.
        left_out: facts with fewer wordings or without a score.
        everything: share of facts that are right in all wordings.
        given: the same among those facts whose first wording the *base* model has right; None if there are none.
    """

    wordings: int
    left_out: int
    everything: Compared
    given: Compared | None


@dataclass(frozen=True, slots=True)
class Inclusion:
    """How much of what a mild edit corrects a stronger one corrects as well.

    Attributes:
        mild: the fraction kept by the milder edit.
        strong: the fraction kept by the stronger one.
        size: documents that the milder edit corrects.
        strong_size: documents that the stronger edit corrects.
        shared: documents that both correct.
        share: shared / size with its interval; None where the milder edit corrects nothing.
        chance: what `share` would be on average if the stronger edit corrected as many documents, drawn
            from all that the base model has wrong; None where it has nothing wrong.
    """

    mild: float
    strong: float
    size: int
    strong_size: int
    shared: int
    share: Estimate | None
    chance: float | None

    @property
    def contained(self) -> bool | None:
        """Whether the stronger edit corrects all of it; None where there is nothing to correct again."""
        return None if self.size == 0 else self.shared == self.size


@dataclass(frozen=True, slots=True)
class Nestedness:
    """Whether what is corrected stays corrected as less is kept.

    Attributes:
        pairs: every two edits, the milder first.
        contained: share of the pairs in which all stays corrected, among those with something to stay; None
            without such a pair.
        share: what stays corrected, over all pairs together.
        chance: what that would be on average by the sizes of the sets alone.
    """

    pairs: tuple[Inclusion, ...]
    contained: float | None
    share: Estimate | None
    chance: float | None


@dataclass(frozen=True, slots=True)
class SameRelation:
    """Wrong answers that are right answers of other facts of the same relation.

    Attributes:
        wrong: how many wrong answers there are.
        share: those that are right for another fact of the relation; None without wrong answers.
        chance: what that share would be on average if the same wrong answers were given to each other's questions.
    """

    wrong: int
    share: Estimate | None
    chance: float | None


# ── frequency ────────────────────────────────────────────────────────────────────────────────────────────────


def frequency_curve(
    base: Scores,
    edited: Scores,
    frequency: Scores,
    *,
    facts: Labels | None = None,
    at: Iterable[float] | None = None,
    seed: int = 0,
) -> tuple[Point, ...]:
    """Mean scores over all facts that occur in at most x documents of a corpus, for growing x (figure 3b).

    Args:
        base: of the untouched model.
        edited: of the edited one.
        frequency: in how many documents of the corpus a document's fact occurs; None or NaN is unknown, left out.
        facts: which documents ask for one fact; None: each for its own.
        at: the values of x; None: 0, 1, 2, 5, 10, 20, 50 and so on, up to the largest frequency.
        seed: of the resampling.

    Returns:
        A point for each x that is not below all frequencies.
    """
    table = _table(base, edited, frequency, facts=facts)
    often = table.column(2)
    places = sorted(set(series(float(often.max())) if at is None else at)) if len(often) else []
    inside = [(x, often <= x) for x in places]
    inside = [(x, chosen) for x, chosen in inside if chosen.any()]
    both = _compared(table, [chosen for _, chosen in inside], seed)
    return tuple(Point(float(x), one) for (x, _), one in zip(inside, both, strict=True))


def bin_boost(
    base: Scores,
    edited: Scores,
    frequency: Scores,
    *,
    facts: Labels | None = None,
    edges: Sequence[float] = EDGES,
    seed: int = 0,
) -> tuple[Boost, ...]:
    """What the edit corrects among rare and among frequent facts (figure 3c).

    The first edge belongs to the range above it, every other edge to the range below it, as in the paper: fewer
    than 50, 50 to 1,000, more than 1,000. Ranges without facts are left out.

    Raises:
        ValueError: the edges do not ascend.
    """
    if any(b <= a for a, b in pairwise(edges)) or not edges:
        raise ValueError(f"the edges of frequency ranges ascend, and there is at least one: {tuple(edges)}")
    table = _table(base, edited, frequency, facts=facts)
    often = table.column(2)
    below = f"fewer than {edges[0]:,.10g}" if edges[0] != 1 else "none"
    ranges: list[tuple[str, Bools]] = [(below, often < edges[0])]
    for place, (low, high) in enumerate(pairwise(edges)):
        above = often >= low if place == 0 else often > low
        start = f"{low:,.10g}" if place == 0 else f"more than {low:,.10g}"
        ranges.append((f"{start} to {high:,.10g}", above & (often <= high)))
    last = often >= edges[-1] if len(edges) == 1 else often > edges[-1]
    ranges.append((f"{edges[-1]:,.10g} or more" if len(edges) == 1 else f"more than {edges[-1]:,.10g}", last))
    ranges = [(name, chosen) for name, chosen in ranges if chosen.any()]
    both = _compared(table, [chosen for _, chosen in ranges], seed)
    return tuple(_boost(name, table.of(chosen), one, seed) for (name, chosen), one in zip(ranges, both, strict=True))


def rarity_effect(
    base: Scores,
    edited: Scores,
    frequency: Scores,
    *,
    facts: Labels | None = None,
    edges: Sequence[float] = EDGES,
    seed: int = 0,
) -> Estimate | None:
    """How much more the edit gains on rare facts (below the first edge) than on frequent ones (above the last).

    Both are mean differences edited - base, so that a better base model on frequent facts does not count by
    itself. None where there are no rare or no frequent facts.
    """
    table = _table(base, edited, frequency, facts=facts)
    gain, often = table.column(1) - table.column(0), table.column(2)
    rare, frequent = often < edges[0], often > edges[-1]
    if not rare.any() or not frequent.any():
        return None
    effect = float(gain[rare].mean() - gain[frequent].mean())
    # Each fact's influence on the difference of the two means, so that facts of both kinds are resampled together.
    influence = np.zeros(len(gain))
    influence[rare] = (gain[rare] - gain[rare].mean()) / rare.mean()
    influence[frequent] = -(gain[frequent] - gain[frequent].mean()) / frequent.mean()
    return statistics.over_seeds(effect + influence, n=_resamples(len(gain)), seed=seed)


def series(largest: float) -> tuple[float, ...]:
    """0, 1, 2, 5, 10, 20, 50 and so on, up to the first that is not below `largest`.

    >>> series(30)
    (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    """
    found, step = [0.0], 1.0
    while found[-1] < largest:
        found += [step, 2 * step, 5 * step]
        step *= 10
    while len(found) > 1 and found[-2] >= largest:
        found.pop()
    return tuple(found)


# ── wordings ─────────────────────────────────────────────────────────────────────────────────────────────────


def robustness(
    base: Scores, edited: Scores, facts: Labels, *, wordings: int | None = None, seed: int = 0
) -> Robustness:
    """Whether facts are right in every wording, and whether those are that were right to begin with (section 5.2).

    A fact's first wording is the one that comes first; of more wordings than asked for, the first ones count.

    Args:
        base: of the untouched model, 0 or 1.
        edited: of the edited one.
        facts: which documents ask for one fact.
        wordings: how many make a fact; None: as many as most facts have (3 in the paper).
        seed: of the resampling.

    Raises:
        ValueError: fewer than two wordings, which cannot disagree.
    """
    first, second = _floats(base), _floats(edited)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, name in enumerate(facts):
        groups[name].append(place)
    if wordings is None:
        sizes = Counter(len(places) for places in groups.values())
        wordings = max(sizes, key=lambda size: (sizes[size], size), default=2)
    if wordings < 2:
        raise ValueError("facts in one wording cannot be right in one and wrong in another: give several wordings")
    whole = [places[:wordings] for places in groups.values() if len(places) >= wordings]
    chosen = np.array(whole, np.int64).reshape(-1, wordings)
    known = (np.isfinite(first[chosen]) & np.isfinite(second[chosen])).all(axis=1)
    chosen = chosen[known]
    right = [(scores[chosen] == 1).all(axis=1).astype(np.float64) for scores in (first, second)]
    start = first[chosen[:, 0]] == 1
    table = _Table(np.stack(right, axis=1), np.full(len(chosen), wordings), np.stack(right, axis=1))
    parts = [np.ones(len(chosen), bool), *([start] if start.any() else [])]
    everything, *given = _compared(table, parts, seed)
    return Robustness(wordings, len(groups) - len(chosen), everything, given[0] if given else None)


# ── corrected sets ───────────────────────────────────────────────────────────────────────────────────────────


def nestedness(
    base: Scores, edited: Mapping[float, Scores], *, facts: Labels | None = None, seed: int = 0
) -> Nestedness:
    """Whether documents that an edit corrects stay corrected as it keeps less and less (the paper's claim).

    Args:
        base: of the untouched model, 0 or 1.
        edited: by the fraction kept, one matrix with each; documents without a score under any of them are left out.
        facts: which documents ask for one fact, for the intervals.
        seed: of the resampling.
    """
    kept = sorted(edited, reverse=True)
    rows = np.stack([_floats(base), *(_floats(edited[rho]) for rho in kept)])
    there = np.isfinite(rows).all(axis=0)
    wrong = rows[0, there] == 0
    corrected = {rho: wrong & (rows[place, there] == 1) for place, rho in enumerate(kept, 1)}
    names = None if facts is None else [facts[place] for place in np.flatnonzero(there).tolist()]
    pairs = [(mild, strong) for place, mild in enumerate(kept) for strong in kept[place + 1 :]]
    made, totals, expected = [], np.zeros((2, int(there.sum()))), 0.0
    for mild, strong in pairs:
        small, large = corrected[mild], corrected[strong]
        both = small & large
        chance = float(large.sum() / wrong.sum()) if wrong.any() else None
        totals += np.stack([both, small])
        expected += float(small.sum()) * (chance or 0.0)
        sizes = int(small.sum()), int(large.sum()), int(both.sum())
        made.append(Inclusion(mild, strong, *sizes, _ratio(both, small, names, seed), chance))
    full = [pair.contained for pair in made if pair.contained is not None]
    return Nestedness(
        pairs=tuple(made),
        contained=sum(full) / len(full) if full else None,
        share=_ratio(totals[0], totals[1], names, seed),
        chance=expected / float(totals[1].sum()) if totals[1].any() else None,
    )


# ── what is said instead ─────────────────────────────────────────────────────────────────────────────────────


def stop_word_share(
    said: Sequence[str],
    *,
    words: frozenset[str] = STOP_WORDS,
    facts: Labels | None = None,
    seed: int = 0,
) -> Estimate:
    """The share of texts that are a stop word, whatever their case and the spaces around them."""
    return _share([_plain(text) in words for text in said], facts, seed)


def same_relation_share(
    said: Sequence[str],
    right: Sequence[str],
    relations: Labels,
    *,
    facts: Labels | None = None,
    seed: int = 0,
) -> SameRelation:
    """How many wrong answers are of the right kind: another city for a city, another language for a language.

    Texts are compared without case and the spaces around them. So where `said` are single tokens, `right` should
    be the first token of each answer.

    Args:
        said: what the model answered.
        right: the right answer of each document.
        relations: what is asked for; "" and None are unknown and left out.
        facts: which documents ask for one fact.
        seed: of the resampling.
    """
    known = [place for place, relation in enumerate(relations) if relation not in ("", None)]
    answers = [(_plain(said[place]), _plain(right[place]), relations[place]) for place in known]
    kinds: dict[Any, set[str]] = defaultdict(set)
    for _, gold, relation in answers:
        kinds[relation].add(gold)
    missed = [place for place, (given, gold, _) in enumerate(answers) if given != gold]
    if not missed:
        return SameRelation(0, None, None)
    hits = [answers[place][0] in kinds[answers[place][2]] for place in missed]
    names = None if facts is None else [facts[known[place]] for place in missed]
    given = Counter(answers[place][0] for place in missed)
    of_kind = {relation: sum(given[text] for text in texts) for relation, texts in kinds.items()}
    by_chance = [of_kind[relation] - given[gold] for _, gold, relation in (answers[place] for place in missed)]
    return SameRelation(len(missed), _share(hits, names, seed), sum(by_chance) / len(missed) ** 2)


def relations(documents: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What each document of the LASER task of facts asks for.

    Its `relation` where the data name one; else the first wording of its fact with the subject left out, so that
    facts asked in the same words are of one kind. That splits a relation that is asked in several ways.
    """
    first: dict[Any, str] = {}
    for document in documents:
        template = str(document["prompt"]).replace(str(document["about"]), "{}")
        first.setdefault(document["record"], template if "{}" in template else "")
    return tuple(str(document.get("relation") or first[document["record"]]) for document in documents)


# ── scores by fact ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Table:
    """Means over the wordings of each fact, [facts, columns], and how many wordings there are, [facts]."""

    means: Floats
    wordings: NDArray[np.int64]
    documents: Floats  # the scores that the means are of, [documents, columns]
    fact: NDArray[np.int64] | None = None  # the fact of each document; None: each its own

    def column(self, number: int) -> Floats:
        return self.means[:, number]

    def of(self, chosen: Bools) -> _Table:
        """Only some facts."""
        if self.fact is None:
            return _Table(self.means[chosen], self.wordings[chosen], self.documents[chosen])
        inside = chosen[self.fact]
        number = np.cumsum(chosen) - 1
        return _Table(self.means[chosen], self.wordings[chosen], self.documents[inside], number[self.fact[inside]])


def _table(*columns: Scores, facts: Labels | None) -> _Table:
    """Scores side by side, without the documents that lack one, and their means over the wordings of each fact."""
    values = [_floats(column) for column in columns]
    lengths = {len(column) for column in (*values, *(() if facts is None else (facts,)))}
    if len(lengths) > 1:
        raise ValueError(f"columns of {' and '.join(map(str, sorted(lengths)))} documents do not belong together")
    documents = np.stack(values, axis=1)
    there = np.isfinite(documents).all(axis=1)
    documents = documents[there]
    if facts is None:
        return _Table(documents, np.ones(len(documents), np.int64), documents)
    fact = _numbered(facts[place] for place in np.flatnonzero(there).tolist())
    wordings = np.bincount(fact)
    sums = [np.bincount(fact, column) for column in documents.T]
    return _Table(np.stack(sums, axis=1) / wordings[:, None], wordings, documents, fact)


def _compared(table: _Table, parts: Sequence[Bools], seed: int) -> list[Compared]:
    """Both models (columns 0 and 1) on some of the facts, for each part; all parts are resampled together."""
    base, edited = table.column(0), table.column(1)
    rows = [np.where(part, values, math.nan) for part in parts for values in (base, edited, edited - base)]
    panel = Panel(full=np.zeros(len(base)), recipes=rows)
    drawn = statistics.differences(panel, n=_resamples(len(base)), seed=seed)
    made = []
    for place, part in enumerate(parts):
        before, after = (
            statistics.interval(values[part]) if _is_binary(values[part]) else drawn[3 * place + column]
            for column, values in enumerate((base, edited))
        )
        documents = int(table.wordings[part].sum())
        made.append(Compared(int(part.sum()), documents, before, after, drawn[3 * place + 2]))
    return made


def _boost(name: str, table: _Table, both: Compared, seed: int) -> Boost:
    before, after = table.documents[:, 0] == 1, table.documents[:, 1] == 1
    corrected, lost = ~before & after, before & ~after
    return Boost(
        name=name,
        both=both,
        right=int(before.sum()),
        corrected=int(corrected.sum()),
        lost=int(lost.sum()),
        ratio=_ratio(corrected, before, table.fact, seed),
        mended=_ratio(corrected, ~before, table.fact, seed),
        spoilt=_ratio(lost, before, table.fact, seed),
    )


def _ratio(above: NDArray[Any], below: NDArray[Any], facts: Labels | None, seed: int) -> Estimate | None:
    """The ratio of two sums over documents, with the interval of other facts; None where nothing is below the line.

    A limit is None where resamples reach a zero below the line, or where too few facts stand there.
    """
    top, bottom = above.astype(np.float64), below.astype(np.float64)
    if not bottom.any():
        return None
    if facts is None and bool((top <= bottom).all()) and _is_binary(bottom):
        return statistics.interval(top[bottom == 1])  # a plain share
    if facts is not None:
        fact = _numbered(facts)
        top, bottom = (np.bincount(fact, values).astype(np.float64) for values in (top, bottom))
    panel = Panel(full=bottom, recipes=[top])
    drawn = statistics.normalised_scores(panel, n=_resamples(len(bottom)), seed=seed)[0]
    return drawn or Estimate(float(top.sum() / bottom.sum()))


def _share(hits: Sequence[bool], facts: Labels | None, seed: int) -> Estimate:
    """The share of hits, with the interval of other facts."""
    if not hits:
        return Estimate(math.nan)
    table = _table(np.array(hits, np.float64), facts=facts)
    return statistics.interval(table.column(0), n=_resamples(len(table.means)), seed=seed)


def _resamples(facts: int) -> int:
    """How many resamples: as everywhere, but fewer of tens of thousands of facts, where each costs milliseconds."""
    return max(FEWEST, min(statistics.RESAMPLES, CELLS // max(1, facts)))


def _numbered(names: Iterable[Hashable]) -> NDArray[np.int64]:
    """The names as numbers from 0, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _plain(text: str) -> str:
    return text.strip().casefold()


def _is_binary(values: Floats) -> bool:
    return len(values) > 0 and bool(((values == 0) | (values == 1)).all())


def _floats(values: object) -> Floats:
    return np.asarray(values, np.float64)  # None becomes NaN
