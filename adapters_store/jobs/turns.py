"""Whose turn it is to publish a job: one process at a time, on any number of machines.

Owns the two ways to know: a lock on the job's folder, where one is shared, or a lease among the jobs' rows, renewed
while it is held. Invariant: what is written of a job under a lease that ran out is refused in the same transaction.
"""

import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from adapters_store.errors import StoreError
from adapters_store.jobs.database import TrainingRows
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job_errors import LeaseLost

logger = logging.getLogger("chorale.training")

# how long a publisher that died holds a job up
TURN_S = 30.0


class Turns(Protocol):
    """Gives turns."""

    def taken(self, job_id: str) -> AbstractContextManager[bool]:
        """Hold a job's turn for the block; False: somebody else has it. Raises StoreError."""
        ...


class FolderTurns:
    """Turns by the lock of a job's folder, which its holder's death gives back at once."""

    def __init__(self, folders: TrainingFolders) -> None:
        self._folders = folders

    @contextmanager
    def taken(self, job_id: str) -> Iterator[bool]:
        """Hold the lock for the block."""
        lock = self._folders.lock_job(job_id)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                os.close(lock)


class LeasedTurns:
    """Turns as rows."""

    def __init__(self, rows: TrainingRows, *, turn_s: float = TURN_S) -> None:
        self._rows = rows
        self._turn_s = turn_s
        self._held: dict[str, str] = {}

    @contextmanager
    def taken(self, job_id: str) -> Iterator[bool]:
        """Hold a lease for the block, renewed by a thread."""
        holder = uuid.uuid4().hex
        if not self._take(job_id, holder):
            yield False
            return
        self._held[job_id] = holder
        is_over = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(job_id, holder, is_over), name="publishing turn")
        renewing.start()
        try:
            yield True
        finally:
            is_over.set()
            renewing.join()
            del self._held[job_id]
            # one that cannot be given back now runs out
            with suppress(StoreError):
                self._rows.write(
                    lambda db: db.execute("DELETE FROM turns WHERE job = ? AND holder = ?", (job_id, holder))
                )

    def check(self, db: sqlite3.Connection, job_id: str) -> None:
        """Raise LeaseLost unless this process has the job's turn."""
        query = "SELECT 1 FROM turns WHERE job = ? AND holder = ? AND until > ?"
        if db.execute(query, (job_id, self._held.get(job_id, ""), self._rows.clock())).fetchone() is None:
            raise LeaseLost(f"another server publishes job {job_id} now")

    def _take(self, job_id: str, holder: str) -> bool:
        def take(db: sqlite3.Connection) -> bool:
            now = self._rows.clock()
            if _is_taken(db, job_id, now):
                return False
            db.execute("DELETE FROM turns WHERE job = ?", (job_id,))
            row = (job_id, holder, now + self._turn_s)
            db.execute("INSERT INTO turns (job, holder, until) VALUES (?, ?, ?)", row)
            return True

        # a look costs less than a change
        with self._rows.read() as db:
            if _is_taken(db, job_id, self._rows.clock()):
                return False
        return self._rows.write(take)

    def _renew(self, job_id: str, holder: str, is_over: threading.Event) -> None:
        query = "UPDATE turns SET until = ? WHERE job = ? AND holder = ? AND until > ?"
        while not is_over.wait(self._turn_s / 3):
            now = self._rows.clock()
            row = (now + self._turn_s, job_id, holder, now)
            try:
                self._rows.write(lambda db, row=row: db.execute(query, row))  # type: ignore[misc]
            except StoreError as error:
                # if it lasts the turn runs out, and whatever is written then is refused
                logger.warning("job %s: the turn to publish it was not renewed: %s", job_id, error.message)


def _is_taken(db: sqlite3.Connection, job_id: str, now: float) -> bool:
    return db.execute("SELECT 1 FROM turns WHERE job = ? AND until > ?", (job_id, now)).fetchone() is not None
