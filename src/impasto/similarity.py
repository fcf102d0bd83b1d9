"""How alike the hidden states along a schedule are: as the painters paper measured it, and without its artefacts.

The states are the embeddings and what every step of a schedule leaves behind (a layer call, or a parallel group after
its merge). They are compared pair by pair, batch after batch; no more than the states of one batch is ever held.

Four measures, each a matrix [states, states]:

- `paper`: a text's states, all positions with their padding, are laid end to end as one long vector; cosine of two
  such vectors, mean over the texts of a batch, then over batches, short ones counting as much as long ones.
- `tokens`: cosine per token, mean over tokens. Padding is left out, and so is the first token of each text, where
  models keep a few enormous numbers (arXiv 2402.17762) that make any two states look alike.
- `centred`: the same after each state's mean over these tokens is taken off, so that a direction common to all
  tokens counts nothing. The means come first, so the batches are run twice.
- `cka`: linear centred kernel alignment over the same tokens, blind to rotations of a state. HSIC is estimated without
  bias per batch and averaged before the quotient is formed (Nguyen, Raghu and Kornblith 2020, arXiv 2010.15327):
  with K and L the Gram matrices of n tokens in two states, their diagonals set to zero,

      HSIC(K, L) = [tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'K L 1) / (n-2)] / (n (n-3))
      CKA(X, Y) = sum HSIC(K, L) / sqrt(sum HSIC(K, K) * sum HSIC(L, L))       sums over batches

Values are kept per text (per batch for `cka`), so that intervals by resampling texts can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from impasto.anatomy import Anatomy, anatomy, quietly
from impasto.errors import UsageError
from impasto.runtime import Event, scheduled
from impasto.schedule import Group, Schedule, Step

Floats = NDArray[np.float64]
Measure = Literal["paper", "tokens", "centred", "cka"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

CKA_TOKENS = 512  # tokens of one batch that enter its Gram matrices: 2 MB per state
THRESHOLDS = (0.5, 0.9)  # what the mean over all pairs is kept between, for `groups`
_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class Similarity:
    """What was measured, per text; the matrices are made from it.

    N texts in B batches, S states.

    Attributes:
        labels: what each state is: "embeddings", then each step in the schedule's notation.
        batch: the batch that each text was in, [N].
        counts: tokens of each text that `tokens` and `centred` look at, [N].
        paper_texts: cosine of the flattened states per text, [N, S, S].
        token_texts: mean cosine per token, [N, S, S].
        centred_texts: the same after centring, [N, S, S]; None where it was not asked for.
        hsic: unbiased estimates per batch, [B, S, S].
        norm_texts: mean length of a token's vector, tokens as in `counts`, [N, S].
        moments: per text the number of entries, their sum and their sum of squares, padding left out, [N, S, 3].
        first_share: share of the largest entry in the squared length of the first token's vector, [N, S]; near 1
            where one entry is massive.
        first_norm: length of the first token's vector, [N, S].
    """

    labels: tuple[str, ...]
    batch: NDArray[np.int64]
    counts: NDArray[np.int64]
    paper_texts: Floats
    token_texts: Floats
    centred_texts: Floats | None
    hsic: Floats
    norm_texts: Floats
    moments: Floats
    first_share: Floats
    first_norm: Floats

    @cached_property
    def paper(self) -> Floats:
        """The paper's matrix: cosine of flattened states, mean over texts, then over batches."""
        return self.matrix("paper")

    @cached_property
    def tokens(self) -> Floats:
        """Mean cosine per token, without padding and first tokens."""
        return self.matrix("tokens")

    @cached_property
    def centred(self) -> Floats:
        """The same after each state's mean is taken off."""
        return self.matrix("centred")

    @cached_property
    def cka(self) -> Floats:
        """Linear centred kernel alignment."""
        return self.matrix("cka")

    @cached_property
    def norm(self) -> Floats:
        """Mean length of a token's vector per state, [S]."""
        return _weighted(self.norm_texts, self.counts.astype(np.float64))

    @cached_property
    def variance(self) -> Floats:
        """Variance over all entries of a state (every token, every dimension), padding left out, [S]."""
        entries, total, squares = np.moveaxis(self.moments.sum(0), -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(squares / entries - (total / entries) ** 2, dtype=np.float64)

    def matrix(self, measure: Measure) -> Floats:
        """One of the four measures over all texts, [S, S]; nan where it is not defined."""
        values, weights = self._units(measure)
        return _normalised(_weighted(values, weights), measure)

    def interval(self, measure: Measure, *, draws: int = 1000, seed: int = 0) -> tuple[Floats, Floats]:
        """Ends of the 95 % percentile bootstrap intervals, over texts (over batches for `cka`), each [S, S].

        Args:
            measure: which one.
            draws: how often the texts are drawn anew.
            seed: of the drawing; equal seeds, equal intervals.
        """
        values, weights = self._units(measure)
        units = len(values)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(units, np.full(units, 1 / units), size=draws) * weights
        drawn = drawn[drawn.sum(1) > 0]
        flat = np.nan_to_num(values.reshape(units, -1))
        means = (drawn @ flat / drawn.sum(1, keepdims=True)).reshape(-1, *values.shape[1:])
        ends = np.percentile(_normalised(means, measure), [2.5, 97.5], axis=0)
        undefined = np.isnan(self.matrix(measure))
        low, high = (np.where(undefined, np.nan, end) for end in ends)
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Labels, matrices with their intervals and the figures per state, as plain lists; nan becomes None."""
        known = [m for m in MEASURES if m != "centred" or self.centred_texts is not None]
        return {
            "labels": list(self.labels),
            "texts": len(self.batch),
            "tokens": int(self.counts.sum()),
            "measures": {
                name: dict(zip(("low", "high"), map(_plain, self.interval(name)), strict=True))
                | {"value": _plain(self.matrix(name))}
                for name in known
            },
            "states": {
                "norm": _plain(self.norm),
                "variance": _plain(self.variance),
                "first_norm": _plain(self.first_norm.mean(0)),
                "first_share": _plain(self.first_share.mean(0)),
            },
        }

    def _units(self, measure: Measure) -> tuple[Floats, Floats]:
        """Values that are independent of one another, and how much each weighs."""
        if measure == "paper":
            sizes = np.bincount(self.batch)
            return self.paper_texts, 1.0 / sizes[self.batch]
        if measure == "tokens":
            return self.token_texts, self.counts.astype(np.float64)
        if measure == "centred":
            if self.centred_texts is None:
                raise UsageError("the centred similarity was not measured: leave centre=True")
            return self.centred_texts, self.counts.astype(np.float64)
        if measure == "cka":
            return self.hsic, np.isfinite(self.hsic[:, 0, 0]).astype(np.float64)
        raise UsageError(f"a measure is one of {', '.join(MEASURES)}, not {measure!r}")


def similarity(
    model: nn.Module,
    schedule: Schedule | str,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    members: bool = False,
    skip_first: bool = True,
    centre: bool = True,
    masked: bool | None = None,
    cka_tokens: int = CKA_TOKENS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """Compare all states along a schedule with one another.

        texts = padded([tokenizer.encode(text) for text in corpus])
        similarity(model, "0:8 {8:12} 12:28", texts).tokens

    Args:
        model: any model that can be scheduled; its head is not run.
        schedule: a `Schedule` or its text.
        batches: the model's inputs, such as `input_ids` and `attention_mask` of shape (texts, positions); texts padded
            on the left may need their `position_ids` too.
        members: also compare the states inside parallel groups; otherwise a group is one state, its merge.
        skip_first: leave each text's first token out of `tokens`, `centred` and `cka`.
        centre: measure `centred` too, by a second run over the batches.
        masked: whether the model is given the mask. The paper's code gave none; with padding on the right and
            attention that looks back only, this changes nothing but the states of the padding, which `paper` counts.
            None: no mask for models that write text, on batches padded on the right.
        cka_tokens: how many tokens of a batch enter `cka` at most; a random choice where there are more.
        seed: of that choice.
        progress: called with the batches done and their total (both runs counted).

    Raises:
        UsageError: no batches, or batches without a state to compare.
        UnsupportedModel: the model cannot be scheduled.
    """
    body = anatomy(model)
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, layers=body.depth)
    texts = [dict(batch) for batch in batches]
    if not texts:
        raise UsageError("similarity needs at least one batch of texts")
    wanted = tuple(_events(schedule, members))
    look = _Look(model, body, schedule, {place: i for i, (place, _) in enumerate(wanted)}, masked)
    total = len(texts) * (2 if centre else 1)
    rng = np.random.default_rng(seed)
    parts: list[_Part] = []
    sums: Tensor | None = None
    with quietly(model):
        for done, batch in enumerate(texts, 1):
            states, mask = look(batch)
            chosen = _chosen(mask, skip_first)
            parts.append(_measured(states, mask, chosen, cka_tokens, rng))
            if centre:
                here = (states * chosen[None, :, :, None]).double().sum((1, 2))
                sums = here if sums is None else sums + here
            if progress is not None:
                progress(done, total)
        centred: list[Floats] | None = None
        if sums is not None:
            means = (sums / max(1, sum(int(part.counts.sum()) for part in parts))).float()
            centred = []
            for done, batch in enumerate(texts, len(texts) + 1):
                states, mask = look(batch)
                centred.append(_per_token(states - means[:, None, None], _chosen(mask, skip_first)))
                if progress is not None:
                    progress(done, total)
    return Similarity(
        labels=("embeddings", *(str(Schedule((step,))) for _, step in wanted if step is not None)),
        batch=np.repeat(np.arange(len(parts)), [len(part.counts) for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        paper_texts=np.concatenate([part.paper for part in parts]),
        token_texts=np.concatenate([part.tokens for part in parts]),
        centred_texts=None if centred is None else np.concatenate(centred),
        hsic=np.stack([part.hsic for part in parts]),
        norm_texts=np.concatenate([part.norm for part in parts]),
        moments=np.concatenate([part.moments for part in parts]),
        first_share=np.concatenate([part.first_share for part in parts]),
        first_norm=np.concatenate([part.first_norm for part in parts]),
    )


def padded(texts: Sequence[Sequence[int]], *, batch_size: int = 8, pad: int = 0) -> list[dict[str, Tensor]]:
    """Batches of token lists, longest first as the harness sorts them, padded on the right.

    Args:
        texts: token ids, no text empty.
        batch_size: texts per batch; the paper's was 8.
        pad: the token that fills up.
    """
    if not all(texts):
        raise UsageError("a text without tokens has no states to compare")
    ordered = sorted(texts, key=len, reverse=True)
    batches = []
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        width = len(rows[0])
        batches.append(
            {
                "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            }
        )
    return batches


@dataclass(frozen=True, slots=True)
class Groups:
    """The states of a model in blocks that are alike inside, and which of them make its middle.

    Attributes:
        blocks: all blocks in order, each the numbers of its states.
        middle: the block that stands out most; empty where no two neighbouring states are alike.
        beginning: the states before it (all of them where there is no middle).
        end: the states behind it.
        threshold: the similarity above which a pair speaks for being in one block.
        separation: mean similarity inside the middle minus mean similarity of the middle to the others; nan where
            one of the two does not exist.
        rule: how the blocks were found, in words.
    """

    blocks: tuple[tuple[int, ...], ...]
    beginning: tuple[int, ...]
    middle: tuple[int, ...]
    end: tuple[int, ...]
    threshold: float
    separation: float
    rule: str

    def __str__(self) -> str:
        """The blocks in words, such as `{0} {1} {2..30} {31} {32}`."""
        return " ".join(f"{{{b[0]}}}" if len(b) == 1 else f"{{{b[0]}..{b[-1]}}}" for b in self.blocks)


def groups(matrix: Floats | Sequence[Sequence[float]], threshold: float | None = None) -> Groups:
    """Find the groups of layers in a similarity matrix.

    Every pair of states speaks for being in one block by as much as it is more alike than a threshold, and against it
    by as much as it is less. The middle is the run of neighbouring states whose pairs together speak most for it
    (of equals, the first); the same rule then divides what is left on either side. A run with no more for it than
    against it is no block, and its states stand alone.

    State 0 is the embeddings, state s what the schedule's step s - 1 leaves behind.

    Args:
        matrix: symmetric, [S, S]; a pair that is nan is in no block.
        threshold: None takes the mean over all pairs of different states, but at least 0.5, so that noise is no
            group, and at most 0.9, so that a model that is all alike is one.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise UsageError(f"a similarity matrix is square, not of shape {values.shape}")
    size = len(values)
    pairs = values[~np.eye(size, dtype=bool)]
    pairs = pairs[np.isfinite(pairs)]
    if threshold is None:
        threshold = float(np.clip(pairs.mean() if len(pairs) else 0.0, *THRESHOLDS))
    excess = np.triu(np.where(np.isfinite(values), values - threshold, -1e6), 1)
    first, last = _best(excess, 0, size)
    if last - first == 1:
        first = last = size
    middle = tuple(range(first, last))
    return Groups(
        blocks=tuple(tuple(range(a, b)) for a, b in _divided(excess, 0, size)),
        beginning=tuple(range(first)),
        middle=middle,
        end=tuple(range(last, size)),
        threshold=threshold,
        separation=_separation(values, middle),
        rule=(
            f"the middle is the run of states whose pairs, each counted by its similarity minus {threshold:.2f}, have "
            "the largest sum; the same rule divides what lies before and behind it"
        ),
    )


def _best(excess: Floats, start: int, stop: int) -> tuple[int, int]:
    """The run in [start, stop) with the largest sum of its pairs; a single state where none is above 0."""
    best, most = (start, start + 1), 1e-9
    for a in range(start, stop):
        total = 0.0
        for b in range(a + 1, stop):
            total += float(excess[a:b, b].sum())
            if total > most + 1e-9:
                best, most = (a, b + 1), total
    return best


def _divided(excess: Floats, start: int, stop: int) -> Iterator[tuple[int, int]]:
    if start >= stop:
        return
    a, b = _best(excess, start, stop)
    yield from _divided(excess, start, a)
    yield a, b
    yield from _divided(excess, b, stop)


def _separation(values: Floats, middle: Sequence[int]) -> float:
    inside = np.isin(np.arange(len(values)), middle)
    if inside.sum() < 2 or inside.all():
        return float("nan")
    within = values[np.ix_(inside, inside)]
    pairs = within[~np.eye(len(within), dtype=bool)]
    return float(pairs.mean() - values[np.ix_(inside, ~inside)].mean())


def _events(schedule: Schedule, members: bool) -> Iterator[tuple[int, Step | None]]:
    """Places in the probe's order, and steps, of the states that are compared."""

    def walk(steps: Sequence[Step]) -> Iterator[tuple[Step, bool]]:
        for step in steps:
            if isinstance(step, Group):
                for branch in step.branches:
                    yield from ((inner, False) for inner, _ in walk(branch))
            yield step, True

    yield 0, None
    for place, (step, outer) in enumerate(walk(schedule.steps), 1):
        if outer or members:
            yield place, step


@dataclass
class _Look:
    """Runs one batch and hands out its states, [states, texts, positions, width] in float32, and its mask."""

    model: nn.Module
    body: Anatomy
    schedule: Schedule
    places: Mapping[int, int]
    masked: bool | None
    inner: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.inner = getattr(self.model, "base_model", self.model)  # without the head, where it can be told apart
        self.writes = self.body.cached and self.model.get_output_embeddings() is not None  # type: ignore[operator]

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []

        def keep(event: Event) -> None:
            place = self.places.get(event.place)
            if place is None:
                return
            if not states:
                states.append(event.hidden.new_empty((len(self.places), *event.hidden.shape), dtype=torch.float32))
            states[0][place].copy_(event.hidden)

        inputs = self.inputs(batch)
        with scheduled(self.model, self.schedule, probe=keep):
            self.inner(**inputs)
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones(states[0].shape[1:3])
        return states[0], mask.to(states[0].device).bool()

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        device = next((p.device for p in self.inner.parameters() if p.device.type != "meta"), torch.device("cpu"))
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
        mask = batch.get("attention_mask")
        if mask is not None:
            right = bool((mask[:, :-1] >= mask[:, 1:]).all())
            given = self.masked if self.masked is not None else not (self.writes and right)
            if not given:
                del inputs["attention_mask"]
        if self.body.cached:
            inputs["use_cache"] = False
        if self.inner is self.model and "logits_to_keep" in self.body.arguments:
            inputs["logits_to_keep"] = 1
        return inputs


@dataclass(frozen=True, slots=True)
class _Part:
    """One batch, measured."""

    counts: NDArray[np.int64]
    paper: Floats
    tokens: Floats
    hsic: Floats
    norm: Floats
    moments: Floats
    first_share: Floats
    first_norm: Floats


def _chosen(mask: Tensor, skip_first: bool) -> Tensor:
    """The tokens that are looked at one by one, (texts, positions)."""
    return mask & (mask.cumsum(1) > 1) if skip_first else mask


def _measured(states: Tensor, mask: Tensor, chosen: Tensor, cka_tokens: int, rng: np.random.Generator) -> _Part:
    rows = torch.arange(len(mask), device=mask.device)
    first = states[:, rows, mask.int().argmax(1)]  # [S, N, D]
    squared = first.square()
    lengths = states.norm(dim=-1)  # [S, N, L]
    real = torch.where(mask[None, :, :, None], states, 0.0)
    entries = (mask.sum(1).double() * states.shape[-1]).expand(len(states), -1)
    moments = torch.stack([entries, real.sum((2, 3)).double(), real.square().sum((2, 3)).double()], -1)
    counts = chosen.sum(1)
    return _Part(
        counts=counts.cpu().numpy().astype(np.int64),
        paper=_cosines(states.flatten(2)),
        tokens=_per_token(states, chosen),
        hsic=_hsic(states, chosen, cka_tokens, rng),
        norm=_array(torch.where(chosen, lengths, 0.0).sum(2).T / counts.clamp(min=1)[:, None]),
        moments=_array(moments.transpose(0, 1)),
        first_share=_array((squared.amax(-1) / squared.sum(-1).clamp(min=_EPSILON**2)).T),
        first_norm=_array(first.norm(dim=-1).T),
    )


def _cosines(vectors: Tensor) -> Floats:
    """Cosines between all states per text: [S, N, D] to [N, S, S]."""
    unit = (vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=_EPSILON)).transpose(0, 1)
    return _array(unit @ unit.mT)


def _per_token(states: Tensor, chosen: Tensor) -> Floats:
    """Mean cosine per chosen token between all states per text: [S, N, L, D] to [N, S, S]; 0 without tokens."""
    unit = states / states.norm(dim=-1, keepdim=True).clamp(min=_EPSILON)
    unit = torch.where(chosen[None, :, :, None], unit, 0.0).flatten(2).transpose(0, 1)
    return _array(unit @ unit.mT / chosen.sum(1).clamp(min=1)[:, None, None])


def _hsic(states: Tensor, chosen: Tensor, most: int, rng: np.random.Generator) -> Floats:
    """Unbiased HSIC of every pair of states, [S, S]; nan where fewer than four tokens are there."""
    places = np.flatnonzero(chosen.flatten().cpu().numpy())
    if len(places) > most:
        places = np.sort(rng.choice(places, most, replace=False))
    n = len(places)
    if n < 4:
        return np.full((len(states), len(states)), np.nan)
    tokens = states.flatten(1, 2)[:, torch.from_numpy(places).to(states.device)]
    gram = tokens @ tokens.mT  # float32; differences of large numbers are taken in float64 below
    gram = gram.cpu().double()
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1)
    rows = gram.sum(2)
    total = rows.sum(1)
    value = flat @ flat.T + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 * (rows @ rows.T) / (n - 2)
    return _array(value / (n * (n - 3)))


def _array(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)


def _weighted(values: Floats, weights: Floats) -> Floats:
    """Mean over the first axis; what weighs nothing is left out, even where it is nan."""
    used = weights > 0
    if not used.any():
        return np.full(values.shape[1:], np.nan)
    return np.asarray(np.average(values[used], axis=0, weights=weights[used]), dtype=np.float64)


def _normalised(values: Floats, measure: Measure) -> Floats:
    """Mean HSIC made into CKA, [..., S, S]; other measures as they are."""
    if measure != "cka":
        return values
    own = np.diagonal(values, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.where(own > 0, own, np.nan))
        return np.asarray(values / (scale[..., :, None] * scale[..., None, :]), dtype=np.float64)


def _plain(values: Floats) -> list[Any]:
    """Nested lists with None for what is not finite."""
    return [_plain(v) if isinstance(v, np.ndarray) else (float(v) if np.isfinite(v) else None) for v in values]
