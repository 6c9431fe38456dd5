"""Adapter uploads on their way from the socket into the store.

Owns the fields of `POST /v1/adapters`, the threads that uploads may use and how many may run at once; the store owns
staging, checks and publication. Invariant: however an upload ends, its staging folder is given back, and uploads never
take the threads that requests need.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

from adapters_store.names import check_name
from adapters_store.store import AdapterStore, AdapterVersion, Upload
from adapters_store.upload import PART_NAMES, PartWriter
from serve.api.multipart import MultipartReader, PartData, PartEvent, PartStart
from serve.errors import InvalidRequest, RateLimited

MAX_RUNNING_UPLOADS = 16
_NUM_THREADS = 4
_MAX_NAME_BYTES = 256
# data goes to the disk in pieces of this size: one thread hop each
_WRITE_BYTES = 1 << 20

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class UploadPool:
    """The threads and places of all running uploads."""

    def __init__(self, max_running: int = MAX_RUNNING_UPLOADS) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="upload")
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
        """Run a blocking call in a thread; a cancelled caller still waits for it, since a thread cannot be stopped."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False)


async def receive_upload(
    store: AdapterStore, served_name: str, boundary: bytes, body: AsyncIterator[bytes], pool: UploadPool
) -> AdapterVersion:
    """Stream one upload into the store and publish it.

    Raises:
        InvalidRequest: the form is wrong. StoreError: the store refuses the adapter.
        RateLimited: too many uploads run. ClientDisconnect: the client left; nothing is kept.
    """
    with pool.place():
        upload = await pool.run(store.stage)
        try:
            form = _Form(upload, served_name)
            await _receive_parts(form, boundary, body, pool)
            name = form.finish()
            return await pool.run(upload.commit, name)
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

    def __init__(self, upload: Upload, served_name: str) -> None:
        self._upload = upload
        self._served_name = served_name
        self._name: str | None = None
        self._name_bytes = bytearray()
        self._num_files = 0
        # None: the part is the name
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
            else:
                self._name = _read_name(self._name_bytes)
                check_name(self._name, self._served_name)

    def finish(self) -> str:
        """Return the name; raises InvalidRequest when a field is missing."""
        if self._name is None:
            raise InvalidRequest("field 'name' is missing: the adapter's name", param="name")
        if self._num_files == 0:
            raise InvalidRequest(f"no file was sent; send {' and '.join(PART_NAMES)} as 'files'", param="files")
        return self._name

    def _start_part(self, part: PartStart) -> None:
        if part.field == "name" and part.filename is None:
            if self._name is not None:
                raise InvalidRequest("field 'name' occurs twice", param="name")
            self._writer = None
        elif part.field != "files":
            raise InvalidRequest(f"unknown field {part.field[:64]!a}; this form has 'name' and 'files'")
        elif not part.filename:
            raise InvalidRequest(f"each part 'files' needs a file name: {' or '.join(PART_NAMES)}", param="files")
        else:
            self._num_files += 1
            self._writer = self._upload.open_part(part.filename)

    def _write(self, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data)
            return
        self._name_bytes += data
        if len(self._name_bytes) > _MAX_NAME_BYTES:
            raise InvalidRequest(f"field 'name' is longer than {_MAX_NAME_BYTES} bytes", param="name")


def _read_name(name: bytearray) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("field 'name' is not UTF-8", param="name") from None
