"""The routes that say and change which version a name means: promote, rollback, canary, aliases, history, removal.

Owns their JSON; the store decides. Invariants: each change is one atomic move of one name, durable and in the audit log
when it is answered; running requests finish on the version they began with.
"""

import asyncio

from fastapi import APIRouter, Request

from adapters_store.pointers import Move, Pointers, Sticky
from adapters_store.store import AdapterVersion
from serve.api.errors import error_responses
from serve.api.json_body import read_model
from serve.api.openapi import json_endpoint
from serve.api.schemas_adapters import AliasRequest, CanaryRequest, PromoteRequest
from serve.api.state import api_state
from serve.tenants.audit import AuditEvent

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=error_responses())

Json = dict[str, object]


@router.post("/{name}/promote", **json_endpoint(PromoteRequest))
async def promote(request: Request, name: str) -> Json:
    """Let the plain name, or its alias `to`, mean a version; promoting the canary to the plain name ends the canary."""
    state = api_state(request)
    body = await read_model(request, PromoteRequest)
    version = await asyncio.to_thread(state.store.promote, name, body.chosen, body.to)
    place = "the name" if body.to is None else body.to
    await state.record(AuditEvent.PROMOTE, name, f"{place} is version {version.version} sha256:{version.digest}")
    return _moved(name, version) | {"to": body.to}


@router.post("/{name}/rollback")
async def roll_back(request: Request, name: str) -> Json:
    """Let the plain name mean what it meant before; each call goes one step further back."""
    state = api_state(request)
    version = await asyncio.to_thread(state.store.rollback, name)
    await state.record(AuditEvent.ROLLBACK, name, f"to version {version.version} sha256:{version.digest}")
    return _moved(name, version)


@router.get("/{name}/canary")
async def get_canary(request: Request, name: str) -> Json:
    """Return the canary: its version and share; `version` is null where there is none."""
    pointers = await asyncio.to_thread(api_state(request).store.pointers, name)
    return {"name": name} | canary_json(pointers)


@router.post("/{name}/canary", **json_endpoint(CanaryRequest))
async def set_canary(request: Request, name: str) -> Json:
    """Give a version a share of the name's requests, always those of the same users; `name:canary` means it."""
    state = api_state(request)
    body = await read_model(request, CanaryRequest)
    sticky = Sticky(body.sticky)
    pointers = await asyncio.to_thread(state.store.set_canary, name, body.chosen, body.percent, sticky)
    canary = {"name": name} | canary_json(pointers)
    await state.record(AuditEvent.CANARY, name, f"version {canary['version']} gets {canary['percent']} %")
    return canary


@router.delete("/{name}/canary")
async def end_canary(request: Request, name: str) -> Json:
    """End the canary: everybody gets what the plain name means."""
    return await _remove_alias(request, name, "canary")


@router.post("/{name}/aliases", **json_endpoint(AliasRequest))
async def set_alias(request: Request, name: str) -> Json:
    """Let `name:alias` mean a version, for example `:stable`."""
    state = api_state(request)
    body = await read_model(request, AliasRequest)
    await asyncio.to_thread(state.store.set_alias, name, body.alias, body.version)
    await state.record(AuditEvent.ALIAS, name, f"{body.alias} is version {body.version}")
    return {"name": name, "alias": body.alias, "version": body.version}


@router.delete("/{name}/aliases/{alias}")
async def remove_alias(request: Request, name: str, alias: str) -> Json:
    """Forget `name:alias`; the version stays."""
    return await _remove_alias(request, name, alias)


@router.delete("/{name}/versions/{version}")
async def remove_version(request: Request, name: str, version: int) -> Json:
    """Remove one version; 409 while the name, an alias or a rollback needs it. Requests that run on it finish."""
    state = api_state(request)
    gone = await asyncio.to_thread(state.store.remove_version, name, version)
    await state.record(AuditEvent.DELETE, name, f"version {gone.version} sha256:{gone.digest}")
    return {"id": f"{name}@{gone.version}", "object": "adapter", "deleted": True}


@router.get("/{name}/history")
async def get_history(request: Request, name: str) -> Json:
    """Return who pointed the name and its aliases where, newest first; for the adapter's owner."""
    moves = await asyncio.to_thread(api_state(request).store.moves, name)
    return {"object": "list", "data": [_move_json(move) for move in reversed(moves)]}


def canary_json(pointers: Pointers) -> Json:
    """Return the JSON of a name's canary."""
    return {
        "version": pointers.aliases.get("canary"),
        "percent": pointers.share / 100,
        "sticky": pointers.sticky.value,
    }


async def _remove_alias(request: Request, name: str, alias: str) -> Json:
    state = api_state(request)
    await asyncio.to_thread(state.store.remove_alias, name, alias)
    await state.record(AuditEvent.ALIAS, name, f"{alias} is no more")
    return {"name": name, "alias": alias, "deleted": True}


def _moved(name: str, version: AdapterVersion) -> Json:
    return {"name": name, "version": version.version, "digest": f"sha256:{version.digest}"}


def _move_json(move: Move) -> Json:
    is_canary = move.what == "canary"
    return {
        "object": "adapter.move",
        "what": move.what.value,
        "version": move.version,
        "alias": move.alias or None,
        "percent": move.share / 100 if is_canary else None,
        "sticky": move.sticky.value if is_canary else None,
        "at": move.at,
        "by": move.by or None,
    }
