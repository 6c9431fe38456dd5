"""A store of training jobs in a folder, one server's or shared by replicas, with a clock that tests move.

Owns test data only. Invariants: two jobs made by `new_job` differ in nothing but what the test asked for; of a shared
store each part is a replica of its own, which has nothing in common with the others but the folder.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from adapters_store.jobs.database import TrainingDatabase, TrainingRows
from adapters_store.jobs.files import DataFiles
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import NewJob
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.journal import Journal, LinkingFileSystem

BASE = "sha256:base"
LEASE_S = 30.0
KINDS = ("sqlite", "journal")
# folded all the time: whoever looks seldom finds what it was to read next gone
FOLD_ENTRIES = 5


@dataclass
class Clock:
    """Unix seconds that pass only when the test says so."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@dataclass
class TrainingStore:
    """All parts, over one database or each over its own view of one journal."""

    root: Path
    clock: Clock = field(default_factory=Clock)
    kind: str = "sqlite"

    def __post_init__(self) -> None:
        """Open everything."""
        self._opened: list[TrainingRows] = []
        self.folders = TrainingFolders(self.root)
        self.jobs = SqliteJobs(self.rows())
        self.queue = SqliteJobQueue(self.rows())
        self.outbox = SqliteOutbox(self.rows())
        self.files = DataFiles(self.rows(), self.folders)

    def rows(self) -> TrainingRows:
        """Return the one database, or one more replica's view of the journal."""
        if self.kind == "journal":
            journal = Journal(self.root / "journal", LinkingFileSystem())
            self._opened.append(SharedRows(journal, self.clock, fold_entries=FOLD_ENTRIES))
        elif not self._opened:
            self._opened.append(TrainingDatabase(self.root, self.clock))
        return self._opened[-1]

    def close(self) -> None:
        """Give the connections back."""
        for rows in self._opened:
            rows.close()


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
