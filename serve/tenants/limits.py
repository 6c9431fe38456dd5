"""What one tenant may use: requests and tokens per minute, requests at once. Adapters are the store's to count.

Owns each tenant's accounts in this process. Invariants: a refused request leaves no trace in any account; every request
that was let in is given back exactly once; a tenant that is at rest takes no memory, and no more than `max_tenants` are
remembered.
"""

from collections.abc import Callable
from dataclasses import dataclass

from serve.config import TenantLimits
from serve.errors import RateLimited, Unavailable
from serve.tenants.gcra import MICROSECONDS_PER_S, Bucket, Rate, Standing

MINUTE_US = 60 * MICROSECONDS_PER_S
_CONCURRENT_RETRY_S = 1
_MAX_TENANTS = 10_000


@dataclass(frozen=True, slots=True)
class Standings:
    """What a tenant has left of each rate; None: unbounded."""

    requests: Standing | None
    tokens: Standing | None


class _Accounts:
    """One tenant's."""

    __slots__ = ("num_running", "requests", "tokens")

    def __init__(self, limits: TenantLimits) -> None:
        self.requests = _bucket(limits.requests_per_minute)
        self.tokens = _bucket(limits.tokens_per_minute)
        self.num_running = 0

    def is_at_rest(self, now_us: int) -> bool:
        buckets = (self.requests, self.tokens)
        return self.num_running == 0 and all(bucket is None or bucket.is_full(now_us) for bucket in buckets)


class TenantLimiter:
    """The accounts of all tenants. Called from one thread."""

    def __init__(self, limits: TenantLimits, *, now_us: Callable[[], int], max_tenants: int = _MAX_TENANTS) -> None:
        self._limits = limits
        self._now_us = now_us
        self._max_tenants = max_tenants
        self._accounts: dict[str, _Accounts] = {}

    def enter(self, tenant: str) -> None:
        """Let one request in; `leave` must follow exactly once.

        Raises:
            RateLimited: as many requests run as the tenant may have, or it has sent too many of late.
        """
        accounts = self._of(tenant)
        most = self._limits.max_concurrent
        if most is not None and accounts.num_running >= most:
            raise too_many_at_once(accounts.num_running, most)
        wait_us = accounts.requests.take(1, self._now_us()) if accounts.requests is not None else 0
        if wait_us:
            raise too_many("requests", self._limits.requests_per_minute, wait_us)
        accounts.num_running += 1

    async def admit(self, tenant: str) -> "LocalPlace":
        """Let one request in; raises as `enter`."""
        self.enter(tenant)
        return LocalPlace(self, tenant)

    def note(self, tenant: str, *, num_requests: int = 0, num_tokens: int = 0) -> None:
        """Count what was admitted for a tenant elsewhere, so that taking over from there gives it no second burst."""
        accounts, now_us = self._of(tenant), self._now_us()
        if accounts.requests is not None:
            accounts.requests.fill(num_requests, now_us)
        if accounts.tokens is not None:
            accounts.tokens.fill(num_tokens, now_us)

    def change(self, limits: TenantLimits) -> None:
        """Have other limits from now on; what is used up of the old rates is forgotten."""
        self._limits = limits
        for accounts in self._accounts.values():
            accounts.requests, accounts.tokens = _bucket(limits.requests_per_minute), _bucket(limits.tokens_per_minute)

    async def close(self) -> None:
        """Nothing is held."""

    def leave(self, tenant: str) -> None:
        """Give back one request's place."""
        accounts = self._accounts[tenant]
        assert accounts.num_running > 0, "a request leaves once"
        accounts.num_running -= 1
        if accounts.is_at_rest(self._now_us()):
            del self._accounts[tenant]

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Take so many tokens before any work is done for them.

        Raises:
            RateLimited: they are more than is left, or than there can ever be.
        """
        limit = self._limits.tokens_per_minute
        bucket = self._of(tenant).tokens
        if limit is None or bucket is None:
            return
        if num_tokens > limit:
            raise too_large(num_tokens, limit)
        if wait_us := bucket.take(num_tokens, self._now_us()):
            raise too_many("tokens", limit, wait_us)

    def settle(self, tenant: str, *, charged: int, used: int) -> None:
        """Replace a charge by what was used; more than the charge becomes a debt that later requests wait for."""
        bucket = self._of(tenant).tokens
        if bucket is not None:
            bucket.correct(used - charged, self._now_us())

    def standings(self, tenant: str) -> Standings:
        """Return what a tenant has left."""
        accounts, now_us = self._accounts.get(tenant) or _Accounts(self._limits), self._now_us()
        return Standings(
            requests=None if accounts.requests is None else accounts.requests.standing(now_us),
            tokens=None if accounts.tokens is None else accounts.tokens.standing(now_us),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError if an account is impossible."""
        assert len(self._accounts) <= self._max_tenants, "more tenants than are remembered"
        for tenant, accounts in self._accounts.items():
            assert accounts.num_running >= 0, f"{tenant} has {accounts.num_running} requests running"

    @property
    def num_remembered(self) -> int:
        """Number of tenants that take memory."""
        return len(self._accounts)

    def _of(self, tenant: str) -> _Accounts:
        accounts = self._accounts.get(tenant)
        if accounts is None:
            if len(self._accounts) >= self._max_tenants:
                self._forget_resting()
            accounts = self._accounts[tenant] = _Accounts(self._limits)
        return accounts

    def _forget_resting(self) -> None:
        now_us = self._now_us()
        resting = [tenant for tenant, accounts in self._accounts.items() if accounts.is_at_rest(now_us)]
        if not resting:
            raise Unavailable(
                f"more than {self._max_tenants} tenants are active at once; try again later", retry_after_s=5
            )
        for tenant in resting:
            del self._accounts[tenant]


def _bucket(per_minute: int | None) -> Bucket | None:
    return None if per_minute is None else Bucket(Rate(per_minute, MINUTE_US, burst=per_minute))


class LocalPlace:
    """One request that this process counts."""

    def __init__(self, limiter: TenantLimiter, tenant: str) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._num_charged = 0

    async def charge(self, num_tokens: int) -> None:
        """Take so many tokens; raises RateLimited."""
        self._limiter.charge(self._tenant, num_tokens)
        self._num_charged += num_tokens

    def leave(self, num_used: int) -> None:
        """Settle and give the place back."""
        self._limiter.settle(self._tenant, charged=self._num_charged, used=num_used)
        self._limiter.leave(self._tenant)


def too_many(what: str, limit: int | None, wait_us: int) -> RateLimited:
    """Return the refusal of one more request, or of its tokens, before `wait_us` have passed."""
    wait_s = -(-wait_us // MICROSECONDS_PER_S)
    return RateLimited(
        f"this tenant's limit of {limit} {what} a minute is used up; try again in {wait_s} s", retry_after_s=wait_s
    )


def too_many_at_once(num_running: int, most: int) -> RateLimited:
    """Return the refusal of a request while others run."""
    return RateLimited(
        f"{num_running} of this tenant's requests are running; the limit is {most} at once",
        retry_after_s=_CONCURRENT_RETRY_S,
    )


def too_large(num_tokens: int, limit: int) -> RateLimited:
    """Return the refusal of a request that is worth more than there can ever be."""
    return RateLimited(
        f"the request is worth about {num_tokens} tokens, prompt and output together; this tenant's limit is "
        f"{limit} a minute: send less text or a smaller max_tokens",
        retry_after_s=60,
    )
