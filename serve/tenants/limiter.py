"""What the API asks of a tenant's limits, whoever keeps the accounts: this process alone, or Redis for all replicas.

Owns the protocol only. Invariant: a place that was given is left exactly once, and a refused request leaves no trace.
"""

from typing import Protocol

from serve.tenants.limits import Standings


class Place(Protocol):
    """One request that was let in."""

    async def charge(self, num_tokens: int) -> None:
        """Take so many tokens before any work is done for them; raises RateLimited."""
        ...

    def leave(self, num_used: int) -> None:
        """Give the place back, and replace what was charged by what was used."""
        ...


class Limiter(Protocol):
    """The accounts of all tenants. Called from the event loop."""

    async def admit(self, tenant: str) -> Place:
        """Let one request in.

        Raises:
            RateLimited: as many requests run as the tenant may have, or it has sent too many of late.
            Unavailable: more tenants are active than can be remembered.
        """
        ...

    def standings(self, tenant: str) -> Standings:
        """Return what a tenant has left, as this process knows it."""
        ...

    async def close(self) -> None:
        """Give back what is held."""
        ...
