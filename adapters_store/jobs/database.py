"""The tables of jobs and data files, and the file of them that one server has: `training.sqlite` in the store's folder.

Owns the tables, the connection and the turning of SQLite's errors into the store's; replicas have `shared_rows.py`
instead. Invariant: every change is one transaction that is durable before the call returns.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from adapters_store.durable_sqlite import connect, transaction
from adapters_store.errors import StorageFailed, StoreFull, storage_errors

TRAINING_FILE = "training.sqlite"
# another process holds the write lock for one small transaction at most
_BUSY_TIMEOUT_S = 30.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, base TEXT NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL, finished REAL, model_name TEXT NOT NULL, fine_tuned_model TEXT,
    facts TEXT NOT NULL, token INTEGER NOT NULL DEFAULT 0, worker TEXT, lease_until REAL,
    num_lost INTEGER NOT NULL DEFAULT 0, best_step INTEGER NOT NULL DEFAULT 0,
    progress TEXT, trained TEXT, result_files TEXT, error TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE INDEX IF NOT EXISTS jobs_by_tenant ON jobs (tenant);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created REAL NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, data TEXT, series TEXT, step INTEGER
);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, number);
CREATE UNIQUE INDEX IF NOT EXISTS metrics_once ON events (job, series, step) WHERE series IS NOT NULL;
CREATE TABLE IF NOT EXISTS checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, step INTEGER NOT NULL,
    created REAL NOT NULL, export TEXT NOT NULL, metrics TEXT NOT NULL, state TEXT NOT NULL, UNIQUE (job, step)
);
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, created REAL NOT NULL,
    purpose TEXT NOT NULL, num_bytes INTEGER NOT NULL, expires REAL, facts TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS files_by_tenant ON files (tenant);
CREATE TABLE IF NOT EXISTS turns (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL UNIQUE, holder TEXT NOT NULL, until REAL NOT NULL
);
"""

Answer = TypeVar("Answer")


class TrainingRows(Protocol):
    """The tables, wherever their truth lies. Thread-safe; any number of processes may have the same ones open."""

    clock: Callable[[], float]

    def read(self) -> AbstractContextManager[sqlite3.Connection]:
        """Let the block see all that was changed before, by whomever; raises StorageFailed."""
        ...

    def write(self, change: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """Run a change as one transaction, durable when this returns, with nobody else's in between.

        Args:
            change: may run more than once, each time on the rows as they are then; only the last time counts.
        Raises:
            StorageFailed, StoreFull: nothing was changed, or it may have been. What `change` raises: nothing was.
        """
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class TrainingDatabase:
    """`TrainingRows` in a file: one connection to it."""

    def __init__(self, store_dir: Path, clock: Callable[[], float]) -> None:
        """Open or create the file; raises StorageFailed, StoreFull."""
        self._lock = threading.Lock()
        self.clock = clock
        with storage_errors():
            store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with sqlite_errors():
            self._connection = connect(store_dir / TRAINING_FILE, busy_timeout_s=_BUSY_TIMEOUT_S)
            try:
                self._connection.row_factory = sqlite3.Row
                self._connection.executescript(SCHEMA)
            except sqlite3.Error:
                self._connection.close()
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Hold the connection for reading; raises StorageFailed."""
        with self._lock, sqlite_errors():
            yield self._connection

    def write(self, change: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """Run a change as one transaction; raises StorageFailed, StoreFull, what `change` raises."""
        with self._lock, sqlite_errors(), transaction(self._connection) as db:
            return change(db)

    def close(self) -> None:
        """Give back the connection."""
        with self._lock:
            self._connection.close()


@contextmanager
def sqlite_errors() -> Iterator[None]:
    """Turn SQLite's errors into StorageFailed and StoreFull."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            raise StoreFull("the store's disk is full; delete adapters or data files, or ask the operator") from error
        raise StorageFailed("the store's training jobs cannot be read or written; try again later") from error
