"""Sweeps on workers: who does what when anybody may die, what a worker says, and a real Ray cluster with real kills."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import impasto
from impasto import cluster, dispatch, models, scoring
from impasto.cli import main
from impasto.cluster import Cluster, Reference, Worker, seats
from impasto.dispatch import Died, Dispatch, Done, Event, Failed, Ready, Said, Scored, Share, Wrote
from impasto.errors import ImpastoError, MissingExtra, UsageError
from impasto.evaluate import Questions, evaluate, scorer_of
from impasto.recipe import Recipe
from impasto.result import Request, Response, Setting
from impasto.scoring import Batch, Sharing
from impasto.store import FILENAME, Store
from impasto.tasks import build
from impasto.units import Unit
from tiny import tiny_folder, tiny_model, tiny_tokenizer

TASKS = ("impasto_tiny_choice", "impasto_tiny_lastword", "impasto_tiny_rolling", "impasto_tiny_generate")
SCHEDULES = ("0:4", "0 {1 2} 3", "0 2 1 3", "0 3", "0 1 1 3")
RECIPES = tuple(Recipe.of("tiny", text, layers=4) for text in SCHEDULES)

PATHS = os.pathsep.join([str(Path(impasto.__file__).parents[1]), str(Path(__file__).parent)])

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


# ── who does what, with workers that are made up ─────────────────────────────────────────────────────────────────────


class Notes:
    """Takes what a dispatch hands over."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()
        self.notes: list[str] = []
        self.shares: dict[str, list[float]] = {}

    def questions(self) -> Questions:
        def keep(who: Sequence[Recipe], what: Sequence[Request], batch: Batch) -> None:
            self.answers.update((r.fingerprint, what[i].fingerprint) for r in who for i in batch.requests)

        def keep_text(recipe: Recipe, request: Request, response: Response) -> None:
            self.answers[recipe.fingerprint, request.fingerprint] += 1

        return Questions(
            setting=Setting("m", "w", "float32", "cpu"),
            scored=(),
            written=(),
            scorer=lambda: pytest.fail("nobody needs the driver's scorer here"),
            batch_tokens=None,
            sharing=Sharing(),
            keep=keep,
            keep_text=keep_text,
            progress=lambda phase, share: self.shares.setdefault(phase, []).append(share),
            note=self.notes.append,
        )


class PretendedCrew:
    """Workers without processes: whoever speaks next is drawn by lot, and may die instead.

    `deaths` is how many workers die at random moments; a request whose context is "deadly" always kills, one that is
    "too large" always fails.
    """

    def __init__(self, seed: int, deaths: int = 0, load: Sequence[Event] = (Ready("host"), Done())) -> None:
        self.lot = random.Random(seed)
        self.deaths = deaths
        self.load = load
        self.coming: dict[int, list[Event]] = {}
        self.alive: set[int] = set()

    def start(self, number: int) -> None:
        assert number not in self.alive
        self.alive.add(number)
        self.coming[number] = list(self.load)

    def give(self, number: int, unit: Unit) -> None:
        assert number in self.alive
        self.coming[number] = list(self.answers(unit))

    def answers(self, unit: Unit) -> Iterator[Event]:
        for low in range(0, len(unit.requests), 2):
            places = list(range(low, min(low + 2, len(unit.requests))))
            contexts = {unit.requests[place].context for place in places}
            if "deadly" in contexts:
                yield Died("killed by a request")
                return
            if "too large" in contexts:
                yield Failed("one sequence does not fit")
                yield Done()
                return
            if unit.writes:
                yield from (Wrote(place, Response(text="x")) for place in places)
            else:
                yield Share(low / len(unit.requests))
                values = np.zeros((len(unit.recipes), len(places)))
                some = np.ones(len(places), dtype=np.int64)
                yield Scored(Batch(np.array(places), values, values == 0, some, some == 0))
        yield Done()

    def listen(self, seconds: float) -> list[tuple[int, Event]]:
        speaking = [number for number in sorted(self.alive) if self.coming[number]]
        if not speaking:
            return []
        number = self.lot.choice(speaking)
        if self.deaths and self.lot.random() < 0.3:
            self.deaths -= 1
            self.coming[number] = [Died("its process died")]
        event = self.coming[number].pop(0)
        if isinstance(event, Died):
            self.alive.remove(number)
        return [(number, event)]

    def room(self) -> bool:
        return True


def units(kinds: Sequence[str], size: int = 5) -> list[Unit]:
    """One unit for each kind: "score" or "write", or the same with a deadly or too large request in its middle."""
    made = []
    for i, kind in enumerate(kinds):
        sort = "generate" if kind.startswith("write") else "loglikelihood"
        requests = [Request(sort, "q", f"{i}.{j}") for j in range(size)]
        if "," in kind:
            requests[size // 2] = Request(sort, kind.split(", ")[1], str(i))
        made.append(Unit(RECIPES[:1] if sort == "generate" else RECIPES[:3], tuple(requests), 100 + i))
    return made


def pairs(made: Sequence[Any]) -> set[tuple[str, str]]:
    return {(r.fingerprint, q.fingerprint) for part in made for r in part.recipes for q in part.requests}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["score", "write"]), min_size=1, max_size=12), st.integers(1, 4), st.integers())
def test_two_deaths_lose_nothing_and_double_nothing(kinds: list[str], size: int, seed: int) -> None:
    """Fewer deaths than tries: whenever and whomever they hit, every answer comes exactly once."""
    made, heard = units(kinds), Notes()
    assert Dispatch(made, PretendedCrew(seed, deaths=2), size, heard.questions()).run() == []
    assert heard.answers == Counter(dict.fromkeys(pairs(made), 1))
    for phase in {"generating" if kind == "write" else "scoring" for kind in kinds}:
        assert heard.shares[phase][-1] == 1.0
    assert heard.shares["starting workers"][0] == 0.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["score", "write"]), max_size=8), st.integers(1, 4), st.integers())
def test_a_unit_that_brings_down_everybody_is_named_and_the_rest_goes_on(
    kinds: list[str], size: int, seed: int
) -> None:
    made, heard = units([*kinds[:3], "score, deadly", *kinds[3:], "write, too large"]), Notes()
    lost = Dispatch(made, PretendedCrew(seed), size, heard.questions()).run()
    assert len(lost) == 2
    assert heard.answers == Counter(dict.fromkeys(pairs(made) - pairs(lost), 1))
    for part in lost:  # what came before the bad request in its unit was kept
        assert {request.context for request in part.requests} >= {"q"} and len(part.requests) == 3
    assert sorted(part.reason for part in lost) == [
        "killed by a request (3 times)",
        "one sequence does not fit (3 times)",
    ]
    assert heard.shares["scoring"][-1] == heard.shares["generating"][-1] == 1.0


def test_a_unit_that_failed_goes_to_somebody_else() -> None:
    made, given = units(["score, too large", "score", "score"]), []

    class Watched(PretendedCrew):
        def give(self, number: int, unit: Unit) -> None:
            given.append((number, any(q.context == "too large" for q in unit.requests)))
            super().give(number, unit)

    Dispatch(made, Watched(1), 2, Notes().questions()).run()
    first, second, _ = [number for number, bad in given if bad]
    assert first != second


def test_where_everybody_dies_the_run_ends() -> None:
    """Not three deaths for each of a hundred units."""
    made, heard = units(["score, deadly"] * 100, size=1), Notes()
    lost = Dispatch(made, PretendedCrew(0), 3, heard.questions()).run()
    assert pairs(lost) == pairs(made) and not heard.answers
    assert len(heard.notes) <= dispatch.IN_A_ROW + 3
    assert lost[0].reason == "killed by a request (12 workers in a row)"
    assert heard.shares["scoring"][-1] == 1.0


def test_workers_that_cannot_load() -> None:
    with pytest.raises(ImpastoError, match=r"^worker 1: m is another model here$"):
        Dispatch(
            units(["score"]), PretendedCrew(0, load=[Failed("m is another model here")]), 1, Notes().questions()
        ).run()
    heard = Notes()
    crew = PretendedCrew(0, load=[Died("it was ended because its machine ran out of memory")])
    with pytest.raises(ImpastoError, match=r"no worker could load the model \(it was ended .*\): try fewer --workers"):
        Dispatch(units(["score"]), crew, 2, heard.questions()).run()
    assert len(heard.notes) == 2 * dispatch.TRIES


def test_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(PretendedCrew):
        def room(self) -> bool:
            return False

    monkeypatch.setattr(dispatch, "PATIENCE", 0.01)
    with pytest.raises(ImpastoError, match="no machine of the cluster could hold a worker: bring one back and run"):
        Dispatch(units(["score"]), Gone(0, load=[]), 2, Notes().questions()).run()


def test_what_workers_say_reaches_the_user() -> None:
    heard = Notes()
    load = [Ready("host"), Said("out of memory: token budget halved to 8"), Done()]
    Dispatch(units(["score"]), PretendedCrew(0, load=load), 2, heard.questions()).run()
    assert "worker 1 on host: out of memory: token budget halved to 8" in heard.notes or heard.notes == []


# ── how many ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_seats() -> None:
    two = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert seats(two, None, "cuda") == (6, {"num_gpus": 1, "num_cpus": 1})
    assert seats(two, 3, "cuda") == (3, {"num_gpus": 1, "num_cpus": 1})
    assert seats(two, None, "cpu") == (2, {"num_gpus": 0, "num_cpus": 8})
    assert seats(two, 3, "cpu") == (3, {"num_gpus": 0, "num_cpus": 8})
    assert seats(two, 4, "cpu") == (4, {"num_gpus": 0, "num_cpus": 5})
    assert seats([{"CPU": 2.0}, {}], 2, "cpu") == (2, {"num_gpus": 0, "num_cpus": 1})
    for workers, device, text in [
        (None, "cuda", "the cluster has no GPU, and the model was loaded on one: try --device cpu"),
        (3, "cpu", "3 workers need 3 CPU cores, and the cluster has 2: try fewer --workers"),
    ]:
        with pytest.raises(UsageError, match=text):
            seats([{"CPU": 2.0}], workers, device)
    with pytest.raises(UsageError, match="7 workers need 7 GPUs, and the cluster has 6: leave --workers away"):
        seats(two, 7, "cuda")


# ── one worker, in this process ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def worker(folder: Path) -> Worker:
    made = Worker(Reference(str(folder), models.load(folder, dtype="float32").setting), 64, Sharing())
    (ready,) = made.load()
    assert isinstance(ready, Ready)
    return made


SCORED = tuple(Request("loglikelihood", f"The {i}. word of it is", " so") for i in range(6))


def test_a_worker_answers_as_the_scorer_does_and_tells_of_memory_and_warnings(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scorer_of(worker.loaded, 64).score(RECIPES, SCORED).loglikelihood
    real = scoring.call_layer

    def tight(body: Any, layer: int, levels: Any, states: Any) -> Any:
        if sum(state.shape[0] * state.shape[1] for state in states) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(body, layer, levels, states)

    monkeypatch.setattr(scoring, "call_layer", tight)
    monkeypatch.setattr(cluster, "TELL", 0.0)
    monkeypatch.setattr(
        worker.scorer,
        "note",
        lambda text, note=worker.scorer.note: (
            note(text),
            logging.getLogger("some.package").warning("hot: %d degrees", 90),
        ),
    )
    found = np.full(expected.shape, np.nan)
    said, shares = [], []
    for event in worker.answer(Unit(RECIPES, SCORED, 1)):
        match event:
            case Scored(batch):
                found[:, batch.requests] = batch.loglikelihood
            case Said(text):
                said.append(text)
            case Share(share):
                shares.append(share)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert said[0] == "out of memory: token budget halved to 29"
    assert said[1] == "some.package: hot: 90 degrees"
    assert shares == sorted(shares) and shares[-1] == 1
    assert not any(
        "Handler" in str(handler) and "_logging_to" in str(handler) for handler in logging.getLogger().handlers
    )


def test_a_request_that_does_not_fit_is_a_failure_and_a_fault_is_a_death(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> None:
        def call(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(scoring, "call_layer", call)

    fails(torch.OutOfMemoryError("CUDA out of memory."))
    assert [event for event in worker.answer(Unit(RECIPES, SCORED, 1)) if not isinstance(event, Said)] == [
        Failed(
            "one sequence of 23 tokens does not fit into the memory of cpu: use a smaller window or dtype, or a device "
            "with more memory"
        )
    ]
    fails(ValueError("device-side assert triggered\nand more"))
    assert list(worker.answer(Unit(RECIPES, SCORED, 1))) == [
        Died("unexpected ValueError: device-side assert triggered")
    ]


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    mine = models.load(folder, dtype="float32").setting
    other = tiny_folder(tmp_path / "other", seed=1)
    (event,) = Worker(Reference(str(other), mine), 64, Sharing()).load()
    theirs = models.load(other, dtype="float32").setting.weights
    assert event == Failed(
        f"{other} is another model here than on the driver (weights: {theirs[:16]} here, {mine.weights[:16]} there): "
        "give every machine the same files and packages"
    )


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def ray_is(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    """Let Ray seem installed, or not."""
    real = importlib.util.find_spec
    seems = object() if there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: seems if name == "ray" else real(name, *rest))


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray_is(monkeypatch, there=True)
    for address in ("", "ray://somewhere:10001"):
        with pytest.raises(UsageError, match="the address of a cluster is `local`, `auto` or HOST:PORT, not"):
            Cluster(address)
    with pytest.raises(UsageError, match="there is at least one worker, not 0"):
        Cluster(workers=0)
    adopted = models.adopt(tiny_model(), tiny_tokenizer(), name="mine")
    with Store(tmp_path) as store, pytest.raises(UsageError, match="mine is held in memory, where workers cannot load"):
        evaluate(adopted, RECIPES[:1], build(TASKS[:1]), store, where=Cluster())
    adopted.model.hf_device_map = {"": 0}
    with Store(tmp_path) as store, pytest.raises(UsageError, match="spread over several devices .* --device-map away"):
        evaluate(adopted, RECIPES[:1], build(TASKS[:1]), store, where=Cluster())


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (
            "--ray local",
            1,
            "a sweep on several workers needs ray, which is not installed: pip install 'impasto[cluster]'",
        ),
        ("--workers 2", 2, "--workers goes with --ray: `--ray local` starts workers on this host"),
        ("--ray local --device-map auto", 2, "--ray gives each worker one device, and --device-map several: leave one"),
        ("--ray local --workers 0", 2, "Invalid value for '--workers'"),
    ],
)
@pytest.mark.parametrize("command", ["eval x --tasks a", "study painters x"])
def test_the_command_line_says_so_before_a_model_is_loaded(
    command: str,
    options: str,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray_is(monkeypatch, there=False)
    assert main([*command.split(), *options.split()]) == code
    assert capsys.readouterr().err.startswith(f"error: {text}")


def test_missing_ray_is_an_error_like_other_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_is(monkeypatch, there=False)
    with pytest.raises(MissingExtra):
        Cluster()


# ── a real cluster ───────────────────────────────────────────────────────────────────────────────────────────────────


class Registered(Worker):
    """Leaves its process number in a folder that the test names."""

    def prepare(self, tell: Any) -> None:
        super().prepare(tell)
        (Path(os.environ["IMPASTO_TEST_PIDS"]) / str(os.getpid())).touch()


def answers(folder: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    """All rows of a store, by recipe and request."""
    with sqlite3.connect(folder / FILENAME) as db:
        rows = db.execute(
            "SELECT recipes.fingerprint, requests.fingerprint, loglikelihood, is_greedy, tokens, truncated, text"
            " FROM responses JOIN recipes ON recipes.id = recipe JOIN requests ON requests.id = request"
        ).fetchall()
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2:] for row in rows}


def assert_equal_rows(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, (value, *rest) in expected.items():
        assert found[key][0] == pytest.approx(value, abs=1e-4), key
        assert list(found[key][1:]) == rest, key


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What one process makes of the same questions."""
    place = tmp_path_factory.mktemp("local")
    with Store(place) as store:
        evaluate(models.load(folder, dtype="float32"), RECIPES, build(TASKS), store, batch_tokens=64)
    return answers(place)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster for all tests, started as `--ray local` does; with a token that no file keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
        patch.setenv("IMPASTO_TEST_PIDS", str(tmp_path_factory.mktemp("pids")))
        patch.setenv("PYTHONPATH", PATHS)  # workers know what is installed, and this
        with cluster._connected("local", 2, "cpu"):
            import ray

            yield ray.get_runtime_context().gcs_address


@with_ray
def test_a_killed_worker_changes_nothing(
    address: str, folder: Path, undisturbed: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two worker processes, one of them killed with SIGKILL while it scores."""
    pids = Path(os.environ["IMPASTO_TEST_PIDS"])
    monkeypatch.setattr(cluster, "Worker", Registered)
    killed: list[int] = []
    notes: list[str] = []

    def progress(phase: str, share: float) -> None:
        if phase == "scoring" and 0 < share < 1 and not killed:
            killed.append(min(int(path.name) for path in pids.iterdir()))
            os.kill(killed[0], signal.SIGKILL)

    with Store(tmp_path / "run") as store:
        results = evaluate(
            models.load(folder, dtype="float32"),
            RECIPES,
            build(TASKS),
            store,
            batch_tokens=64,
            where=Cluster("local", 2),
            progress=progress,
            note=notes.append,
        )
    assert killed and any("its process died; another one is started" in note for note in notes)
    assert len(results) == len(RECIPES) * len(TASKS)
    assert_equal_rows(answers(tmp_path / "run"), undisturbed)


DRIVER = """
    import sys, time
    sys.path.insert(0, sys.argv[4])
    from impasto import models
    from impasto.cluster import Cluster
    from impasto.evaluate import evaluate
    from impasto.store import Store
    from impasto.tasks import build
    from test_cluster import RECIPES, TASKS
    with Store(sys.argv[2]) as store:
        evaluate(models.load(sys.argv[1], dtype="float32"), RECIPES, build(TASKS), store, batch_tokens=64,
                 where=Cluster(sys.argv[3], 1), progress=lambda phase, share: time.sleep(0.1))
"""


@with_ray
def test_a_killed_driver_goes_on_where_it_was(
    folder: Path, undisturbed: dict[Any, Any], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), str(run), address, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": PATHS},
        stderr=subprocess.PIPE,
        text=True,
    )
    while driver.poll() is None and not ((run / FILENAME).exists() and kept(run)):
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    before = answers(run)
    assert 0 < len(before) < len(undisturbed)
    asked: list[Unit] = []
    real = cluster.planned
    monkeypatch.setattr(cluster, "planned", lambda *given: asked.extend(real(*given)) or asked)
    with Store(run) as store:
        evaluate(
            models.load(folder, dtype="float32"),
            RECIPES,
            build(TASKS),
            store,
            batch_tokens=64,
            where=Cluster(address, 1),
        )
    assert pairs(asked) == undisturbed.keys() - before.keys()
    assert_equal_rows(answers(run), undisturbed)


def kept(run: Path) -> int:
    """How many answers a store holds that another process may just be making."""
    try:
        with sqlite3.connect(f"file:{run / FILENAME}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT count(*) FROM responses").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
