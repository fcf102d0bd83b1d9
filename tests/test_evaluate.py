"""Recipes times tasks: resumed, never doubled, and equal to the harness's own model (law 8, law 7)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from impasto import models
from impasto.encoding import quiet_harness
from impasto.errors import StoreError
from impasto.evaluate import evaluate, plan
from impasto.recipe import Recipe
from impasto.store import Store
from impasto.tasks import build
from tiny import tiny_folder, tiny_model, tiny_tokenizer

TASKS = ("impasto_tiny_choice", "impasto_tiny_lastword", "impasto_tiny_rolling", "impasto_tiny_generate")


@pytest.fixture(scope="module")
def loaded():
    return models.adopt(tiny_model(), tiny_tokenizer(), name="tiny")


def recipes(*texts: str) -> list[Recipe]:
    return [Recipe.of("tiny", text, layers=4) for text in texts]


def test_the_untouched_model_scores_what_the_harness_says(loaded, tmp_path):
    """Law 8: the harness's own `hf` model on the same tasks gives the same metrics."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import impasto.tasks as tasks

    with Store(tmp_path) as store:
        ours = {r.task: r.metrics for r in evaluate(loaded, recipes("0:4"), build(TASKS), store)}
    with quiet_harness():
        theirs = simple_evaluate(
            model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=[str(Path(tasks.__file__).parent / "benchmarks")]),
            bootstrap_iters=0,
        )["results"]
    for task in TASKS:
        for name, value in theirs[task].items():
            if isinstance(value, int | float) and "stderr" not in name and "," in name:
                assert ours[task][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (task, name)


def test_a_second_run_asks_nothing_and_new_recipes_ask_only_their_own(loaded, tmp_path):
    tasks = build(TASKS[:2])
    with Store(tmp_path) as store:
        first = evaluate(loaded, recipes("0:4", "0 3"), tasks, store)
        assert plan(loaded, recipes("0:4", "0 3"), tasks, store).requests == 0
        assert evaluate(loaded, recipes("0:4", "0 3"), tasks, store) == first
        left = plan(loaded, recipes("0:4", "0 3", "3 0"), tasks, store)
        assert left.layer_calls == 2
        more = evaluate(loaded, recipes("0:4", "0 3", "3 0"), tasks, store)
        assert more[: len(first)] == first and len(more) == len(first) + 2


def test_edits_change_the_result_and_are_undone(loaded, tmp_path):
    plain, edited = recipes("0:4")[0], Recipe.of("tiny", "0:4", ["1:3.mlp.*@0"], layers=4)
    with Store(tmp_path) as store:
        one, two = evaluate(loaded, [plain, edited], build(TASKS[2:3]), store)
        again = evaluate(loaded, [plain], build(TASKS[2:3]), store)
    assert one.metrics != two.metrics
    assert again == [one]


def test_a_recipe_that_breaks_is_reported_alone(tmp_path):
    import torch

    model = tiny_model()
    body = models.adopt(model, tiny_tokenizer(), name="broken")
    tasks = build(TASKS[:1])
    with Store(tmp_path) as store:
        evaluate(body, recipes("0:4"), tasks, store)  # anatomy is known before the weights break
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
        notes: list[str] = []
        good, bad = evaluate(body, recipes("0 1 3", "0 2"), tasks, store, note=notes.append)
    assert good.nonfinite == 0 < bad.nonfinite
    assert any("are not finite numbers" in note for note in notes)


def test_a_newer_store_is_refused(loaded, tmp_path):
    import sqlite3

    with Store(tmp_path) as store:
        path = store.path
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    with pytest.raises(StoreError):
        Store(tmp_path)


PROGRAM = """
    import sys
    sys.path.insert(0, sys.argv[3])
    from impasto import models
    from impasto.evaluate import evaluate
    from impasto.recipe import Recipe
    from impasto.store import Store
    from impasto.tasks import build
    loaded = models.load(sys.argv[1], dtype="float32")
    texts = ["0:4", "0 {1 2} 3", "0 2 1 3", "0 3", "0 1 1 3"]
    with Store(sys.argv[2]) as store:
        evaluate(loaded, [Recipe.of("m", t, layers=4) for t in texts], build(["impasto_tiny_choice",
                 "impasto_tiny_lastword", "impasto_tiny_generate"]), store, batch_tokens=64)
"""


def run(model: Path, folder: Path, kill_after: float | None) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(model), str(folder), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    if kill_after is None:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        return
    while process.poll() is None and not (folder / "results.sqlite").exists():
        time.sleep(0.02)
    time.sleep(kill_after)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def rows(folder: Path) -> dict[str, list]:
    with Store(folder, readonly=True) as store:
        (setting,) = store.settings()
        return {
            "results": sorted(
                (r.recipe, r.task, sorted(r.metrics.items()), sorted(r.scores.items())) for r in store.results(setting)
            ),
            "recipes": sorted(store.recipes()),
        }


def test_kill_at_any_moment_and_rerun_equals_the_uninterrupted_run(tmp_path):
    """Law 7, with real processes and SIGKILL."""
    model = tiny_folder(tmp_path / "model")
    run(model, tmp_path / "whole", None)
    for kill_after in (0.02, 0.15):
        run(model, tmp_path / "killed", kill_after)
    run(model, tmp_path / "killed", None)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
