"""`/v1/adapters/{name}/grants`: which other tenants may use an adapter.

Owns the routes; who may see what is decided in `owned_adapters`. Invariant: only an adapter's owner or an admin grants
it, and only an admin grants it to everybody.
"""

import asyncio

from fastapi import APIRouter, Request

from serve.api.errors import error_responses
from serve.api.json_body import read_model
from serve.api.openapi import json_endpoint
from serve.api.schemas_adapters import GrantRequest
from serve.api.state import ApiState, api_state
from serve.api.tenancy import Tenancy
from serve.errors import InvalidRequest, NotFound, PermissionDenied
from serve.tenants.audit import AuditEvent
from serve.tenants.key_store import EVERYBODY, Grant
from serve.tenants.principal import Scope, check_tenant

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=error_responses())

Json = dict[str, object]


@router.get("/{name}/grants")
async def list_grants(request: Request, name: str) -> Json:
    """Return the tenants that may use an adapter of one's own; `*` is everybody."""
    state = api_state(request)
    tenancy, stored = await _owned(state, name)
    snapshot = await asyncio.to_thread(tenancy.keys.snapshot)
    return {"object": "list", "data": [grant.tenant for grant in snapshot.grants if grant.adapter == stored]}


@router.post("/{name}/grants", **json_endpoint(GrantRequest))
async def grant(request: Request, name: str) -> Json:
    """Let another tenant use an adapter, its later versions included, until the grant is withdrawn."""
    state = api_state(request)
    body = await read_model(request, GrantRequest)
    if body.tenant != EVERYBODY:
        check_tenant(body.tenant)
    tenancy, stored = await _owned(state, name)
    if body.tenant == EVERYBODY and Scope.ADMIN not in state.store.principal.scopes:
        raise PermissionDenied("only a key with the scope admin shares an adapter with everybody", param="tenant")
    await state.record(AuditEvent.SHARED, name, f"with {body.tenant}")
    await asyncio.to_thread(tenancy.keys.grant, Grant(stored, body.tenant))
    return {"name": name, "tenant": body.tenant}


@router.delete("/{name}/grants/{tenant}")
async def withdraw(request: Request, name: str, tenant: str) -> Json:
    """Withdraw one tenant's grant; within a second it sees the adapter no more."""
    state = api_state(request)
    tenancy, stored = await _owned(state, name)
    if not await asyncio.to_thread(tenancy.keys.withdraw, stored, tenant):
        raise NotFound(f"the adapter is not shared with {ascii(tenant)[:80]}", param="tenant")
    await state.record(AuditEvent.SHARED, name, f"no longer with {tenant}")
    return {"name": name, "tenant": tenant, "deleted": True}


async def _owned(state: ApiState, name: str) -> tuple[Tenancy, str]:
    tenancy = state.door.tenancy
    if tenancy is None:
        raise InvalidRequest("this server has one user, who sees everything; start it with --require-keys for tenants")
    return tenancy, await asyncio.to_thread(state.store.owned_name, name)
