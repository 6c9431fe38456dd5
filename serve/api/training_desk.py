"""The server's part of the trainer: its jobs, its data files and their folders, opened together.

Owns their opening and closing, and the threads in which routes ask them. Invariants: nothing here trains; what a job
needs lies in its folder before its row exists, so a worker never waits for a server; jobs whose store does not answer
hold up no thread that serves something else.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from adapters_store.jobs.files import DataFiles
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.jobs import Jobs, Outbox
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.rows_choice import open_folders, open_rows
from adapters_store.jobs.turns import FolderTurns, LeasedTurns, Turns

P = ParamSpec("P")
Answer = TypeVar("Answer")

_NUM_THREADS = 4


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="training")


@dataclass(frozen=True, slots=True)
class TrainingDesk:
    """What routes and the publisher use. Thread-safe."""

    jobs: Jobs
    outbox: Outbox
    files: DataFiles
    folders: TrainingFolders
    turns: Turns
    # gives back the rows
    close_rows: Callable[[], None]
    threads: ThreadPoolExecutor = field(default_factory=_threads)

    @classmethod
    def open(cls, store_dir: Path, blobs_url: str | None = None) -> "TrainingDesk":
        """Open or create what lies in a store's folder, or in the object store that replicas share.

        Raises:
            InvalidOption, StorageFailed, StoreFull.
        """
        rows = open_rows(store_dir, time.time, blobs_url)
        try:
            folders = open_folders(store_dir, blobs_url)
        except BaseException:
            rows.close()
            raise
        files = DataFiles(rows, folders)
        if blobs_url is None:
            return cls(SqliteJobs(rows), SqliteOutbox(rows), files, folders, FolderTurns(folders), rows.close)
        turns = LeasedTurns(rows)
        return cls(SqliteJobs(rows), SqliteOutbox(rows, turns.check), files, folders, turns, rows.close)

    async def ask(self, call: Callable[P, Answer], *args: P.args, **kwargs: P.kwargs) -> Answer:
        """Run a call in a thread of the desk's own, in the caller's context; raises what it raises."""
        work = partial(copy_context().run, call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def sweep(self) -> None:
        """Remove the folders of ended jobs and what crashes left."""
        self.folders.sweep(self.jobs.states, self.files.known_ids)

    def close(self) -> None:
        """Give everything back; what runs in a thread is waited for."""
        self.threads.shutdown(cancel_futures=True)
        self.close_rows()
        self.folders.close()
