"""Where the trainer's files lie: data files, what is arriving, and a folder per job.

    training/staging/<random>/       a data file on its way in; gone when its owner is
    training/files/<file id>         a data file, never changed
    training/jobs/<job id>/inputs/   what the job reads, so that nothing can be deleted under it
    training/jobs/<job id>/run-<n>/  what the worker with fencing token n writes, and nobody else
    training/jobs/<job id>/exports/  adapters that wait to be published

Owns these paths and the moves between them; where machines share an object store and no folder, `shared_folders.py` has
the same moves. Invariant: taking over a run renames its folder, so a worker whose token is void finds nothing to write
to; an export appears whole or not at all.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapters_store.errors import StorageFailed, storage_errors
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.jobs.foreign_tree import copy_foreign
from adapters_store.jobs.job import ENDED, JobState
from adapters_store.locks import lock_folder
from adapters_store.object_files import OBJECT_FILES

# what no row names and is older than this was left by a crash
ORPHAN_S = 3600.0


class TrainingFolders:
    """The folders of one store."""

    def __init__(self, store_dir: Path, files: FileSystem | None = None) -> None:
        """Create what is missing; raises StorageFailed, StoreFull."""
        self.store_dir = store_dir
        training = store_dir / "training"
        self.staging, self.data_files, self.jobs = training / "staging", training / "files", training / "jobs"
        self._files = files or FileSystem()
        with storage_errors():
            for folder in (self.staging, self.data_files, self.jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def job(self, job_id: str) -> Path:
        """Return a job's folder."""
        return self.jobs / job_id

    def inputs(self, job_id: str) -> Path:
        """Return the folder of what a job reads."""
        return self.job(job_id) / "inputs"

    def keep_data(self, path: Path, file_id: str) -> None:
        """Keep a whole data file under its id; durable when this returns. Raises StorageFailed, StoreFull."""
        with storage_errors():
            self._files.rename(path, self.data_files / file_id)
            self._files.sync_dir(self.data_files)

    def open_data(self, file_id: str) -> BinaryIO:
        """Open a data file; raises FileNotFoundError, StoreError."""
        try:
            return open_regular(self.data_files / file_id, is_trusted=True)
        except OSError as error:
            raise FileNotFoundError(file_id) from error

    def remove_data(self, file_id: str) -> None:
        """Remove a data file; what cannot be removed now is left to the next sweep."""
        with suppress(OSError):
            self._files.unlink(self.data_files / file_id)

    def make_job(self, job_id: str, files: Mapping[str, str], adapters: Mapping[str, str]) -> None:
        """Create a job's folder with what it reads.

        Args:
            files: name inside `inputs/` to the id of a data file, which is linked.
            adapters: folder inside `inputs/` to the digest of an adapter, which is copied: objects have one name only.
        Raises:
            FileNotFoundError: one of them is gone. StorageFailed, StoreFull: the disk.
        """
        inputs = self.inputs(job_id)
        try:
            with storage_errors():
                inputs.mkdir(mode=0o700, parents=True)
            for name, file_id in files.items():
                _link(self.data_files / file_id, inputs / name)
            for name, digest in adapters.items():
                with storage_errors():
                    (inputs / name).mkdir(mode=0o700, parents=True)
                for file in OBJECT_FILES:
                    _copy(self.store_dir / "objects" / digest / file, inputs / name / file)
        except BaseException:
            self.remove_job(job_id)
            raise

    def begin_run(self, job_id: str, token: int) -> Path:
        """Return the folder of the run with this token, which continues the newest run before it; raises StorageFailed.

        The folder of the run before is renamed: its worker, if it still lives, can name nothing in it any more.
        """
        ours = self.job(job_id) / f"run-{token}"
        with storage_errors():
            runs = {int(path.name[4:]): path for path in self.job(job_id).glob("run-*") if path.name[4:].isdigit()}
            before = max((number for number in runs if number < token), default=None)
            if before is None:
                ours.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                os.rename(runs[before], ours)
            return ours

    def keep_export(self, job_id: str, name: str, exported: Path) -> str:
        """Copy an exported adapter out of a run; return its path inside the job's folder.

        What the walled process wrote is taken as a stranger's: regular files of one name, a bounded number of them.

        Raises:
            StorageFailed, StoreFull: it is not readable, or the disk is full.
        """
        exports = self.job(job_id) / "exports"
        target, partial = exports / name, exports / f".{name}.{os.getpid()}"
        with storage_errors():
            exports.mkdir(mode=0o700, exist_ok=True)
            if target.is_dir():
                return f"exports/{name}"
            shutil.rmtree(partial, ignore_errors=True)
            copy_foreign(self.job(job_id), exported, partial, self._files)
            try:
                os.rename(partial, target)
            except OSError:
                # an earlier worker of the job got there first, with the same bytes
                if not target.is_dir():
                    raise
                self._files.remove_tree(partial)
            self._files.sync_dir(exports)
        return f"exports/{name}"

    def is_run_shared(self, job_id: str, token: int) -> bool:
        """Return whether `share_run` has nothing to do."""
        return True

    def share_run(self, job_id: str, token: int) -> None:
        """See that what a run has saved outlives this machine, as in a shared folder it does; raises StoreError."""

    def share_export(self, job_id: str, export: str) -> None:
        """See that an export can be published anywhere, as from a shared folder it can; raises StoreError."""

    def bring_export(self, job_id: str, export: str) -> Path:
        """Return the folder of an export, as it is here; raises FileNotFoundError, StoreError."""
        return self.job(job_id) / export

    def leave_job(self, job_id: str) -> None:
        """Say that this process needs nothing of a job any more. Folders that are shared stay until a sweep."""

    def lock_job(self, job_id: str) -> int | None:
        """Take a job folder's lock and return the descriptor that holds it; None if somebody else has it."""
        try:
            return lock_folder(self.job(job_id))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Give back what this process alone uses: nothing."""

    def remove_job(self, job_id: str) -> None:
        """Remove a job's folder; what cannot be removed now is left to the next sweep."""
        with suppress(OSError):
            self._files.remove_tree(self.job(job_id))

    def sweep(self, states: Callable[[list[str]], dict[str, JobState]], known_files: Callable[[], set[str]]) -> None:
        """Remove what ended or died: folders of ended jobs, data files that no row names, staging without an owner.

        A job's folder is made before its row, by any server: one without a row goes when it is old.
        Raises:
            StorageFailed: the folders cannot be listed.
        """
        with storage_errors():
            old_jobs = [entry.name for entry in os.scandir(self.jobs)]
            found = states(old_jobs)
            for job_id in old_jobs:
                has_ended = found.get(job_id) in ENDED and (self.job(job_id) / "inputs").is_dir()
                if has_ended or (found.get(job_id, JobState.FAILED) in ENDED and _is_old(self.job(job_id))):
                    self.remove_job(job_id)
            known = known_files()
            for entry in list(os.scandir(self.data_files)):
                if entry.name not in known and _is_old(Path(entry.path)):
                    self._files.unlink(Path(entry.path))
            for entry in list(os.scandir(self.staging)):
                self._sweep_staging(Path(entry.path))

    def _sweep_staging(self, folder: Path) -> None:
        with suppress(OSError):
            lock = lock_folder(folder)
            if lock is not None:
                try:
                    self._files.remove_tree(folder)
                finally:
                    os.close(lock)


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ORPHAN_S
    return False


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk cannot; raises FileNotFoundError, StorageFailed."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    try:
        with storage_errors():
            shutil.copyfile(source, target)
    except StorageFailed as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise
