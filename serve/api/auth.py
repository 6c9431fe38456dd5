"""The door: who calls, and whether the matched route is open to them.

Owns the reading of the `Authorization` header and the decision. Invariants: the decision is made on the matched route,
never on a URL string; a wrong, an expired, a revoked and an unknown key get one answer after the same work; a key that
was revoked opens nothing a second later.
"""

import asyncio
import hmac
from collections.abc import Sequence
from typing import cast

from fastapi import Request

from serve.api.route_scopes import OPEN, required_scopes
from serve.api.tenancy import Tenancy
from serve.config import ApiConfig
from serve.errors import InvalidApiKey, PermissionDenied
from serve.tenants.pepper import tenant_salt
from serve.tenants.principal import Principal, local_principal

_MAX_KEY_CHARS = 512


class Door:
    """The keys of one server: the operator's static ones, and those of the store if keys are required."""

    def __init__(self, static_keys: Sequence[str], tenancy: Tenancy | None) -> None:
        self._static_keys = [key.encode("utf-8") for key in static_keys]
        self.tenancy = tenancy

    @classmethod
    def open(cls, config: ApiConfig) -> "Door":
        """Open what the configuration names.

        Raises:
            StartError: no pepper, or not the one that the keys were made with. Unavailable: the keys cannot be read.
        """
        return cls(config.api_keys, Tenancy.open(config) if config.require_keys else None)

    async def identify(self, authorization: Sequence[str]) -> Principal:
        """Return who sends these `Authorization` headers; without any keys, everybody is the local user.

        Raises:
            InvalidApiKey: not exactly one, or not a valid key. Unavailable: the keys cannot be read.
        """
        principal = self._of_operator(authorization)
        if principal is None and self.tenancy is not None:
            ring = self.tenancy.ring
            if ring.is_stale:
                await asyncio.to_thread(ring.refresh)
            principal = ring.authenticate(_bearer(authorization))
        if principal is None:
            raise InvalidApiKey("no valid API key; send one as 'Authorization: Bearer KEY'")
        return principal

    def recognise(self, authorization: Sequence[str]) -> Principal | None:
        """As `identify`, without waiting; None: no valid key, or the keys have to be read before that can be said."""
        principal = self._of_operator(authorization)
        if principal is None and self.tenancy is not None and not self.tenancy.ring.is_stale:
            principal = self.tenancy.ring.authenticate(_bearer(authorization))
        return principal

    def salt_of(self, principal: Principal) -> str:
        """Return what keeps a tenant's prefix cache apart from all others'; a server of one user needs none."""
        return "" if self.tenancy is None else tenant_salt(self.tenancy.pepper, principal.tenant)

    def shared_with(self, tenant: str) -> frozenset[str]:
        """Return the adapters of others that a tenant may use, by the store's names."""
        return frozenset() if self.tenancy is None else self.tenancy.ring.shared_with(tenant)

    def close(self) -> None:
        """Give back the store of keys."""
        if self.tenancy is not None:
            self.tenancy.keys.close()

    def _of_operator(self, authorization: Sequence[str]) -> Principal | None:
        """Return the local user, who has a static key or needs none."""
        if not self._static_keys and self.tenancy is None:
            return local_principal()
        text = _bearer(authorization)
        sent = text.encode("utf-8", "replace")
        # no early exit: every key is compared
        are_equal = [hmac.compare_digest(sent, key) for key in self._static_keys]
        return local_principal("static") if text and any(are_equal) else None


def _bearer(authorization: Sequence[str]) -> str:
    scheme, _, token = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
    return token.strip()[:_MAX_KEY_CHARS] if scheme.lower() == "bearer" else ""


async def authorise(request: Request) -> None:
    """Let a request pass to its route, or refuse it; afterwards `principal_of` says who calls.

    Raises:
        InvalidApiKey: no valid key. PermissionDenied: a valid one that does not open this route.
    """
    template = getattr(request.scope.get("route"), "path", "")
    scopes = required_scopes(request.method, template)
    if scopes == OPEN:
        return
    door: Door = request.app.state.api.door
    principal = await door.identify(request.headers.getlist("authorization"))
    if scopes is None or not principal.may(scopes):
        if door.tenancy is not None:
            await door.tenancy.denied(principal, f"{request.method} {template}")
        wanted = " or ".join(sorted(scopes or ())) or "none"
        raise PermissionDenied(f"this key may not do this: it needs the scope {wanted}; ask the operator for another")
    request.state.principal = principal


def principal_of(request: Request) -> Principal:
    """Return who calls; routes that are open to everybody have nobody to name."""
    return cast(Principal, request.state.principal)
