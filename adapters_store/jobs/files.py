"""The data files of tenants: streamed in, checked line by line in a walled process, kept under an id.

Owns the rows of `files` and how bytes become one of them. Invariants: a file that has an id was checked to its last
line and never changes; no tenant reads, lists or deletes another's; nobody has more bytes than the bound.
"""

import json
import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from adapters_store.errors import StoreAway, UploadTooLarge, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.jobs.data_check import check_data
from adapters_store.jobs.database import TrainingRows
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import JobPage
from adapters_store.jobs.job_errors import DataFileNotFound, TooManyJobs
from adapters_store.jobs.job_rows import new_id
from adapters_store.jobs.jsonl import DataLimits, DataSummary
from adapters_store.locks import lock_folder

FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file. Times are unix seconds; `summary` is what the check found, None for results, which we wrote."""

    id: str
    tenant: str
    created: int
    purpose: str
    filename: str
    num_bytes: int
    expires: int | None
    summary: DataSummary | None


class DataUpload:
    """A data file on its way in. Use it as a context manager: what was not kept is gone at its end."""

    def __init__(self, folders: TrainingFolders, files: FileSystem, max_bytes: int) -> None:
        """Create the staging folder and lock it against sweeps; raises StorageFailed, StoreFull."""
        self._files = files
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self.folder = folders.staging / uuid.uuid4().hex
        with storage_errors():
            files.make_dir(self.folder)
            self._lock = lock_folder(self.folder)
            self._descriptor: int | None = files.create(self.path)

    @property
    def path(self) -> Path:
        """Return where the bytes lie until they are kept."""
        return self.folder / "data.jsonl"

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; raises UploadTooLarge, StorageFailed, StoreFull."""
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise UploadTooLarge(f"a data file has at most {self._max_bytes} bytes", param="file")
        assert self._descriptor is not None, "the upload was closed"
        with storage_errors():
            self._files.write(self._descriptor, data)

    def end(self) -> None:
        """Say that all bytes came; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with storage_errors():
                self._files.close(descriptor)
                self._files.sync_file(self.path)

    def close(self) -> None:
        """Remove what is left of it."""
        with suppress(OSError):
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            if self.folder.is_dir():
                self._files.remove_tree(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "DataUpload":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DataFiles:
    """All data files of a store. Thread-safe. `tenant` None is the operator, who sees all."""

    def __init__(
        self,
        database: TrainingRows,
        folders: TrainingFolders,
        *,
        limits: DataLimits | None = None,
        check: Callable[[Path, DataLimits], DataSummary] = check_data,
    ) -> None:
        self._database = database
        self._folders = folders
        self._limits = limits or DataLimits()
        self._check = check
        self._files = FileSystem()

    def stage(self) -> DataUpload:
        """Begin an upload."""
        return DataUpload(self._folders, self._files, self._limits.max_bytes)

    def keep(
        self,
        upload: DataUpload,
        tenant: str,
        filename: str,
        *,
        max_tenant_bytes: int | None = None,
        expires_after_s: int | None = None,
    ) -> DataFile:
        """Check an upload to its last line and keep it; durable when this returns.

        Raises:
            InvalidData: bad lines, by their numbers. TooManyJobs: the tenant's bytes. StoreError: the disk, the check.
        """
        upload.end()
        new = DataFile("", tenant, 0, FINE_TUNE, filename, upload.num_bytes, expires_after_s, None)
        with self._database.read() as db:
            _check_room(db, new, max_tenant_bytes)
        summary = self._check(upload.path, self._limits)
        return self._insert(upload.path, replace(new, summary=summary), max_tenant_bytes)

    def keep_result(self, tenant: str, filename: str, content: bytes, *, file_id: str) -> DataFile:
        """Keep a file that the trainer made, under its tenant; one that is there already under this id stays."""
        with suppress(DataFileNotFound):
            return self.get(file_id, tenant)
        with self.stage() as upload:
            upload.write(content)
            upload.end()
            new = DataFile(file_id, tenant, 0, RESULTS, filename, upload.num_bytes, None, None)
            return self._insert(upload.path, new, None)

    def get(self, file_id: str, tenant: str | None, *, param: str | None = None) -> DataFile:
        """Return a file; raises DataFileNotFound, whose `param` is this one."""
        for found in self._select(tenant, "id = ?", file_id):
            return found
        raise DataFileNotFound(f"there is no file {ascii(file_id)[:80]}", param=param)

    def page(
        self, tenant: str | None, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> JobPage[DataFile]:
        """Return files by age; raises DataFileNotFound for an unknown `after`."""
        found = self._select(tenant, "1") if purpose is None else self._select(tenant, "purpose = ?", purpose)
        if newest_first:
            found.reverse()
        if after is not None:
            self.get(after, tenant, param="after")
            ids = [each.id for each in found]
            # a file of another purpose has a place in time as well, but not in this list
            found = found[ids.index(after) + 1 :] if after in ids else []
        return JobPage(tuple(found[:limit]), len(found) > limit)

    def open(self, file: DataFile) -> BinaryIO:
        """Open a file's bytes; raises DataFileNotFound if it was deleted meanwhile, StorageFailed."""
        try:
            return self._folders.open_data(file.id)
        except FileNotFoundError:
            raise DataFileNotFound(f"there is no file {ascii(file.id)[:80]}") from None

    def delete(self, file_id: str, tenant: str | None) -> None:
        """Forget a file; jobs that were made with it keep theirs. Raises DataFileNotFound."""
        found = self.get(file_id, tenant)
        self._database.write(lambda db: db.execute("DELETE FROM files WHERE id = ?", (found.id,)))
        self._folders.remove_data(found.id)

    def known_ids(self) -> set[str]:
        """Return all ids, those of expired files left out, which are forgotten by this."""

        def forget(db: sqlite3.Connection) -> set[str]:
            db.execute("DELETE FROM files WHERE expires <= ?", (self._database.clock(),))
            return {row["id"] for row in db.execute("SELECT id FROM files").fetchall()}

        return self._database.write(forget)

    def _insert(self, path: Path, new: DataFile, max_tenant_bytes: int | None) -> DataFile:
        file_id, now = new.id or new_id("file-"), self._database.clock()
        self._folders.keep_data(path, file_id)
        facts = {"filename": new.filename, "summary": None if new.summary is None else asdict(new.summary)}
        expires = None if new.expires is None else now + new.expires
        values = (file_id, new.tenant, now, new.purpose, new.num_bytes, expires, json.dumps(facts))

        def insert(db: sqlite3.Connection) -> None:
            _check_room(db, new, max_tenant_bytes)
            columns = "id, tenant, created, purpose, num_bytes, expires, facts"
            db.execute(f"INSERT INTO files ({columns}) VALUES (?,?,?,?,?,?,?)", values)

        try:
            self._database.write(insert)
        except StoreAway:
            # the row may be there: bytes without one go with a sweep, a row without bytes would stay
            raise
        except BaseException:
            self._folders.remove_data(file_id)
            raise
        return self.get(file_id, new.tenant)

    def _select(self, tenant: str | None, clause: str, *values: str) -> list[DataFile]:
        query = f"SELECT * FROM files WHERE {clause} AND (expires IS NULL OR expires > ?)"
        arguments: list[str | float] = [*values, self._database.clock()]
        if tenant is not None:
            query, arguments = f"{query} AND tenant = ?", [*arguments, tenant]
        with self._database.read() as db:
            rows = db.execute(f"{query} ORDER BY number", arguments).fetchall()
        return [_file_of(dict(row)) for row in rows]


def _check_room(db: sqlite3.Connection, new: DataFile, most: int | None) -> None:
    if most is None:
        return
    query = "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE tenant = ? AND purpose = ?"
    held = db.execute(query, (new.tenant, FINE_TUNE)).fetchone()[0]
    if held + new.num_bytes > most:
        raise TooManyJobs(
            f"this tenant's data files take {held} bytes, and {new.num_bytes} more are over the limit of {most}: "
            "delete some",
            param="file",
        )


def _file_of(row: dict[str, object]) -> DataFile:
    facts = json.loads(str(row["facts"]))
    summary = facts["summary"]
    if summary is not None:
        summary = DataSummary(**{**summary, "tasks": tuple(summary["tasks"])})
    return DataFile(
        id=str(row["id"]),
        tenant=str(row["tenant"]),
        created=int(float(str(row["created"]))),
        purpose=str(row["purpose"]),
        filename=facts["filename"],
        num_bytes=int(str(row["num_bytes"])),
        expires=None if row["expires"] is None else int(float(str(row["expires"]))),
        summary=summary,
    )
