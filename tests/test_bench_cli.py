"""`impasto bench` on a tiny model: its words, its files, its interruption."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from impasto import frontier, latency, plots
from impasto.cli import main
from impasto.recipe import Recipe
from impasto.result import Estimate, Result, Setting
from impasto.store import Store
from impasto.timings import Bench, Case, Demand, Reading, Roofline, Round, Timing
from tiny import tiny_folder

command = importlib.import_module("impasto.cli.bench")  # the package has the command itself under this name
Spoken = Callable[..., tuple[int, str, str]]
LAYERS = 24
RECIPES = (
    Recipe.of("m", layers=LAYERS),
    Recipe.of("m", "0:8 12:24", layers=LAYERS),
    Recipe.of("m", "0:8 {8:16} 16:24", ["1.mlp.*@0.1"], layers=LAYERS),
)


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no colours, nothing measured of the device, nothing written outside the test's own folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "limits", lambda *_: {"copy": 1e9, "read": 2e9, "matmul": 1e12})
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Spoken:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


QUICK = ("--batch-sizes", "1,2", "--contexts", "8", "--new-tokens", "3", "--rounds", "2")


def test_a_bench_prints_tables_and_leaves_files(model: str, say: Spoken) -> None:
    code, text, errors = say("bench", model, "-s", "0 2:", "-s", "0 {1,2} 3", *QUICK, "--peers", "hf,vllm")
    assert code == 0, errors
    lines = text.splitlines()
    assert lines[0] == "schedule A  0 2 3 (3 of 4 layers, 3 layer calls, depth 3)"
    assert lines[3] == "batch 1, context 8, 3 new tokens"
    assert lines[4].split() == [
        "TTFT",
        "ms",
        "ratio",
        "TPOT",
        "ms",
        "p95",
        "ratio",
        "95",
        "%",
        "interval",
        "tokens/s",
        "memory",
        "roofline",
    ]
    assert [line.split()[0] for line in lines[5:10]] == ["untouched", "A", "B", "hf", "vllm:"]
    assert lines[9] == "vllm: vLLM is not installed: pip install vllm"
    assert re.match(r"A +[\d.,]+ +\d\.\d{3} +[\d.,]+ +[\d.,]+ +\d\.\d{3}  [\d.<]+ to ", lines[6])
    assert "no clocks and temperatures: no driver of an NVIDIA device answers here" in text
    folder = Path("impasto-runs/tiny-bench")
    assert lines[-1] == f"samples: {folder / 'bench.json'}"
    assert f"figure: {folder / 'figures' / 'tpot-ratio.png'}" in lines
    kept = latency.load(folder / "bench.json")
    assert kept.complete and [len(one.rounds) for one in kept.timings] == [2, 2, 2, 2, 0] * 2
    with Store(folder, readonly=True) as store:
        assert len(store.measurements(kept.setting, "latency")) == 10
        (run,) = store.runs()
        assert run.outcome == "finished" and run.command[:2] == ("impasto", *run.command[1:2])


def test_scores_of_a_run_draw_the_frontier(
    model: str, say: Spoken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say("bench", model, "-s", "0 2:", *QUICK, "--peers", "none", "-o", "first")[0] == 0
    found = latency.load(Path("first/bench.json"))
    info = {"metric": "acc,none", "higher_is_better": True, "chance": 0.0}
    with Store("scores") as store:
        store.put_recipes(found.recipes)
        for recipe, right in zip(found.recipes, (18, 9), strict=True):
            scores = {"acc,none": (1.0,) * right + (0.0,) * (20 - right)}
            result = Result(recipe.fingerprint, "task", "p", 20, {"acc,none": right / 20}, scores, info=info)
            store.put_result(found.setting, result)
    code, text, _ = say("bench", model, "-s", "0 2:", *QUICK, "--peers", "none", "--accuracy", "scores", "-o", "x")
    assert code == 0 and "figure: x/figures/frontier.png" in text.splitlines()
    rows = Path("x/figures/frontier.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[2].startswith('"batch 1, context 8, 3 new tokens",skip,0 2 3,')
    with Store("empty"):
        pass
    names = [path.name for path in command.drawn(found, tmp_path / "y", Path("empty"))]
    assert names == ["tpot-ratio.png", "ttft-ratio.png"]
    assert capsys.readouterr().err == (
        "note: no frontier: empty holds no scores of these weights: fill it with `impasto eval` first\n"
    )


def test_ctrl_c_prints_and_keeps_what_is_finished(model: str, say: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = latency.measure

    def interrupted(*arguments: Any, **options: Any) -> Bench:
        found = measure(*arguments, **options)
        return replace(found, timings=found.timings[:2], complete=False)

    monkeypatch.setattr(latency, "measure", interrupted)
    code, text, errors = say("bench", model, "-s", "0 2:", *QUICK, "--peers", "none")
    assert code == 130 and errors.splitlines()[-2:] == [
        "note: batch 2, context 8, 3 new tokens: not measured",
        "stopped",
    ]
    assert "batch 1, context 8, 3 new tokens" in text and "batch 2" not in text
    folder = Path("impasto-runs/tiny-bench")
    assert not latency.load(folder / "bench.json").complete
    with Store(folder, readonly=True) as store:
        assert store.runs()[0].outcome == "interrupted"


def test_a_bench_leaves_an_earlier_one_in_its_folder_alone(
    model: str, say: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, line = Path("impasto-runs/tiny-bench"), ("bench", model, "-s", "0 2:", *QUICK, "--peers", "none")
    assert say(*line, "--batch-sizes", "1,2,3")[0] == 0
    first = (folder / "bench.json").read_text()
    (folder / "figures" / "other.png").write_text("of another command")
    measure = latency.measure

    def stopped(*arguments: Any, **options: Any) -> Bench:
        return replace(measure(*arguments, **options), timings=(), complete=False)

    def short(*arguments: Any, **options: Any) -> Bench:
        found = measure(*arguments, **options)
        timings = [replace(one, rounds=one.rounds[:1]) for one in found.timings]
        return replace(found, timings=tuple(timings), complete=False)

    monkeypatch.setattr(latency, "measure", stopped)
    code, text, errors = say(*line)
    assert (code, text) == (130, "") and errors.splitlines()[-1] == "stopped"
    assert (folder / "bench.json").read_text() == first and not (folder / "earlier").exists()
    monkeypatch.setattr(latency, "measure", short)
    code, _, errors = say(*line)
    assert code == 130 and "note: batch 2, context 8, 3 new tokens: 1 of 2 rounds" in errors.splitlines()
    (kept,) = (folder / "earlier").iterdir()
    assert f"note: samples and figures of the bench that was here before are in {kept}" in errors.splitlines()
    assert (kept / "bench.json").read_text() == first and (kept / "figures" / "throughput.png").exists()
    found = latency.load(folder / "bench.json")
    assert len(found.timings) == 4
    single = replace(found, timings=(replace(found.timings[0], rounds=found.timings[0].rounds * 2),))
    assert list(command.unfinished(single, [found.timings[0].case], 2)) == [f"{found.timings[0].case}: 0 of 2 rounds"]
    assert {path.stem for path in (folder / "figures").iterdir()} == {"tpot-ratio", "ttft-ratio", "other"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["--batch-sizes", "1,x"], "--batch-sizes is a list of whole numbers from 1 on, such as 1,32, not '1,x'"),
        (["--contexts", "0"], "--contexts is a list of whole numbers from 1 on, such as 1,32, not '0'"),
        (["--contexts", ""], "--contexts is a list of whole numbers from 1 on, such as 1,32, not ''"),
        (["--peers", "hf,tgi"], "--peers knows hf, hf-compiled, vllm and none, not 'tgi'"),
        (["--new-tokens", "1"], "Invalid value for '--new-tokens'"),
        (["--accuracy", "nowhere"], "no results in nowhere: there is no file results.sqlite. Is it a run folder?"),
        (["-s", "0:8 12-14"], "'-'"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_looked_for(line: list[str], text: str, say: Spoken) -> None:
    code, output, errors = say("bench", "no-such-model", *line)
    assert code in (1, 2) and output == "" and "loading" not in errors
    assert text in errors or line[0] == "-s"


def test_the_example_of_the_document_runs(model: str, say: Spoken, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "bench.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    latency.save(measured(), Path("there/bench.json"))
    exec(program, {"folder": "there"})
    assert capsys.readouterr().out.splitlines()[0].startswith("fast batch 32, context 1,024, 64 new tokens 1.14")


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def measured() -> Bench:
    case, late = Case(32, 1024, 64), Case(256, 32_000, 64)
    demand = Demand(10**9, 400_000_000, 1e9, 10**9, 1e13)

    def timing(recipe: int, how: Any, ms: float, **options: Any) -> Timing:
        rows = tuple(Round(i, (ms * 20,), (ms * (1 + i / 99), ms * 1.01)) for i in range(5))
        return Timing(RECIPES[recipe].fingerprint, how, case, **({"rounds": rows, "demand": demand} | options))

    return Bench(
        setting=Setting("m", "w", "bfloat16", "cuda"),
        recipes=RECIPES,
        timings=(
            timing(0, "fast", 1.1284, memory=12_345_678_901, build={"check": 1.0, "record": 3.2}),
            timing(1, "fast", 0.8583, memory=987_654_321),
            timing(2, "plain", 17.52, memory=987_654_321, notes=("fast refuses: it has moods",)),
            timing(0, "hf-compiled", 2.861, demand=None),
            timing(0, "vllm", 0.0, rounds=(), problem="out of memory"),
            timing(1, "vllm", 0.9021, demand=None, notes=("vllm: TPOT is a mean over each text",)),
            *[Timing(recipe.fingerprint, "fast", late, problem="out of memory") for recipe in RECIPES],
        ),
        machine={"gpu": "NVIDIA H200"},
        roofline=Roofline(4.25e12, 4.1e12, 7e14),
        readings=(
            Reading(case.key, 0, {"sm_mhz": 1980.0, "celsius": 41.0}),
            Reading(case.key, 1, {"sm_mhz": 1755.0, "celsius": 66.0}, ("power limit",)),
        ),
        notes=("vLLM does not run the rest",),
    )


def shown(bench: Bench, width: int = 100) -> list[str]:
    screen = io.StringIO()
    command.show(Console(file=screen, width=width, highlight=False, markup=False, color_system=None), bench)
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def test_a_narrow_window_gets_two_tables_and_whole_numbers() -> None:
    wide, narrow = shown(measured()), shown(measured(), 72)
    assert max(map(len, narrow)) <= 72
    assert not any("…" in line for line in narrow)
    for first, second, whole in zip(narrow[3:8], narrow[10:15], wide[3:8], strict=True):
        name = whole.split("  ")[0]
        assert first.startswith(name) and second.startswith(name)
        assert first.split() + second.removeprefix(name).split() == whole.split()


def test_the_table_fits_a_hundred_columns() -> None:
    lines = shown(measured())
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert lines[3].split() == ["untouched", "22.6", "1.14", "1.17", "28,078", "12", "GB", "8.3", "%"]
    assert lines[4].split()[:3] == ["A", "17.2", "0.761"] and lines[5].startswith("B (plain)")
    assert lines[6].startswith("hf-compiled") and lines[7].startswith("A (vllm) ")
    assert lines[8] == "vllm: out of memory"
    assert lines[10:12] == ["batch 256, context 32,000, 64 new tokens", "out of memory"]
    assert lines[13:] == [
        "NVIDIA H200: copies 4,250 GB/s, reads 4,100 GB/s, multiplies 700.0 k GFLOP/s;",
        "  roofline is the share of that which TPOT reaches",
        "clock 1755 to 1980 MHz, 41 to 66 °C in 2 readings",
        "held back by power limit in 1 of 2 readings",
        "getting ready took at most 4 s (untouched)",
        "B: fast refuses: it has moods",
        "vllm: TPOT is a mean over each text",
        "vLLM does not run the rest",
    ]


def test_a_recipe_under_a_peer_is_called_by_both_names() -> None:
    bench = measured()
    names = command.named(bench)
    called = [bench.called(timing, names) for timing in bench.timings[:6]]
    assert called == ["untouched", "A", "B", "hf-compiled", "vllm", "A (vllm)"]
    ratio = bench.ratio(bench.timings[5])
    assert ratio is not None and ratio.value == pytest.approx(0.9021 / 1.1284)  # of the untouched model by impasto
    failed = replace(bench.timings[5], rounds=(), problem="out of memory")
    assert command.problems(replace(bench, timings=(*bench.timings[:4], failed)), failed.case) == [
        "A (vllm): out of memory"
    ]
    series = {row["series"] for row in frontier.throughput(bench, names).rows}
    assert series == {"untouched", "A", "B", "hf-compiled", "A (vllm)"}


def test_figures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    found = command.drawn(measured(), tmp_path, None)
    assert [path.name for path in found] == ["tpot-ratio.png", "ttft-ratio.png"]
    rows = (tmp_path / "figures" / "tpot-ratio.csv").read_text().splitlines()
    assert [row.split(",")[-4] for row in rows[1:]] == [
        "A  0:8 12:24",
        "B  0:8 {8:16} 16:24 + 1.mlp.*@0.1",
        "hf-compiled",
        "A  0:8 12:24 (vllm)",
    ]
    nothing = replace(measured(), timings=measured().timings[-3:])
    assert command.drawn(nothing, tmp_path, None) == []
    assert plots.DRAWINGS["frontier"].required == ("x", "y")
    assert json.loads(json.dumps(measured().to_dict()))["timings"][0]["summary"]["tpot_ratio"]["value"] == 1.0


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.5, 0.75, "0.500 to 0.750"), (0.0, 4.6e7, "<0.001 to >1,000"), (0.0011, 999.0, "0.001 to 999.000")],
)
def test_ends_of_an_interval_that_says_little_are_short(low: float, high: float, text: str) -> None:
    assert command._ratio(Estimate(1.0, low, high))[1] == text
