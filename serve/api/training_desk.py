"""The server's part of the trainer: its jobs, its data files and their folders, opened together.

Owns their opening and closing. Invariant: nothing here trains; what a job needs lies in its folder before its row
exists, so a worker never waits for a server.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.jobs.files import DataFiles
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.jobs import Jobs, Outbox
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.rows_choice import open_rows


@dataclass(frozen=True, slots=True)
class TrainingDesk:
    """What routes and the publisher use. Thread-safe."""

    jobs: Jobs
    outbox: Outbox
    files: DataFiles
    folders: TrainingFolders
    close: Callable[[], None]

    @classmethod
    def open(cls, store_dir: Path) -> "TrainingDesk":
        """Open or create what lies in a store's folder; raises InvalidOption, StorageFailed, StoreFull."""
        rows = open_rows(store_dir, time.time)
        folders = TrainingFolders(store_dir)
        return cls(SqliteJobs(rows), SqliteOutbox(rows), DataFiles(rows, folders), folders, rows.close)

    def sweep(self) -> None:
        """Remove the folders of ended jobs and what crashes left."""
        self.folders.sweep(self.jobs.states, self.files.known_ids)
