"""Latencies as values: every sample of every recipe, what they are compared with, and how sure the comparison is.

    bench = Bench.from_dict(json.loads(Path("bench.json").read_text()))
    for timing in bench.timings:
        print(timing.how, timing.case, timing.tpot, bench.ratio(timing))

Two times are kept apart, because recipes change them by different amounts: TTFT, from a prompt to its first new token,
and TPOT, from one new token to the next. Times are in milliseconds. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from impasto.errors import UsageError
from impasto.recipe import Recipe
from impasto.result import Estimate, Setting

How = Literal["plain", "fast", "hf", "hf-compiled", "vllm"]
Part = Literal["ttft", "tpot"]
OURS: tuple[How, ...] = ("plain", "fast")
SCHEMA_VERSION = 1
LEVEL = 0.95
Fact: TypeAlias = str | float | int | None


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """What every contender is asked to do: so many rows, prompts of so many tokens, so many tokens after them."""

    batch: int
    context: int
    new_tokens: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 1 or self.new_tokens < 2:
            raise UsageError(
                "a case has at least one row, one token of prompt and two new tokens, not "
                f"{self.batch}, {self.context} and {self.new_tokens}"
            )

    @property
    def key(self) -> str:
        """The name of the case in a store."""
        return f"batch {self.batch}, context {self.context}, new {self.new_tokens}"

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context:,}, {self.new_tokens} new tokens"


@dataclass(frozen=True, slots=True)
class Round:
    """What one contender showed in one round; rounds of equal number ran side by side, in turns.

    Attributes:
        number: of the round within its case.
        ttft: milliseconds from prompt to first token, one value per time the prompt was read.
        tpot: milliseconds of every token after the first; a single mean where only the whole can be timed.
    """

    number: int
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a case makes the device do at the very least, by counting weights, keys and values.

    Attributes:
        weights: bytes of the weights that the recipe needs in memory, each once.
        step_bytes: bytes that one step of decoding reads: weights of every layer call, head, keys and values.
        step_flops: floating-point operations of that step.
        prompt_bytes: bytes that reading the prompts takes.
        prompt_flops: operations of reading the prompts.
    """

    weights: int
    step_bytes: int
    step_flops: float
    prompt_bytes: int
    prompt_flops: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device reached in this run: bytes per second of copying and of reading, operations per second."""

    copy: float
    read: float
    matmul: float

    def floor(self, demand: Demand, part: Part) -> float:
        """Milliseconds below which the device cannot go: the longer of moving the bytes and doing the operations."""
        moved, done = (
            (demand.step_bytes, demand.step_flops) if part == "tpot" else (demand.prompt_bytes, demand.prompt_flops)
        )
        return 1e3 * max(moved / max(self.copy, self.read), done / self.matmul)


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of the device before one round of a case.

    Attributes:
        case: the case's key.
        round: its number.
        facts: clocks in MHz, temperature in °C, power in W.
        throttled: why the device was held back, empty where it was not.
    """

    case: str
    round: int
    facts: Mapping[str, Fact]
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of samples, and the values below which 5 %, 95 % and 99 % of them are."""

    median: float
    q05: float
    q95: float
    q99: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread | None:
        """None where there are no samples."""
        if not samples:
            return None
        ordered = sorted(samples)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            low = math.floor(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

        return cls(at(0.5), at(0.05), at(0.95), at(0.99), len(ordered))

    def __str__(self) -> str:
        return f"{self.median:.3f} ms [{self.q05:.3f}, {self.q95:.3f}]"


@dataclass(frozen=True)
class Timing:
    """One recipe in one case, run in one way.

    Attributes:
        recipe: fingerprint.
        how: "plain" and "fast" are impasto's; "hf" and "hf-compiled" run the untouched model elsewhere, and "vllm"
            also recipes that can be plain checkpoints.
        case: what was asked.
        rounds: every sample; empty where there is a problem.
        memory: bytes needed at the most, the recipe's own weights and building included; None where it is not known.
        build: seconds that getting ready took, by what they were spent on; equal layers are compiled for the first
            contender alone.
        demand: what the device must do at the least; None for peers.
        problem: why there are no samples, or fewer than there should be.
        notes: what should be said beside the numbers.
    """

    recipe: str
    how: How
    case: Case
    rounds: tuple[Round, ...] = ()
    memory: int | None = None
    build: Mapping[str, float] = field(default_factory=dict)
    demand: Demand | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ttft(self) -> Spread | None:
        """Milliseconds to the first token, over all rounds."""
        return Spread.of([sample for one in self.rounds for sample in one.ttft])

    @property
    def tpot(self) -> Spread | None:
        """Milliseconds per token after the first, over all rounds."""
        return Spread.of([sample for one in self.rounds for sample in one.tpot])

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second of all rows, once their prompts are read."""
        return None if self.tpot is None else self.case.batch / self.tpot.median * 1e3

    @property
    def throughput(self) -> float | None:
        """New tokens per second of all rows, prompts included: what serving such requests one batch at a time gives."""
        if self.ttft is None or self.tpot is None:
            return None
        milliseconds = self.ttft.median + self.tpot.median * (self.case.new_tokens - 1)
        return self.case.batch * self.case.new_tokens / milliseconds * 1e3


@dataclass(frozen=True)
class Bench:
    """One run of the bench.

    Attributes:
        setting: weights, dtype and device.
        recipes: what was compared; the first is the untouched model.
        timings: one per contender and case.
        machine: what it ran on, and with which versions.
        roofline: what the device can do; None where it was not measured.
        readings: the state of the device before every round; empty where nothing answers.
        notes: what should be said of the whole run.
        complete: whether all that was asked was measured.
    """

    setting: Setting
    recipes: tuple[Recipe, ...]
    timings: tuple[Timing, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    roofline: Roofline | None = None
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases, in the order in which they came."""
        return tuple(dict.fromkeys(timing.case for timing in self.timings))

    def of(self, case: Case) -> tuple[Timing, ...]:
        """The timings of one case."""
        return tuple(timing for timing in self.timings if timing.case == case)

    def baseline(self, case: Case) -> Timing | None:
        """The untouched model in this case, run by impasto."""
        first = self.recipes[0].fingerprint
        return next((t for t in self.of(case) if t.recipe == first and t.how in OURS and t.rounds), None)

    def called(self, timing: Timing, names: Mapping[str, str]) -> str:
        """What tables and figures call a contender.

        A recipe by its name; one that a peer runs as `A (vllm)`; and the untouched model under a peer as the peer.

        Args:
            timing: whose.
            names: of the recipes, by fingerprint.
        """
        if timing.how in OURS:
            return names[timing.recipe]
        return timing.how if timing.recipe == self.recipes[0].fingerprint else f"{names[timing.recipe]} ({timing.how})"

    def ratio(self, timing: Timing, part: Part = "tpot") -> Estimate | None:
        """How many times as long this takes as the untouched model run by impasto, whoever runs this.

        None where the two never ran in one round.
        """
        base = self.baseline(timing.case)
        return None if base is None else ratio(timing.rounds, base.rounds, part)

    def share(self, timing: Timing, part: Part = "tpot") -> float | None:
        """The share of what the device can do that was reached: 1 is the roofline."""
        spread = timing.tpot if part == "tpot" else timing.ttft
        if self.roofline is None or timing.demand is None or spread is None:
            return None
        return self.roofline.floor(timing.demand, part) / spread.median

    @property
    def throttled(self) -> Mapping[str, int]:
        """How many readings found the device held back, by reason."""
        reasons = [reason for reading in self.readings for reason in reading.throttled]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with medians and ratios beside the samples that they were made of."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench",
            "setting": dataclasses.asdict(self.setting),
            "machine": dict(self.machine),
            "roofline": None if self.roofline is None else dataclasses.asdict(self.roofline),
            "recipes": [recipe.to_dict() for recipe in self.recipes],
            "timings": [self.timing_dict(timing) for timing in self.timings],
            "readings": [dataclasses.asdict(reading) for reading in self.readings],
            "notes": list(self.notes),
            "complete": self.complete,
        }

    def timing_dict(self, timing: Timing) -> dict[str, Any]:
        """One timing as plain data; what stands under "summary" follows from the rest."""
        summary = {
            "ttft_ms": timing.ttft,
            "tpot_ms": timing.tpot,
            "ttft_ratio": self.ratio(timing, "ttft"),
            "tpot_ratio": self.ratio(timing, "tpot"),
        }
        return {
            **dataclasses.asdict(timing),
            "summary": {
                **{name: None if value is None else dataclasses.asdict(value) for name, value in summary.items()},
                "decode_tokens_per_second": timing.decode_rate,
                "tokens_per_second": timing.throughput,
                "ttft_roofline_share": self.share(timing, "ttft"),
                "tpot_roofline_share": self.share(timing, "tpot"),
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bench:
        """The bench that `to_dict` wrote.

        Raises:
            UsageError: the data is no bench, or one of a newer impasto.
        """
        version = data.get("schema_version")
        if data.get("kind") != "bench" or type(version) is not int:
            raise UsageError("this is no result of `impasto bench`")
        if version > SCHEMA_VERSION:
            raise UsageError(f"this bench has schema version {version}; this impasto reads {SCHEMA_VERSION}")
        roofline = data["roofline"]
        return cls(
            setting=Setting(**data["setting"]),
            recipes=tuple(map(Recipe.from_dict, data["recipes"])),
            timings=tuple(map(timing_of, data["timings"])),
            machine=data["machine"],
            roofline=None if roofline is None else Roofline(**roofline),
            readings=tuple(
                Reading(one["case"], one["round"], one["facts"], tuple(one["throttled"])) for one in data["readings"]
            ),
            notes=tuple(data["notes"]),
            complete=data["complete"],
        )


def timing_of(data: Mapping[str, Any]) -> Timing:
    """The timing that `Bench.timing_dict` wrote."""
    if data["how"] not in get_args(How):
        raise UsageError(f"a recipe runs as one of {', '.join(get_args(How))}, not {data['how']!r}")
    return Timing(
        recipe=data["recipe"],
        how=data["how"],
        case=Case(**data["case"]),
        rounds=tuple(Round(one["number"], tuple(one["ttft"]), tuple(one["tpot"])) for one in data["rounds"]),
        memory=data["memory"],
        build=data["build"],
        demand=None if data["demand"] is None else Demand(**data["demand"]),
        problem=data["problem"],
        notes=tuple(data["notes"]),
    )


def ratio(rounds: Sequence[Round], base: Sequence[Round], part: Part = "tpot") -> Estimate | None:
    """How many times as long as `base` the rounds take, with a 95 % interval.

    The device's speed drifts, so only rounds that ran side by side are compared, by their medians. The value is the
    geometric mean of these ratios; the interval is Student's, of their logarithms, and needs two rounds.
    """
    known = {one.number: getattr(one, part) for one in base}
    logs = [
        math.log(statistics.median(getattr(one, part)) / statistics.median(known[one.number]))
        for one in rounds
        if getattr(one, part) and known.get(one.number)
    ]
    if not logs:
        return None
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Estimate(math.exp(middle))
    from scipy import stats

    width = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Estimate(math.exp(middle), math.exp(middle - width), math.exp(middle + width))


def turns(count: int, number: int) -> tuple[int, ...]:
    """In which order `count` contenders run in round `number`.

    Whoever runs first finds the device cool, and whoever runs behind a long one finds it warm. So the order changes
    from round to round as in a Williams square: in any `count` rounds that follow each other every contender has
    every place once, and for an even count every contender follows every other one once.

    >>> [turns(4, number) for number in range(4)]
    [(0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)]
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return tuple((step + number) % count for step in zigzag)


def cases(batches: Sequence[int], contexts: Sequence[int], new_tokens: int) -> Iterator[Case]:
    """Every batch size with every context, small ones first, each once."""
    for context in sorted(set(contexts)):
        for batch in sorted(set(batches)):
            yield Case(batch, context, new_tokens)
