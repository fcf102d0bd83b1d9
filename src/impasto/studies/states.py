"""Questions about hidden states and caches: similarity, its artefacts, why repeating is worse, averaged KV caches.

Matrices arrive as plain data with an interval for every entry, not with resamples. The interval of a mean of entries
is then the mean of their intervals, which is exact if all entries move together and too wide otherwise; of a
difference, both intervals are added. So these verdicts err towards "unclear".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impasto import moves, statistics
from impasto.result import Estimate
from impasto.statistics import verdict
from impasto.studies.evidence import Cached
from impasto.studies.protocol import FULL, METHODS, state_start
from impasto.studies.reading import SLIGHT, Found, Reading, listed, said, with_interval

MEASURES: Mapping[str, str] = {
    "paper": "as in the paper",
    "tokens": "per token, first token left out",
    "centred": "per token, centred",
    "cka": "linear CKA",
}
"""What figures call the measures of `impasto.similarity`."""

DISTINCT = 0.1
"""How much more alike states must be inside the middle than to the others, to call it a group of its own."""

Floats = NDArray[np.float64]


def groups(reading: Reading) -> Found | None:
    """Whether the states fall into a beginning, a middle and an end, as the paper measured them."""
    found = reading.evidence.groups.get("paper")
    matrix = _matrix(reading, FULL, "paper")
    if found is None or matrix is None:
        return None
    parts = {name: tuple(found[name]) for name in ("beginning", "middle", "end")}
    blocks = " ".join(f"{{{_states(block)}}}" for block in found["blocks"])
    apart = _separation(matrix, parts["middle"])
    if not all(parts.values()) or apart is None:
        lacking = listed([name for name, states in parts.items() if not states])
        return Found("no", f"There is no {lacking} group. Blocks of like states: {blocks}.", apart)
    effect = (
        f"Blocks of like states: {blocks}. The middle "
        f"({_states(parts['middle'])}) is more alike inside than to the other states by {with_interval(apart)}."
    )
    return Found(verdict(apart, DISTINCT), effect, apart)


def artefacts(reading: Reading) -> Found | None:
    """Whether the middle stays a group when padding, first tokens and common directions do not count."""
    found = reading.evidence.groups.get("paper")
    middle = tuple(found["middle"]) if found is not None else ()
    apart = {}
    for measure in ("tokens", "centred", "cka"):
        matrix = _matrix(reading, FULL, measure)
        estimate = _separation(matrix, middle) if matrix is not None else None
        if estimate is not None:
            apart[measure] = estimate
    if found is not None and not middle:
        return Found("unclear", "The paper's measure finds no middle group here, so there is none to look at again.")
    if not apart:
        return None
    least = min(apart.values(), key=lambda estimate: estimate.value)
    parts = [f"{with_interval(one)} ({MEASURES[measure]})" for measure, one in apart.items()]
    effect = (
        f"The states {_states(middle)}, which are the middle by the paper's measure, are more alike inside than to the "
        f"others by {listed(parts)}. {_first_token(reading)}"
    )
    return Found(verdict(least, DISTINCT), effect.strip(), least)


def repeat_drifts(reading: Reading) -> Found | None:
    """Whether the repeated layer carries the states further away than the layers whose places it takes."""
    start, width = state_start(reading.depth), moves.affected(reading.depth, state_start(reading.depth))
    before, behind = start + 1, start + 1 + width
    kept = {}
    for label in (FULL, "middle_repeat"):
        matrix = _matrix(reading, label, "tokens")
        if matrix is None or matrix.shape[-1] <= behind:
            return None
        kept[label] = _estimate(*matrix[:, before, behind])
    further = _minus(kept[FULL], kept["middle_repeat"])
    if further is None:
        return None
    spread = {label: _variance(reading, label) for label in (FULL, "skip", "middle_repeat")}
    base = spread[FULL]
    ratios = [
        f"{said(value / base, 1)} times under {METHODS[label].lower()}"
        for label, value in spread.items()
        if label != FULL and value is not None and base
    ]
    more = f" The variance of the last state is, compared with the full model, {listed(ratios)}." if ratios else ""
    effect = (
        f"From the state that enters the middle (M = {width}) to the one that leaves it, the cosine per token is "
        f"{with_interval(kept[FULL])} in the full model and {with_interval(kept['middle_repeat'])} when layer "
        f"{moves.centre(reading.depth)} is repeated.{more}"
    )
    return Found(verdict(further), effect, further)


def averaged_cache(reading: Reading) -> Found | None:
    """Whether the averaged cache changes texts that the exact cache writes as the full pass does."""
    rows = [row for row in reading.evidence.kv if row.affected > 1]
    if not rows:
        return None
    changed = interval_of_rows([[a and not b for a, b in zip(row.exact, row.mean, strict=True)] for row in rows])
    exact = interval_of_rows([row.exact for row in rows])
    mean = interval_of_rows([row.mean for row in rows])
    firsts = [first for row in rows for first in row.mean_first if first is not None]
    where = f" The first other token is number {int(np.median(firsts)) + 1} in the median." if firsts else ""
    labels = [f"{METHODS.get(row.method, row.method).lower()}, M = {row.affected}" for row in rows]
    effect = (
        f"With exact caches {with_interval(exact)} of the texts are those that a full pass without a cache writes, "
        f"with averaged caches {with_interval(mean)} ({listed(labels)}).{where}{_right(rows)}"
    )
    return Found(verdict(changed, SLIGHT), effect, changed)


def interval_of_rows(rows: Sequence[Sequence[float]]) -> Estimate:
    """Mean over prompts, each averaged over the rows in which it stands, with its interval over prompts."""
    if len({len(row) for row in rows}) == 1:
        return statistics.interval(np.mean(np.asarray(rows, np.float64), axis=0))
    return statistics.interval([float(value) for row in rows for value in row])


def cache_label(row: Cached) -> str:
    """What a row of the comparison is called in figures."""
    return f"{METHODS.get(row.method, row.method)}, M = {row.affected}"


def middle_groups(found: Mapping[str, Any] | None) -> list[list[object]]:
    """Groups as boxes for the drawing of a matrix: [first, behind the last, name]."""
    if found is None or not found["middle"]:
        return []
    parts = ((name, found[name]) for name in ("beginning", "middle", "end"))
    return [[min(states), max(states) + 1, name] for name, states in parts if states]


def _matrix(reading: Reading, label: str, measure: str) -> Floats | None:
    """Value, low and high of a similarity matrix, [3, states, states]; NaN where undefined."""
    found = reading.evidence.similarity.get(label, {}).get("measures", {}).get(measure)
    if found is None:
        return None
    return np.stack([np.asarray(found[end], np.float64) for end in ("value", "low", "high")])


def _separation(matrix: Floats, middle: Sequence[int]) -> Estimate | None:
    """Mean similarity of pairs inside the middle minus that of the middle to the other states."""
    inside = np.isin(np.arange(matrix.shape[-1]), middle)
    if inside.sum() < 2 or inside.all():
        return None
    pairs = np.outer(inside, inside) & ~np.eye(len(inside), dtype=bool)
    across = np.outer(inside, ~inside)
    means = [_estimate(*(_mean(end[where]) for end in matrix)) for where in (pairs, across)]
    return _minus(*means)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _estimate(value: float, low: float, high: float) -> Estimate:
    known = np.isfinite(low) and np.isfinite(high)
    return Estimate(float(value), float(low) if known else None, float(high) if known else None)


def _minus(a: Estimate, b: Estimate) -> Estimate | None:
    if not np.isfinite(a.value) or not np.isfinite(b.value):
        return None
    low = a.low - b.high if a.low is not None and b.high is not None else None
    high = a.high - b.low if a.high is not None and b.low is not None else None
    return Estimate(a.value - b.value, low, high)


def _variance(reading: Reading, label: str) -> float | None:
    """Variance of the last state."""
    values = reading.evidence.similarity.get(label, {}).get("states", {}).get("variance") or [None]
    return None if values[-1] is None else float(values[-1])


def _first_token(reading: Reading) -> str:
    """How much of the first token's length is one single number, where it is most."""
    shares = reading.evidence.similarity.get(FULL, {}).get("states", {}).get("first_share") or []
    known = [(share, state) for state, share in enumerate(shares) if share is not None]
    if not known:
        return ""
    share, state = max(known)
    return f"One entry makes up to {share:.0%} of the first token's squared length (state {state})."


def _states(states: Sequence[int]) -> str:
    if not len(states):
        return "none"
    return str(states[0]) if len(states) == 1 else f"{states[0]} to {states[-1]}"


def _right(rows: Sequence[Cached]) -> str:
    judged = [row for row in rows if row.exact_right and row.mean_right]
    if not judged:
        return ""
    exact, mean = (
        interval_of_rows([row.exact_right for row in judged]),
        interval_of_rows([row.mean_right for row in judged]),
    )
    return f" Right answers: {with_interval(exact)} with exact, {with_interval(mean)} with averaged caches."
