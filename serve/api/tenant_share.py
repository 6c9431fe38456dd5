"""One request's part of what its tenant may use, from the door to the last byte of its answer.

Owns the estimate of a request's tokens, its correction by what was used, and the `x-ratelimit-*` headers. Invariant: a
request that was let in gives its place back exactly once, and in the end its tenant has paid for the tokens that were
computed: no more, no less.
"""

from collections.abc import Callable
from typing import cast

from fastapi import Request

from serve.api.auth import principal_of
from serve.api.route_scopes import OPEN, required_scopes
from serve.tenants.gcra import MICROSECONDS_PER_S, Standing
from serve.tenants.limiter import Limiter, Place

# text in most languages has at least so many bytes per token; the true count replaces the estimate at the end
_BYTES_PER_TOKEN = 4
# a scraper comes every few milliseconds
_UNCOUNTED = frozenset({"/metrics"})


class TenantShare:
    """A request's account. `leave` may be called at any time, once."""

    def __init__(self, limiter: Limiter, tenant: str) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._place: Place | None = None
        self._num_used: Callable[[], int] = _nothing

    async def enter(self) -> None:
        """Take a place; raises RateLimited."""
        self._place = await self._limiter.admit(self._tenant)

    async def charge(self, num_tokens: int) -> None:
        """Pay for so many tokens in advance; raises RateLimited."""
        assert self._place is not None, "only who was let in is charged"
        await self._place.charge(num_tokens)

    def pay_by(self, num_used: Callable[[], int]) -> None:
        """Let this count, read at the end, decide what the request has cost; until then it has cost nothing."""
        self._num_used = num_used

    def leave(self) -> None:
        """Settle and give the place back."""
        place, self._place = self._place, None
        if place is not None:
            place.leave(self._num_used())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what the tenant has left, as OpenAI's clients read it."""
        standings = self._limiter.standings(self._tenant)
        return [*_headers("requests", standings.requests), *_headers("tokens", standings.tokens)]


async def take_share(request: Request) -> None:
    """Count a request that has passed the door; the outermost layer ends what begins here.

    Raises:
        RateLimited: its tenant has sent too many of late, or too many at once.
    """
    template = getattr(request.scope.get("route"), "path", "")
    if required_scopes(request.method, template) == OPEN or template in _UNCOUNTED:
        return
    share = TenantShare(request.app.state.api.limiter, principal_of(request).tenant)
    # before it enters: a refusal tells what is left, too
    request.state.share = share
    await share.enter()


def share_of(request: Request) -> TenantShare:
    """Return the account of a request that `take_share` has let in."""
    return cast(TenantShare, request.state.share)


async def charge_tokens(request: Request, num_output_tokens: int) -> None:
    """Charge a request's prompt, by the size of its body, and the output it asks for; before anything is tokenised.

    Raises:
        RateLimited: its tenant has not so many left.
    """
    num_prompt_tokens = len(await request.body()) // _BYTES_PER_TOKEN
    await share_of(request).charge(num_prompt_tokens + num_output_tokens)


def _nothing() -> int:
    return 0


def _headers(what: str, standing: Standing | None) -> list[tuple[bytes, bytes]]:
    if standing is None:
        return []
    reset_s = -(-standing.reset_us // MICROSECONDS_PER_S)
    values = {"limit": str(standing.limit), "remaining": str(standing.remaining), "reset": f"{reset_s}s"}
    return [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in values.items()]
