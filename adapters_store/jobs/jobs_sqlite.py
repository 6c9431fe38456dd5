"""`Jobs` over SQLite's tables, one server's or shared ones: what tenants ask for and see.

Owns the tenants' side of the tables; workers and publishers have their own files. Invariant: a method that is given a
tenant never reads or changes another's job, and cancelling or pausing voids the worker's token in the same transaction.
"""

import json
import sqlite3

from adapters_store.jobs.database import TrainingRows
from adapters_store.jobs.job import ENDED, Checkpoint, Job, JobEvent, JobPage, JobState, NewEvent, NewJob
from adapters_store.jobs.job_errors import JobNotFound, TooManyJobs, WrongJobState
from adapters_store.jobs.job_rows import add_events, end_job, event_of, facts_of, job_of, new_id
from adapters_store.jobs.model_name import model_name

# one tenant's jobs that have not ended, where nothing smaller is set: each is a row, a folder and links
_MAX_UNFINISHED = 1000
_UNENDED = tuple(state for state in JobState if state not in ENDED)


class SqliteJobs:
    """A `Jobs`."""

    def __init__(self, database: TrainingRows) -> None:
        self._database = database

    def create(self, new: NewJob, *, job_id: str | None = None, max_unfinished: int | None = None) -> Job:
        """Queue a job; raises TooManyJobs."""
        most = _MAX_UNFINISHED if max_unfinished is None else max_unfinished
        given = job_id or new_id("ftjob-")
        now = self._database.clock()

        def insert(db: sqlite3.Connection) -> Job:
            marks = ",".join("?" * len(_UNENDED))
            query = f"SELECT count(*) FROM jobs WHERE tenant = ? AND state IN ({marks})"
            num_unfinished = db.execute(query, (new.tenant, *_UNENDED)).fetchone()[0]
            if num_unfinished >= most:
                raise TooManyJobs(
                    f"{num_unfinished} of this tenant's jobs have not ended; the limit is {most}: cancel one or wait"
                )
            db.execute(
                "INSERT INTO jobs (id, tenant, base, state, created, model_name, facts) VALUES (?,?,?,?,?,?,?)",
                (given, new.tenant, new.base, JobState.QUEUED, now, model_name(new, given), facts_of(new)),
            )
            told = [f"Created fine-tuning job: {given}", f"Validating training file: {new.training_file}"]
            told.append("Files validated, moving job to queued state")
            add_events(db, given, [NewEvent(message) for message in told], now)
            return job_of(_row(db, given, new.tenant))

        return self._database.write(insert)

    def get(self, job_id: str, tenant: str | None) -> Job:
        """Return a job; raises JobNotFound."""
        with self._database.read() as db:
            return job_of(_row(db, job_id, tenant))

    def page(
        self,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        without_metadata: bool = False,
    ) -> JobPage[Job]:
        """Return jobs, newest first; raises JobNotFound for an unknown `after`."""
        clauses, values = ["1"], list[str | int]()
        if tenant is not None:
            clauses.append("tenant = ?")
            values.append(tenant)
        for key, value in (metadata or {}).items():
            clauses.append("EXISTS (SELECT 1 FROM json_each(facts, '$.metadata') WHERE key = ? AND value = ?)")
            values += [key, value]
        if without_metadata:
            clauses.append("json_extract(facts, '$.metadata') IS NULL")
        with self._database.read() as db:
            if after is not None:
                clauses.append("number < ?")
                values.append(_row(db, after, tenant, param="after")["number"])
            query = f"SELECT * FROM jobs WHERE {' AND '.join(clauses)} ORDER BY number DESC LIMIT ?"
            rows = db.execute(query, (*values, limit + 1)).fetchall()
        return JobPage(tuple(job_of(row) for row in rows[:limit]), len(rows) > limit)

    def cancel(self, job_id: str, tenant: str | None) -> Job:
        """End a job for good, at once: its worker's token is void; raises WrongJobState."""
        event = NewEvent("Fine-tuning job cancelled")
        return self._change(
            job_id, tenant, JobState.CANCELLED, {JobState.QUEUED, JobState.RUNNING, JobState.PAUSED}, event
        )

    def pause(self, job_id: str, tenant: str | None) -> Job:
        """Let a job rest, at once; what it had saved stays. Raises WrongJobState."""
        event = NewEvent("Fine-tuning job paused")
        return self._change(job_id, tenant, JobState.PAUSED, {JobState.QUEUED, JobState.RUNNING}, event)

    def resume(self, job_id: str, tenant: str | None) -> Job:
        """Queue a paused job again; raises WrongJobState."""
        event = NewEvent("Fine-tuning job resumed, moving job to queued state")
        return self._change(job_id, tenant, JobState.QUEUED, {JobState.PAUSED}, event)

    def events(
        self, job_id: str, tenant: str | None, *, after: str | None = None, limit: int = 20
    ) -> JobPage[JobEvent]:
        """Return a job's events, newest first; raises JobNotFound for an unknown job or `after`."""
        with self._database.read() as db:
            rows = _newest(db, "events", _row(db, job_id, tenant)["id"], after, limit)
        return JobPage(tuple(event_of(row) for row in rows[:limit]), len(rows) > limit)

    def checkpoints(
        self, job_id: str, tenant: str | None, *, after: str | None = None, limit: int = 10
    ) -> JobPage[Checkpoint]:
        """Return a job's published checkpoints, newest first; raises JobNotFound."""
        with self._database.read() as db:
            job = _row(db, job_id, tenant)
            rows = _newest(db, "checkpoints", job["id"], after, limit, only="AND state = 'published'")
        found = [
            Checkpoint(
                id=row["id"],
                job_id=job_id,
                created=int(row["created"]),
                step=row["step"],
                model_name=f"{job['model_name']}:ckpt-step-{row['step']}",
                metrics=json.loads(row["metrics"]),
            )
            for row in rows[:limit]
        ]
        return JobPage(tuple(found), len(rows) > limit)

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state, zeros included."""
        with self._database.read() as db:
            found = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in JobState}

    def running(self) -> list[Job]:
        """Return the jobs that are being trained."""
        with self._database.read() as db:
            rows = db.execute("SELECT * FROM jobs WHERE state = ? ORDER BY number", (JobState.RUNNING,)).fetchall()
        return [job_of(row) for row in rows]

    def states(self, job_ids: list[str]) -> dict[str, JobState]:
        """Return the states of those jobs that there are."""
        with self._database.read() as db:
            found = {row["id"]: JobState(row["state"]) for row in db.execute("SELECT id, state FROM jobs").fetchall()}
        return {job_id: found[job_id] for job_id in job_ids if job_id in found}

    def _change(self, job_id: str, tenant: str | None, state: JobState, sources: set[JobState], event: NewEvent) -> Job:
        now = self._database.clock()

        def move(db: sqlite3.Connection) -> Job:
            found = JobState(_row(db, job_id, tenant)["state"])
            if found not in sources:
                wanted = " or ".join(sorted(sources))
                raise WrongJobState(f"job {job_id} is {found.value}; this needs a job that is {wanted}")
            if state in ENDED:
                end_job(db, job_id, state, now, event)
            else:
                db.execute("UPDATE jobs SET state = ?, worker = NULL, lease_until = NULL WHERE id = ?", (state, job_id))
                add_events(db, job_id, [event], now)
            return job_of(_row(db, job_id, tenant))

        return self._database.write(move)


def _row(db: sqlite3.Connection, job_id: str, tenant: str | None, *, param: str | None = None) -> sqlite3.Row:
    query, values = "SELECT * FROM jobs WHERE id = ?", [job_id]
    if tenant is not None:
        query, values = f"{query} AND tenant = ?", [job_id, tenant]
    row: sqlite3.Row | None = db.execute(query, values).fetchone()
    if row is None:
        raise JobNotFound(f"there is no fine-tuning job {ascii(job_id)[:80]}", param=param)
    return row


def _newest(
    db: sqlite3.Connection, table: str, job_id: str, after: str | None, limit: int, only: str = ""
) -> list[sqlite3.Row]:
    """Return a job's rows behind `after`, newest first, and one more than `limit` if there are more."""
    before = 1 << 62
    if after is not None:
        row = db.execute(f"SELECT number FROM {table} WHERE id = ? AND job = ?", (after, job_id)).fetchone()
        if row is None:
            raise JobNotFound(f"'after' is {ascii(after)[:80]}, which this job does not have", param="after")
        before = row["number"]
    query = f"SELECT * FROM {table} WHERE job = ? AND number < ? {only} ORDER BY number DESC LIMIT ?"
    return db.execute(query, (job_id, before, limit + 1)).fetchall()
