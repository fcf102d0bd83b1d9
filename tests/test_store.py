from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.errors import StoreError
from impasto.recipe import Recipe
from impasto.records import from_json, to_json
from impasto.result import MASKINGS, Request, Response, Result, Setting, digest
from impasto.store import FILENAME, Store, duplicate

SETTING = Setting("some/model", "w0", "float32", "cpu")
RECIPES = [Recipe.of("some/model", text, layers=6) for text in ("0:6", "0:2 3:6", "0:2 {2:5} 5", "5 4 3")]
REQUESTS = [Request("loglikelihood", f"question {i}", f" answer {i}") for i in range(7)]

# What the processes of the tests below do: score batches as an engine would, skipping what is known.
WORKER = """
import sys, time
import numpy as np
from impasto.recipe import Recipe
from impasto.result import Request, Result, Setting
from impasto.store import Store

folder, pause, order = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
setting = Setting("some/model", "w0", "float32", "cpu")
recipes = [Recipe.of("some/model", f"0:{n}", layers=30) for n in range(1, 25)]
requests = [Request("loglikelihood", f"q{i}", f" a{i}") for i in range(200)]
print("ready", flush=True)
with Store(folder) as store:
    starts = range(0, 200, 20)
    for start in starts if order > 0 else reversed(starts):
        batch = requests[start : start + 20]
        gaps = ~store.known(setting, recipes, batch)
        if gaps.any():
            value = -np.add.outer(np.arange(24.0), np.arange(start, start + 20) / 7)
            store.put_batch(setting, recipes, batch, loglikelihood=value, is_greedy=value > -5,
                            tokens=np.arange(20), answered=gaps)
        print("batch", flush=True)
        time.sleep(pause)
    for recipe in recipes:
        answers = store.responses(setting, recipe, requests)
        scores = tuple(answers[r.fingerprint].loglikelihood for r in requests)
        store.put_result(setting, Result(recipe.fingerprint, "t", "p", 200, {"ll,none": sum(scores) / 200},
                                         {"ll,none": scores}))
print("done", flush=True)
"""


def spawn(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def contents(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, with names in place of keys, which depend on the order of arrival."""
    queries = {
        "responses": """SELECT s.fingerprint, r.fingerprint, q.fingerprint, loglikelihood, is_greedy, tokens,
            truncated, text FROM responses JOIN settings s ON s.id = setting JOIN recipes r ON r.id = recipe
            JOIN requests q ON q.id = request""",
        "results": """SELECT r.fingerprint, task, protocol, n, metrics, info, metric, examples FROM results
            JOIN recipes r ON r.id = recipe JOIN scores ON scores.result = results.id""",
        "recipes": "SELECT fingerprint, schedule, edits, label FROM recipes",
        "requests": "SELECT fingerprint FROM requests",
        "settings": "SELECT fingerprint, model, weights, dtype, device, kv, attention FROM settings",
    }
    with Store(folder, readonly=True):
        pass
    connection = sqlite3.connect(folder / FILENAME)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    tables = {name: sorted(connection.execute(query).fetchall()) for name, query in queries.items()}
    connection.close()
    return tables


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "run") as opened:
        yield opened


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user may read; the one pytest gives is private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_json_values_come_back_as_they_were(value: object) -> None:
    assert from_json(to_json(value)) == value


def test_json_keeps_numbers_that_json_has_no_word_for() -> None:
    text = to_json({"a": [math.nan, math.inf, -math.inf, 1.5], "b": np.array([[1.0, np.nan]]), "c": np.int64(3)})
    json.loads(text, parse_constant=pytest.fail)  # plain JSON, for every reader
    value = from_json(text)
    assert math.isnan(value["a"][0]) and value["a"][1:] == [math.inf, -math.inf, 1.5]
    assert value["b"][0][0] == 1.0 and math.isnan(value["b"][0][1])
    assert value["c"] == 3


@pytest.mark.parametrize("value", [{1: 2}, {"$float": 1}, object(), {1, 2}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        to_json(value)


# ── responses ────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_come_back_as_they_were(store: Store) -> None:
    answers = [
        Response(-1.25, True, None, 3, False),
        Response(-math.inf, False, None, 1, True),
        Response(0.0, False, "a text\nwith 'quotes' and \u00fcnicode \U0001f3a8", 9, False),
    ]
    rows = [(RECIPES[0], request, answer) for request, answer in zip(REQUESTS, answers, strict=False)]
    assert store.put_responses(SETTING, rows) == 3
    found = store.responses(SETTING, RECIPES[0], REQUESTS)
    assert found == {r.fingerprint: a for r, a in zip(REQUESTS, answers, strict=False)}
    assert store.responses(SETTING, RECIPES[1], REQUESTS) == {}
    store.put_responses(SETTING, [(RECIPES[1], REQUESTS[0], Response(math.nan))])
    assert math.isnan(store.responses(SETTING, RECIPES[1], REQUESTS)[REQUESTS[0].fingerprint].loglikelihood)


def test_the_first_answer_stays(store: Store) -> None:
    assert store.put_responses(SETTING, [(RECIPES[0], REQUESTS[0], Response(-1.0))]) == 1
    assert store.put_responses(SETTING, [(RECIPES[0], REQUESTS[0], Response(-2.0))]) == 0
    assert store.put_batch(SETTING, RECIPES[:1], REQUESTS[:2], loglikelihood=-3.0) == 1
    found = store.responses(SETTING, RECIPES[0], REQUESTS)
    assert [found[r.fingerprint].loglikelihood for r in REQUESTS[:2]] == [-1.0, -3.0]


def test_a_batch_is_the_same_as_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (len(RECIPES), len(REQUESTS))
    values, greedy, answered = rng.normal(size=shape), rng.random(shape) < 0.5, rng.random(shape) < 0.7
    texts = [[f"{row} {column}" for column in range(shape[1])] for row in range(shape[0])]
    tokens = np.arange(shape[1])
    with Store(tmp_path / "batch") as store:
        new = store.put_batch(
            SETTING, RECIPES, REQUESTS,
            loglikelihood=values, is_greedy=greedy, tokens=tokens, text=texts, answered=answered,
        )  # fmt: skip
        assert new == answered.sum()
        assert (store.known(SETTING, RECIPES, REQUESTS) == answered).all()
        store.put_responses(SETTING, [])
    with Store(tmp_path / "rows") as store:
        store.put_recipes(RECIPES)
        store.put_responses(
            SETTING,
            [
                (
                    recipe,
                    request,
                    Response(float(values[i, j]), bool(greedy[i, j]), texts[i][j], int(tokens[j])),
                )
                for i, recipe in enumerate(RECIPES)
                for j, request in enumerate(REQUESTS)
                if answered[i, j]
            ],
        )
    assert contents(tmp_path / "batch") == contents(tmp_path / "rows")


def test_what_is_missing_is_what_was_not_stored(store: Store) -> None:
    assert not store.known(SETTING, RECIPES, REQUESTS).any()
    store.put_batch(SETTING, RECIPES[1:2], REQUESTS[2:4], loglikelihood=-1.0)
    missing = store.missing(SETTING, RECIPES, REQUESTS)
    everybody, the_others = tuple(RECIPES), (RECIPES[0], *RECIPES[2:])
    assert missing == [everybody] * 2 + [the_others] * 2 + [everybody] * 3
    assert missing[2] is missing[3]
    # order and repetition of the question do not matter, nor do requests that were never seen
    asked = [REQUESTS[3], Request("rolling", "", "new"), REQUESTS[3], REQUESTS[0]]
    assert store.known(SETTING, RECIPES[1:2], asked).tolist() == [[True, False, True, False]]
    assert store.known(SETTING, [], asked).shape == (0, 4)
    assert store.known(SETTING, RECIPES, []).shape == (4, 0)
    assert store.missing(SETTING, RECIPES, []) == []


def test_settings_do_not_mix_and_the_models_name_is_not_part_of_one(store: Store) -> None:
    renamed = Setting("another/name", "w0", "float32", "cpu")
    other = Setting("some/model", "w0", "bfloat16", "cpu")
    store.put_batch(SETTING, RECIPES, REQUESTS, loglikelihood=-1.0)
    assert store.known(renamed, RECIPES, REQUESTS).all()
    assert not store.known(other, RECIPES, REQUESTS).any()
    store.put_batch(other, RECIPES[:1], REQUESTS[:1], loglikelihood=-2.0)
    assert store.settings() == [SETTING, other]
    assert len(store.responses(other, RECIPES[0], REQUESTS)) == 1


# ── results, measurements, provenance ────────────────────────────────────────────────────────────────────────


def result(recipe: Recipe, task: str = "arc", accuracy: float = 0.5) -> Result:
    return Result(
        recipe=recipe.fingerprint,
        task=task,
        protocol="p1",
        n=4,
        metrics={"acc,none": accuracy, "ppl,none": math.inf},
        scores={"acc,none": (1.0, 0.0, 1.0, 0.0), "ll,none": (-1.5, None, -2.0, -math.inf)},
        nonfinite=1,
        truncated=2,
        info={"version": 1.0, "shots": 5, "metric": "acc,none", "higher_is_better": True, "chance": 0.25},
    )


def test_results_come_back_as_they_were(store: Store) -> None:
    store.put_recipes(RECIPES)
    store.put_result(SETTING, result(RECIPES[0]))
    assert store.results(SETTING) == [result(RECIPES[0])]


def test_what_was_written_is_in_the_file_though_a_reader_closes_last(tmp_path: Path) -> None:
    writer = Store(tmp_path)
    writer.put_recipes(RECIPES)
    with Store(tmp_path, readonly=True):
        writer.close()
        (file,) = tmp_path.glob("*.sqlite")
        copy = tmp_path / "copy"
        copy.mkdir()
        shutil.copy(file, copy)
    with Store(copy, readonly=True) as alone:
        assert list(alone.recipes()) == [recipe.fingerprint for recipe in RECIPES]


def test_a_result_is_replaced_with_its_scores(store: Store) -> None:
    store.put_recipes(RECIPES)
    store.put_result(SETTING, result(RECIPES[0]))
    store.put_result(SETTING, result(RECIPES[0], accuracy=0.75))
    assert store.results(SETTING) == [result(RECIPES[0], accuracy=0.75)]


def test_results_are_found_by_recipe_task_and_protocol(store: Store) -> None:
    store.put_recipes(RECIPES)
    for recipe in RECIPES:
        for task in ("arc", "piqa"):
            store.put_result(SETTING, result(recipe, task))
    assert len(store.results(SETTING)) == 8
    only = store.results(SETTING, recipes=[RECIPES[1].fingerprint], tasks=["piqa"])
    assert only == [result(RECIPES[1], "piqa")]
    assert store.results(SETTING, protocol="p2") == store.results(SETTING, recipes=[]) == []


def test_a_result_of_an_unknown_recipe_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match=r"is not known in .*: store the recipe before its result"):
        store.put_result(SETTING, result(RECIPES[0]))


def test_recipes_keep_their_texts_and_their_latest_label(store: Store) -> None:
    name = RECIPES[1].fingerprint
    store.put_recipes(RECIPES, {name: {"method": "skip", "n": 2}})
    store.put_recipes(RECIPES)
    stored = store.recipes()
    assert list(stored) == [recipe.fingerprint for recipe in RECIPES]
    assert stored[name].schedule == str(RECIPES[1].schedule)
    assert stored[name].label == {"method": "skip", "n": 2}
    store.put_recipes(RECIPES, {name: {"method": "skip-one"}})
    assert store.recipes()[name].label == {"method": "skip-one"}


def test_measurements_come_back_as_they_were(store: Store) -> None:
    store.put_measurement(SETTING, RECIPES[0], "similarity", "cosine", [[1.0, 0.5], [0.5, math.inf]])
    store.put_measurement(SETTING, RECIPES[0], "latency", "decode", np.array([1.0, 2.0]))
    store.put_measurement(SETTING, RECIPES[0], "latency", "decode", [3.0])
    assert store.measurement(SETTING, RECIPES[0], "similarity", "cosine") == [[1.0, 0.5], [0.5, math.inf]]
    assert store.measurement(SETTING, RECIPES[0], "latency", "decode") == [3.0]
    assert store.measurement(SETTING, RECIPES[1], "latency", "decode", default="none") == "none"
    assert [m.key for m in store.measurements(SETTING)] == ["decode", "cosine"]
    assert [m.value for m in store.measurements(SETTING, "latency")] == [[3.0]]
    assert store.measurements(SETTING, recipe=RECIPES[1].fingerprint) == []


def test_runs_and_tasks_are_kept(store: Store) -> None:
    number = store.start_run(["impasto", "eval"], versions={"torch": "2"}, seed=3, facts={"cores": 2})
    killed = store.start_run(["impasto", "eval"], versions={})
    store.finish_run(number, seconds=1.5)
    first, second = store.runs()
    assert (first.command, first.versions, first.seed) == (("impasto", "eval"), {"torch": "2"}, 3)
    assert (first.facts, first.seconds, first.outcome) == ({"cores": 2}, 1.5, "finished")
    assert second.id == killed and second.finished is None and second.outcome is None
    store.put_task("arc", "p1", {"version": 1})
    store.put_task("arc", "p1", {"version": 2})
    assert store.tasks() == {("arc", "p1"): {"version": 2}}


# ── exports ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_and_parquet_say_the_same(store: Store, tmp_path: Path) -> None:
    store.put_recipes(RECIPES, {RECIPES[1].fingerprint: {"method": "skip"}})
    for recipe in RECIPES[:2]:
        store.put_result(SETTING, result(recipe))
    for table, rows in (("results", 4), ("scores", 16)):
        text = store.export_csv(tmp_path / "out" / f"{table}.csv", table)  # type: ignore[arg-type]
        with text.open(newline="") as file:
            from_csv = list(csv.DictReader(file))
        binary = pq.read_table(store.export_parquet(tmp_path / f"{table}.parquet", table))  # type: ignore[arg-type]
        from_parquet = binary.to_pylist()
        assert len(from_csv) == len(from_parquet) == rows
        for left, right in zip(from_csv, from_parquet, strict=True):
            assert left == {key: "" if value is None else str(value) for key, value in right.items()}
    assert from_parquet[0]["schedule"] == "0:6" and from_parquet[5]["value"] is None
    assert not list(tmp_path.rglob("*.part"))


def test_the_harness_would_have_written_the_same_keys(store: Store, tmp_path: Path) -> None:
    store.put_recipes(RECIPES)
    store.put_result(SETTING, result(RECIPES[1]))
    store.start_run(["impasto", "eval"], versions={"transformers": "5.0", "lm_eval": "0.4"}, seed=1)
    path = store.export_lm_eval(tmp_path / "out", SETTING, RECIPES[1].fingerprint)
    assert path.parent.name == "some__model" and path.name.startswith("results_")
    document = json.loads(path.read_text())
    task = document["results"]["arc"]
    assert task["alias"] == "arc" and task["acc,none"] == 0.5
    assert task["acc_stderr,none"] == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)
    assert task["ppl_stderr,none"] == "N/A"
    assert document["versions"] == {"arc": 1.0} and document["n-shot"] == {"arc": 5}
    assert document["higher_is_better"] == {"arc": {"acc": True}}
    assert document["n-samples"] == {"arc": {"original": 4, "effective": 4}}
    assert document["config"]["model_args"]["pretrained"] == document["model_name"] == "some/model"
    assert document["transformers_version"] == "5.0"
    assert document["impasto"]["schedule"] == str(RECIPES[1].schedule)
    harness = pytest.importorskip("lm_eval.result_schema", reason="older harnesses do not declare their keys")
    declared = set(harness.EvalResults.__annotations__)
    assert set(document) - declared == {"impasto"}
    optional = {"groups", "samples", "eot_token_id", "max_length"}
    assert {key for key in declared - set(document) if not key.startswith("tokenizer_")} <= optional


def test_a_recipe_without_results_cannot_be_exported(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no results for some/model"):
        store.export_lm_eval(tmp_path, SETTING, RECIPES[0].fingerprint)


def test_an_export_that_fails_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "table.csv").mkdir()
    for place in (tmp_path / "file" / "table.csv", tmp_path / "table.csv"):
        with pytest.raises(StoreError, match=r"cannot write .*: choose another place"):
            store.export_csv(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "table.csv"]


# ── files that cannot be used ────────────────────────────────────────────────────────────────────────────────


def test_no_file_where_one_is_expected(tmp_path: Path) -> None:
    for arguments in ({"create": False}, {"readonly": True}):
        with pytest.raises(StoreError, match=r"no results in .*results\.sqlite\. Is it a run folder\?"):
            Store(tmp_path / "nowhere", **arguments)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StoreError, match=r"cannot make the run folder .*: choose another one with --output"):
        Store(tmp_path / "run")


def test_a_newer_format(tmp_path: Path) -> None:
    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILENAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"was written by a newer impasto \(format 99; this one reads up to 3\)"):
        Store(tmp_path)


def of_format_1(folder: Path) -> None:
    """A run folder as the first format had it, with one answer."""
    with Store(folder) as store:
        store.put_batch(SETTING, RECIPES[:1], REQUESTS[:1], loglikelihood=-3.0)
    connection = sqlite3.connect(folder / FILENAME)
    connection.execute("ALTER TABLE responses DROP COLUMN rank")
    connection.execute("ALTER TABLE settings DROP COLUMN masking")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("readonly", [True, False])
def test_an_older_format_is_read(tmp_path: Path, readonly: bool) -> None:
    of_format_1(tmp_path)
    before = (tmp_path / FILENAME).read_bytes()
    with Store(tmp_path, readonly=readonly) as store:
        (answer,) = store.responses(SETTING, RECIPES[0], REQUESTS[:1]).values()
        assert store.settings() == [SETTING]
    assert answer == Response(-3.0)
    assert ((tmp_path / FILENAME).read_bytes() == before) == readonly


def test_answers_of_masked_tokens_are_kept_apart_and_other_settings_keep_their_names(tmp_path: Path) -> None:
    ways = [SETTING, *(replace(SETTING, masking=name) for name in MASKINGS)]
    assert len({way.fingerprint for way in ways}) == 4
    assert SETTING.fingerprint == digest("setting", "w0", "float32", "cpu", "exact", "sdpa")
    with Store(tmp_path) as store:
        for value, way in enumerate(ways):
            store.put_batch(way, RECIPES[:1], REQUESTS[:1], loglikelihood=-float(value))
        assert store.settings() == ways
        for value, way in enumerate(ways):
            (answer,) = store.responses(way, RECIPES[0], REQUESTS[:1]).values()
            assert answer.loglikelihood == -value


def test_an_older_format_is_written_to(tmp_path: Path) -> None:
    of_format_1(tmp_path)
    with Store(tmp_path) as store:
        store.put_batch(SETTING, RECIPES[:1], REQUESTS[1:3], loglikelihood=-1.0, rank=[-1, 4])
    with Store(tmp_path, readonly=True) as store:
        found = store.responses(SETTING, RECIPES[0], REQUESTS[:3])
    assert [found[request.fingerprint].rank for request in REQUESTS[:3]] == [None, None, 4]


def test_another_programs_file(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILENAME)
    connection.execute("CREATE TABLE something (x)")
    connection.close()
    before = (tmp_path / FILENAME).read_bytes()
    with pytest.raises(StoreError, match="is an SQLite file, but not one of impasto's"):
        Store(tmp_path)
    assert (tmp_path / FILENAME).read_bytes() == before


def test_an_empty_file_is_a_new_one_except_for_a_reader(tmp_path: Path) -> None:
    (tmp_path / FILENAME).touch()
    with pytest.raises(StoreError, match="is empty: no run has written to it yet"):
        Store(tmp_path, readonly=True)
    with Store(tmp_path) as store:
        assert store.runs() == []


def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / FILENAME).write_text("hello, this is a text and no database\n" * 200)
    with pytest.raises(StoreError, match="is damaged or not a result file"):
        Store(tmp_path)


def test_a_damaged_database(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put_batch(SETTING, RECIPES, [Request("rolling", "", str(i)) for i in range(2000)], loglikelihood=-1)
    path = tmp_path / FILENAME
    pages = bytearray(path.read_bytes())
    pages[8192:] = b"\xa5" * (len(pages) - 8192)
    path.write_bytes(pages)
    with pytest.raises(StoreError, match="is damaged or not a result file"), Store(tmp_path) as store:
        store.known(SETTING, RECIPES, [Request("rolling", "", str(i)) for i in range(2000)])


def test_a_copy_holds_whole_transactions_of_a_store_that_is_in_use(tmp_path: Path) -> None:
    for name in ("one", "two", "none", "new"):
        (tmp_path / name).mkdir()
    with Store(tmp_path / "one") as store:
        store.put_batch(SETTING, RECIPES, REQUESTS, loglikelihood=-1.0)  # still in the write-ahead log
        with store._db.writing() as db:
            db.execute("DELETE FROM responses")
            duplicate(tmp_path / "one", tmp_path / "two")
            db.execute("ROLLBACK")
            db.execute("BEGIN")
        with Store(tmp_path / "two") as copy:
            assert copy.known(SETTING, RECIPES, REQUESTS).all()
            copy.put_batch(SETTING, RECIPES[:1], [Request("rolling", "", "more")], loglikelihood=-2.0)
        assert store.known(SETTING, RECIPES[:1], [Request("rolling", "", "more")]).sum() == 0
    duplicate(tmp_path / "none", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "none" / FILENAME).touch()  # another process is about to make it
    duplicate(tmp_path / "none", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "none" / FILENAME).write_text("no database" * 100)
    with pytest.raises(StoreError, match="^cannot copy .*none.results.sqlite to .*new.results.sqlite: file is not a"):
        duplicate(tmp_path / "none", tmp_path / "new")


def test_a_reader_does_not_write(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put_batch(SETTING, RECIPES, REQUESTS, loglikelihood=-1.0)
    with Store(tmp_path, readonly=True) as store:
        assert store.known(SETTING, RECIPES, REQUESTS).all()
        with pytest.raises(StoreError, match="make the file and its folder writable"):
            store.put_batch(SETTING, RECIPES, REQUESTS, loglikelihood=-2.0)


READ_ONLY_FOLDER = """
import os, sys
from impasto.errors import StoreError
from impasto.store import Store

folder = sys.argv[1]
if os.geteuid() == 0:
    os.setuid(65534)  # permissions do not bind the superuser
with Store(folder, readonly=True) as store:
    print(len(store.recipes()))
for place in (folder, folder + "/new"):
    try:
        Store(place)
    except StoreError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
def test_a_read_only_folder_can_be_read_and_says_why_it_cannot_be_written(public_folder: Path) -> None:
    folder = public_folder / "run"
    with Store(folder) as store:
        store.put_recipes(RECIPES)
    folder.chmod(0o555)
    (folder / FILENAME).chmod(0o444)
    try:
        count, old, new = finish(spawn(READ_ONLY_FOLDER, folder)).splitlines()
    finally:
        folder.chmod(0o755)
    assert count == "4"
    assert old.startswith(("cannot write", "cannot open")) and "--output" in old
    assert new.startswith("cannot make the run folder") and "--output" in new


FULL_DISK = """
import resource, sys
import numpy as np
from impasto.errors import StoreError
from impasto.recipe import Recipe
from impasto.result import Request, Setting
from impasto.store import Store

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # no file may grow beyond this
setting = Setting("some/model", "w0", "float32", "cpu")
recipe = Recipe.of("some/model", "0:6", layers=6)
kept = 0
with Store(sys.argv[1]) as store:
    try:
        for start in range(0, 100_000, 500):
            batch = [Request("rolling", "", str(i)) for i in range(start, start + 500)]
            store.put_batch(setting, [recipe], batch, loglikelihood=-1.0)
            kept += 500
    except StoreError as error:
        print(error)
print(kept)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_keeps_what_was_committed(tmp_path: Path) -> None:
    message, kept = finish(spawn(FULL_DISK, tmp_path)).splitlines()
    assert message.startswith(f"cannot write {tmp_path / FILENAME} (")
    assert message.endswith("run the same command again; what was measured before is kept")
    requests = [Request("rolling", "", str(i)) for i in range(int(kept) + 500)]
    with Store(tmp_path) as store:
        known = store.known(SETTING, RECIPES[:1], requests)[0]
        assert int(kept) >= 500 and known[: int(kept)].all() and not known[int(kept) :].any()
        store.put_batch(SETTING, RECIPES[:1], requests, loglikelihood=-1.0)  # space again: it goes on
        assert store.known(SETTING, RECIPES[:1], requests).all()
    contents(tmp_path)


def test_a_failed_call_leaves_nothing_and_the_store_goes_on(store: Store) -> None:
    def rows() -> Iterator[tuple[Recipe, Request, Response]]:
        yield RECIPES[0], REQUESTS[0], Response(-1.0)
        yield RECIPES[1], REQUESTS[1], Response(-1.0, text=object())  # type: ignore[arg-type]

    with pytest.raises(StoreError):
        store.put_responses(SETTING, rows())
    assert store.settings() == [] and store.recipes() == {}
    assert store.put_batch(SETTING, RECIPES, REQUESTS, loglikelihood=-1.0) == 28


# ── several processes, and their deaths ──────────────────────────────────────────────────────────────────────


def test_kill_at_any_moment_and_rerun_is_the_uninterrupted_run(tmp_path: Path) -> None:
    finish(spawn(WORKER, tmp_path / "whole", 0, 1))
    whole = contents(tmp_path / "whole")
    assert len(whole["responses"]) == 24 * 200 and len(whole["results"]) == 24
    rng = np.random.default_rng()
    for attempt in range(5):  # the first four die, each somewhere else; the last one finishes what is left
        process = spawn(WORKER, tmp_path / "killed", 0.002, 1)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if attempt < 4:
            for _ in range(2 * attempt):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.015))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            finish(process)
    assert contents(tmp_path / "killed") == whole


def test_processes_writing_at_once_store_everything_once(tmp_path: Path) -> None:
    finish(spawn(WORKER, tmp_path / "alone", 0, 1))
    processes = [spawn(WORKER, tmp_path / "shared", 0.001, order) for order in (1, -1, 1)]
    for process in processes:
        assert finish(process).endswith("done\n")
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_reader_sees_whole_batches_while_another_process_writes(tmp_path: Path) -> None:
    Store(tmp_path).close()
    recipes = [Recipe.of("some/model", f"0:{n}", layers=30) for n in range(1, 25)]
    requests = [Request("loglikelihood", f"q{i}", f" a{i}") for i in range(200)]
    process = spawn(WORKER, tmp_path, 0.005, 1)
    with Store(tmp_path, readonly=True) as store:
        while process.poll() is None:
            counts = store.known(SETTING, recipes[:1], requests).reshape(10, 20).sum(axis=1)
            assert set(counts.tolist()) <= {0, 20}
    assert finish(process).endswith("done\n")


def test_the_store_leaves_the_heavy_packages_alone() -> None:
    program = "import sys, impasto.store; print({'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules))"
    assert finish(spawn(program)).strip() == "set()"
