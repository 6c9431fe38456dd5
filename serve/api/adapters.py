"""The routes of `/v1/adapters`: upload, list, inspect, alias, delete.

Owns the JSON shape of an adapter; the store decides, the engine holds. Invariant: 201 is answered only after the
version is durable, and nothing here blocks the event loop on the disk.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from adapters_store.formats import FORMATS
from adapters_store.store import AdapterVersion
from serve.api.engine_gateway import EngineGateway
from serve.api.errors import error_responses
from serve.api.json_body import read_model
from serve.api.multipart import read_boundary
from serve.api.openapi import json_endpoint
from serve.api.schemas_adapters import AliasRequest
from serve.api.state import ApiState, api_state
from serve.api.uploads import receive_upload
from serve.tenants.audit import AuditEvent

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=error_responses())

Json = dict[str, object]

_UPLOAD_BODY: Json = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string"},
                    "format": {"type": "string", "enum": [*FORMATS]},
                    "options": {"type": "string"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
        }
    },
}


@router.post("", status_code=201, openapi_extra={"requestBody": _UPLOAD_BODY})
async def upload_adapter(request: Request) -> JSONResponse:
    """Publish an adapter as the next version of `name`: field `name`, one part `files` per file.

    `format` says which external format the files are in (found by their names by default); `options` is a JSON object
    with what such files do not store.
    """
    state = api_state(request)
    boundary = read_boundary(request.headers.get("content-type", ""))
    version = await receive_upload(state.store, boundary, request.stream(), state.uploads, state.proving())
    await state.record(AuditEvent.UPLOAD, version.name, f"version {version.version} sha256:{version.digest}")
    return JSONResponse(adapter_card(version), 201)


@router.get("")
async def list_adapters(request: Request) -> Json:
    """Return the current version of every adapter."""
    state = api_state(request)
    versions = await asyncio.to_thread(state.store.list)
    return _list_of([adapter_card(version) | _held(state.engine, version) for version in versions])


@router.get("/{name}")
async def get_adapter(request: Request, name: str) -> Json:
    """Return the current version of one adapter."""
    state = api_state(request)
    version = await asyncio.to_thread(state.store.get, name)
    return adapter_card(version) | _held(state.engine, version)


@router.delete("/{name}")
async def delete_adapter(request: Request, name: str) -> Json:
    """Forget an adapter with all versions and aliases; requests that run on it finish."""
    await remove_adapter(api_state(request), name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.get("/{name}/versions")
async def list_versions(request: Request, name: str) -> Json:
    """Return all versions of one adapter, oldest first."""
    versions = await asyncio.to_thread(api_state(request).store.versions, name)
    return _list_of([adapter_card(version) for version in versions])


@router.post("/{name}/aliases", **json_endpoint(AliasRequest))
async def set_alias(request: Request, name: str) -> Json:
    """Let `name:alias` mean a version, for example `:stable`."""
    state = api_state(request)
    body = await read_model(request, AliasRequest)
    await asyncio.to_thread(state.store.set_alias, name, body.alias, body.version)
    await state.record(AuditEvent.ALIAS, name, f"{body.alias} is version {body.version}")
    return {"name": name, "alias": body.alias, "version": body.version}


async def remove_adapter(state: ApiState, name: str) -> None:
    """Delete an adapter with its grants and let the engine forget its images; raises AdapterNotFound."""
    stored = await asyncio.to_thread(state.store.owned_name, name)
    versions = await asyncio.to_thread(state.store.versions, name)
    # first the grants: what is left of a crash between the two is an adapter that nobody else sees
    if state.door.tenancy is not None:
        await asyncio.to_thread(state.door.tenancy.keys.withdraw, stored, None)
    await asyncio.to_thread(state.store.delete, name)
    await state.record(AuditEvent.DELETE, name)
    for digest in {version.digest for version in versions}:
        state.engine.unload_adapter(digest)


def adapter_card(version: AdapterVersion) -> Json:
    """Return the JSON of one version, as an upload answers it."""
    return {
        "object": "adapter",
        "name": version.name,
        "version": version.version,
        "digest": f"sha256:{version.digest}",
        "family": version.family,
        "rank": version.rank,
        "bytes": version.num_bytes,
        "dtype": version.dtype,
        "created": version.created,
        "base": version.base,
        "num_virtual_tokens": version.num_virtual_tokens,
        "invocation_tokens": list(version.invocation_tokens),
        "report": asdict(version.report),
        "proof": version.proof,
        "not_probed": version.not_probed if version.proof is None else None,
    }


def _held(engine: EngineGateway, version: AdapterVersion) -> Json:
    held = () if engine.stats is None else engine.stats.adapters
    for adapter in held:
        if adapter.digest == version.digest:
            return {"tier": adapter.tier, "pins": adapter.num_pins}
    return {"tier": "disk", "pins": 0}


def _list_of(data: Sequence[Json]) -> Json:
    return {"object": "list", "data": list(data)}
