"""`JobQueue` over SQLite's tables, one server's or shared ones: what workers do with jobs.

Owns leases, fencing tokens and whose turn it is. Invariant: every write of a worker is one transaction that first finds
its claim still good, so nothing that an expired worker says is kept.
"""

import json
import sqlite3
from collections.abc import Iterable

from adapters_store.jobs.database import TrainingRows
from adapters_store.jobs.job import Claim, JobError, JobState, NewEvent, Progress, Trained
from adapters_store.jobs.job_errors import LeaseLost
from adapters_store.jobs.job_rows import add_events, dumps, end_job, job_of, new_id
from adapters_store.strict_json import Json

# a job whose workers die so often without having come further is what kills them
MAX_LOST = 5
# waits, or its worker is silent; tenants with the fewest running jobs first, then the oldest
_NEXT = """
SELECT * FROM jobs WHERE base = :base AND (state = 'queued' OR (state = 'running' AND lease_until <= :now))
ORDER BY (SELECT count(*) FROM jobs AS other WHERE other.tenant = jobs.tenant AND other.state = 'running'
          AND other.lease_until > :now), number LIMIT 1
"""


class SqliteJobQueue:
    """A `JobQueue`."""

    def __init__(self, database: TrainingRows) -> None:
        self._database = database

    def claim(self, worker: str, base: str, *, lease_s: float) -> Claim | None:
        """Take the next job of this base; None: nothing to do."""

        def take(db: sqlite3.Connection) -> Claim | None:
            # inside: whoever had to wait for the lock must not judge leases by an older time
            now = self._database.clock()
            while (row := _next(db, base, now)) is not None:
                num_lost = row["num_lost"] + (row["state"] == JobState.RUNNING)
                if num_lost > MAX_LOST:
                    _give_up(db, row["id"], num_lost, now)
                    continue
                return self._take(db, row, worker, num_lost, now, lease_s)
            return None

        # most of the time there is nothing, and a look costs less than a change
        with self._database.read() as db:
            if _next(db, base, self._database.clock()) is None:
                return None
        return self._database.write(take)

    def renew(self, claim: Claim, *, lease_s: float) -> None:
        """Hold on for so long from now."""

        def renew(db: sqlite3.Connection) -> None:
            now = self._check(db, claim)
            db.execute("UPDATE jobs SET lease_until = ? WHERE id = ?", (now + lease_s, claim.job.id))

        self._database.write(renew)

    def check(self, claim: Claim) -> None:
        """Raise LeaseLost unless the claim holds; writes nothing."""
        with self._database.read() as db:
            self._check(db, claim)

    def is_paused(self, job_id: str) -> bool:
        """Return whether a job was paused."""
        with self._database.read() as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is not None and row["state"] == JobState.PAUSED

    def report(self, claim: Claim, events: Iterable[NewEvent], progress: Progress | None = None) -> None:
        """Add events, and say how far the job is."""
        told = tuple(events)

        def add(db: sqlite3.Connection) -> None:
            add_events(db, claim.job.id, told, self._check(db, claim))
            if progress is not None:
                # further than ever: whatever killed earlier workers did not do it here
                db.execute(
                    "UPDATE jobs SET progress = ?, num_lost = iif(best_step < ?, 0, num_lost), "
                    "best_step = max(best_step, ?) WHERE id = ?",
                    (dumps(progress), progress.step, progress.step, claim.job.id),
                )

        self._database.write(add)

    def add_checkpoint(self, claim: Claim, step: int, export: str, metrics: dict[str, Json]) -> None:
        """Hand over an exported checkpoint; the same step again changes nothing."""

        def add(db: sqlite3.Connection) -> None:
            now = self._check(db, claim)
            db.execute(
                "INSERT OR IGNORE INTO checkpoints (id, job, step, created, export, metrics, state) "
                "VALUES (?, ?, ?, ?, ?, ?, 'exported')",
                (new_id("ftckpt_"), claim.job.id, step, now, export, json.dumps(metrics)),
            )

        self._database.write(add)

    def hand_over(self, claim: Claim, trained: Trained) -> None:
        """Give the finished adapter to who publishes; the claim ends."""

        def give(db: sqlite3.Connection) -> None:
            now = self._check(db, claim)
            db.execute(
                "UPDATE jobs SET state = ?, trained = ?, worker = NULL, lease_until = NULL WHERE id = ?",
                (JobState.PUBLISHING, dumps(trained), claim.job.id),
            )
            add_events(db, claim.job.id, [NewEvent("Training finished, the adapter is checked and published")], now)

        self._database.write(give)

    def fail(self, claim: Claim, error: JobError) -> None:
        """End the job; the claim ends."""

        def end(db: sqlite3.Connection) -> None:
            now = self._check(db, claim)
            event = NewEvent(f"Fine-tuning job failed: {error.message}", level="error")
            end_job(db, claim.job.id, JobState.FAILED, now, event, error)

        self._database.write(end)

    def give_back(self, claim: Claim, *, was_lost: bool = False) -> None:
        """Queue the job again, in its old place, for any worker; the claim ends."""

        def queue(db: sqlite3.Connection) -> None:
            now = self._check(db, claim)
            query = "UPDATE jobs SET state = ?, worker = NULL, lease_until = NULL, num_lost = num_lost + ? WHERE id = ?"
            db.execute(query, (JobState.QUEUED, int(was_lost), claim.job.id))
            told = "The training process was killed" if was_lost else "The worker stops"
            event = NewEvent(f"{told}; the job waits to be resumed", level="warn" if was_lost else "info")
            add_events(db, claim.job.id, [event], now)

        self._database.write(queue)

    def _take(
        self, db: sqlite3.Connection, row: sqlite3.Row, worker: str, num_lost: int, now: float, lease_s: float
    ) -> Claim:
        token = row["token"] + 1
        db.execute(
            "UPDATE jobs SET state = ?, token = ?, worker = ?, lease_until = ?, num_lost = ? WHERE id = ?",
            (JobState.RUNNING, token, worker, now + lease_s, num_lost, row["id"]),
        )
        started = "Fine-tuning job started" if token == 1 else f"Fine-tuning job resumed (worker {token})"
        add_events(db, row["id"], [NewEvent(started)], now)
        taken = db.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone()
        return Claim(job_of(taken), worker, token)

    def _check(self, db: sqlite3.Connection, claim: Claim) -> float:
        """Return the time if the claim is good; raises LeaseLost."""
        now = self._database.clock()
        query = "SELECT 1 FROM jobs WHERE id = ? AND token = ? AND state = 'running' AND lease_until > ?"
        if db.execute(query, (claim.job.id, claim.token, now)).fetchone() is None:
            raise LeaseLost(f"job {claim.job.id} is no longer this worker's")
        return now


def _next(db: sqlite3.Connection, base: str, now: float) -> sqlite3.Row | None:
    found: sqlite3.Row | None = db.execute(_NEXT, {"base": base, "now": now}).fetchone()
    return found


def _give_up(db: sqlite3.Connection, job_id: str, num_lost: int, now: float) -> None:
    error = JobError("worker_lost", f"{num_lost} workers died at this job without coming further; it is given up")
    event = NewEvent(f"Fine-tuning job failed: {error.message}", level="error")
    end_job(db, job_id, JobState.FAILED, now, event, error)
