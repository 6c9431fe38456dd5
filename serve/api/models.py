"""GET /v1/models, and GET and DELETE of one: the base and its adapters as cards.

Owns the card's shape and the list's filters. Invariant: `parent` is the base's name for adapters and null for the base
(routers read exactly `id` and `parent`), and `root` is never a path.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request

from adapters_store.store import AdapterVersion
from serve.api.adapter_place import ON_DISK, Place, places_of
from serve.api.adapters import remove_adapter
from serve.api.errors import error_responses
from serve.api.paging import MAX_LIMIT, page_of
from serve.api.selection import resolve_adapter
from serve.api.state import ApiState, api_state
from serve.errors import InvalidRequest, InvalidValue

Json = dict[str, object]

router = APIRouter(responses=error_responses())

OWNER = "chorale"


@router.get("/v1/models")
async def list_models(
    request: Request,
    limit: Annotated[int | None, Query(ge=1, le=MAX_LIMIT)] = None,
    after: Annotated[str | None, Query(max_length=256)] = None,
    parent: Annotated[str | None, Query(max_length=256)] = None,
    family: Annotated[str | None, Query(max_length=64)] = None,
    state: Annotated[str | None, Query(max_length=64)] = None,
) -> Json:
    """List the base, then its adapters by name."""
    api = api_state(request)
    versions = await asyncio.to_thread(api.store.list)
    places = places_of(api.engine.stats)
    cards = [_adapter_card(api, version.name, version, places) for version in versions]
    if parent is not None:
        cards = cards if parent == api.config.served_model_name else []
    elif family is None and state is None:
        cards = [_base_card(api), *cards]
    cards = [card for card in cards if _matches(card, "family", family) and _matches(card, "state", state)]
    return page_of(cards, "id", after=after, limit=limit)


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Json:
    """Return one card; versions and aliases are found too."""
    api = api_state(request)
    ref = await resolve_adapter(api, model_id)
    if ref is None:
        return _base_card(api)
    versions = await asyncio.to_thread(api.store.versions, ref.name)
    version = next(version for version in versions if version.version == ref.version)
    return _adapter_card(api, model_id, version, places_of(api.engine.stats))


@router.delete("/v1/models/{model_id:path}")
async def delete_model(request: Request, model_id: str) -> Json:
    """Unregister an adapter with all its versions; requests that run on it finish."""
    api = api_state(request)
    ref = await resolve_adapter(api, model_id)
    if ref is None:
        raise InvalidRequest("the base model cannot be deleted", param="model")
    if ref.name != model_id:
        raise InvalidValue(
            f"a version or alias cannot be deleted alone; delete the adapter {ref.name!r}", param="model"
        )
    await remove_adapter(api, ref.name)
    return {"id": model_id, "object": "model", "deleted": True}


def _base_card(api: ApiState) -> Json:
    ready = api.engine.ready
    return {
        "id": api.config.served_model_name,
        "object": "model",
        "created": api.started,
        "owned_by": OWNER,
        "root": api.config.served_model_name,
        "parent": None,
        "max_model_len": ready.max_model_len if ready is not None else None,
    }


def _adapter_card(api: ApiState, model_id: str, version: AdapterVersion, places: Mapping[str, Place]) -> Json:
    found = places.get(version.digest, ON_DISK)
    return {
        **_base_card(api),
        "id": model_id,
        "created": version.created,
        "root": f"sha256:{version.digest}",
        "parent": api.config.served_model_name,
        "adapter": {
            "family": version.family,
            "rank": version.rank,
            "version": version.version,
            "digest": f"sha256:{version.digest}",
            "tier": found.tier,
            "bytes": version.num_bytes,
            "state": found.state if version.digest in places else "stored",
        },
    }


def _matches(card: Json, key: str, wanted: str | None) -> bool:
    adapter = card.get("adapter")
    return wanted is None or (isinstance(adapter, dict) and adapter[key] == wanted)
