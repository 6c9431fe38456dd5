"""`Outbox` over SQLite's tables, one server's or shared ones: what workers have exported, on its way to publication.

Owns the last steps of a job. Invariant: a job succeeds only when its adapter can be asked for, and each parcel leaves
the outbox once.
"""

import json
import sqlite3
from collections.abc import Callable

from adapters_store.jobs.database import TrainingRows
from adapters_store.jobs.job import JobError, JobState, NewEvent, Parcel
from adapters_store.jobs.job_rows import add_events, end_job, job_of, trained_of

_CHECKPOINTS = """
SELECT c.step AS step, c.export AS export, j.id AS job FROM checkpoints AS c JOIN jobs AS j ON j.id = c.job
WHERE c.state = 'exported' AND j.base = ? AND j.state NOT IN ('cancelled', 'failed') ORDER BY c.number
"""

# of the tables and a job's id
CheckTurn = Callable[[sqlite3.Connection, str], None]


def _hold_lock(_db: sqlite3.Connection, _job_id: str) -> None:
    """Do nothing: a lock of the job's folder cannot be lost."""


class SqliteOutbox:
    """An `Outbox`."""

    def __init__(self, database: TrainingRows, check: CheckTurn = _hold_lock) -> None:
        """Use these tables.

        Args:
            check: raises LeaseLost, inside the change, if it is not this process's turn to publish a job any more.
        """
        self._database = database
        self._check = check

    def parcels(self, base: str) -> list[Parcel]:
        """Return what waits to be published, a job's checkpoints before its result."""
        with self._database.read() as db:
            waiting = db.execute(_CHECKPOINTS, (base,)).fetchall()
            query = "SELECT * FROM jobs WHERE state = ? AND base = ? ORDER BY number"
            finished = db.execute(query, (JobState.PUBLISHING, base)).fetchall()
            ids = sorted({row["job"] for row in waiting})
            rows = [db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone() for job_id in ids]
        jobs = {row["id"]: job_of(row) for row in rows}
        found = [Parcel(jobs[row["job"]], row["step"], row["export"]) for row in waiting]
        return found + [Parcel(job_of(row), None, trained_of(row["trained"]).export) for row in finished]

    def is_waiting(self, parcel: Parcel) -> bool:
        """Return whether the parcel still waits."""
        query, values = "SELECT 1 FROM jobs WHERE id = ? AND state = 'publishing'", [parcel.job.id]
        if parcel.step is not None:
            query = "SELECT 1 FROM checkpoints WHERE job = ? AND step = ? AND state = 'exported'"
            values = [parcel.job.id, str(parcel.step)]
        with self._database.read() as db:
            return db.execute(query, values).fetchone() is not None

    def published(self, parcel: Parcel, *, result_files: tuple[str, ...] = ()) -> None:
        """Note that the adapter can be asked for; for the job's own, that the job has succeeded."""
        job_id, now = parcel.job.id, self._database.clock()

        def note(db: sqlite3.Connection) -> None:
            self._check(db, job_id)
            if parcel.step is not None:
                _close(db, parcel, "published")
                told = NewEvent(f"Checkpoint created at step {parcel.step}: {parcel.model_name}")
                add_events(db, job_id, [told], now)
                return
            db.execute(
                "UPDATE jobs SET fine_tuned_model = ?, result_files = ? WHERE id = ?",
                (parcel.model_name, json.dumps(result_files), job_id),
            )
            add_events(db, job_id, [NewEvent(f"New fine-tuned model created: {parcel.model_name}")], now)
            end_job(db, job_id, JobState.SUCCEEDED, now, NewEvent("The job has successfully completed"))

        self._database.write(note)

    def refused(self, parcel: Parcel, error: JobError) -> None:
        """Note that the adapter cannot be published; the job fails if it was its own."""
        job_id, now = parcel.job.id, self._database.clock()

        def note(db: sqlite3.Connection) -> None:
            self._check(db, job_id)
            if parcel.step is not None:
                _close(db, parcel, "refused")
                message = f"The checkpoint of step {parcel.step} was not published: {error.message}"
                add_events(db, job_id, [NewEvent(message, level="warn")], now)
                return
            event = NewEvent(f"Fine-tuning job failed: {error.message}", level="error")
            end_job(db, job_id, JobState.FAILED, now, event, error)

        self._database.write(note)

    def tell(self, job_id: str, event: NewEvent) -> None:
        """Add an event to a job that is published or ended."""

        def add(db: sqlite3.Connection) -> None:
            self._check(db, job_id)
            add_events(db, job_id, [event], self._database.clock())

        self._database.write(add)


def _close(db: sqlite3.Connection, parcel: Parcel, state: str) -> None:
    query = "UPDATE checkpoints SET state = ? WHERE job = ? AND step = ?"
    db.execute(query, (state, parcel.job.id, parcel.step))
