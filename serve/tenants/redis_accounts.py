"""The accounts of tenants in Redis: how far each rate is used up, which requests run, which replicas live.

Owns the commands and the keys; decides nothing. A rate's account is GCRA's one number, the moment (microseconds of
Redis's clock) up to which it is used up, as a member's score. Raising that to now and adding a price are one MULTI with
TIME in it, so that no two callers ever see the same account: no script, no function, nothing beyond Redis 6.2.
Invariant: Redis holds names of tenants and numbers, nothing else, and what it loses costs one burst.

`chorale:<store>:rates:<tenant>`: members `requests`, `tokens`. `chorale:<store>:running:<tenant>`: one member per
running request, its score the moment at which it is forgotten unless renewed. `chorale:<store>:replicas`: the same for
replicas. Commands: MULTI, EXEC, TIME, ZADD, ZINCRBY, ZCARD, ZREM, ZREMRANGEBYSCORE, PEXPIRE (`COMMANDS`).
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from adapters_store.redis_head import KEY_PREFIX
from serve.tenants.gcra import MICROSECONDS_PER_S

COMMANDS = ("exec", "multi", "pexpire", "time", "zadd", "zcard", "zincrby", "zrem", "zremrangebyscore")
# longer than any debt that is worth remembering
_FORGET_MS = 24 * 3600 * 1000
_MAX_CALLS = 32


class AccountsAway(Exception):
    """Redis did not answer in time, or refused."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What accounts say after a price was added: `until_us` per rate; how many requests run, this one included."""

    now_us: int
    until_us: dict[str, int]
    num_running: int


class RedisAccounts:
    """The accounts of one store. Called from one event loop; every method but `close` raises AccountsAway."""

    def __init__(
        self, url: str, store_id: str, *, timeout_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect lazily; the URL was tried by whoever opened the store's registry."""
        self._prefix = f"{KEY_PREFIX}{store_id}"
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        # Redis's clock less ours, at least: a reply is older than the moment at which it arrives
        self._ahead_us: int | None = None
        self._calls = asyncio.Semaphore(_MAX_CALLS)
        self._client = redis.asyncio.Redis.from_url(
            url,
            # fewer commands to allow: RESP2 needs no HELLO, and without a driver's name there is no CLIENT SETINFO
            protocol=2,
            driver_info=None,
            socket_connect_timeout=timeout_s,
            # a call that may have been carried out is not made again
            retry=Retry(NoBackoff(), 0),
        )

    async def spend(self, tenant: str, prices_us: Mapping[str, int], *, lease: str | None, lease_us: int) -> Spent:
        """Add a price to each of these rates, and a running request if `lease` names one; nothing is refused here."""
        begin_us = await self._now_us()
        rates, running = f"{self._prefix}:rates:{tenant}", f"{self._prefix}:running:{tenant}"
        call = self._client.pipeline(transaction=True)
        call.time()
        for rate, price_us in prices_us.items():
            call.zadd(rates, {rate: begin_us}, gt=True)
            call.zincrby(rates, price_us, rate)
        if prices_us:
            call.pexpire(rates, _FORGET_MS)
        if lease is not None:
            call.zremrangebyscore(running, "-inf", begin_us)
            call.zadd(running, {lease: begin_us + lease_us})
            call.pexpire(running, 2 * lease_us // 1000)
            call.zcard(running)
        replies = await self._carry_out(call)
        until_us = {rate: _whole(replies[2 + 2 * index]) for index, rate in enumerate(prices_us)}
        return Spent(_microseconds(replies[0]), until_us, _whole(replies[-1]) if lease is not None else 0)

    async def give_back(self, tenant: str, prices_us: Mapping[str, int], *, lease: str | None) -> None:
        """Take a price off each of these rates (a negative one is added), and the running request away."""
        begin_us, rates = await self._now_us(), f"{self._prefix}:rates:{tenant}"
        call = self._client.pipeline(transaction=True)
        call.time()
        for rate, price_us in prices_us.items():
            # a debt begins now, not where an idle account was left
            call.zadd(rates, {rate: begin_us}, gt=True)
            call.zincrby(rates, -price_us, rate)
            call.pexpire(rates, _FORGET_MS)
        if lease is not None:
            call.zrem(f"{self._prefix}:running:{tenant}", lease)
        await self._carry_out(call)

    async def renew(self, replica: str, leases: Mapping[str, str], *, lease_us: int) -> int:
        """Say that a replica and its running requests (lease to tenant) live; return how many replicas do."""
        end_us = await self._now_us() + lease_us
        replicas = f"{self._prefix}:replicas"
        call = self._client.pipeline(transaction=True)
        call.time()
        for lease, tenant in leases.items():
            call.zadd(f"{self._prefix}:running:{tenant}", {lease: end_us})
            call.pexpire(f"{self._prefix}:running:{tenant}", 2 * lease_us // 1000)
        call.zadd(replicas, {replica: end_us})
        call.zremrangebyscore(replicas, "-inf", end_us - lease_us)
        call.pexpire(replicas, 2 * lease_us // 1000)
        call.zcard(replicas)
        return _whole((await self._carry_out(call))[-1])

    async def close(self) -> None:
        """Give back the connections."""
        await self._client.aclose()

    async def _now_us(self) -> int:
        """Return Redis's time, or a little less."""
        if self._ahead_us is None:
            call = self._client.pipeline(transaction=True)
            call.time()
            await self._carry_out(call)
        assert self._ahead_us is not None, "a reply sets it"
        return int(self._monotonic() * MICROSECONDS_PER_S) + self._ahead_us

    async def _carry_out(self, call: Pipeline) -> list[object]:
        """Carry out one transaction that begins with TIME."""
        try:
            async with self._calls, asyncio.timeout(self._timeout_s):
                replies: list[object] = await call.execute()
        except (RedisError, OSError, TimeoutError) as error:
            # another server may be there next time, with another clock
            self._ahead_us = None
            raise AccountsAway(str(error)) from error
        self._ahead_us = _microseconds(replies[0]) - int(self._monotonic() * MICROSECONDS_PER_S)
        return replies


def _microseconds(reply: object) -> int:
    assert isinstance(reply, tuple | list), "TIME says two numbers"
    return int(reply[0]) * MICROSECONDS_PER_S + int(reply[1])


def _whole(reply: object) -> int:
    """Return a count or a score; microseconds since 1970 are whole numbers of a double for centuries."""
    assert isinstance(reply, int | float), "Redis says numbers"
    return int(reply)
