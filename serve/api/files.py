"""The routes of `/v1/files`: the data that jobs train from, and the results that they leave.

Owns the JSON of a file. Invariant: a file that can be listed was checked to its last line.
"""

from collections.abc import AsyncIterator
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from adapters_store.jobs.files import DataFile
from adapters_store.jobs.job import JobPage
from serve.api.data_upload import receive_data_file
from serve.api.errors import error_responses
from serve.api.multipart import read_boundary
from serve.api.state import api_state
from serve.api.training_desk import TrainingDesk
from serve.tenants.audit import AuditEvent

Json = dict[str, object]

MAX_PAGE = 10_000
_PIECE_BYTES = 1 << 20
_UPLOAD_BODY: Json = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["fine-tune"]},
                },
            }
        }
    },
}
_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

router = APIRouter(prefix="/v1/files", tags=["files"], responses=error_responses())


@router.post("", openapi_extra={"requestBody": _UPLOAD_BODY})
async def create(request: Request) -> Json:
    """Keep a data file; every line is checked before this answers."""
    state = api_state(request)
    boundary = read_boundary(request.headers.get("content-type", ""))
    file = await receive_data_file(
        state.training.files,
        state.store.principal.tenant,
        boundary,
        request.stream(),
        state.uploads,
        max_tenant_bytes=state.config.tenant_limits.max_training_bytes,
    )
    await state.record(AuditEvent.DATA_FILE, file.id, f"{file.num_bytes} bytes")
    return file_json(file)


@router.get("")
async def list_files(
    request: Request,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Literal["asc", "desc"] = "desc",
) -> Json:
    """List files by age, newest first unless `order` is asc."""
    state = api_state(request)

    def read() -> JobPage[DataFile]:
        is_newest_first = order == "desc"
        files = state.training.files
        return files.page(state.tenant, purpose=purpose, after=after, limit=limit, newest_first=is_newest_first)

    page = await state.training.ask(read)
    ids = [file.id for file in page.items]
    return {
        "object": "list",
        "data": [file_json(file) for file in page.items],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": page.has_more,
    }


@router.get("/{file_id}")
async def retrieve(request: Request, file_id: str) -> Json:
    """Return one file's facts."""
    state = api_state(request)
    return file_json(await state.training.ask(state.training.files.get, file_id, state.tenant))


@router.get("/{file_id}/content", response_class=Response, responses={200: {"content": _CONTENT}})
async def content(request: Request, file_id: str) -> Response:
    """Return a file's bytes."""
    state = api_state(request)

    def opened() -> tuple[DataFile, BinaryIO]:
        file = state.training.files.get(file_id, state.tenant)
        return file, state.training.files.open(file)

    file, stream = await state.training.ask(opened)
    headers = {"content-length": str(file.num_bytes), "cache-control": "private, no-cache"}
    return StreamingResponse(_pieces(state.training, stream), 200, headers, "application/octet-stream")


@router.delete("/{file_id}")
async def delete(request: Request, file_id: str) -> Json:
    """Forget a file; jobs that were made with it keep what they read."""
    state = api_state(request)
    await state.training.ask(state.training.files.delete, file_id, state.tenant)
    await state.record(AuditEvent.DATA_FILE, file_id, "deleted")
    return {"id": file_id, "object": "file", "deleted": True}


def file_json(file: DataFile) -> Json:
    """Return a file as OpenAI's clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created,
        "expires_at": file.expires,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


async def _pieces(desk: TrainingDesk, stream: BinaryIO) -> AsyncIterator[bytes]:
    with stream:
        while piece := await desk.ask(stream.read, _PIECE_BYTES):
            yield piece
