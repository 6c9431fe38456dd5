"""A store of training jobs, one server's or shared by replicas in a folder or an object store, with tests' own clock.

Owns test data only. Invariants: two jobs made by `new_job` differ in nothing but what the test asked for; of a shared
store each part is a replica of its own, which has nothing in common with the others but the folder or the objects.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from obstore.store import MemoryStore

from adapters_store.change_log import ChangeLog
from adapters_store.jobs.database import TrainingDatabase, TrainingRows
from adapters_store.jobs.files import DataFiles
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import JobError, NewJob, Parcel
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.shared_folders import SharedFolders
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.jobs.turns import FolderTurns, LeasedTurns, Turns
from adapters_store.journal import Journal, LinkingFileSystem
from tests.memory_objects import MemoryObjects, memory_journal

BASE = "sha256:base"
LEASE_S = 30.0
KINDS = ("sqlite", "journal", "objects")
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
    # of objects that a fold made needless
    kept_s: float = 3600.0

    def __post_init__(self) -> None:
        """Open everything."""
        self._opened: list[TrainingRows] = []
        self._made: list[TrainingFolders] = []
        self.memory = MemoryStore()
        self.folders = self.one_more()
        self.jobs = SqliteJobs(self.rows())
        self.queue = SqliteJobQueue(self.rows())
        self.turns: Turns = FolderTurns(self.folders)
        self.outbox = SqliteOutbox(self.rows())
        if self.kind == "objects":
            leased = LeasedTurns(self.rows())
            self.turns, self.outbox = leased, SqliteOutbox(self.rows(), leased.check)
        self.files = DataFiles(self.rows(), self.folders)

    def one_more(self) -> TrainingFolders:
        """Return the shared folder, or what one more machine sees of the objects."""
        if self.kind == "objects":
            self._made.append(SharedFolders(self.root / f"machine{len(self._made)}", MemoryObjects(self.memory)))
        elif not self._made:
            self._made.append(TrainingFolders(self.root))
        return self._made[-1]

    def rows(self) -> TrainingRows:
        """Return the one database, or one more replica's view of the journal."""
        if self.kind != "sqlite":
            self._opened.append(SharedRows(self.journal(), self.clock, fold_entries=FOLD_ENTRIES))
        elif not self._opened:
            self._opened.append(TrainingDatabase(self.root, self.clock))
        return self._opened[-1]

    def journal(self) -> ChangeLog:
        """Return one more view of the journal."""
        if self.kind == "objects":
            return memory_journal(self.memory, "training/journal", kept_s=self.kept_s)
        return Journal(self.root / "journal", LinkingFileSystem())

    def kept_jobs(self) -> set[str]:
        """Return the jobs whose files are there."""
        if self.kind == "objects":
            keys = (listed.key.split("/") for listed in MemoryObjects(self.memory).list("training/jobs"))
            return {key[2] for key in keys}
        return {path.name for path in self.folders.jobs.iterdir()}

    def published(self, parcel: Parcel) -> None:
        """Note, in its turn, that a parcel was published."""
        with self.turns.taken(parcel.job.id):
            self.outbox.published(parcel)

    def refused(self, parcel: Parcel, error: JobError) -> None:
        """Note, in its turn, that a parcel was refused."""
        with self.turns.taken(parcel.job.id):
            self.outbox.refused(parcel, error)

    def close(self) -> None:
        """Give the connections back."""
        for rows in self._opened:
            rows.close()
        for folders in self._made:
            folders.close()


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
