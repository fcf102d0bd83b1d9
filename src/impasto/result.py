"""Values that pass between measuring, storing and showing: requests, responses, results, answers.

Nothing here imports torch; everything is immutable and has a stable meaning across processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["loglikelihood", "rolling", "generate"]
Verdict = Literal["yes", "no", "unclear"]

RANK = '{"rank": true}'  # options of a log-likelihood request


def digest(*parts: object) -> str:
    """A 16-digit hexadecimal fingerprint of JSON-able parts, the same in every process and on every machine."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    r"""One question to a model, as lm-evaluation-harness asks it.

    `kind` is "loglikelihood" (of `continuation` after `context`), "rolling" (of the whole text in
    `continuation`) or "generate" (greedy text after `context`; `options` is the JSON text of the harness's
    generation options, such as `{"max_gen_toks": 64, "until": ["\n"]}`). `RANK` as the options of a log-likelihood
    asks for the rank of the continuation's first token too; `after` in them is a text behind the continuation, which
    models that see both sides are shown.
    """

    kind: Kind
    context: str
    continuation: str = ""
    options: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """Stable name of this question, equal for equal texts."""
        return digest("request", self.kind, self.context, self.continuation, self.options)

    @property
    def wants_rank(self) -> bool:
        """Whether the rank of the continuation's first token is asked for."""
        return bool(self._said.get("rank"))

    @property
    def after(self) -> str:
        """What stands behind the continuation; models that read from left to right have no use for it."""
        return str(self._said.get("after", ""))

    @cached_property
    def _said(self) -> Mapping[str, Any]:
        """The options of a log-likelihood."""
        found: Mapping[str, Any] = json.loads(self.options) if self.kind == "loglikelihood" and self.options else {}
        return found


@dataclass(frozen=True, slots=True)
class Response:
    """The answer of one recipe to one request.

    `loglikelihood` is in nats and may be non-finite (then it is reported, never averaged in silently);
    `tokens` counts scored or generated tokens; `truncated` says that the request was longer than the model's window;
    `rank` counts the tokens that are likelier than the continuation's first, 10 for as many or more, and is None where
    that was not asked for.
    """

    loglikelihood: float = math.nan
    is_greedy: bool = False
    text: str | None = None
    tokens: int = 0
    truncated: bool = False
    rank: int | None = None


MASKINGS: Mapping[str, str] = MappingProxyType(
    {
        "together": "all tokens of an answer masked at once",
        "each": "the tokens of an answer masked one at a time",
        "authors": "all tokens of an answer masked at once, losses per token over one token too many",
    }
)
"""Ways to score with a model that predicts masked tokens, the usual one first, and what each is, in words."""


@dataclass(frozen=True)
class Setting:
    """What must be equal for two numbers to be comparable: the weights and how they were run."""

    model: str  # as the user named it
    weights: str  # hash of the weights, or of the hub revision
    dtype: str  # "float32", "bfloat16", "float16"
    device: str  # "cpu" or "cuda"
    kv: str = "exact"
    attention: str = "sdpa"
    masking: str = ""  # how masked tokens are scored, a name in `MASKINGS`; "" predicts next tokens

    @cached_property
    def fingerprint(self) -> str:
        """Stable name of the setting; the model's display name is not part of it."""
        masking = (self.masking,) if self.masking else ()  # so that older names stay what they were
        return digest("setting", self.weights, self.dtype, self.device, self.kv, self.attention, *masking)


@dataclass(frozen=True)
class Result:
    """What one recipe scored on one task.

    `metrics` and `scores` have the harness's metric names ("acc,none"); `scores[name]` has one value per
    example, in document order, None where the example has no finite value. `protocol` is the fingerprint of
    what was asked (task version, shots, prompts, documents), so only equal protocols may be compared.
    """

    recipe: str  # Recipe.fingerprint
    task: str
    protocol: str
    n: int
    metrics: Mapping[str, float]
    scores: Mapping[str, tuple[float | None, ...]]
    nonfinite: int = 0  # requests whose log-likelihood was not finite
    truncated: int = 0  # requests longer than the model's window
    info: Mapping[str, Any] = field(default_factory=dict)  # task version, shots, chance, majority, higher_is_better...


_NOTHING = 1e-12
"""What sums of floating-point numbers leave where nothing should be left; printed as zero."""


def fixed(value: float, digits: int = 3) -> str:
    """A number with so many decimals, and where these are all zero with as many more as show its first digit.

    So a reader sees on which side of zero every number lies. Only what is nothing but rounding is 0, without a sign.

    Example:
        >>> fixed(-0.12345), fixed(-0.00012), fixed(0.0), fixed(3e-9, 2)
        ('-0.123', '-0.0001', '0.000', '3e-09')
    """
    text = f"{value:,.{digits}f}"
    if any(letter not in "-0.," for letter in text):
        return text
    if abs(value) < _NOTHING:
        return f"{0:.{digits}f}"
    first = -math.floor(math.log10(abs(value)))
    return f"{value:.{first}f}" if first <= max(6, digits) else f"{value:.0e}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; `low`/`high` are None where no interval can be given."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return fixed(self.value)
        return f"{fixed(self.value)} [{fixed(self.low)}, {fixed(self.high)}]"


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of a study, answered for this model."""

    key: str  # short slug, e.g. "order-matters"
    question: str
    verdict: Verdict
    effect: str  # one sentence with the effect size in words and numbers
    estimate: Estimate | None
    unit: str  # unit of `estimate`, e.g. "normalised score"
    paper: str  # what the paper found, on which model
    rule: str  # how the verdict was reached from the interval
    figure: str | None = None  # key of the figure that shows it


Row = Mapping[str, Any]  # one row of a figure's table: plain numbers, texts, None


@dataclass(frozen=True)
class Figure:
    """What a figure shows, apart from how it is drawn: its numbers and which drawing fits them.

    `kind` names a drawing in `impasto.plots`; `options` are its arguments (axis titles, baselines...).
    """

    key: str
    title: str
    caption: str
    kind: str
    rows: tuple[Row, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A whole report, ready to be drawn: answers first, then figures, then how it was made."""

    title: str
    subtitle: str
    answers: tuple[Answer, ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]  # warnings and limits, shown under the answers
    facts: Mapping[str, str]  # provenance: model, weights, dtype, versions, command, time...
    tables: tuple[tuple[str, tuple[Row, ...]], ...] = ()  # title, rows
