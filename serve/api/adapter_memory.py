"""The routes that say and change which adapters are in memory: status, prefetch, pin, unpin, evict.

Owns the JSON of an adapter's place on this replica; the engine decides. Here `name` may also be `name@3`,
`name@sha256:...` or `name:alias`, and the action is what follows the last colon. Invariant: what is said comes from the
last heartbeat, so nothing but the operator's own commands waits for the engine.
"""

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from adapters_store.errors import AdapterNotFound
from adapters_store.store import AdapterRef
from serve.api.adapter_place import ON_DISK, places_of
from serve.api.engine_gateway import EngineGateway
from serve.api.errors import error_responses
from serve.api.json_body import show
from serve.api.state import ApiState, api_state

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=error_responses())

Json = dict[str, object]


@router.get("/{name}/status")
async def get_status(request: Request, name: str) -> Json:
    """Say where the adapter's image is on this replica, who holds it there, and what became of it so far."""
    state = api_state(request)
    return _status(state, await _resolve(state, name))


@router.post("/{name}:prefetch", status_code=202)
async def prefetch_adapter(request: Request, name: str) -> Json:
    """Bring the adapter's image into memory ahead of its first request; answers before it is there."""
    state = api_state(request)
    ref = await _resolve(state, name, to_serve=True)
    state.engine.load_adapter(ref.digest)
    return _status(state, ref)


@router.post("/{name}:pin", status_code=202)
async def pin_adapter(request: Request, name: str) -> Json:
    """Load the adapter and keep it in memory until it is unpinned or deleted, over restarts; answers at once.

    409 when that would leave no room for others.
    """
    state = api_state(request)
    ref = await _resolve(state, name, to_serve=True)
    await state.pins.pin(ref.digest)
    return _status(state, ref)


@router.post("/{name}:unpin")
async def unpin_adapter(request: Request, name: str) -> Json:
    """Take a pin back: the adapter stays in memory until its room is needed."""
    state = api_state(request)
    ref = await _resolve(state, name)
    await state.pins.unpin(ref.digest)
    return _status(state, ref)


@router.post("/{name}:evict", responses={202: {"description": "It goes when the last running request lets go"}})
async def evict_adapter(request: Request, name: str) -> JSONResponse:
    """Free the adapter's memory: `bytes_freed` at once, or, `pending`, when no running request holds it any more.

    409 while it is pinned.
    """
    state = api_state(request)
    ref = await _resolve(state, name)
    done = await state.engine.desk.evict(ref.digest)
    body = _identity(ref) | {"bytes_freed": done.num_bytes_freed, "pending": done.is_pending}
    return JSONResponse(body, 202 if done.is_pending else 200)


async def _resolve(state: ApiState, name: str, *, to_serve: bool = False) -> AdapterRef:
    """Return the version that a name means.

    Raises:
        AdapterNotFound: none that this principal may see. SignatureInvalid: it is `to_serve`, and may not be.
    """
    ref = await asyncio.to_thread(partial(state.store.resolve, name, to_serve=to_serve))
    if ref is None:
        raise AdapterNotFound(f"there is no adapter {show(name)}; GET /v1/adapters lists them", param="name")
    if state.metrics is not None:
        state.metrics.name_adapter(ref.digest, state.store.metrics_name(ref))
    return ref


def _identity(ref: AdapterRef) -> Json:
    return {"name": ref.name, "version": ref.version, "digest": f"sha256:{ref.digest}"}


def _status(state: ApiState, ref: AdapterRef) -> Json:
    engine, digest = state.engine, ref.digest
    history, found = engine.desk.history(digest), places_of(engine.stats).get(digest, ON_DISK)
    return _identity(ref) | {
        "engine": _engine_state(engine),
        "state": found.state,
        "tier": found.tier,
        "bytes": found.num_device_bytes + found.num_host_bytes,
        "device_bytes": found.num_device_bytes,
        "host_bytes": found.num_host_bytes,
        "pins": found.num_pins,
        "pinned": engine.desk.is_pinned(digest),
        "pin_error": _pin_error(engine, digest),
        "loads": history.num_loads,
        "evictions": history.num_evictions,
        "fetches": history.num_fetches,
        "last_load_seconds": history.load_s,
        "last_fetch_seconds": history.fetch_s,
        "replica": state.replica.describe(),
    }


def _engine_state(engine: EngineGateway) -> str:
    if engine.is_draining:
        return "draining"
    if engine.is_ready:
        return "serving"
    return "starting" if engine.is_live else "down"


def _pin_error(engine: EngineGateway, digest: str) -> str | None:
    pins = () if engine.stats is None else engine.stats.operator_pins
    return next((pin.error for pin in pins if pin.digest == digest), None)
