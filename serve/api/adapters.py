"""The routes of `/v1/adapters`: upload, list, inspect, delete; what names mean is moved in `versions`.

Owns the JSON shape of an adapter; the store decides, the engine holds. Invariant: 201 is answered only after the
version is durable, and nothing here blocks the event loop on the disk.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from adapters_store.formats import FORMATS
from adapters_store.pointers import Pointers
from adapters_store.signatures import shown
from adapters_store.store import AdapterVersion
from serve.api.adapter_place import ON_DISK, Place, places_of
from serve.api.errors import error_responses
from serve.api.multipart import read_boundary
from serve.api.paging import MAX_LIMIT, page_of
from serve.api.state import ApiState, api_state
from serve.api.uploads import receive_upload
from serve.api.versions import canary_json
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
                    "promote": {"type": "string", "enum": ["true", "false"]},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
        }
    },
}


@router.post("", status_code=201, openapi_extra={"requestBody": _UPLOAD_BODY})
async def upload_adapter(request: Request) -> JSONResponse:
    """Publish an adapter as the next version of `name`: field `name`, one part `files` per file.

    The name means that version from then on; with `promote` false it keeps its meaning, if it has one, and the version
    waits for `POST /v1/adapters/{name}/promote` or a canary.
    `format` says which external format the files are in (found by their names by default); `options` is a JSON object
    with what such files do not store.
    """
    state = api_state(request)
    boundary = read_boundary(request.headers.get("content-type", ""))
    version = await receive_upload(state.store, boundary, request.stream(), state.uploads, state.proving())
    await state.record(AuditEvent.UPLOAD, version.name, f"version {version.version} sha256:{version.digest}")
    return JSONResponse(adapter_card(version), 201)


@router.get("")
async def list_adapters(
    request: Request,
    family: Annotated[str | None, Query(max_length=64)] = None,
    state: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int | None, Query(ge=1, le=MAX_LIMIT)] = None,
    after: Annotated[str | None, Query(max_length=256)] = None,
) -> Json:
    """Return the current version of every adapter, or of those of a family or in a state (ready, host, stored, ...)."""
    api = api_state(request)
    wanted = {"family": family, "state": state}
    versions, places = await asyncio.to_thread(api.store.list), places_of(api.engine.stats)
    cards = [adapter_card(version) | _on_this_replica(api, version, places) for version in versions]
    cards = [card for card in cards if all(value in (None, card[key]) for key, value in wanted.items())]
    return page_of(cards, "name", after=after, limit=limit)


@router.get("/{name}")
async def get_adapter(request: Request, name: str) -> Json:
    """Return the current version of one adapter, and what else its name points to."""
    state = api_state(request)
    version = await asyncio.to_thread(state.store.get, name)
    pointers = await asyncio.to_thread(state.store.pointers, name)
    pointing = {"aliases": dict(pointers.aliases), "canary": canary_json(pointers) if pointers.canary else None}
    return adapter_card(version) | _on_this_replica(state, version, places_of(state.engine.stats)) | pointing


@router.delete("/{name}")
async def delete_adapter(request: Request, name: str) -> Json:
    """Forget an adapter with all versions and aliases; requests that run on it finish."""
    await remove_adapter(api_state(request), name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.get("/{name}/versions")
async def list_versions(request: Request, name: str) -> Json:
    """Return all versions of one adapter, oldest first."""
    state = api_state(request)
    versions = await asyncio.to_thread(state.store.versions, name)
    pointers = await asyncio.to_thread(state.store.pointers, name)
    return _list_of([adapter_card(version) | _pointed(version, pointers) for version in versions])


async def remove_adapter(state: ApiState, name: str) -> None:
    """Delete an adapter with its grants and let the engine forget its images; raises AdapterNotFound."""
    stored = await asyncio.to_thread(state.store.owned_name, name)
    versions = await asyncio.to_thread(state.store.versions, name)
    # first the grants: what is left of a crash between the two is an adapter that nobody else sees
    if state.door.tenancy is not None:
        await asyncio.to_thread(state.door.tenancy.keys.withdraw, stored, None)
    await asyncio.to_thread(state.store.delete, name)
    await state.record(AuditEvent.DELETE, name)
    digests = {version.digest for version in versions}
    await state.pins.forget(digests)
    for digest in digests:
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
        "signature": shown(version.signature),
        "provenance": version.provenance,
    }


def _pointed(version: AdapterVersion, pointers: Pointers) -> Json:
    number = version.version
    return {
        "current": pointers.current == number,
        "aliases": sorted(alias for alias, target in pointers.aliases.items() if target == number),
        "percent": pointers.share / 100 if pointers.canary == number else None,
    }


def _on_this_replica(state: ApiState, version: AdapterVersion, places: Mapping[str, Place]) -> Json:
    """Say where the image is, what it takes there, who holds it, and when it was last asked for."""
    found = places.get(version.digest, ON_DISK)
    return {
        "state": "stored" if found is ON_DISK else found.state,
        "tier": found.tier,
        "bytes_in_memory": found.num_device_bytes + found.num_host_bytes,
        "device_bytes": found.num_device_bytes,
        "host_bytes": found.num_host_bytes,
        "pins": found.num_pins,
        "last_used": state.last_uses.of(version.digest),
    }


def _list_of(data: Sequence[Json]) -> Json:
    return {"object": "list", "data": list(data)}
