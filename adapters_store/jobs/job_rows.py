"""Rows of the training database as values, and events as rows.

Owns the JSON inside the columns and the spelling of ids. Invariant: an id is unguessable and never given twice, and a
metric of one step is kept once.
"""

import json
import secrets
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict

from adapters_store.jobs.job import Job, JobError, JobEvent, JobState, NewEvent, NewJob, Progress, Promotion, Trained
from adapters_store.strict_json import Json


def new_id(prefix: str) -> str:
    """Return an id as OpenAI spells them."""
    return f"{prefix}{secrets.token_hex(12)}"


def facts_of(new: NewJob) -> str:
    """Return what never changes of a job, as JSON."""
    return json.dumps(asdict(new))


def job_of(row: sqlite3.Row) -> Job:
    """Return a row of `jobs`."""
    facts = json.loads(row["facts"])
    promotion = facts.pop("promotion")
    trained = None if row["trained"] is None else trained_of(row["trained"])
    return Job(
        id=row["id"],
        new=NewJob(**facts, promotion=None if promotion is None else Promotion(**promotion)),
        state=JobState(row["state"]),
        created=int(row["created"]),
        finished=None if row["finished"] is None else int(row["finished"]),
        model_name=row["model_name"],
        fine_tuned_model=row["fine_tuned_model"],
        token=row["token"],
        progress=None if row["progress"] is None else Progress(**json.loads(row["progress"])),
        trained_tokens=None if trained is None else trained.trained_tokens,
        metrics={} if trained is None else trained.metrics,
        result_files=tuple(json.loads(row["result_files"] or "[]")),
        error=None if row["error"] is None else JobError(**json.loads(row["error"])),
    )


def trained_of(text: str) -> Trained:
    """Return the column `trained`."""
    return Trained(**json.loads(text))


def dumps(value: object) -> str:
    """Return a dataclass as JSON."""
    return json.dumps(asdict(value))  # type: ignore[call-overload]


def event_of(row: sqlite3.Row) -> JobEvent:
    """Return a row of `events`."""
    data: dict[str, Json] | None = None if row["data"] is None else json.loads(row["data"])
    kind = "message" if row["series"] is None else "metrics"
    return JobEvent(row["id"], int(row["created"]), row["level"], row["message"], kind, data)


def add_events(db: sqlite3.Connection, job_id: str, events: Iterable[NewEvent], now: float) -> None:
    """Add events in their order; a metric of a step that is there already is left as it is."""
    db.executemany(
        "INSERT OR IGNORE INTO events (id, job, created, level, message, data, series, step) VALUES (?,?,?,?,?,?,?,?)",
        [
            (
                new_id("ftevent-"),
                job_id,
                now,
                event.level,
                event.message,
                None if event.data is None else json.dumps(event.data),
                event.series,
                event.step,
            )
            for event in events
        ],
    )


def end_job(
    db: sqlite3.Connection, job_id: str, state: JobState, now: float, event: NewEvent, error: JobError | None = None
) -> None:
    """Set a job's last state, with the event that tells of it; the claim on it, if any, is void."""
    db.execute(
        "UPDATE jobs SET state = ?, finished = ?, error = ?, worker = NULL, lease_until = NULL WHERE id = ?",
        (state, now, None if error is None else dumps(error), job_id),
    )
    add_events(db, job_id, [event], now)
