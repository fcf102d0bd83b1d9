"""Recipes times tasks: resumed, never doubled, and equal to the harness's own model (law 8, law 7)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from impasto import models
from impasto.encoding import quiet_harness
from impasto.errors import ImpastoError, StoreError
from impasto.evaluate import Here, Lost, Questions, evaluate, plan, scorer_of
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


def test_requests_longer_than_the_window_are_cut_counted_and_reported(tmp_path):
    short = models.adopt(tiny_model(max_position_embeddings=64), tiny_tokenizer(), name="short")
    notes: list[str] = []
    with Store(tmp_path) as store:
        full, other = evaluate(short, recipes("0:4", "0 3"), build(TASKS[1:2]), store, note=notes.append)
    assert full.truncated == other.truncated > 0 and full.nonfinite == 0
    assert notes == [  # once for the task, not for every recipe
        f"{TASKS[1]}: {full.truncated} requests are longer than the model's window and were cut from the left"
    ]


def kept(store: Store) -> dict:
    """All answers in a store, by recipe and request."""
    requests = [request for task in build(TASKS) for request in task.requests]
    (setting,) = store.settings()
    return {
        (recipe.fingerprint, request): answer
        for recipe in recipes(*SCHEDULES)
        for request, answer in store.responses(setting, recipe, requests).items()
    }


SCHEDULES = ("0:4", "0 {1 2} 3", "0 2 1 3")


def run_here(loaded, store: Store, **options) -> list:
    return evaluate(loaded, recipes(*SCHEDULES), build(TASKS), store, batch_tokens=200, **options)


@pytest.mark.parametrize("phase", ["scoring", "generating"])
def test_ctrl_c_keeps_what_is_measured_and_the_same_call_goes_on(loaded, tmp_path, phase):
    def interrupt(now: str, share: float) -> None:
        if now == phase and share > 0.4:
            raise KeyboardInterrupt

    with Store(tmp_path / "whole") as store:
        whole, answers = run_here(loaded, store), kept(store)
    with Store(tmp_path / "stopped") as store:
        with pytest.raises(KeyboardInterrupt):
            run_here(loaded, store, progress=interrupt)
        part = kept(store)
        assert 0 < len(part) < len(answers) and part == {key: answers[key] for key in part}
        assert run_here(loaded, store) == whole
        assert kept(store) == answers


def test_a_full_disk_stops_the_run_and_with_space_it_goes_on(loaded, tmp_path):
    """SQLite's own limit on the file's pages is what it says of a full disk, too."""
    with Store(tmp_path / "whole") as store:
        whole, answers = run_here(loaded, store), kept(store)
    with Store(tmp_path / "full") as store:
        store.put_recipes(recipes(*SCHEDULES))
        (pages,) = store._db._connection.execute("PRAGMA page_count").fetchone()
        store._db._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="is full.*: free some space, .* run the same command again"):
            run_here(loaded, store)
        part = kept(store)
        assert 0 < len(part) < len(answers) and part == {key: answers[key] for key in part}
    with Store(tmp_path / "full") as store:
        assert run_here(loaded, store) == whole
        assert kept(store) == answers


def test_what_nobody_could_answer_is_named_after_all_else_is_measured(loaded, tmp_path):
    class Picky:
        """A place that leaves out one request of one recipe."""

        def answer(self, loaded, questions: Questions) -> list[Lost]:
            (who, what), *rest = questions.scored
            less = [(who[:1], what[1:]), (who[1:], what), *rest]
            Here().answer(loaded, replace(questions, scored=less))
            return [Lost(who[:1], tuple(what[:1]), "its process died (3 times)")]

    with Store(tmp_path) as store:
        with pytest.raises(ImpastoError) as problem:
            run_here(loaded, store, where=Picky())
        (setting,) = store.settings()
        results = store.results(setting)
        assert len(results) == len(SCHEDULES) * len(TASKS) - 1  # all but the one that lacks an answer
        first = build(TASKS)[0].requests[0]
        assert str(problem.value) == (
            "some questions could not be answered; everything else is measured and kept\n"
            "  its process died (3 times):\n"
            "    recipes: 0:4\n"
            f"    requests: {(first.context + first.continuation)!r}\n"
            "the same command asks them again; without --ray, in this process"
        )
        assert len(run_here(loaded, store)) == len(SCHEDULES) * len(TASKS)


def test_a_scorer_is_made_once_and_only_where_something_is_asked(loaded, tmp_path):
    made = []

    def scorer():
        made.append(scorer_of(loaded, 200))
        return made[-1]

    with Store(tmp_path) as store:
        evaluate(loaded, recipes(*SCHEDULES), build(TASKS), store, scorer=scorer)
        assert len(made) == 1
        evaluate(loaded, recipes(*SCHEDULES), build(TASKS), store, scorer=scorer)
        assert len(made) == 1


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
