"""One SQLite file that several processes may use, survives their deaths, and says plainly what is wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from impasto.errors import StoreError

APPLICATION_ID = 0x696D7061  # "impa", in the file's header: tells our files from other SQLite files
SCHEMA_VERSION = 3
BUSY_SECONDS = 60.0  # how long a writer waits for another one; a transaction takes well under a second

SCHEMA = (
    """CREATE TABLE settings (
        id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, model TEXT NOT NULL, weights TEXT NOT NULL,
        dtype TEXT NOT NULL, device TEXT NOT NULL, kv TEXT NOT NULL, attention TEXT NOT NULL,
        masking TEXT NOT NULL DEFAULT '') STRICT""",
    """CREATE TABLE recipes (
        id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, schedule TEXT NOT NULL,
        edits TEXT NOT NULL, label TEXT NOT NULL DEFAULT '{}') STRICT""",
    "CREATE TABLE requests (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE) STRICT",
    # A log-likelihood that is not a number is NULL: SQLite has no NaN. Infinities are stored as they are.
    """CREATE TABLE responses (
        setting INTEGER NOT NULL REFERENCES settings, recipe INTEGER NOT NULL REFERENCES recipes,
        request INTEGER NOT NULL REFERENCES requests, loglikelihood REAL, is_greedy INTEGER NOT NULL,
        tokens INTEGER NOT NULL, truncated INTEGER NOT NULL, text TEXT, rank INTEGER,
        PRIMARY KEY (setting, recipe, request)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE results (
        id INTEGER PRIMARY KEY, setting INTEGER NOT NULL REFERENCES settings,
        recipe INTEGER NOT NULL REFERENCES recipes, task TEXT NOT NULL, protocol TEXT NOT NULL,
        n INTEGER NOT NULL, nonfinite INTEGER NOT NULL, truncated INTEGER NOT NULL,
        metrics TEXT NOT NULL, info TEXT NOT NULL, UNIQUE (setting, recipe, task, protocol)) STRICT""",
    # One little-endian float64 per example, in document order; NaN stands for "no finite value".
    """CREATE TABLE scores (
        result INTEGER NOT NULL REFERENCES results ON DELETE CASCADE, metric TEXT NOT NULL,
        examples BLOB NOT NULL, PRIMARY KEY (result, metric)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE measurements (
        setting INTEGER NOT NULL REFERENCES settings, recipe INTEGER NOT NULL REFERENCES recipes,
        kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (setting, recipe, kind, key)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY, command TEXT NOT NULL, versions TEXT NOT NULL, facts TEXT NOT NULL,
        seed INTEGER, started TEXT NOT NULL, finished TEXT, seconds REAL, outcome TEXT) STRICT""",
    """CREATE TABLE tasks (
        name TEXT NOT NULL, protocol TEXT NOT NULL, info TEXT NOT NULL,
        PRIMARY KEY (name, protocol)) STRICT, WITHOUT ROWID""",
)

# What makes the next format of an older one, and what makes an older one that may not be changed read like the next.
CHANGES = {
    1: ("ALTER TABLE responses ADD COLUMN rank INTEGER",),
    2: ("ALTER TABLE settings ADD COLUMN masking TEXT NOT NULL DEFAULT ''",),
}
VIEWS = {
    1: ("CREATE TEMP VIEW responses AS SELECT *, NULL AS rank FROM main.responses",),
    2: ("CREATE TEMP VIEW settings AS SELECT *, '' AS masking FROM main.settings",),
}


class Database:
    """A connection to one file of results, with its tables made on first use.

    Args:
        path: the file.
        readonly: never write; works in a folder without write permission too.

    Raises:
        StoreError: if it cannot be opened, is not one of ours, is damaged, or is too new.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        with self._advising():
            self._connection = self._open()
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file; who has written folds the write-ahead log into it, as far as no reader needs it.

        Without that a reader who closes last would leave all there is in the log, and a copy of the file alone empty.
        """
        if not self.readonly:
            with contextlib.suppress(sqlite3.Error):  # it is as whole with its log
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for queries."""
        with self._advising():
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection inside one transaction: all of it happens, or nothing."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have rolled it back already
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Errors of SQLite become a `StoreError` that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(self._advice(error)) from error

    def _open(self) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri()
        if not self.readonly:
            return _connect(f"{uri}?mode=rwc")
        connection = _connect(f"{uri}?mode=ro")
        try:
            connection.execute("PRAGMA schema_version").fetchone()
            return connection
        except sqlite3.OperationalError:
            # A write-ahead file needs a shared-memory file beside it, which a folder without write permission
            # refuses. Where no log is left behind, nobody writes, and the file may be read as it stands.
            connection.close()
            log = self.path.with_name(self.path.name + "-wal")
            if log.exists() and log.stat().st_size:
                raise
            return _connect(f"{uri}?mode=ro&immutable=1")

    def _prepare(self) -> None:
        self._check_header()
        self._connection.execute("PRAGMA cache_size = -65536")  # 64 MiB
        if self.readonly:
            for older in range(self._number("user_version"), SCHEMA_VERSION):
                for statement in VIEWS[older]:
                    self._connection.execute(statement)
            return
        self._use_log()
        # With a write-ahead log, NORMAL survives every death of the process; only a power cut can take
        # the last transactions with it, and then a rerun computes them again.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if self._number("user_version") < SCHEMA_VERSION:
            with self.writing() as connection:
                version = self._number("user_version")  # somebody may have been faster
                if version == 0:
                    for statement in SCHEMA:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
                    for statement in CHANGES[older]:
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_header(self) -> None:
        application, version = self._number("application_id"), self._number("user_version")
        empty = self._number("schema_version") == 0
        if empty and self.readonly:
            raise StoreError(f"{self.path} is empty: no run has written to it yet")
        if not empty and application != APPLICATION_ID:
            raise StoreError(f"{self.path} is an SQLite file, but not one of impasto's: choose another run folder")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer impasto (format {version}; this one reads up to "
                f"{SCHEMA_VERSION}): upgrade with `pip install -U impasto`, or choose another run folder"
            )

    def _use_log(self) -> None:
        # Switching to the write-ahead log needs the file for a moment, and SQLite does not wait by itself.
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _advice(self, error: sqlite3.Error) -> str:
        kept = "what was measured before is kept"
        match _code(error):
            case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
                return (
                    f"cannot write {self.path} ({error}): free some space, or move the folder to a larger "
                    f"disk, and run the same command again; {kept}"
                )
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                return (
                    f"cannot write {self.path} ({error}): make the file and its folder writable, or choose "
                    f"another folder with --output; {kept}"
                )
            case sqlite3.SQLITE_CANTOPEN:
                return (
                    f"cannot open {self.path} ({error}): check that the folder exists and may be read and "
                    "written, or choose another one with --output"
                )
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return (
                    f"another process has locked {self.path} for {BUSY_SECONDS:.0f} seconds: wait for it or "
                    f"end it, then run the same command again; {kept}"
                )
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                return (
                    f"{self.path} is damaged or not a result file ({error}): move it away and run again, or "
                    f"rescue what is readable with `sqlite3 {self.path.name} .recover`"
                )
            case _:
                return f"cannot use {self.path}: {error}"


def copied(source: Path, target: Path) -> None:
    """Copy a file of results as it stands, which others may use meanwhile; of an empty one nothing.

    Raises:
        StoreError: it cannot be read, or the copy not be written.
    """
    try:
        with contextlib.closing(_connect(f"{source.absolute().as_uri()}?mode=ro")) as old:
            if old.execute("PRAGMA schema_version").fetchone()[0]:
                with contextlib.closing(_connect(f"{target.absolute().as_uri()}?mode=rwc")) as new:
                    old.backup(new)
    except sqlite3.Error as error:
        raise StoreError(f"cannot copy {source} to {target}: {error}") from error


def _connect(uri: str) -> sqlite3.Connection:
    # No isolation level: transactions begin and end where this module says so, not where Python guesses.
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def _code(error: sqlite3.Error) -> int:
    """The primary result code of SQLite; its extended codes carry details in the higher bytes."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
