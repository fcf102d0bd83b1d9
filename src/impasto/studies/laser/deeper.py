"""Beyond accuracy: rare and frequent facts, what the discarded components say, plain text. Questions and figures.

Sections 5.1 and 5.3 of the LASER paper (arXiv 2312.13558) and its appendix C.4. All of it is of the test part, or of
texts, so nothing here was chosen on what it is judged by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from impasto import statistics
from impasto.result import Estimate, Figure, Row
from impasto.studies.facts import EDGES, Boost, bin_boost, frequency_curve, rarity_effect, same_relation_share
from impasto.studies.facts import stop_word_share as function_words
from impasto.studies.figures import bar, point
from impasto.studies.laser.evidence import BASE, CHOSEN, Evidence, Floats, Mentions, Tail, Text, Trial, pooled
from impasto.studies.laser.findings import clear, in_points, last_composed, percent
from impasto.studies.laser.protocol import Use, rho_of
from impasto.studies.reading import Found, listed, said

LOSS = 0.02
"""A difference of the loss, in nats per token, that is called the same: two per cent of the perplexity."""

ENOUGH = 20
"""Facts on either side at least, for the paper's bounds of rare and frequent, and for any verdict."""

FACTS = "Single facts, other text"
RIGHT, FUNCTION, RELATED, LIKENESS = (
    "the right answer",
    "function words",
    "same relation, of wrong answers",
    "likeness to the right answer",
)


# ── rare and frequent facts ──────────────────────────────────────────────────────────────────────────────────


def rare(evidence: Evidence) -> Found | None:
    """Whether the chosen edit gains more on facts that a corpus seldom has; of several counts the first decides."""
    effects: list[Estimate] = []
    parts: list[str] = []
    for trial in evidence.reported:
        for place, one in enumerate(trial.mentions):
            base, edited, often = _scores(trial, one)
            edges = bounds(one, trial.units)
            gap = rarity_effect(base, edited, often, facts=trial.units, edges=edges)
            if gap is None:
                continue
            ends = bin_boost(base, edited, often, facts=trial.units, edges=edges)
            first, last = ends[0].both, ends[-1].both
            parts.append(
                f"{trial.title} ({_named(one)}): {in_points(first.difference)} on {_counted_facts(first.facts)} in "
                f"{'no document' if ends[0].name == 'none' else f'{ends[0].name} documents'}, "
                f"{in_points(last.difference)} on {_counted_facts(last.facts)} in {ends[-1].name}"
            )
            if place == 0:
                effects.append(gap if min(first.facts, last.facts) >= ENOUGH else Estimate(gap.value))
    total = pooled(effects)
    if total is None:
        return None
    few = "" if total.low is not None else f" Fewer than {ENOUGH} facts on a side say nothing: a larger corpus would."
    text = f"What the chosen edit gains on rare and on frequent facts. {'; '.join(parts)}.{few}"
    return Found(clear(total) if total.low is not None else "unclear", text, total)


def bounds(mentions: Mentions, units: Sequence[int]) -> tuple[float, float]:
    """Below what a fact is rare and above what it is frequent.

    The paper's 50 and 1,000 documents, where there are enough facts on either side of both; a smaller corpus is cut
    where a third of its facts lies below and a third above.

    Args:
        mentions: the count of each document's fact.
        units: which documents are about one thing, which counts once, with their mean.

    Example:
        >>> bounds(Mentions("phrase", "", (0, 0, 0, 1, 2, 3, 4, 5, 6)), range(9))
        (1.0, 3.0)
    """
    known: dict[int, list[int]] = {}
    for unit, count in zip(units, mentions.counts, strict=True):
        if count is not None:
            known.setdefault(unit, []).append(count)
    often = np.array([np.mean(counts) for counts in known.values()], np.float64)
    low, high = EDGES
    if min((often < low).sum(), (often > high).sum()) >= ENOUGH:
        return low, high
    if not len(often):
        return EDGES
    first, second = np.quantile(often, (1 / 3, 2 / 3), method="lower")
    low = max(1.0, float(first))
    return low, max(low + 1, float(second))


def frequency(evidence: Evidence) -> Figure | None:
    """Accuracy over all facts up to a frequency, with and without the edit."""
    rows: list[Row] = []
    for trial, one in _counted(evidence):
        often = _often(one)
        for name, base, edited in (
            ("accuracy", trial.values(BASE), trial.values(CHOSEN)),
            ("top 10", trial.among(BASE, 10), trial.among(CHOSEN, 10)),
        ):
            if base is None or edited is None:
                continue
            panel = f"{trial.title}, {name} ({_named(one)})"
            for found in frequency_curve(base, edited, often, facts=trial.units):
                label = f"{found.frequency:,.0f} or fewer"
                for series, level in (("the model itself", found.both.base), ("chosen edit", found.both.edited)):
                    row = {"panel": panel, "label": label, "series": series, "facts": found.both.facts}
                    rows.append({**row, **bar(level)})
    if not rows:
        return None
    caption = (
        "All facts whose subject and answer stand together in at most so many documents of a corpus; the last bar is "
        f"all facts. Intervals: 95 %, of other facts. {_corpora(evidence)}"
    )
    options = {
        "series": ["the model itself", "chosen edit"],
        "sort": "given",
        "x_title": "share of facts",
        "section": FACTS,
    }
    return Figure("frequency", "Rare facts first", caption, "bars", tuple(rows), options)


def boosts(evidence: Evidence) -> Figure | None:
    """What the edit corrects and spoils among rare and among frequent facts."""
    rows: list[Row] = []
    series = ("corrected, of what was wrong", "lost, of what was right", "corrected / right before")
    for trial, one in _counted(evidence):
        base, edited, often = _scores(trial, one)
        for found in bin_boost(base, edited, often, facts=trial.units, edges=bounds(one, trial.units)):
            if found.both.facts < ENOUGH:
                continue
            rows += [
                {"panel": f"{trial.title} ({_named(one)})", "label": found.name, "series": name, **bar(share)}
                for name, share in zip(series, _shares(found), strict=True)
                if share is not None
            ]
    if not rows:
        return None
    caption = (
        "Facts by the number of documents that mention them. The paper draws the last series, which falls with the "
        "frequency already because the model itself knows frequent facts better; the first two do not. Left out are "
        f"ranges of fewer than {ENOUGH} facts. "
        f"Intervals: 95 %, of other facts. {_corpora(evidence)}"
    )
    options = {"series": list(series), "sort": "given", "x_title": "share", "section": FACTS}
    return Figure("boosts", "What is corrected, by frequency", caption, "bars", tuple(rows), options)


def _counted_facts(count: int) -> str:
    return "1 fact" if count == 1 else f"{count:,} facts"


def _shares(found: Boost) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    return found.mended, found.spoilt, found.ratio


def _counted(evidence: Evidence) -> Iterator[tuple[Trial, Mentions]]:
    return ((trial, one) for trial in evidence.reported for one in trial.mentions)


def _scores(trial: Trial, one: Mentions) -> tuple[Floats, Floats, Floats]:
    base, edited = trial.values(BASE), trial.values(CHOSEN)
    assert base is not None and edited is not None  # the trial is reported
    return base, edited, _often(one)


def _often(one: Mentions) -> Floats:
    return np.array([np.nan if count is None else count for count in one.counts], np.float64)


def _named(one: Mentions) -> str:
    return ", ".join(part for part in (one.name, one.corpus) if part)


def _corpora(evidence: Evidence) -> str:
    names = dict.fromkeys(f"{one.name} in {one.corpus}" for _, one in _counted(evidence) if one.corpus)
    return f"Counted: {listed(list(names))}." if names else ""


# ── what the discarded components say ────────────────────────────────────────────────────────────────────────


def discarded(evidence: Evidence) -> Found | None:
    """Whether what the chosen edit throws away answers with things of the right kind, beyond chance."""
    above: list[Estimate] = []
    parts: list[str] = []
    for trial in evidence.reported:
        tail = _thrown(trial)
        if trial.spoken is None or tail is None or trial.chosen is None:
            continue
        kind = same_relation_share(tail.said, trial.spoken.golds, trial.spoken.relations, facts=trial.spoken.units)
        if kind.share is None or kind.chance is None:
            continue
        above.append(shifted(kind.share, -kind.chance))
        words = function_words(tail.said, facts=trial.spoken.units)
        parts.append(
            f"{trial.title}: with only what {trial.chosen} throws away, {percent(float(np.mean(tail.right)))} of "
            f"{len(tail.said):,} answers begin right and {percent(words.value)} with a function word; of "
            f"{kind.wrong:,} wrong ones {percent(kind.share.value)} are right for another fact of the same relation, "
            f"{percent(kind.chance)} by chance"
        )
    total = pooled(above)
    return None if total is None else Found(clear(total), f"{'; '.join(parts)}.", total)


def _thrown(trial: Trial) -> Tail | None:
    """The answers of exactly those components that the chosen edit takes away."""
    if trial.spoken is None or trial.chosen is None:
        return None
    share = 1 - rho_of(trial.chosen)
    return next((tail for tail in trial.spoken.tails if abs(tail.share - share) < 1e-9), None)


def shifted(estimate: Estimate, by: float) -> Estimate:
    """An estimate moved by a constant, its interval with it."""
    low, high = (None if end is None else end + by for end in (estimate.low, estimate.high))
    return Estimate(estimate.value + by, low, high)


def tails(evidence: Evidence) -> Figure | None:
    """The likeliest next token with only the smallest components of the chosen matrix."""
    rows: list[Row] = []
    for trial in evidence.trials:
        spoken = trial.spoken
        if spoken is None:
            continue
        panel = f"{trial.title}: {spoken.matrix} of layer {spoken.layer}"
        for tail in spoken.tails:
            likeness = np.array([np.nan if one is None else one for one in tail.likeness], np.float64)
            kind = same_relation_share(tail.said, spoken.golds, spoken.relations, facts=spoken.units)
            curves = {
                RIGHT: statistics.interval(np.asarray(tail.right, np.float64)),
                FUNCTION: function_words(tail.said, facts=spoken.units),
                RELATED: kind.share,
                LIKENESS: statistics.over_seeds(likeness) if np.isfinite(likeness).all() else None,
            }
            for series, found in curves.items():
                if found is not None:
                    row = {"panel": panel, "series": series, "x": tail.share, **point(found)}
                    rows.append({**row, "by_chance": kind.chance if series == RELATED else None})
    if not rows:
        return None
    asked = [
        f"{trial.title} {len(trial.spoken.golds):,}, of which the chosen edit corrects {trial.spoken.corrected:,}"
        for trial in evidence.trials
        if trial.spoken is not None
    ]
    caption = (
        "The likeliest next token when of the chosen matrix only the smallest components are kept, a larger and larger "
        "share of them; at 1 it is the model itself. Likeness is the cosine of the input embeddings of that token and "
        f"of the right answer's first. Bands: 95 % intervals. Questions: {'; '.join(asked)}."
    )
    options = {
        "series": [RIGHT, FUNCTION, RELATED, LIKENESS],
        "x_title": "share of the smallest components kept",
        "y_title": "share of answers, or cosine",
        "section": FACTS,
    }
    return Figure("tails", "What the discarded components say", caption, "layer_curve", tuple(rows), options)


# ── plain text ───────────────────────────────────────────────────────────────────────────────────────────────


def reads(evidence: Evidence) -> Found | None:
    """Whether the model with the chosen edits reads plain text as well as before.

    All tasks' edits read the same windows, so a window counts once, with the mean over the tasks.
    """
    gaps: list[Estimate] = []
    parts: list[str] = []
    for text in evidence.texts:
        rows = {
            trial.name: (trial, row) for trial in evidence.reported if (row := lost(trial, text, CHOSEN)) is not None
        }
        if rows:
            gaps.append(statistics.over_seeds(np.mean([row for _, row in rows.values()], axis=0)))
            first, _ = next(iter(rows.values()))
            edited = [f"{t.chosen} ({t.title}) {_size(perplexity(t, text, CHOSEN))}" for t, _ in rows.values()]
            parts.append(f"{text.name}: the model itself {_size(perplexity(first, text, BASE))}, {', '.join(edited)}")
    total = pooled(gaps)
    if total is None:
        return None
    effect = f"Perplexity per token. {'; '.join(parts)}."
    if total.low is None or total.high is None:
        return Found("unclear", effect, total)
    return Found("yes" if total.high < LOSS else "no" if total.low > LOSS else "unclear", effect, total)


def texts(evidence: Evidence) -> Figure | None:
    """What the edits change of the loss on plain text."""
    rows: list[Row] = []
    for text in evidence.texts:
        for trial in evidence.reported:
            for series, use in (("chosen edit", CHOSEN), ("several edits", last_composed(trial))):
                gap = None if use is None else lost(trial, text, use)
                if gap is not None and use is not None:
                    change = statistics.over_seeds(gap)
                    row = {"panel": text.name, "label": trial.title, "series": series, **bar(change)}
                    rows.append({**row, "perplexity": perplexity(trial, text, use)})
    if not rows:
        return None
    sizes = [f"{text.name} {text.tokens:,}" for text in evidence.texts]
    caption = (
        "Negative log-likelihood of plain text in nats per token, with the edits that were chosen for each task, minus "
        "that of the model itself: above zero the model reads worse. Sliding windows; each token is scored once. "
        f"Intervals: 95 %, bootstrap over windows. Tokens: {listed(sizes)}."
    )
    options = {
        "series": ["chosen edit", "several edits"],
        "rules": [{"value": 0.0, "name": "no change"}],
        "sort": "given",
        "x_title": "difference of the loss (nats per token)",
        "section": FACTS,
    }
    return Figure("texts", "Plain text", caption, "bars", tuple(rows), options)


def lost(trial: Trial, text: Text, use: Use) -> Floats | None:
    """Window by window, by how many nats a text is less likely with a use's edits; None where not read."""
    found, base = _windows(trial, text, use), _windows(trial, text, BASE)
    return None if found is None or base is None or not np.isfinite(found - base).all() else found - base


def perplexity(trial: Trial, text: Text, use: Use) -> float | None:
    """Of a text per token, under a use's edits; None where it was not read."""
    found = _windows(trial, text, use)
    return None if found is None or not np.isfinite(found).all() else float(np.exp(found.mean()))


def _size(value: float | None) -> str:
    return "?" if value is None else said(value, 2)


def _windows(trial: Trial, text: Text, use: Use) -> Floats | None:
    recipe = trial.report.uses.get(use) if trial.report is not None else None
    losses = None if recipe is None else text.reads.get(recipe.fingerprint)
    return None if losses is None else np.array([np.nan if one is None else one for one in losses], np.float64)


def figures(evidence: Evidence) -> Sequence[Figure]:
    """The figures for which something was measured."""
    drawn = (frequency(evidence), boosts(evidence), tails(evidence), texts(evidence))
    return [figure for figure in drawn if figure is not None]
