"""What tenants may use, counted in Redis for all replicas together; while Redis is away, each counts its part alone.

Owns the decisions; `redis_accounts` owns the commands. Invariants: while Redis answers, a tenant has no more than one
process alone would give it, but for what its rates grow while one call is under way; while it does not, each replica
gives at most its part, and what it admitted before counts as used of that, so a loss costs at most one more burst for
all; no request waits longer than the accounts' time limit for Redis, and none fails because of it.
"""

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import fields, replace

from serve.config import TenantLimits
from serve.errors import Unavailable
from serve.tenants.gcra import MICROSECONDS_PER_S, Standing
from serve.tenants.limiter import Place
from serve.tenants.limits import MINUTE_US, Standings, TenantLimiter, too_large, too_many, too_many_at_once
from serve.tenants.redis_accounts import AccountsAway, RedisAccounts, Spent

logger = logging.getLogger(__name__)

# how often this replica says that it lives and its requests run, and how long that holds
RENEW_S = 5.0
LEASE_US = 20 * MICROSECONDS_PER_S
# how long until a Redis that did not answer is asked again
RETRY_S = 0.5
_MAX_STANDINGS = 10_000


class RedisLimiter:
    """A `Limiter` over accounts that replicas share. All calls come from one event loop."""

    def __init__(self, limits: TenantLimits, accounts: RedisAccounts, alone: TenantLimiter) -> None:
        """Count in `accounts`; in `alone`, which from now on is this object's, while they are away."""
        self.limits = limits
        self._accounts = accounts
        self._alone = alone
        self._replica = uuid.uuid4().hex[:16]
        self._num_requests = 0
        self._num_replicas = 1
        # lease to tenant
        self._running: dict[str, str] = {}
        self._standings: dict[str, Standings] = {}
        self._is_away = False
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Return whether Redis did not answer the last time."""
        return self._is_away

    async def admit(self, tenant: str) -> Place:
        """Let one request in; raises RateLimited, Unavailable."""
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        if not self._is_away:
            self._num_requests += 1
            lease = f"{self._replica}:{self._num_requests}"
            try:
                await self._admit(tenant, lease)
                return _SharedPlace(self, tenant, lease)
            except AccountsAway as error:
                self._lose(error)
        self._alone.enter(tenant)
        return _PartPlace(self, tenant)

    async def take_tokens(self, tenant: str, num_tokens: int) -> bool:
        """Take tokens for a request that Redis counts; False if this process alone counted them instead."""
        limit = self.limits.tokens_per_minute
        if limit is None:
            return True
        if num_tokens > limit:
            raise too_large(num_tokens, limit)
        if not self._is_away:
            try:
                await self._spend(tenant, {"tokens": (num_tokens, limit)}, lease=None)
                self._note(tenant, num_tokens=num_tokens)
                return True
            except AccountsAway as error:
                self._lose(error)
        self.take_part(tenant, num_tokens)
        return False

    def take_part(self, tenant: str, num_tokens: int) -> None:
        """Take tokens of this replica's part; what the part can never hold at once becomes a debt of it."""
        limit = self.limits.tokens_per_minute
        if limit is None:
            return
        if num_tokens > limit:
            raise too_large(num_tokens, limit)
        now = min(num_tokens, _part_of(limit, self._num_replicas))
        self._alone.charge(tenant, now)
        self._alone.settle(tenant, charged=now, used=num_tokens)

    def leave_part(self, tenant: str, *, charged: int, used: int) -> None:
        """Settle a request that this process alone counts, and give its place back."""
        self._alone.settle(tenant, charged=charged, used=used)
        self._alone.leave(tenant)

    def settle(self, tenant: str, lease: str, num_tokens_less: int) -> None:
        """Give back so many tokens (charge them, if negative) and the request's place; returns at once."""
        self._running.pop(lease, None)
        limit = self.limits.tokens_per_minute
        # rounded down, as a price is rounded up: no account ever gets back more than was taken
        back = {} if limit is None or not num_tokens_less else {"tokens": num_tokens_less * MINUTE_US // limit}
        if not self._is_away:
            self._start(self._give_back(tenant, back, lease))

    def standings(self, tenant: str) -> Standings:
        """Return what a tenant has left, as the last answer told."""
        known = None if self._is_away else self._standings.get(tenant)
        return known if known is not None else self._alone.standings(tenant)

    async def close(self) -> None:
        """Give back the connections, after what is on its way."""
        if self._renewing is not None:
            self._renewing.cancel()
        await asyncio.gather(*self._tasks, *filter(None, [self._renewing]), return_exceptions=True)
        await self._accounts.close()

    async def _admit(self, tenant: str, lease: str) -> None:
        per_minute, most = self.limits.requests_per_minute, self.limits.max_concurrent
        costs = {} if per_minute is None else {"requests": (1, per_minute)}
        spent = await self._spend(tenant, costs, lease=lease)
        if most is not None and spent.num_running > most:
            self._start(self._give_back(tenant, {rate: _price_us(*cost) for rate, cost in costs.items()}, lease))
            raise too_many_at_once(spent.num_running - 1, most)
        self._running[lease] = tenant
        self._note(tenant, num_requests=1)

    async def _spend(self, tenant: str, costs: dict[str, tuple[int, int]], *, lease: str | None) -> Spent:
        """Take units of each rate, given with its limit a minute; all or nothing.

        Raises:
            RateLimited: they are not there. AccountsAway.
        """
        prices_us = {rate: _price_us(*cost) for rate, cost in costs.items()}
        try:
            spent = await self._accounts.spend(tenant, prices_us, lease=lease, lease_us=LEASE_US)
        except asyncio.CancelledError:
            # carried out or not: nobody can tell. Given back, or the tenant would have to pay for a client that left
            self._start(self._give_back(tenant, prices_us, lease))
            raise
        for rate, (_, limit) in costs.items():
            over_us = spent.until_us[rate] - spent.now_us - MINUTE_US
            until_us = spent.until_us[rate] - (prices_us[rate] if over_us > 0 else 0)
            self._remember(tenant, rate, _standing(limit, until_us - spent.now_us))
            if over_us > 0:
                self._start(self._give_back(tenant, prices_us, lease))
                raise too_many(rate, limit, over_us)
        return spent

    async def _give_back(self, tenant: str, prices_us: dict[str, int], lease: str | None) -> None:
        try:
            await self._accounts.give_back(tenant, prices_us, lease=lease)
        except AccountsAway as error:
            # time gives back rates, and leases end
            self._lose(error)

    async def _renew(self) -> None:
        while True:
            try:
                await self._renew_once()
            except AccountsAway as error:
                self._lose(error)
                await asyncio.sleep(RETRY_S)
                continue
            if self._is_away:
                self._is_away = False
                self._lost.clear()
                logger.info("Redis answers: limits are counted for all replicas together again")
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._lost.wait()

    async def _renew_once(self) -> None:
        num_replicas = await self._accounts.renew(self._replica, dict(self._running), lease_us=LEASE_US)
        if num_replicas != self._num_replicas:
            self._num_replicas = num_replicas
            self._alone.change(_part(self.limits, num_replicas))

    def _lose(self, error: AccountsAway) -> None:
        if not self._is_away:
            self._is_away = True
            self._lost.set()
            logger.warning(
                "Redis does not answer (%s): this replica gives 1/%d of each limit", error, self._num_replicas
            )

    def _note(self, tenant: str, *, num_requests: int = 0, num_tokens: int = 0) -> None:
        # too many tenants to remember: those that come when Redis goes get what a fresh account gives
        with suppress(Unavailable):
            self._alone.note(tenant, num_requests=num_requests, num_tokens=num_tokens)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remember(self, tenant: str, rate: str, standing: Standing) -> None:
        if len(self._standings) >= _MAX_STANDINGS:
            self._standings.clear()
        known = self._standings.get(tenant, Standings(None, None))
        changed = replace(known, requests=standing) if rate == "requests" else replace(known, tokens=standing)
        self._standings[tenant] = changed


class _SharedPlace:
    """One request that Redis counts."""

    def __init__(self, limiter: RedisLimiter, tenant: str, lease: str) -> None:
        self._limiter = limiter
        self._tenant, self._lease = tenant, lease
        self._num_charged = 0

    async def charge(self, num_tokens: int) -> None:
        """Take so many tokens; raises RateLimited."""
        if await self._limiter.take_tokens(self._tenant, num_tokens):
            self._num_charged += num_tokens

    def leave(self, num_used: int) -> None:
        """Settle and give the place back."""
        self._limiter.settle(self._tenant, self._lease, self._num_charged - num_used)


class _PartPlace:
    """One request that this replica counts as its part, since Redis was away when it came."""

    def __init__(self, limiter: RedisLimiter, tenant: str) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._num_charged = 0

    async def charge(self, num_tokens: int) -> None:
        """Take so many tokens; raises RateLimited."""
        self._limiter.take_part(self._tenant, num_tokens)
        self._num_charged += num_tokens

    def leave(self, num_used: int) -> None:
        """Settle and give the place back."""
        self._limiter.leave_part(self._tenant, charged=self._num_charged, used=num_used)


def _price_us(num_units: int, limit: int) -> int:
    """Return the microseconds that so many units take of a limit a minute, rounded up."""
    return -(-num_units * MINUTE_US // limit)


def _standing(limit: int, used_us: int) -> Standing:
    used_us = max(0, used_us)
    return Standing(limit, max(0, MINUTE_US - used_us) * limit // MINUTE_US, used_us)


def _part(limits: TenantLimits, num_replicas: int) -> TenantLimits:
    """Return what one of so many replicas may give alone; adapters and bytes are not counted here."""
    rates = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
    values = {field.name: getattr(limits, field.name) for field in fields(limits) if field.name in rates}
    parts = {name: value and _part_of(value, num_replicas) for name, value in values.items()}
    return replace(limits, **parts)


def _part_of(limit: int, num_replicas: int) -> int:
    return max(1, limit // max(1, num_replicas))
