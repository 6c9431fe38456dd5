"""The trainer's files where machines share an object store and no folder: objects, and each process's scratch folder.

    training/files/<file id>/           a data file, never changed
    training/jobs/<job id>/inputs/      what the job reads
    training/jobs/<job id>/run-<n>/     what the run with fencing token n saved (`shared_runs.py`)
    training/jobs/<job id>/exports/     adapters that wait to be published
    STORE/training/scratch/<random>/    one process's copies; gone when it is

Owns these keys and the ways between. Each of the first four is a bundle: whole or not there. Invariants: a run writes
under its own token alone, so a worker that was believed dead changes nothing that another reads; what a row names was
durable before the row.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from adapters_store.blob_cache import OBJECTS
from adapters_store.errors import AdapterCorrupt, StorageFailed, StoreAway, StoreError, storage_errors
from adapters_store.file_system import FileSystem, WrittenFile, open_regular
from adapters_store.jobs.bundles import Bundles
from adapters_store.jobs.folders import ORPHAN_S, TrainingFolders
from adapters_store.jobs.job import ENDED, JobState
from adapters_store.jobs.shared_runs import SharedRuns
from adapters_store.locks import StoreLock, lock_folder
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from adapters_store.object_store import ObjectStore
from adapters_store.staging import Staging

_FILES, _JOBS = "training/files", "training/jobs"
_DATA_NAME = "data.jsonl"


class SharedFolders(TrainingFolders):
    """The folders of one process; what must outlive it lies in the object store."""

    def __init__(self, store_dir: Path, objects: ObjectStore, clock: Callable[[], datetime] | None = None) -> None:
        """Make a scratch folder, and remove those of dead processes; raises StorageFailed, StoreFull."""
        super().__init__(store_dir)
        self._objects = objects
        self._bundles = Bundles(objects, self._files)
        self._clock = clock or (lambda: datetime.now(UTC))
        scratches = store_dir / "training" / "scratch"
        self._scratch = scratches / uuid.uuid4().hex
        self.jobs = self._scratch / "jobs"
        self._runs = SharedRuns(self._bundles, objects, self.jobs, self._scratch / "sharing")
        with storage_errors():
            scratches.mkdir(mode=0o700, exist_ok=True)
        # under the lock that sweeps hold: a folder that nobody has locked yet would look like a dead process's
        with StoreLock(store_dir / "lock").held(), storage_errors():
            Staging(scratches, FileSystem()).sweep()
            self._files.make_dir(self._scratch)
            self._alive = lock_folder(self._scratch)
            self._files.make_dir(self.jobs)

    def keep_data(self, path: Path, file_id: str) -> None:
        """Write a whole data file as an object; raises StoreAway, StorageFailed."""
        with storage_errors():
            folder = self._scratch / uuid.uuid4().hex
            self._files.make_dir(folder)
            self._files.rename(path, folder / _DATA_NAME)
        try:
            self._bundles.write(f"{_FILES}/{file_id}", folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def open_data(self, file_id: str) -> BinaryIO:
        """Fetch a data file and open it; raises FileNotFoundError, StoreAway, StorageFailed."""
        folder = self._scratch / uuid.uuid4().hex
        try:
            self._bundles.fetch(f"{_FILES}/{file_id}", folder)
            return open_regular(folder / _DATA_NAME)
        finally:
            # whoever has it open keeps its bytes
            shutil.rmtree(folder, ignore_errors=True)

    def remove_data(self, file_id: str) -> None:
        """Remove a data file; what cannot be removed now is left to the next sweep."""
        with suppress(StoreError):
            self._bundles.remove(f"{_FILES}/{file_id}")

    def make_job(self, job_id: str, files: Mapping[str, str], adapters: Mapping[str, str]) -> None:
        """Copy what a job reads inside the object store; raises FileNotFoundError, StoreAway, StorageFailed."""
        inputs = f"{_JOBS}/{job_id}/inputs"
        index: dict[str, WrittenFile] = {}
        try:
            for name, file_id in files.items():
                found = self._bundles.index(f"{_FILES}/{file_id}")
                if found is None:
                    raise FileNotFoundError(file_id)
                self._bundles.copy_file(f"{_FILES}/{file_id}/{_DATA_NAME}", f"{inputs}/{name}")
                index[name] = found[_DATA_NAME]
            for name, digest in adapters.items():
                for file, facts in self._adapter(digest).items():
                    self._bundles.copy_file(f"{OBJECTS}/{digest}/{file}", f"{inputs}/{name}/{file}")
                    index[f"{name}/{file}"] = facts
            self._bundles.close(inputs, index)
        except StoreAway:
            # a sweep removes what is there of it
            raise
        except BaseException:
            self.remove_job(job_id)
            raise

    def begin_run(self, job_id: str, token: int) -> Path:
        """Fetch what the job reads and what the runs before saved; raises StorageFailed, StoreAway."""
        self.leave_job(job_id)
        try:
            self._bundles.fetch(f"{_JOBS}/{job_id}/inputs", self.inputs(job_id))
        except FileNotFoundError as error:
            raise StorageFailed(f"job {job_id} has no inputs in the object store; make it again") from error
        return self._runs.begin(f"{_JOBS}/{job_id}", job_id, token)

    def is_run_shared(self, job_id: str, token: int) -> bool:
        """Return whether the newest point of the run is in the object store, or there is none; looks at the disk."""
        return self._runs.is_shared(job_id, token)

    def share_run(self, job_id: str, token: int) -> None:
        """Write what the run has saved since the last call to the object store; raises StoreAway, StorageFailed."""
        self._runs.share(f"{_JOBS}/{job_id}", job_id, token)

    def share_export(self, job_id: str, export: str) -> None:
        """Write an export to the object store; raises StoreAway, StorageFailed."""
        self._bundles.write(f"{_JOBS}/{job_id}/{export}", self.job(job_id) / export)

    def bring_export(self, job_id: str, export: str) -> Path:
        """Fetch an export; raises FileNotFoundError, StoreAway, StorageFailed."""
        folder = self.job(job_id) / export
        if not folder.is_dir():
            arriving = self._scratch / uuid.uuid4().hex
            try:
                self._bundles.fetch(f"{_JOBS}/{job_id}/{export}", arriving)
                with storage_errors():
                    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._files.rename(arriving, folder)
            finally:
                shutil.rmtree(arriving, ignore_errors=True)
        return folder

    def leave_job(self, job_id: str) -> None:
        """Remove this process's copies of a job's files."""
        self._runs.forget(job_id)
        shutil.rmtree(self.job(job_id), ignore_errors=True)

    def remove_job(self, job_id: str) -> None:
        """Remove a job's files everywhere; what cannot be removed now is left to the next sweep."""
        self.leave_job(job_id)
        with suppress(StoreError):
            self._bundles.remove(f"{_JOBS}/{job_id}")

    def sweep(self, states: Callable[[list[str]], dict[str, JobState]], known_files: Callable[[], set[str]]) -> None:
        """Remove what ended or died, as in a folder; raises StoreAway, StorageFailed."""
        # listed first: a row that comes later is not missed
        jobs, data = self._newest(_JOBS), self._newest(_FILES)
        found = states(list(jobs))
        for job_id, newest in jobs.items():
            if found.get(job_id) in ENDED or (job_id not in found and self._is_old(newest)):
                self.remove_job(job_id)
        known = known_files()
        for file_id, newest in data.items():
            if file_id not in known and self._is_old(newest):
                self.remove_data(file_id)
        with storage_errors():
            for entry in list(os.scandir(self.staging)):
                self._sweep_staging(Path(entry.path))

    def close(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        alive, self._alive = self._alive, None
        if alive is not None:
            os.close(alive)

    def _adapter(self, digest: str) -> dict[str, WrittenFile]:
        """Return what an adapter's two objects hold; raises FileNotFoundError, StoreAway, AdapterCorrupt."""
        raw = self._objects.get(f"{OBJECTS}/{digest}/{MANIFEST_NAME}", max_bytes=MAX_MANIFEST_BYTES)
        if raw is None:
            raise FileNotFoundError(digest)
        if hashlib.sha256(raw).hexdigest() != digest:
            raise AdapterCorrupt(f"adapter {digest[:12]} is damaged in the object store; upload it again")
        manifest = parse_manifest(raw)
        image = WrittenFile(manifest.file_bytes, manifest.file_sha256)
        return {MANIFEST_NAME: WrittenFile(len(raw), digest), IMAGE_NAME: image}

    def _newest(self, folder: str) -> dict[str, datetime]:
        """Return the ids in a folder with the time of their newest object."""
        found: dict[str, datetime] = {}
        for listed in self._objects.list(folder):
            name = listed.key.removeprefix(f"{folder}/").split("/")[0]
            found[name] = max(found.get(name, listed.modified), listed.modified)
        return found

    def _is_old(self, modified: datetime) -> bool:
        return self._clock() - modified > timedelta(seconds=ORPHAN_S)
