"""Adapter uploads on their way from the socket into the store.

Owns the fields of `POST /v1/adapters`, the threads that uploads may use and how many may run at once; the store owns
staging, checks and publication. Invariant: however an upload ends, its staging folder is given back, and uploads never
take the threads that requests need.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, TypeVarTuple

from adapters_store.formats import MAX_OPTIONS_BYTES, PEFT_PARTS, Declared
from adapters_store.proof import Proving
from adapters_store.store import AdapterVersion, Upload
from adapters_store.upload import PartWriter
from serve.api.multipart import MultipartReader, PartData, PartEvent, PartStart
from serve.api.owned_adapters import OwnedAdapters
from serve.errors import InvalidRequest, RateLimited

MAX_RUNNING_UPLOADS = 16
_NUM_THREADS = 4
# conversions and probes at once: each may be minutes long and needs gigabytes in processes of its own
_NUM_COMMITS = 4
# the text fields of the form, and how long each may be
_MAX_FIELD_BYTES = {"name": 256, "format": 64, "options": MAX_OPTIONS_BYTES, "promote": 8}
# data goes to the disk in pieces of this size: one thread hop each
_WRITE_BYTES = 1 << 20

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class UploadPool:
    """The threads and places of all running uploads; those that receive bytes never wait for one that converts."""

    def __init__(self, max_running: int = MAX_RUNNING_UPLOADS) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="upload")
        self._commits = ThreadPoolExecutor(_NUM_COMMITS, thread_name_prefix="upload-commit")
        self._max_running = max_running
        self._num_running = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for running uploads.

        Raises:
            RateLimited: all are taken.
        """
        if self._num_running >= self._max_running:
            raise RateLimited(f"{self._max_running} uploads are running, the limit; try again", retry_after_s=5)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    async def run(self, call: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run a short call in a thread; a cancelled caller still waits for it, since a thread cannot be stopped."""
        return await _finish(asyncio.get_running_loop().run_in_executor(self._threads, call, *args))

    async def commit(self, call: Callable[[], Result]) -> Result:
        """Convert, prove and publish in a thread; waits for its turn, and as `run` for the end."""
        return await _finish(asyncio.get_running_loop().run_in_executor(self._commits, call))

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False)
        self._commits.shutdown(wait=False)


async def _finish(future: asyncio.Future[Result]) -> Result:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


async def receive_upload(
    store: OwnedAdapters,
    boundary: bytes,
    body: AsyncIterator[bytes],
    pool: UploadPool,
    proving: Proving,
) -> AdapterVersion:
    """Stream one upload into the store, prove and publish it.

    Raises:
        InvalidRequest: the form is wrong. StoreError: the store or the probe refuses the adapter.
        RateLimited: too many uploads run. Unavailable: the engine went away. ClientDisconnect: the client left;
            nothing is kept.
    """
    with pool.place():
        upload = await pool.run(store.stage)
        try:
            form = _Form(upload, store)
            await _receive_parts(form, boundary, body, pool)
            name, declared = form.finish()
            return await pool.commit(partial(store.commit, upload, name, declared, proving, staged=form.is_staged()))
        finally:
            await pool.run(upload.close)


async def _receive_parts(form: "_Form", boundary: bytes, body: AsyncIterator[bytes], pool: UploadPool) -> None:
    reader = MultipartReader(boundary)
    events: list[PartEvent] = []
    num_bytes = 0
    async for chunk in body:
        events += reader.feed(chunk)
        num_bytes += len(chunk)
        if num_bytes >= _WRITE_BYTES:
            await pool.run(form.take, events)
            events, num_bytes = [], 0
    reader.finish()
    await pool.run(form.take, events)


class _Form:
    """The fields seen so far and the part that is being received. Called in one thread at a time."""

    def __init__(self, upload: Upload, store: OwnedAdapters) -> None:
        self._upload = upload
        self._store = store
        self._name: str | None = None
        self._fields: dict[str, bytearray] = {}
        # the text field that is being received; None: the part is a file
        self._field: str | None = None
        self._num_files = 0
        self._writer: PartWriter | None = None

    def take(self, events: Iterable[PartEvent]) -> None:
        """Do what the parts say; the name is checked as soon as it is whole."""
        for event in events:
            if isinstance(event, PartStart):
                self._start_part(event)
            elif isinstance(event, PartData):
                self._write(event.data)
            elif self._writer is not None:
                self._writer.close()
            elif self._field == "name":
                self._name = _read_text(self._fields, "name") or ""
                self._store.check_free(self._name)

    def finish(self) -> tuple[str, Declared]:
        """Return the name and what was declared; raises InvalidRequest when a field is missing, InvalidOption."""
        if self._name is None:
            raise InvalidRequest("field 'name' is missing: the adapter's name", param="name")
        if self._num_files == 0:
            raise InvalidRequest(f"no file was sent; send {' and '.join(PEFT_PARTS)} as 'files'", param="files")
        options = self._fields.get("options")
        declared = Declared.parse(_read_text(self._fields, "format"), None if options is None else bytes(options))
        return self._name, declared

    def is_staged(self) -> bool:
        """Return whether the name is to keep its meaning; raises InvalidRequest."""
        promotes = _read_text(self._fields, "promote") or "true"
        if promotes not in ("true", "false"):
            raise InvalidRequest(f"field 'promote' is {promotes!a}; 'true' or 'false'", param="promote")
        return promotes == "false"

    def _start_part(self, part: PartStart) -> None:
        self._field = self._writer = None
        if part.field in _MAX_FIELD_BYTES and part.filename is None:
            if part.field in self._fields:
                raise InvalidRequest(f"field '{part.field}' occurs twice", param=part.field)
            self._field, self._fields[part.field] = part.field, bytearray()
        elif part.field != "files":
            known = ", ".join(f"'{field}'" for field in _MAX_FIELD_BYTES)
            raise InvalidRequest(f"unknown field {part.field[:64]!a}; this form has {known} and 'files'")
        elif not part.filename:
            raise InvalidRequest(f"each part 'files' needs a file name: {' or '.join(PEFT_PARTS)}", param="files")
        else:
            self._num_files += 1
            self._writer = self._upload.open_part(part.filename)

    def _write(self, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data)
            return
        assert self._field is not None, "data belongs to a part that began"
        text, most = self._fields[self._field], _MAX_FIELD_BYTES[self._field]
        text += data
        if len(text) > most:
            raise InvalidRequest(f"field '{self._field}' is longer than {most} bytes", param=self._field)


def _read_text(fields: dict[str, bytearray], field: str) -> str | None:
    if field not in fields:
        return None
    try:
        return fields[field].decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"field '{field}' is not UTF-8", param=field) from None
