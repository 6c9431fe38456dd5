"""`GET /v1/adapters/{name}/files/{file}`: the canonical download, `adapter.json` and `adapter.safetensors`.

Owns the headers of a download: entity tag, one byte range, not-modified. Invariant: what is sent was hashed through the
very descriptor that is read, and memory holds one piece of it at a time.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from typing import BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from adapters_store.errors import AdapterCorrupt
from adapters_store.manifest import MANIFEST_NAME
from adapters_store.object_files import open_object_file
from serve.api.errors import error_responses
from serve.api.state import api_state

_PIECE_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,15})-(?P<last>[0-9]{0,15})\Z")
_TYPES = {True: "application/json", False: "application/octet-stream"}
_CONTENT: dict[str, object] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _TYPES.values()}
_RESPONSES = error_responses() | {
    200: {"description": "The file", "content": _CONTENT},
    206: {"description": "The part that `Range` asks for", "content": _CONTENT},
    304: {"description": "`If-None-Match` names these bytes"},
    416: {"description": "`Range` begins behind the end"},
}

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=_RESPONSES)


@router.get("/{name}/files/{file}", response_class=Response)
async def get_file(request: Request, name: str, file: str) -> Response:
    """Return one of the two canonical files of an adapter's current version; the digest covers both."""
    state = api_state(request)
    version = await asyncio.to_thread(state.store.get, name)
    # hashing a large file takes seconds of a thread that tokenising must not wait for
    await state.uploads.run(state.store.bring, version.digest)
    opened, sha256 = await state.uploads.run(open_object_file, state.config.store_dir, version.digest, file)
    return _answer(request, opened, sha256, _TYPES[file == MANIFEST_NAME])


def _answer(request: Request, file: BinaryIO, sha256: str, media_type: str) -> Response:
    size = os.fstat(file.fileno()).st_size
    tag = f'"sha256:{sha256}"'
    headers = {"etag": tag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        file.close()
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    # a range of other bytes than the client thinks is none
    if request.headers.get("if-range", tag) != tag:
        wanted = None
    begin, end = _range(wanted, size)
    if begin >= end:
        file.close()
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
    headers["content-length"] = str(end - begin)
    is_part = (begin, end) != (0, size)
    if is_part:
        headers["content-range"] = f"bytes {begin}-{end - 1}/{size}"
    return StreamingResponse(_pieces(file, begin, end), 206 if is_part else 200, headers, media_type)


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Return the first byte and the one behind the last; anything but one plain range means the whole file."""
    match = _RANGE.match(header or "")
    if match is None or not (match["first"] or match["last"]):
        return 0, size
    if not match["first"]:
        return max(0, size - int(match["last"])), size
    first = int(match["first"])
    if not match["last"]:
        return first, size
    last = int(match["last"])
    return (0, size) if last < first else (first, min(last + 1, size))


async def _pieces(file: BinaryIO, begin: int, end: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(begin)
        while begin < end:
            piece = await asyncio.to_thread(file.read, min(_PIECE_BYTES, end - begin))
            if not piece:
                raise AdapterCorrupt("the adapter's file became shorter while it was sent; ask for it again")
            begin += len(piece)
            yield piece
