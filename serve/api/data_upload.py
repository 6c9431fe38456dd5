"""A data file on its way from the socket into the store: the form of `POST /v1/files`.

Owns the fields of the form; staging, check and bounds are the store's. Invariant: however an upload ends, what it
staged is given back.
"""

from collections.abc import AsyncIterator, Iterable
from functools import partial

from adapters_store.jobs.files import FINE_TUNE, DataFile, DataFiles, DataUpload
from serve.api.json_body import show
from serve.api.multipart import MultipartReader, PartData, PartEvent, PartStart
from serve.api.uploads import UploadPool
from serve.errors import InvalidRequest, InvalidValue

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("purpose", _ANCHOR, _SECONDS)
_MAX_FIELD_BYTES = 64
_MAX_FILENAME_CHARS = 256
# data goes to the disk in pieces of this size: one thread hop each
_WRITE_BYTES = 1 << 20


async def receive_data_file(
    files: DataFiles,
    tenant: str,
    boundary: bytes,
    body: AsyncIterator[bytes],
    pool: UploadPool,
    *,
    max_tenant_bytes: int | None,
) -> DataFile:
    """Stream one file into the store, check its lines and keep it.

    Raises:
        InvalidRequest: the form is wrong. InvalidData: its lines are. StoreError: bounds, or the disk.
        RateLimited: too many uploads run. ClientDisconnect: the client left; nothing is kept.
    """
    with pool.place():
        upload = await pool.run(files.stage)
        try:
            form = _Form(upload)
            await _receive(form, boundary, body, pool)
            expiry = form.finish()
            keep = partial(files.keep, upload, tenant, form.filename)
            return await pool.commit(partial(keep, max_tenant_bytes=max_tenant_bytes, expires_after_s=expiry))
        finally:
            await pool.run(upload.close)


async def _receive(form: "_Form", boundary: bytes, body: AsyncIterator[bytes], pool: UploadPool) -> None:
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
    """The fields seen so far. Called in one thread at a time."""

    def __init__(self, upload: DataUpload) -> None:
        self._upload = upload
        self._fields: dict[str, bytearray] = {}
        # the text field that is being received; None: the file
        self._field: str | None = None
        self._has_file = False
        self.filename = ""

    def take(self, events: Iterable[PartEvent]) -> None:
        """Do what the parts say; raises InvalidRequest, StoreError."""
        for event in events:
            if isinstance(event, PartStart):
                self._start(event)
            elif isinstance(event, PartData):
                self._write(event.data)

    def finish(self) -> int | None:
        """Return the seconds until the file expires; raises InvalidRequest if the form is not whole."""
        if not self._has_file:
            raise InvalidRequest("field 'file' is missing: the data file", param="file")
        texts = {name: bytes(value).decode("utf-8", "replace") for name, value in self._fields.items()}
        purpose = texts.get("purpose")
        if purpose is None:
            raise InvalidRequest("field 'purpose' is missing; send 'fine-tune'", param="purpose")
        if purpose != FINE_TUNE:
            raise InvalidValue(f"purpose is {show(purpose)}; this server takes 'fine-tune' only", param="purpose")
        if _ANCHOR not in texts and _SECONDS not in texts:
            return None
        if texts.get(_ANCHOR) != "created_at":
            raise InvalidValue("expires_after.anchor must be 'created_at'", param="expires_after")
        seconds = texts.get(_SECONDS, "")
        if not (seconds.isascii() and seconds.isdigit() and MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S):
            raise InvalidValue(
                f"expires_after.seconds must be a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
                param="expires_after",
            )
        return int(seconds)

    def _start(self, part: PartStart) -> None:
        self._field = None
        if part.field in _FIELDS and part.filename is None:
            if part.field in self._fields:
                raise InvalidRequest(f"field '{part.field}' occurs twice", param=part.field)
            self._field, self._fields[part.field] = part.field, bytearray()
        elif part.field != "file":
            raise InvalidRequest(f"unknown field {part.field[:64]!a}; this form has 'file', {', '.join(_FIELDS)}")
        elif self._has_file:
            raise InvalidRequest("field 'file' occurs twice; send one file per request", param="file")
        else:
            self._has_file = True
            self.filename = part.filename or ""
            is_named = 0 < len(self.filename) <= _MAX_FILENAME_CHARS and self.filename.isprintable()
            if not is_named:
                raise InvalidRequest(
                    f"the part 'file' needs a file name of 1 to {_MAX_FILENAME_CHARS} printable characters",
                    param="file",
                )

    def _write(self, data: bytes) -> None:
        if self._field is None:
            self._upload.write(data)
            return
        text = self._fields[self._field]
        text += data
        if len(text) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"field '{self._field}' is longer than {_MAX_FIELD_BYTES} bytes", param=self._field)
