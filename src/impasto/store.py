"""One SQLite file per run folder: what was asked, what was answered, what came of it and how it was made.

Everything is keyed by fingerprints, so a run that was killed finds what it already has and goes on:

    with Store("runs/painters") as store:
        known = store.known(setting, recipes, requests)        # [recipes, requests], True where answered
        ...
        store.put_batch(setting, recipes, batch, loglikelihood=ll, is_greedy=greedy)

Rules that hold for every method:

- One call is one transaction. A process that dies at any moment leaves every finished call and no part of
  the interrupted one.
- Responses are written once: a second answer to the same question is ignored, so nothing is doubled and a
  number never changes under a reader. Results, measurements and tasks are derived, so there the last stays.
- Several processes of one machine may write at once; each waits for the others. (The write-ahead log needs
  shared memory, so writers on different machines need different folders.)
- What SQLite reports (full disk, read-only folder, damaged file) becomes a `StoreError` that says what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from impasto.database import Database, copied
from impasto.errors import StoreError
from impasto.exports import Measured, Table, write_csv, write_lm_eval, write_parquet
from impasto.recipe import Recipe
from impasto.records import Measurement, Run, StoredRecipe, from_json, to_json
from impasto.result import Request, Response, Result, Setting

FILENAME = "results.sqlite"


class Store:
    """The results of one run folder, in the file `results.sqlite`.

    Args:
        folder: the run folder.
        create: make the folder and the file if they are missing.
        readonly: never write; works in a folder without write permission too, as a report needs.

    Raises:
        StoreError: if there is no such file, it cannot be opened, it is not ours, or it is too new.
    """

    def __init__(self, folder: str | Path, *, create: bool = True, readonly: bool = False) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILENAME
        if readonly or not create:
            if not self.path.is_file():
                raise StoreError(f"no results in {self.folder}: there is no file {FILENAME}. Is it a run folder?")
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"cannot make the run folder {self.folder} ({error.strerror}): choose another one with --output"
                ) from error
        self._db = Database(self.path, readonly=readonly)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A closed store answers nothing any more."""
        self._db.close()

    # ── settings, recipes, tasks, runs ───────────────────────────────────────────────────────────────────

    def put_recipes(self, recipes: Iterable[Recipe], labels: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Make recipes known, and what a study calls them (by fingerprint); a new label replaces an older."""
        labels = labels or {}
        with self._db.writing() as db:
            known = list(recipes)
            _add_recipes(db, known)
            db.executemany(
                "UPDATE recipes SET label = ? WHERE fingerprint = ?",
                [(to_json(labels[r.fingerprint]), r.fingerprint) for r in known if r.fingerprint in labels],
            )

    def recipes(self) -> dict[str, StoredRecipe]:
        """All recipes ever stored in this folder, by fingerprint, in the order of their arrival."""
        rows = self._rows("SELECT fingerprint, schedule, edits, label FROM recipes ORDER BY id")
        return {
            fingerprint: StoredRecipe(fingerprint, schedule, tuple(json.loads(edits)), from_json(label))
            for fingerprint, schedule, edits, label in rows
        }

    def settings(self) -> list[Setting]:
        """All settings that anything in this folder was measured under, oldest first."""
        rows = self._rows("SELECT model, weights, dtype, device, kv, attention, masking FROM settings ORDER BY id")
        return [Setting(*row) for row in rows]

    def put_task(self, name: str, protocol: str, info: Mapping[str, Any]) -> None:
        """Keep what a task asks under a protocol (version, shots, documents...); the last one stays."""
        with self._db.writing() as db:
            db.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (name, protocol, to_json(info)))

    def tasks(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Descriptions of the tasks, by name and protocol."""
        rows = self._rows("SELECT name, protocol, info FROM tasks ORDER BY name, protocol")
        return {(name, protocol): from_json(info) for name, protocol, info in rows}

    def start_run(
        self,
        command: Sequence[str],
        *,
        versions: Mapping[str, str],
        seed: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> int:
        """Note that a run begins: command line, package versions, seed, host facts. Returns its number."""
        with self._db.writing() as db:
            cursor = db.execute(
                "INSERT INTO runs (command, versions, facts, seed, started) VALUES (?, ?, ?, ?, ?)",
                (to_json(list(command)), to_json(versions), to_json(facts or {}), seed, _now()),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def finish_run(self, run: int, *, seconds: float, outcome: str = "finished") -> None:
        """Note that a run ended, how ("finished", "interrupted", "failed") and after how many seconds."""
        with self._db.writing() as db:
            db.execute(
                "UPDATE runs SET finished = ?, seconds = ?, outcome = ? WHERE id = ?",
                (_now(), seconds, outcome, run),
            )

    def runs(self) -> list[Run]:
        """All starts of the program on this folder, oldest first."""
        rows = self._rows(
            "SELECT id, command, versions, facts, seed, started, finished, seconds, outcome FROM runs ORDER BY id"
        )
        return [
            Run(number, tuple(json.loads(command)), from_json(versions), from_json(facts), *rest)
            for number, command, versions, facts, *rest in rows
        ]

    # ── responses ────────────────────────────────────────────────────────────────────────────────────────

    def put_responses(self, setting: Setting, rows: Iterable[tuple[Recipe, Request, Response]]) -> int:
        """Keep answers, in one transaction; answers that are already there stay as they are.

        Returns:
            How many answers were new.
        """
        answers = list(rows)
        with self._db.writing() as db:
            key = _add_setting(db, setting)
            recipes = _add_recipes(db, {recipe.fingerprint: recipe for recipe, _, _ in answers}.values())
            requests = _add_requests(db, {request.fingerprint for _, request, _ in answers})
            before = db.total_changes
            db.executemany(
                _INSERT_RESPONSE,
                [
                    (
                        key,
                        recipes[recipe.fingerprint],
                        requests[request.fingerprint],
                        answer.loglikelihood,
                        answer.is_greedy,
                        answer.tokens,
                        answer.truncated,
                        answer.text,
                        answer.rank,
                    )
                    for recipe, request, answer in answers
                ],
            )
            return db.total_changes - before

    def put_batch(
        self,
        setting: Setting,
        recipes: Sequence[Recipe],
        requests: Sequence[Request],
        *,
        loglikelihood: ArrayLike = math.nan,
        is_greedy: ArrayLike = False,
        tokens: ArrayLike = 0,
        truncated: ArrayLike = False,
        rank: ArrayLike = -1,
        text: Sequence[Sequence[str | None]] | None = None,
        answered: ArrayLike = True,
    ) -> int:
        """Keep the answers of many recipes to one batch of requests, in one transaction.

        Every array has the shape [recipes, requests] or one that broadcasts to it: `tokens=lengths` with the
        shape [requests] says that the lengths do not depend on the recipe.

        Args:
            setting: how the model was run.
            recipes: one per row.
            requests: one per column.
            loglikelihood: in nats; may be non-finite.
            is_greedy: whether the continuation is what greedy decoding gives.
            tokens: scored or generated tokens.
            truncated: whether the request was longer than the model's window.
            rank: how many tokens are likelier than the continuation's first; -1 where that is not known.
            text: generated texts, row by row.
            answered: False where there is no answer to keep.

        Returns:
            How many answers were new.
        """
        shape = (len(recipes), len(requests))
        columns: list[NDArray[Any]] = [
            np.broadcast_to(np.asarray(values, dtype), shape)
            for values, dtype in (
                (loglikelihood, np.float64),
                (is_greedy, np.int64),
                (tokens, np.int64),
                (truncated, np.int64),
                (rank, np.int64),
                (answered, np.bool_),
            )
        ]
        with self._db.writing() as db:
            key = _add_setting(db, setting)
            recipe_ids = _add_recipes(db, recipes)
            known = _add_requests(db, [request.fingerprint for request in requests])
            request_ids = np.array([known[request.fingerprint] for request in requests], np.int64)
            before = db.total_changes
            for row, recipe in enumerate(recipes):
                kept = columns[-1][row]
                *fields, ranks = [column[row][kept].tolist() for column in columns[:-1]]
                texts: Iterable[str | None] = repeat(None)
                if text is not None:
                    texts = (text[row][column] for column in np.flatnonzero(kept).tolist())
                db.executemany(
                    _INSERT_RESPONSE,
                    zip(
                        repeat(key),
                        repeat(recipe_ids[recipe.fingerprint]),
                        request_ids[kept].tolist(),
                        *fields,
                        texts,
                        (None if number < 0 else number for number in ranks),
                        strict=False,
                    ),
                )
            return db.total_changes - before

    def known(self, setting: Setting, recipes: Sequence[Recipe], requests: Sequence[Request]) -> NDArray[np.bool_]:
        """Which questions have an answer: booleans of shape [recipes, requests]."""
        answered = np.zeros((len(recipes), len(requests)), np.bool_)
        with self._db.reading() as db:
            key, request_ids, first, last = _span(db, setting, requests)
            if key is None or last < first:
                return answered
            columns = np.array([request_ids.get(r.fingerprint, last + 1) for r in requests], np.int64) - first
            recipe_ids = _ids(db, "recipes", [recipe.fingerprint for recipe in recipes])
            present = np.zeros(last - first + 2, np.bool_)  # one more, never set, for unknown requests
            for row, recipe in enumerate(recipes):
                if recipe.fingerprint in recipe_ids:
                    (ids,) = db.execute(
                        "SELECT group_concat(request) FROM responses"
                        " WHERE setting = ? AND recipe = ? AND request BETWEEN ? AND ?",
                        (key, recipe_ids[recipe.fingerprint], first, last),
                    ).fetchone()
                    if ids is not None:
                        present[:] = False
                        present[np.fromstring(ids, np.int64, sep=",") - first] = True
                        answered[row] = present[columns]
        return answered

    def missing(
        self, setting: Setting, recipes: Sequence[Recipe], requests: Sequence[Request]
    ) -> list[tuple[Recipe, ...]]:
        """For each request the recipes that have not answered it yet, in their order.

        Requests with the same gap share one tuple, so that an engine can group them by it cheaply.
        """
        gaps = ~self.known(setting, recipes, requests).T  # [requests, recipes]
        shared: dict[bytes, tuple[Recipe, ...]] = {}
        result = []
        for gap, packed in zip(gaps, np.packbits(gaps, axis=1), strict=True):
            name = packed.tobytes()
            if name not in shared:
                shared[name] = tuple(recipes[row] for row in np.flatnonzero(gap).tolist())
            result.append(shared[name])
        return result

    def responses(self, setting: Setting, recipe: Recipe, requests: Sequence[Request]) -> dict[str, Response]:
        """The answers of one recipe, by the request's fingerprint; what has no answer is left out."""
        with self._db.reading() as db:
            key, request_ids, first, last = _span(db, setting, requests)
            names = {number: name for name, number in request_ids.items()}
            rows = db.execute(
                "SELECT request, loglikelihood, is_greedy, text, tokens, truncated, rank FROM responses"
                " WHERE setting = ? AND recipe = (SELECT id FROM recipes WHERE fingerprint = ?)"
                " AND request BETWEEN ? AND ?",
                (key, recipe.fingerprint, first, last),
            )
            return {
                names[request]: Response(
                    math.nan if loglikelihood is None else loglikelihood,
                    bool(greedy),
                    text,
                    tokens,
                    bool(truncated),
                    rank,
                )
                for request, loglikelihood, greedy, text, tokens, truncated, rank in rows
                if request in names
            }

    # ── results ──────────────────────────────────────────────────────────────────────────────────────────

    def put_result(self, setting: Setting, result: Result) -> None:
        """Keep what a recipe scored on a task, with its per-example scores; an older one is replaced.

        Raises:
            StoreError: if the recipe is unknown here (`put_recipes` and every stored answer make it known).
        """
        with self._db.writing() as db:
            recipe = _ids(db, "recipes", [result.recipe]).get(result.recipe)
            if recipe is None:
                raise StoreError(
                    f"recipe {result.recipe} is not known in {self.folder}: store the recipe before its result"
                )
            where = (_add_setting(db, setting), recipe, result.task, result.protocol)
            db.execute("DELETE FROM results WHERE setting = ? AND recipe = ? AND task = ? AND protocol = ?", where)
            cursor = db.execute(
                "INSERT INTO results"
                " (setting, recipe, task, protocol, n, nonfinite, truncated, metrics, info)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *where,
                    result.n,
                    result.nonfinite,
                    result.truncated,
                    to_json(result.metrics),
                    to_json(result.info),
                ),
            )
            db.executemany(
                "INSERT INTO scores VALUES (?, ?, ?)",
                [
                    (cursor.lastrowid, metric, np.array(values, "<f8").tobytes())
                    for metric, values in result.scores.items()
                ],
            )

    def results(
        self,
        setting: Setting,
        *,
        recipes: Collection[str] | None = None,
        tasks: Collection[str] | None = None,
        protocol: str | None = None,
    ) -> list[Result]:
        """Results of one setting, oldest recipe first, then by task; None asks for all.

        Args:
            setting: numbers of different settings are not comparable, so exactly one is asked for.
            recipes: fingerprints.
            tasks: names.
            protocol: fingerprint of what was asked.
        """
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT results.id, recipes.fingerprint, task, protocol, n, metrics, nonfinite,"
                " results.truncated, info"
                " FROM results JOIN recipes ON recipes.id = recipe"
                " WHERE setting = (SELECT id FROM settings WHERE fingerprint = ?)"
                " AND (? IS NULL OR recipes.fingerprint IN (SELECT value FROM json_each(?)))"
                " AND (? IS NULL OR task IN (SELECT value FROM json_each(?)))"
                " AND (? IS NULL OR protocol = ?) ORDER BY recipe, task, protocol",
                (setting.fingerprint, *2 * (_listed(recipes),), *2 * (_listed(tasks),), protocol, protocol),
            ).fetchall()
            return [
                Result(
                    recipe=recipe,
                    task=task,
                    protocol=asked,
                    n=n,
                    metrics=from_json(metrics),
                    scores=_scores(db, number),
                    nonfinite=nonfinite,
                    truncated=truncated,
                    info=from_json(info),
                )
                for number, recipe, task, asked, n, metrics, nonfinite, truncated, info in rows
            ]

    # ── measurements ─────────────────────────────────────────────────────────────────────────────────────

    def put_measurement(self, setting: Setting, recipe: Recipe, kind: str, key: str, value: Any) -> None:
        """Keep a measured JSON value (see `to_json`) under (kind, key); an older one is replaced."""
        with self._db.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?)",
                (
                    _add_setting(db, setting),
                    _add_recipes(db, [recipe])[recipe.fingerprint],
                    kind,
                    key,
                    to_json(value),
                ),
            )

    def measurement(self, setting: Setting, recipe: Recipe, kind: str, key: str, default: Any = None) -> Any:
        """One measured value, or `default` if it has not been measured."""
        rows = self._rows(
            "SELECT value FROM measurements"
            " WHERE setting = (SELECT id FROM settings WHERE fingerprint = ?)"
            " AND recipe = (SELECT id FROM recipes WHERE fingerprint = ?) AND kind = ? AND key = ?",
            (setting.fingerprint, recipe.fingerprint, kind, key),
        )
        return from_json(rows[0][0]) if rows else default

    def measurements(
        self, setting: Setting, kind: str | None = None, *, recipe: str | None = None
    ) -> list[Measurement]:
        """All measured values of a setting, of one kind and one recipe (fingerprint) if asked."""
        rows = self._rows(
            "SELECT recipes.fingerprint, kind, key, value FROM measurements"
            " JOIN recipes ON recipes.id = recipe"
            " WHERE setting = (SELECT id FROM settings WHERE fingerprint = ?)"
            " AND (? IS NULL OR kind = ?) AND (? IS NULL OR recipes.fingerprint = ?)"
            " ORDER BY recipe, kind, key",
            (setting.fingerprint, kind, kind, recipe, recipe),
        )
        return [Measurement(name, kind, key, from_json(value)) for name, kind, key, value in rows]

    # ── exports ──────────────────────────────────────────────────────────────────────────────────────────

    # ── exports ──────────────────────────────────────────────────────────────────────────────────────────

    def export_csv(self, path: str | Path, table: Table = "results") -> Path:
        """Write all results as CSV: one row per result and metric, or per example (`table="scores"`)."""
        write_csv(Path(path), self._measured(), table)
        return Path(path)

    def export_parquet(self, path: str | Path, table: Table = "results") -> Path:
        """Write the table of `export_csv` as Parquet."""
        write_parquet(Path(path), self._measured(), table)
        return Path(path)

    def export_lm_eval(self, folder: str | Path, setting: Setting, recipe: str) -> Path:
        """Write the results of one recipe (fingerprint) in lm-evaluation-harness's own JSON.

        Raises:
            StoreError: if the recipe has no results under this setting.
        """
        results = self.results(setting, recipes=[recipe])
        if not results:
            raise StoreError(f"recipe {recipe} has no results for {setting.model} in {self.folder}")
        last = max(self.runs(), key=lambda run: run.id, default=None)
        return write_lm_eval(Path(folder), setting, self.recipes()[recipe], results, last)

    def _measured(self) -> Iterator[Measured]:
        recipes = self.recipes()
        for setting in self.settings():
            for result in self.results(setting):
                yield setting, recipes[result.recipe], result

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._db.reading() as db:
            return db.execute(query, values).fetchall()


_INSERT_RESPONSE = (
    "INSERT OR IGNORE INTO responses"
    " (setting, recipe, request, loglikelihood, is_greedy, tokens, truncated, text, rank)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def duplicate(folder: str | Path, target: str | Path) -> None:
    """Copy what a run folder holds now to another folder, which is there and empty; nothing where it holds nothing.

    Raises:
        StoreError: it cannot be read, or the copy not be written.
    """
    if (source := Path(folder) / FILENAME).exists():
        copied(source, Path(target) / FILENAME)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _listed(names: Collection[str] | None) -> str | None:
    return None if names is None else json.dumps(list(names))


def _scores(db: sqlite3.Connection, result: int) -> dict[str, tuple[float | None, ...]]:
    rows = db.execute("SELECT metric, examples FROM scores WHERE result = ?", (result,))
    return {
        metric: tuple(None if math.isnan(x) else x for x in np.frombuffer(examples, "<f8").tolist())
        for metric, examples in rows
    }


def _add_setting(db: sqlite3.Connection, setting: Setting) -> int:
    values = (setting.fingerprint, *dataclasses.astuple(setting))
    db.execute(
        "INSERT OR IGNORE INTO settings (fingerprint, model, weights, dtype, device, kv, attention, masking)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    )
    return _ids(db, "settings", [setting.fingerprint])[setting.fingerprint]


def _add_recipes(db: sqlite3.Connection, recipes: Iterable[Recipe]) -> dict[str, int]:
    rows = [
        (recipe.fingerprint, str(recipe.schedule), to_json([str(edit) for edit in recipe.edits])) for recipe in recipes
    ]
    names = [fingerprint for fingerprint, _, _ in rows]
    ids = _ids(db, "recipes", names)
    if len(ids) < len(set(names)):
        db.executemany("INSERT OR IGNORE INTO recipes (fingerprint, schedule, edits) VALUES (?, ?, ?)", rows)
        ids = _ids(db, "recipes", names)
    return ids


def _add_requests(db: sqlite3.Connection, fingerprints: Iterable[str]) -> dict[str, int]:
    names = list(dict.fromkeys(fingerprints))
    ids = _ids(db, "requests", names)
    if len(ids) < len(names):
        db.executemany(
            "INSERT OR IGNORE INTO requests (fingerprint) VALUES (?)",
            [(name,) for name in names if name not in ids],
        )
        ids = _ids(db, "requests", names)
    return ids


def _ids(db: sqlite3.Connection, table: str, fingerprints: Iterable[str]) -> dict[str, int]:
    return dict(
        db.execute(
            f"SELECT fingerprint, id FROM {table} WHERE fingerprint IN (SELECT value FROM json_each(?))",
            (json.dumps(list(fingerprints)),),
        ).fetchall()
    )


def _span(
    db: sqlite3.Connection, setting: Setting, requests: Sequence[Request]
) -> tuple[int | None, dict[str, int], int, int]:
    """Key of the setting, keys of the known requests, and their smallest and largest (0, -1 if none)."""
    key = _ids(db, "settings", [setting.fingerprint]).get(setting.fingerprint)
    ids = _ids(db, "requests", (request.fingerprint for request in requests))
    return key, ids, min(ids.values(), default=0), max(ids.values(), default=-1)
