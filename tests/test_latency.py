"""Laws of the bench: turns, samples, ratios, failures; on a clock of its own, so that nothing here is timed."""

from __future__ import annotations

import functools
import importlib.machinery
import itertools
import json
import math
import random
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from impasto import latency, peers
from impasto.contenders import Fast, Job, Outfit, Plain, Ready, demand, written
from impasto.edit import Edit
from impasto.errors import NotationError, StoreError, UnsupportedModel, UsageError
from impasto.hardware import HostWatch, Sensor, State, limits, machine, peak_memory
from impasto.models import LoadedModel, adopt
from impasto.recipe import Recipe
from impasto.result import Setting
from impasto.runtime import scheduled
from impasto.store import Store
from impasto.timings import Bench, Case, Demand, Reading, Roofline, Round, Spread, Timing, cases, ratio, turns
from tiny import tiny_folder, tiny_model, tiny_tokenizer

LAYERS = 4
FULL = Recipe.of("tiny", layers=LAYERS)
SKIP = Recipe.of("tiny", "0 2:4", layers=LAYERS)
PARALLEL = Recipe.of("tiny", "0 {1,2} 3", layers=LAYERS)
CUT = Recipe.of("tiny", None, ["1:3.mlp.*@r4"], layers=LAYERS)
CASE = Case(2, 8, 4)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return adopt(tiny_model(layers=LAYERS), tiny_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's limits are given, not measured."""
    monkeypatch.setattr(latency, "limits", lambda *_: {"copy": 1e9, "read": 2e9, "matmul": 1e12})


class Ticks:
    """A clock that goes on by one second at every look."""

    def __init__(self) -> None:
        self.looks = itertools.count()

    def __call__(self) -> float:
        return float(next(self.looks))


def ticking(loaded: LoadedModel) -> HostWatch:
    return HostWatch(loaded.device, Ticks())


@dataclass
class Thermometer:
    """A sensor that gets warmer."""

    reads: int = 0

    def read(self) -> State:
        self.reads += 1
        return State({"sm_mhz": 1980.0, "celsius": 30.0 + self.reads}, ("power limit",) if self.reads == 3 else ())


@dataclass
class Stage:
    """Contenders that do nothing but tell what happens, and what goes wrong as planned."""

    told: list[tuple[str, ...]] = field(default_factory=list)
    wrong: Callable[[str, str, frozenset[str]], Exception | None] = lambda what, who, alive: None
    alive: set[str] = field(default_factory=set)

    def make(self, recipe: Recipe, how: str) -> Any:
        return Actor(self, recipe, how, name=str(recipe.schedule) if how in ("plain", "fast") else how)

    def tell(self, what: str, who: str) -> None:
        self.told.append((what, who))
        problem = self.wrong(what, who, frozenset(self.alive))
        if problem is not None:
            raise problem


@dataclass
class Actor:
    stage: Stage
    recipe: Recipe
    how: Any
    name: str

    def ready(self, job: Job) -> Ready:
        self.stage.alive.add(self.name)
        self.stage.tell("ready", self.name)
        return Ready({"record": 0.5}, 1000, Demand(10, 20, 30.0, 40, 50.0), (f"{self.name} is an actor",))

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        self.stage.tell("run", self.name)
        return [1.0] * prefills, [0.1 * (1 + len(self.stage.told))] * steps

    def close(self) -> None:
        self.stage.alive.discard(self.name)
        self.stage.told.append(("close", self.name))


def played(loaded: LoadedModel, stage: Stage, **options: Any) -> Bench:
    asked = {"batch_sizes": [2], "contexts": [8], "new_tokens": 4, "rounds": 3} | options
    return latency.measure(
        loaded, [SKIP, PARALLEL], make=stage.make, watch=ticking(loaded), sensor=Thermometer(), **asked
    )


# ── who runs when ────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 12), st.integers(0, 50))
def test_every_contender_has_every_place_once(count: int, first: int) -> None:
    square = [turns(count, first + number) for number in range(count)]
    assert all(sorted(row) == list(range(count)) for row in square)
    assert all(sorted(column) == list(range(count)) for column in zip(*square, strict=True))


@given(st.integers(1, 6).map(lambda half: 2 * half), st.integers(0, 50))
def test_of_an_even_number_everyone_follows_everyone_once(count: int, first: int) -> None:
    pairs = [pair for number in range(count) for pair in itertools.pairwise(turns(count, first + number))]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(count) if a != b]


def test_all_are_ready_before_anyone_runs_and_take_turns_in_every_round(loaded: LoadedModel) -> None:
    stage = Stage()
    bench = played(loaded, stage, peers=["hf"])
    names = [str(FULL.schedule), str(SKIP.schedule), str(PARALLEL.schedule), "hf"]
    told = stage.told
    assert told[:4] == [("ready", name) for name in names]
    ran = [who for what, who in told if what == "run"]
    assert [ran[i : i + 4] for i in range(0, 12, 4)] == [[names[i] for i in turns(4, number)] for number in range(3)]
    assert sorted(told[16:]) == sorted(("close", name) for name in names)
    assert [timing.how for timing in bench.timings] == ["plain", "plain", "plain", "hf"]
    assert [round.number for round in bench.timings[0].rounds] == [0, 1, 2]


def test_every_sample_is_kept(loaded: LoadedModel) -> None:
    bench = played(loaded, Stage(), batch_sizes=[1, 2], contexts=[8, 16])
    assert bench.complete and bench.cases == tuple(cases([2, 1], [16, 8, 8], 4))
    assert len(bench.timings) == 4 * 3
    for timing in bench.timings:
        assert [len(one.ttft) for one in timing.rounds] == [latency.PREFILLS] * 3
        assert [len(one.tpot) for one in timing.rounds] == [timing.case.new_tokens - 1] * 3
        assert (timing.memory, dict(timing.build)) == (1000, {"record": 0.5})
        assert timing.notes and timing.problem is None
    assert len(bench.readings) == 4 * 3 and bench.throttled == {"power limit": 1}
    assert [(one.case, one.round) for one in bench.readings[:4]] == [
        (bench.cases[0].key, 0),
        (bench.cases[0].key, 1),
        (bench.cases[0].key, 2),
        (bench.cases[1].key, 0),
    ]


def test_a_recipe_given_twice_and_the_untouched_one_run_once(loaded: LoadedModel) -> None:
    bench = latency.measure(
        loaded, [SKIP, FULL, SKIP], new_tokens=2, contexts=[4], rounds=1, make=Stage().make, watch=ticking(loaded)
    )
    assert bench.recipes == (FULL, SKIP)
    assert len(bench.timings) == 2


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────


def full(_: str = "") -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_what_does_not_fit_beside_the_others_is_tried_beside_the_untouched_model(loaded: LoadedModel) -> None:
    stage = Stage(wrong=lambda what, who, alive: full() if len(alive) > 2 else None)
    bench = played(loaded, stage)
    assert [timing.problem for timing in bench.timings] == [None] * 3
    base, skip, parallel = bench.timings[0], bench.timings[1], bench.timings[2]
    assert [one.number for one in base.rounds] == [0, 1, 2, 3, 4, 5]
    assert [one.number for one in skip.rounds] == [0, 1, 2] and [one.number for one in parallel.rounds] == [3, 4, 5]
    assert bench.ratio(parallel) is not None


def test_what_fits_alone_only_has_samples_and_no_ratio(loaded: LoadedModel) -> None:
    large = str(PARALLEL.schedule)
    stage = Stage(wrong=lambda what, who, alive: full() if who == large and len(alive) > 1 else None)
    bench = played(loaded, stage)
    assert [len(timing.rounds) for timing in bench.timings] == [6, 3, 3]
    assert bench.timings[2].problem is None and bench.ratio(bench.timings[2]) is None


def test_what_never_fits_is_written_down_and_the_run_goes_on(loaded: LoadedModel) -> None:
    large = str(SKIP.schedule)
    stage = Stage(wrong=lambda what, who, alive: full() if (what, who) == ("run", large) else None)
    bench = played(loaded, stage, batch_sizes=[1, 2])
    for case in bench.cases:
        base, skip, parallel = bench.of(case)
        assert (skip.problem, skip.rounds, skip.ttft, bench.ratio(skip)) == ("out of memory", (), None, None)
        assert base.problem is None and len(parallel.rounds) == 3
    assert not stage.alive


def test_any_other_failure_costs_nobody_else_a_number(loaded: LoadedModel) -> None:
    def wrong(what: str, who: str, alive: frozenset[str]) -> Exception | None:
        return ValueError("broken\nin many ways") if who == "hf" else None

    bench = played(loaded, Stage(wrong=wrong), peers=["hf", "vllm"])
    assert [timing.problem for timing in bench.timings] == [None, None, None, "ValueError: broken", None]
    assert len(bench.timings[4].rounds) == 3


def refusing(what: str, who: str, alive: frozenset[str]) -> Exception | None:
    return UnsupportedModel("it has moods") if (what, who) == ("ready", str(SKIP.schedule)) else None


def test_a_refusal_of_fast_is_written_down(loaded: LoadedModel) -> None:
    bench = played(loaded, Stage(wrong=refusing), mode="fast")
    assert [timing.problem for timing in bench.timings] == [None, "it has moods", None]
    assert [timing.how for timing in bench.timings] == ["fast"] * 3


def test_in_auto_mode_the_plain_runtime_takes_the_place_of_fast() -> None:
    stage = Stage()
    make = stage.make

    def picky(recipe: Recipe, how: str) -> Any:
        actor = make(recipe, how)
        if how == "fast" and recipe == SKIP:
            actor.ready = lambda job: (_ for _ in ()).throw(UnsupportedModel("it has moods"))
        return actor

    run = latency._Run(
        bench=Bench(Setting("m", "w", "float32", "cuda"), (FULL, SKIP)),
        job=lambda case: Job(case, torch.zeros(case.batch, case.context, dtype=torch.long)),
        make=picky,
        falls_back=True,
        sensor=Thermometer(),
        rounds=2,
        progress=lambda what, share: None,
        aside=lambda what, detail: None,
    )
    run.case(CASE, [(FULL, "fast"), (SKIP, "fast")], 0.0, 1.0)
    base, skip = run.bench.timings
    assert (base.how, skip.how, skip.notes[0]) == ("fast", "plain", "fast refuses: it has moods")
    assert len(skip.rounds) == 2 and run.bench.ratio(skip) is not None


def test_ctrl_c_keeps_what_is_finished(loaded: LoadedModel) -> None:
    count = itertools.count()

    def wrong(what: str, who: str, alive: frozenset[str]) -> Any:
        if what == "run" and next(count) == 3 * 3 + 4:  # in the second round of the second case
            raise KeyboardInterrupt
        return None

    stage = Stage(wrong=wrong)
    bench = played(loaded, stage, batch_sizes=[1, 2, 4])
    assert not bench.complete and not stage.alive
    assert [len(timing.rounds) for timing in bench.timings] == [3, 3, 3, 1, 2, 1]
    assert Bench.from_dict(json.loads(json.dumps(bench.to_dict()))) == bench


def test_a_case_beyond_the_window_is_written_down(loaded: LoadedModel) -> None:
    bench = played(loaded, Stage(), contexts=[8, 254])
    assert [timing.problem for timing in bench.timings[:3]] == [None] * 3
    assert {timing.problem for timing in bench.timings[3:]} == {
        "254 + 4 tokens are more than the model's window of 256"
    }


def test_what_cannot_be_is_refused(loaded: LoadedModel) -> None:
    for options, text in (
        ({"contexts": [254, 900]}, "nothing can be timed: 254 + 64 tokens are more than the model's window of 256"),
        ({"rounds": 0}, "a bench has at least one round, one batch size and one context"),
        ({"batch_sizes": []}, "a bench has at least one round, one batch size and one context"),
        ({"mode": "slow"}, "mode is 'auto', 'plain' or 'fast', not 'slow'"),
        ({"new_tokens": 1}, "a case has at least one row, one token of prompt and two new tokens, not 1, 128 and 1"),
    ):
        with pytest.raises(UsageError) as error:
            latency.measure(loaded, [], **options)
        assert str(error.value) == text
    with pytest.raises(NotationError):
        latency.measure(loaded, [Recipe.of("tiny", "0:9")])


def test_progress_goes_up_to_the_end(loaded: LoadedModel) -> None:
    heard: list[tuple[str, float]] = []
    asides: list[tuple[str, str]] = []
    stage = Stage(wrong=lambda what, who, alive: full() if len(alive) > 2 else None)
    played(
        loaded,
        stage,
        batch_sizes=[1, 2],
        progress=lambda what, share: heard.append((what, share)),
        aside=lambda *said: asides.append(said),
    )
    assert heard[:2] == [("roofline of the device", 0.0), ("roofline of the device", 1.0)]
    assert {what for what, _ in heard[2:]} == {"measuring"}
    shares = [share for _, share in heard[2:]]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[0] < 0.2
    assert ("batch 1, context 8, 4 new tokens", "round 1") in asides


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────

times = st.floats(1e-3, 1e3)


@given(st.lists(times, min_size=1, max_size=60))
def test_spreads_are_ordered_and_inside_the_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    assert spread is not None and spread.count == len(samples)
    assert min(samples) <= spread.q05 <= spread.median <= spread.q95 <= spread.q99 <= max(samples)
    assert Spread.of([]) is None


def rounds(values: Sequence[Sequence[float]], first: int = 0) -> tuple[Round, ...]:
    return tuple(Round(first + number, (1.0,), tuple(value)) for number, value in enumerate(values))


@given(st.lists(times, min_size=1, max_size=8), st.floats(0.1, 10))
def test_a_ratio_that_holds_in_every_round_is_found_whatever_the_drift(drift: list[float], factor: float) -> None:
    found = ratio(rounds([[value * factor] for value in drift]), rounds([[value] for value in drift]))
    assert found is not None and math.isclose(found.value, factor, rel_tol=1e-9)
    if len(drift) == 1:
        assert found.low is None and found.high is None
    else:
        assert found.low is not None and found.high is not None
        assert found.low == pytest.approx(factor) and found.high == pytest.approx(factor)


@given(st.lists(st.tuples(times, times), min_size=2, max_size=8))
def test_the_ratio_of_two_is_one_over_that_of_the_other_two(pairs: list[tuple[float, float]]) -> None:
    a, b = rounds([[x] for x, _ in pairs]), rounds([[y] for _, y in pairs])
    there, back = ratio(a, b), ratio(b, a)
    assert there is not None and back is not None and there.low is not None and there.high is not None
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high) and there.high == pytest.approx(1 / back.low)


def test_only_rounds_that_both_ran_in_count() -> None:
    a, b = rounds([[2.0], [8.0], [6.0]], first=1), rounds([[1.0], [1.0], [4.0]], first=0)
    found = ratio(a, b)
    assert found is not None and found.value == pytest.approx(math.sqrt(2.0 * 2.0))
    assert ratio(rounds([[1.0]], first=7), b) is None and ratio((), b) is None


def test_intervals_of_ratios_cover_the_truth_as_often_as_they_say() -> None:
    chance, hits, trials = random.Random(5), 0, 1000
    for _ in range(trials):
        drift = [chance.lognormvariate(0, 0.5) for _ in range(5)]
        a = rounds([[0.7 * d * chance.lognormvariate(0, 0.03)] for d in drift])
        b = rounds([[d * chance.lognormvariate(0, 0.03)] for d in drift])
        found = ratio(a, b)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0.7 <= found.high
    assert 0.93 < hits / trials < 0.97


def test_rates_follow_from_the_medians() -> None:
    timing = Timing("r", "plain", Case(4, 8, 11), (Round(0, (20.0,), (2.0,) * 10),))
    assert timing.decode_rate == pytest.approx(4 / 0.002)
    assert timing.throughput == pytest.approx(4 * 11 / 0.040)
    assert Timing("r", "plain", CASE).throughput is None and Timing("r", "plain", CASE).decode_rate is None


def test_the_roofline_is_the_longer_of_moving_and_computing() -> None:
    roofline = Roofline(copy=1e9, read=2e9, matmul=1e12)
    assert roofline.floor(Demand(0, 2_000_000, 1e6, 0, 1e11), "tpot") == pytest.approx(1.0)
    assert roofline.floor(Demand(0, 2_000_000, 1e10, 0, 1e11), "tpot") == pytest.approx(10.0)
    assert roofline.floor(Demand(0, 2_000_000, 1e10, 0, 1e11), "ttft") == pytest.approx(100.0)
    timing = Timing("r", "plain", CASE, (Round(0, (200.0,), (4.0,)),), demand=Demand(0, 2_000_000, 0, 0, 1e11))
    bench = Bench(Setting("m", "w", "float32", "cpu"), (FULL,), (timing,), roofline=roofline)
    assert bench.share(timing) == pytest.approx(0.25) and bench.share(timing, "ttft") == pytest.approx(0.5)


setting = Setting("tiny", "abc", "float32", "cpu")
rows = st.builds(
    Round, st.integers(0, 9), st.lists(times, max_size=3).map(tuple), st.lists(times, max_size=3).map(tuple)
)
timings = st.builds(
    Timing,
    recipe=st.sampled_from([FULL.fingerprint, SKIP.fingerprint]),
    how=st.sampled_from(["plain", "fast", "hf", "hf-compiled", "vllm"]),
    case=st.builds(Case, st.integers(1, 256), st.integers(1, 32_000), st.integers(2, 99)),
    rounds=st.lists(rows, max_size=3).map(tuple),
    memory=st.none() | st.integers(0, 10**12),
    build=st.dictionaries(st.sampled_from(["check", "record"]), times),
    demand=st.none() | st.builds(Demand, *[st.integers(0, 10**12)] * 2, times, st.integers(0, 10**12), times),
    problem=st.none() | st.text(max_size=9),
    notes=st.lists(st.text(max_size=9), max_size=2).map(tuple),
)
benches = st.builds(
    Bench,
    setting=st.just(setting),
    recipes=st.just((FULL, SKIP)),
    timings=st.lists(timings, max_size=3).map(tuple),
    machine=st.just({"gpu": None, "versions": {"torch": "2"}}),
    roofline=st.none() | st.builds(Roofline, times, times, times),
    readings=st.lists(
        st.builds(Reading, st.text(max_size=3), st.integers(0, 9), st.just({"celsius": 40.0}), st.just(("heat",))),
        max_size=2,
    ).map(tuple),
    notes=st.just(("a",)),
    complete=st.booleans(),
)


@given(benches)
def test_json_and_back(bench: Bench) -> None:
    assert Bench.from_dict(json.loads(json.dumps(bench.to_dict(), allow_nan=False))) == bench


def test_what_is_no_bench_is_refused(tmp_path: Path) -> None:
    for data, text in (
        ({}, "this is no result of `impasto bench`"),
        ({"kind": "bench", "schema_version": 9}, "this bench has schema version 9; this impasto reads 1"),
    ):
        with pytest.raises(UsageError) as error:
            Bench.from_dict(data)
        assert str(error.value) == text
    path = tmp_path / "x.json"
    with pytest.raises(StoreError, match="cannot read .*No such file"):
        latency.load(path)
    for text in ("[]", "{"):
        path.write_text(text)
        with pytest.raises(UsageError, match="no result of `impasto bench`"):
            latency.load(path)


# ── on a model ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["plain", "fast"])
def test_a_bench_leaves_the_model_as_it_was_and_goes_into_a_store(
    mode: Any, loaded: LoadedModel, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    kinds = [type(layer) for layer in loaded.model.model.layers]
    bench = latency.measure(
        loaded,
        [SKIP, PARALLEL, CUT],
        batch_sizes=[1, 2],
        contexts=[8],
        new_tokens=3,
        rounds=2,
        mode=mode,
        watch=ticking(loaded),
        peers=["hf", "hf-compiled", "vllm"],
    )
    problems = {timing.problem for timing in bench.timings if timing.how != "vllm"}
    assert problems == {None}
    assert {timing.problem for timing in bench.timings if timing.how == "vllm"} == {
        "vLLM is not installed: pip install vllm"
    }
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert [type(layer) for layer in loaded.model.model.layers] == kinds
    assert not any("forward" in vars(module) for module in loaded.model.modules())
    for timing in bench.timings:
        if timing.rounds:
            assert [(len(one.ttft), len(one.tpot)) for one in timing.rounds] == [(3, 2), (3, 2)]
            assert all(sample > 0 for one in timing.rounds for sample in (*one.ttft, *one.tpot))
        if timing.how in ("plain", "fast"):
            assert timing.demand is not None and bench.share(timing) is not None
    assert "no peak memory: a cpu device keeps no count of it" in bench.notes
    latency.save(bench, tmp_path / "deep" / "bench.json")
    assert latency.load(tmp_path / "deep" / "bench.json") == bench
    with Store(tmp_path) as store:
        latency.keep(bench, store)
        latency.keep(bench, store)
        kept = store.measurements(bench.setting, latency.KIND, recipe=SKIP.fingerprint)
        assert [one.key for one in kept] == [f"{case.key}, {mode}" for case in bench.cases]
        expected = bench.ratio(next(t for t in bench.of(bench.cases[0]) if t.recipe == SKIP.fingerprint))
        assert expected is not None and kept[0].value["summary"]["tpot_ratio"]["value"] == expected.value
        release, *_ = kept[0].value["machine"]["versions"]["torch"].split("+")  # behind it, which build it is
        assert torch.__version__.split("+")[0] == release


@pytest.mark.parametrize("kind", [Plain, Fast])
def test_ready_contenders_make_the_recipes_tokens_in_any_order(kind: Any, loaded: LoadedModel) -> None:
    """Several are alive at a time, and each still runs its own recipe after the others had the model."""
    from impasto.generation import generate

    job = Job.of(Case(1, 8, 6), loaded)
    made = []
    for recipe in (SKIP, CUT, FULL):
        contender = kind(loaded, recipe, Outfit(loaded, recipe.edits), ticking(loaded))
        contender.ready(job)
        made.append(contender)
    for contender in [*made, *reversed(made)]:
        contender.run(2, 5)
        if kind is Fast:
            got = tuple(contender.decoder.new_tokens()[0])
            with contender.outfit.worn():
                (plain,) = generate(
                    loaded.model, loaded.tokenizer, contender.recipe.schedule, job.ids.tolist(), max_new_tokens=6
                )
            assert got[: plain.tokens] == plain.new_token_ids
    assert [contender.close() for contender in made] == [None] * 3


def test_an_outfit_is_the_edits(loaded: LoadedModel) -> None:
    from impasto.surgery import edited

    ids = torch.tensor([[5, 9, 12, 3]])
    for edits in (["1.mlp.up_proj@0"], ["1:3.mlp.*@1"], ["1.mlp.up_proj@tail0.5", "2.mlp.down_proj@prune0.5"]):
        outfit = Outfit(loaded, tuple(map(Edit.parse, edits)))
        with torch.no_grad():
            before = loaded.model(ids).logits
            with edited(loaded.model, edits):
                expected = loaded.model(ids).logits
            with outfit.worn():
                assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-3)
            assert torch.equal(loaded.model(ids).logits, before)
        with pytest.raises(ZeroDivisionError), outfit.worn():
            raise ZeroDivisionError
        assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_prompts_are_the_same_in_every_run(loaded: LoadedModel) -> None:
    one, two, other = (Job.of(CASE, loaded, seed).ids for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (2, 8)


def test_demands_count_every_call_and_thin_products_by_their_factors(loaded: LoadedModel) -> None:
    body = written(loaded.model)

    def of(recipe: Recipe, case: Case = CASE) -> Demand:
        outfit = Outfit(loaded, recipe.edits)
        return demand(loaded.model, body, recipe, outfit.touched, case, keys=0)

    head = loaded.model.get_output_embeddings().weight.nbytes
    layer = sum(p.nbytes for p in body.layers[0].parameters())
    whole = sum(p.nbytes for p in loaded.model.parameters())
    assert of(FULL).step_bytes == head + LAYERS * layer and of(FULL).weights == whole
    assert of(SKIP).step_bytes == head + 3 * layer and of(SKIP).weights == whole - layer
    twice = Recipe.of("tiny", "0 {1,2}x2 3", layers=LAYERS)
    assert of(twice).step_bytes == head + 6 * layer and of(twice).weights == whole
    spared = 2 * 3 * 4 * (32 * 64 - 4 * (32 + 64))  # layers, matrices, bytes
    assert of(CUT).step_bytes == head + LAYERS * layer - spared and of(CUT).weights == whole - spared
    attn, mlp = (of(Recipe.of("tiny", f"0:3 3.{half}", layers=LAYERS)).step_bytes for half in ("attn", "mlp"))
    norms = layer - (attn - head - 3 * layer) - (mlp - head - 3 * layer)
    assert norms == 2 * 32 * 4
    assert of(FULL, Case(8, 8, 4)).step_flops == 4 * of(FULL).step_flops
    assert of(FULL, Case(2, 64, 4)).prompt_flops > 8 * of(FULL).prompt_flops / 1.1


def test_a_model_that_writes_nothing_is_refused() -> None:
    import families

    with pytest.raises(UnsupportedModel, match="does not write text: it is no causal language model with a KV cache"):
        latency.measure(adopt(families.shared("bert"), None, name="x"), [])


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def nowhere() -> Path:
    raise AssertionError("this peer reads no folder")


def test_unknown_peers_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="a peer is one of hf, hf-compiled, vllm, not 'other'"):
        peers.peer("other", loaded, FULL, ticking(loaded), nowhere)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["hf", "hf-compiled"])
def test_generate_makes_every_token_even_of_a_model_that_would_stop(how: Any, loaded: LoadedModel) -> None:
    peer = peers.peer(how, loaded, FULL, ticking(loaded), nowhere)
    peer.ready(Job.of(Case(2, 8, 12), loaded))
    ttft, tpot = peer.run(3, 11)
    assert (len(ttft), len(tpot)) == (3, 11)
    peer.close()
    assert "_cache" not in vars(loaded.model)


GIGABYTE = 10**9


class Garage:
    """A stand-in for vLLM, whose engines write greedy texts by the checkpoint that they are given, on a large device.

    As in vLLM, an engine takes its share of the whole device for itself, and does not start if less is free.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: float = 100.0) -> None:
        self.memory = memory * GIGABYTE
        self.clock = Ticks()
        self.options: list[dict[str, Any]] = []
        self.texts: list[list[tuple[int, ...]]] = []  # of each engine, those of its last call
        self.alive: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        module = types.ModuleType("vllm")
        module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        vars(module).update(LLM=functools.partial(Engine, self), SamplingParams=dict)
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.memory))

    @property
    def free(self) -> float:
        return self.memory - sum(self.alive.values())


class Engine:
    def __init__(self, garage: Garage, **options: Any) -> None:
        share = options["gpu_memory_utilization"] * garage.memory
        assert share <= garage.free, "free memory on startup is less than desired"
        garage.alive[self] = share
        self.garage, self.number = garage, len(garage.options)
        garage.options.append(options)
        garage.texts.append([])
        self.model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"])
        assert options["skip_tokenizer_init"] and not options["enable_prefix_caching"]
        core = types.SimpleNamespace(shutdown=lambda: garage.alive.pop(self))
        self.llm_engine = types.SimpleNamespace(engine_core=core)

    def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> None:
        assert sampling["ignore_eos"] and "min_tokens" not in sampling and not use_tqdm
        ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts])
        length = ids.shape[1]
        assert len(ids) <= self.garage.options[self.number]["max_num_seqs"]
        assert length + sampling["max_tokens"] <= self.garage.options[self.number]["max_model_len"]
        with torch.no_grad():
            for _ in range(sampling["max_tokens"]):
                ids = torch.cat([ids, self.model(ids).logits[:, -1:].argmax(-1)], 1)
                self.garage.clock()
        self.garage.texts[self.number] = [tuple(row) for row in ids[:, length:].tolist()]


def greedy(loaded: LoadedModel, recipe: Recipe, ids: torch.Tensor, tokens: int) -> list[tuple[int, ...]]:
    """The texts of a recipe by impasto's plain runtime, without a cache."""
    length = ids.shape[1]
    with Outfit(loaded, recipe.edits).worn(), scheduled(loaded.model, recipe.schedule), torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return [tuple(row) for row in ids[:, length:].tolist()]


def test_vllm_runs_every_recipe_that_can_be_a_checkpoint(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    garage = Garage(monkeypatch)
    monkeypatch.setattr(peers, "absent", lambda name, loaded: None)
    monkeypatch.setattr(latency, "absent", lambda name, loaded: None)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    twice, half = Recipe.of("tiny", "3 (1 0)x2", layers=LAYERS), Recipe.of("tiny", "0:3 3.mlp", layers=LAYERS)
    other = Recipe.of("tiny", "{0,1} 2:4", layers=LAYERS)
    heard: list[str] = []
    bench = latency.measure(
        loaded,
        [SKIP, PARALLEL, CUT, twice, half, other],
        batch_sizes=[1, 2],
        contexts=[8],
        new_tokens=5,
        rounds=1,
        peers=["vllm"],
        watch=HostWatch(loaded.device, garage.clock),
        sensor=Thermometer(),
        aside=lambda what, detail: heard.append(detail),
    )
    run = [timing for timing in bench.timings if timing.how == "vllm"]
    able = [FULL, SKIP, CUT, twice]
    assert [timing.recipe for timing in run] == 2 * [recipe.fingerprint for recipe in able]
    assert all(timing.problem is None and len(timing.rounds) == 1 for timing in run)
    assert bench.notes[-2:] == (
        "vLLM does not run 0 {1 2} 3; {0 1} 2 3: it runs layers in parallel, and a plain checkpoint has one after the "
        "other",
        "vLLM does not run 0:3 3.mlp: it runs halves of layers, and a plain checkpoint has whole ones",
    )
    for number, (recipe, text) in enumerate(zip(2 * able, garage.texts, strict=True)):
        ids = Job.of(bench.cases[number // len(able)], loaded).ids
        assert text == greedy(loaded, recipe, ids, 5), recipe
    assert len({tuple(text) for text in garage.texts[:4]}) == 4
    assert "getting vllm ready" in heard and "getting 0 2 3 (vllm) ready" in heard
    assert run[0].notes == ("vllm: TPOT is a mean over each text",)
    assert "vllm: matrices that edits cut are whole in a checkpoint, and take their full time" in run[2].notes
    assert list(run[0].build) == ["checkpoint", "start"] and bench.ratio(run[1]) is not None
    places = [options["model"] for options in garage.options]
    assert places[:4] == places[4:] and len(set(places)) == 4  # written once for all cases
    assert not any(Path(place).exists() for place in places) and not garage.alive
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    with Store(tmp_path) as store:
        latency.keep(bench, store)
        kept = store.measurements(bench.setting, latency.KIND, recipe=twice.fingerprint)
        assert [one.key for one in kept] == [f"{case.key}, {how}" for case in bench.cases for how in ("plain", "vllm")]


def test_engines_share_a_device_and_each_asks_for_what_its_recipe_needs(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "absent", lambda name, loaded: None)
    monkeypatch.setattr(peers, "_SPARE", 0)
    monkeypatch.setattr(peers, "_PROCESS", 0)
    garage, case = Garage(monkeypatch, 0.01), Case(2, 8, 5)
    job = Job.of(case, loaded)
    long = Recipe.of("tiny", "0:4 0:4", layers=LAYERS)
    layer = sum(p.nbytes for p in loaded.model.model.layers[0].parameters())
    keys = 1.2 * 2 * 2 * 8 * 4 * case.batch * (case.context + case.new_tokens)  # heads, width, bytes
    with peers.Shelf(loaded) as shelf:
        for recipe in (FULL, SKIP, long):
            place = functools.partial(shelf.place, recipe, Outfit(loaded, ()))
            engine = peers.peer("vllm", loaded, recipe, HostWatch(loaded.device, garage.clock), place)
            engine.ready(job)
            job_again = engine.run(1, 4)
            assert [len(times) for times in job_again] == [1, 1]
            if recipe is not FULL:
                engine.close()
            else:
                first = engine
        asked = [options["gpu_memory_utilization"] * garage.memory for options in garage.options]
        assert asked[0] - asked[1] == pytest.approx(layer + keys)
        assert asked[2] - asked[0] == pytest.approx(4 * (layer + keys))
        assert list(garage.alive.values()) == [pytest.approx(asked[0])]
        garage.memory = asked[0] + 0.99 * asked[1]  # beside the first there is room for less than another
        engine = peers.peer(
            "vllm",
            loaded,
            SKIP,
            HostWatch(loaded.device, garage.clock),
            functools.partial(shelf.place, SKIP, Outfit(loaded, ())),
        )
        with pytest.raises(torch.OutOfMemoryError, match="out of memory: vLLM needs about 0.0 GB"):
            engine.ready(job)
        first.close()
        engine.ready(job)
        engine.close()


def test_engines_that_do_not_fit_together_run_one_after_the_other(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    garage = Garage(monkeypatch, 8.0)  # one engine has six to spare
    monkeypatch.setattr(peers, "absent", lambda name, loaded: None)
    monkeypatch.setattr(latency, "absent", lambda name, loaded: None)
    bench = latency.measure(
        loaded,
        [SKIP],
        batch_sizes=[1],
        contexts=[8],
        new_tokens=3,
        rounds=2,
        peers=["vllm"],
        watch=HostWatch(loaded.device, garage.clock),
    )
    assert [(timing.how, len(timing.rounds), timing.problem) for timing in bench.timings] == [
        ("plain", 4, None),
        ("plain", 2, None),
        ("vllm", 2, None),
        ("vllm", 2, None),
    ]
    assert bench.ratio(bench.timings[3]) is not None and not garage.alive


def test_a_checkpoint_that_is_refused_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a run of the written checkpoint shows is the recipe's problem in every case, and written once."""
    import families

    monkeypatch.setattr(peers, "absent", lambda name, loaded: None)
    monkeypatch.setattr(latency, "absent", lambda name, loaded: None)
    garage = Garage(monkeypatch)
    model = adopt(families.shared("gemma3n_text"), None, name="x")
    recipe, count = Recipe.of("x", "5 4 3 2 1 0", layers=6), itertools.count()
    write = peers.write
    monkeypatch.setattr(peers, "write", lambda *given: (next(count), write(*given))[1])
    bench = latency.measure(
        model,
        [recipe],
        batch_sizes=[1, 2],
        contexts=[8],
        new_tokens=2,
        rounds=1,
        peers=["vllm"],
        watch=HostWatch(model.device, garage.clock),
    )
    assert [timing.problem is None for timing in bench.timings] == 2 * [True, True, True, False]
    assert "layers know more of their place than the config says" in str(bench.timings[-1].problem)
    assert next(count) == 2  # the untouched model's, and this one


def test_the_untouched_model_runs_from_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    model = adopt(tiny_model(layers=LAYERS), tiny_tokenizer(), name=str(folder))
    outfit = Outfit(model, ())
    with peers.Shelf(model) as shelf:
        assert shelf.place(FULL, outfit) == folder
        other = shelf.place(SKIP, outfit)
        assert other != folder and (other / "config.json").is_file() and shelf.place(SKIP, outfit) == other
    assert not other.exists() and (folder / "config.json").is_file()


def test_long_lists_of_recipes_are_cut_short() -> None:
    assert [latency._listed(list("abcde"[:count])) for count in (1, 3, 5)] == ["a", "a; b; c", "a; b; c and 2 more"]


def test_why_vllm_cannot_run_here(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.absent("hf", loaded) is None
    with pytest.raises(UsageError, match="vLLM is not installed"):
        peers.peer("vllm", loaded, FULL, ticking(loaded), nowhere)
    Garage(monkeypatch)
    with pytest.raises(UsageError, match="vLLM runs beside impasto on CUDA devices only"):
        peers.peer("vllm", loaded, FULL, ticking(loaded), nowhere)
    for device in ("cuda", "cuda:0"):
        monkeypatch.setattr(LoadedModel, "device", torch.device(device))
        assert peers.absent("vllm", loaded) is None
    monkeypatch.setattr(LoadedModel, "device", torch.device("cuda:1"))
    reason = "vLLM runs on the first GPU, and the model is on cuda:1: choose one by CUDA_VISIBLE_DEVICES"
    assert peers.absent("vllm", loaded) == reason


def test_an_engine_stops_when_it_is_closed_whoever_still_holds_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "tiny", layers=LAYERS)
    garage, job = Garage(monkeypatch), Job.of(Case(1, 8, 3), loaded)
    engine = peers.Vllm(loaded, FULL, HostWatch(loaded.device, garage.clock), lambda: folder)
    engine.close()
    engine.ready(job)
    held = engine._engine
    engine.close()
    assert held is not None and not garage.alive
    engine.close()
    engine.ready(job)
    engine._engine.llm_engine = None  # of a version that keeps it elsewhere: collecting it must do
    engine.close()
    del held
    assert not garage.alive


def test_an_engine_needs_room_for_its_process(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM looks how much is free, its own process has taken some: the share alone is not enough."""
    garage = Garage(monkeypatch, 7.0)  # 6.44 to spare, and 1.07 for the process
    engine = peers.Vllm(loaded, FULL, HostWatch(loaded.device, garage.clock), lambda: Path("there"))
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: vLLM needs about 6\.4 GB"):
        engine.ready(Job.of(Case(1, 8, 3), loaded))
    assert not garage.options


def test_vllms_times_are_those_of_whole_texts(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = Ticks(), []

    class Slow:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> None:
            asked.append((len(prompts), len(prompts[0]["prompt_token_ids"]), sampling["max_tokens"]))
            for _ in range(sampling["max_tokens"]):
                now()

    Garage(monkeypatch)
    monkeypatch.setattr(sys.modules["vllm"], "LLM", Slow)
    peer = peers.Vllm(loaded, FULL, HostWatch(torch.device("cpu"), now), lambda: Path("there"))
    peer.ready(Job(Case(2, 8, 5), torch.ones(2, 8, dtype=torch.long)))
    assert peer.run(3, 4) == ([2000.0] * 3, [1000.0])
    monkeypatch.setattr(Slow, "generate", lambda *given, **options: None)
    with pytest.raises(UsageError) as error:
        peer.run(1, 4)
    assert str(error.value) == "texts of 5 tokens took no longer than their first one: ask for more new tokens"
    assert asked[-4:] == [(2, 8, 1)] * 3 + [(2, 8, 5)]
    options = asked[0]
    assert (options["max_model_len"], options["max_num_seqs"], options["dtype"]) == (13, 2, "float32")
    assert options["model"] == "there" and 0.06 < options["gpu_memory_utilization"] < 0.07


# ── the device ───────────────────────────────────────────────────────────────────────────────────────────────────


def driver(mask: str, bits: str, answers: bool = True) -> Callable[[Sequence[str]], str]:
    def ask(command: Sequence[str]) -> str:
        if not answers:
            raise FileNotFoundError("nvidia-smi")
        fields = next(part for part in command if part.startswith("--query-gpu="))[12:].split(",")
        known = {"clocks.sm": "1980", "clocks.mem": "3201", "temperature.gpu": "41", "power.draw": "[N/A]", mask: bits}
        known["pstate"] = "P0"
        return ", ".join(known[name] for name in fields) + "\n" if set(fields) <= set(known) else "no such field"

    return ask


@pytest.mark.parametrize("mask", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_the_driver_is_asked_in_its_new_and_old_words(mask: str) -> None:
    state = Sensor(torch.device("cpu"), driver(mask, "0x0000000000000024")).read()
    assert state == State(
        {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 41.0, "watts": None, "state": "P0"},
        ("power limit", "heat (software)"),
    )
    idle = Sensor(torch.device("cpu"), driver(mask, "0x0000000000000001")).read()
    assert idle is not None and idle.throttled == ()


def test_no_driver_is_no_error() -> None:
    assert Sensor(torch.device("cpu")).read() is None
    assert Sensor(torch.device("cpu"), driver("", "", answers=False)).read() is None
    assert Sensor(torch.device("cpu"), lambda command: "no devices were found").read() is None


def test_limits_are_amounts_over_median_times(loaded: LoadedModel) -> None:
    found = limits(torch.device("cpu"), torch.float32, ticking(loaded))
    assert found == {"copy": 2.0 * (1 << 25), "read": float(1 << 25), "matmul": 2.0 * 512**3}


def test_memory_is_known_on_cuda_only() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.zeros(1000)
    assert peak.bytes is None


def test_the_machine_has_no_name() -> None:
    import getpass
    import platform

    told = machine(torch.device("cpu"))
    assert set(told) == {"gpu", "processor", "cores", "threads", "python", "versions", "begun"}
    assert set(told["versions"]) >= {"impasto", "torch", "transformers", "numpy"}
    text = json.dumps(told)
    assert platform.node() not in text or not platform.node()
    assert getpass.getuser() not in text.replace("processor", "")
