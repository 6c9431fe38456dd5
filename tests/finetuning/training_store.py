"""A store of training jobs in a folder, with a clock that tests move.

Owns test data only. Invariant: two jobs made by `new_job` differ in nothing but what the test asked for.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from adapters_store.jobs.database import TrainingDatabase
from adapters_store.jobs.files import DataFiles
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import NewJob
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.queue_sqlite import SqliteJobQueue

BASE = "sha256:base"
LEASE_S = 30.0


@dataclass
class Clock:
    """Unix seconds that pass only when the test says so."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@dataclass
class TrainingStore:
    """All parts over one database."""

    root: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        """Open everything."""
        self.database = TrainingDatabase(self.root, self.clock)
        self.folders = TrainingFolders(self.root)
        self.jobs = SqliteJobs(self.database)
        self.queue = SqliteJobQueue(self.database)
        self.outbox = SqliteOutbox(self.database)
        self.files = DataFiles(self.database, self.folders)


def new_job(tenant: str = "acme", **changes: object) -> NewJob:
    """Return a job that asks for nothing special."""
    job = NewJob(
        tenant=tenant,
        base=BASE,
        model="org/demo",
        training_file="file-1",
        validation_file=None,
        suffix=None,
        seed=7,
        spec={"family": "lora"},
        hyperparameters={"n_epochs": 1},
        metadata=None,
        promotion=None,
    )
    return replace(job, **changes)  # type: ignore[arg-type]
