"""Limits that replicas share through a real Redis: against GCRA's own arithmetic, with many clients, through losses."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from adapters_store.redis_head import acl_line
from serve.config import TenantLimits
from serve.errors import RateLimited
from serve.tenants.gcra import Bucket, Rate
from serve.tenants.limiter import Place
from serve.tenants.limits import MINUTE_US, TenantLimiter
from serve.tenants.limits_redis import RedisLimiter
from serve.tenants.redis_accounts import COMMANDS, AccountsAway, RedisAccounts, Spent
from tests.redis_server import RedisServer

# generous: what is awaited here happens at once on an idle machine
PATIENCE_S = 120.0


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis of the test's own."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()


def new_limiter(url: str, limits: TenantLimits, *, timeout_s: float = PATIENCE_S) -> tuple[RedisLimiter, RedisAccounts]:
    accounts = RedisAccounts(url, "store", timeout_s=timeout_s)
    alone = TenantLimiter(limits, now_us=lambda: time.monotonic_ns() // 1000)
    return RedisLimiter(limits, accounts, alone), accounts


@asynccontextmanager
async def replicas(
    redis_server: RedisServer, num: int, limits: TenantLimits, *, timeout_s: float = PATIENCE_S
) -> AsyncIterator[list[RedisLimiter]]:
    """Hand out the limiters of so many replicas."""
    async with AsyncExitStack() as opened:
        limiters = []
        for _ in range(num):
            limiter, _accounts = new_limiter(redis_server.url, limits, timeout_s=timeout_s)
            opened.push_async_callback(limiter.close)
            limiters.append(limiter)
        yield limiters


async def admitted(limiter: RedisLimiter, tenant: str = "acme") -> Place | None:
    try:
        return await limiter.admit(tenant)
    except RateLimited:
        return None


async def until(condition: Callable[[], bool]) -> None:
    async def is_so() -> bool:
        return condition()

    await eventually(is_so)


async def eventually(attempt: Callable[[], Awaitable[object]]) -> None:
    """Return once an attempt gives something."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await attempt():
                return
            await asyncio.sleep(0.01)


def test_one_client_is_answered_as_by_the_arithmetic_itself(redis_server: RedisServer) -> None:
    rate, choose = Rate(60_000, MINUTE_US, burst=60_000), random.Random(7)
    # tokens that the rate grows by in a twentieth of a second: what lies between two readings of a clock
    slack = 50

    async def run() -> None:
        accounts = RedisAccounts(redis_server.url, "store", timeout_s=PATIENCE_S)
        bucket, num_refused = Bucket(rate), 0
        for _ in range(400):
            cost = choose.choice([1, 17, 400, 9_000])
            before = bucket.standing
            spent = await accounts.spend("acme", {"tokens": cost * 1000}, lease=None, lease_us=1)
            over_us = spent.until_us["tokens"] - spent.now_us - MINUTE_US
            remaining = before(spent.now_us).remaining
            wait_us = bucket.take(cost, spent.now_us)
            if over_us > 0:
                await accounts.give_back("acme", {"tokens": cost * 1000}, lease=None)
                num_refused += 1
            if abs(remaining - cost) > slack:
                assert (over_us > 0) == (wait_us > 0), f"{cost} of {remaining}"
        assert 50 < num_refused < 400
        await accounts.close()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_many_clients_of_many_replicas_never_get_more_than_burst_and_rate(redis_server: RedisServer, seed: int) -> None:
    limit = 60_000
    taken: list[tuple[int, int]] = []
    slowest_us = 0

    async def client(limiter: RedisLimiter, accounts: RedisAccounts, choose: random.Random) -> None:
        nonlocal slowest_us
        for _ in range(40):
            cost, back = choose.choice([1, 50, 700, 4_000]), choose.random()
            begin = time.monotonic()
            place = await limiter.admit("acme")
            try:
                await place.charge(cost)
            except RateLimited:
                place.leave(0)
                continue
            slowest_us = max(slowest_us, int((time.monotonic() - begin) * 1e6))
            now_us = await accounts._now_us()
            used = int(cost * back)
            taken.append((now_us, used))
            place.leave(used)

    async def run() -> None:
        async with AsyncExitStack() as opened:
            clients = []
            for number in range(4):
                limiter, accounts = new_limiter(redis_server.url, TenantLimits(tokens_per_minute=limit))
                opened.push_async_callback(limiter.close)
                clients += [client(limiter, accounts, random.Random(100 * seed + 10 * number + n)) for n in range(4)]
            await asyncio.gather(*clients)
            assert not limiter.is_away

    asyncio.run(run())
    taken.sort()
    for first in range(len(taken)):
        total, start_us = 0, taken[first][0]
        for end_us, used in taken[first:]:
            total += used
            # a call's time on either side of the span
            assert (total - limit) * MINUTE_US <= limit * (end_us - start_us + 2 * slowest_us)
    assert sum(used for _, used in taken) > limit // 4, "and not next to nothing"


def test_a_charge_of_all_there_is_fits_once_and_what_was_not_used_comes_back(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 2, TenantLimits(tokens_per_minute=600)) as (one, other):
            place, late = await one.admit("acme"), await other.admit("acme")
            await place.charge(600)
            with pytest.raises(RateLimited, match="600 tokens a minute is used up"):
                await late.charge(300)
            # another tenant has its own
            await (await other.admit("bob")).charge(600)
            place.leave(100)

            async def is_charged() -> bool:
                with suppress(RateLimited):
                    await late.charge(450)
                    return True
                return False

            await eventually(is_charged)
            standing = other.standings("acme").tokens
            assert standing is not None and standing.limit == 600 and standing.remaining < 600
            with pytest.raises(RateLimited, match="about 601 tokens"):
                await late.charge(601)

    asyncio.run(run())


def test_more_than_was_charged_becomes_a_debt_everywhere(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 2, TenantLimits(tokens_per_minute=100)) as (one, other):
            place = await one.admit("acme")
            place.leave(100_000)
            late = await other.admit("acme")

            async def is_in_debt() -> bool:
                try:
                    await late.charge(1)
                except RateLimited as error:
                    assert error.retry_after_s is not None
                    return error.retry_after_s > 3600
                return False

            await eventually(is_in_debt)

    asyncio.run(run())


def test_requests_at_once_are_counted_over_all_replicas(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 3, TenantLimits(max_concurrent=4)) as limiters:
            places = [await admitted(limiters[number % 3]) for number in range(4)]
            assert all(places)
            with pytest.raises(RateLimited, match="the limit is 4 at once"):
                await limiters[0].admit("acme")
            assert places[1] is not None
            places[1].leave(0)
            await eventually(lambda: admitted(limiters[2]))
            # what was refused meanwhile holds nothing
            with pytest.raises(RateLimited):
                await limiters[1].admit("acme")

    asyncio.run(run())


def test_requests_per_minute_are_counted_over_all_replicas(redis_server: RedisServer) -> None:
    async def run() -> None:
        # few a minute: hardly one comes back while the test runs
        async with replicas(redis_server, 3, TenantLimits(requests_per_minute=9)) as limiters:
            begin_s = time.monotonic()
            answers = await asyncio.gather(*(admitted(limiters[number % 3]) for number in range(30)))
            most = 10 + (time.monotonic() - begin_s) * 9 / 60
            assert 1 <= sum(place is not None for place in answers) <= most

    asyncio.run(run())


def test_the_requests_of_a_dead_replica_are_forgotten(redis_server: RedisServer) -> None:
    async def run() -> None:
        accounts = RedisAccounts(redis_server.url, "store", timeout_s=PATIENCE_S)
        # leases of a replica that was killed: nobody renews them
        for number in range(4):
            await accounts.spend("acme", {}, lease=f"dead:{number}", lease_us=1000)
        async with replicas(redis_server, 1, TenantLimits(max_concurrent=1)) as (living,):
            await eventually(lambda: admitted(living))
        await accounts.close()

    asyncio.run(run())


def test_without_redis_each_replica_gives_its_part_and_nobody_fails(redis_server: RedisServer) -> None:
    async def run() -> None:
        limits = TenantLimits(requests_per_minute=12)
        async with replicas(redis_server, 3, limits) as limiters:
            assert all([await admitted(limiter, "warm") for limiter in limiters])
            # all know of all: one says so every few seconds, or when it is asked to
            for limiter in limiters:
                await limiter._renew_once()
            for limiter in limiters:
                await limiter._renew_once()
            redis_server.kill()
            begin_s = time.monotonic()
            answers = [await admitted(limiters[number % 3]) for number in range(60)]
            assert all(limiter.is_away for limiter in limiters)
            # 4 each, and what comes back meanwhile
            most = 12 + 3 + (time.monotonic() - begin_s) * 12 / 60
            assert 12 <= sum(place is not None for place in answers) <= most
            for place in answers:
                if place is not None:
                    place.leave(0)
            redis_server.start()
            await until(lambda: not any(limiter.is_away for limiter in limiters))
            assert await admitted(limiters[0], "other") is not None

    asyncio.run(run())


def test_what_was_admitted_before_a_loss_counts_as_used_of_the_part(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 1, TenantLimits(requests_per_minute=6)) as (only,):
            begin_s = time.monotonic()
            assert sum([await admitted(only) is not None for _ in range(10)]) >= 6
            redis_server.kill()
            # a part that knew nothing would give six at once
            num_more = sum([await admitted(only) is not None for _ in range(10)])
            assert num_more <= 1 + (time.monotonic() - begin_s) * 2 * 6 / 60

    asyncio.run(run())


def test_a_request_larger_than_the_part_is_served_and_paid_for_over_time(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 2, TenantLimits(tokens_per_minute=1000)) as (one, other):
            for limiter in (one, other, one, other):
                (await limiter.admit("warm")).leave(0)
                await limiter._renew_once()
            redis_server.kill()
            place = await one.admit("acme")
            await place.charge(900)
            with pytest.raises(RateLimited):
                await (await one.admit("acme")).charge(400)
            with pytest.raises(RateLimited, match="about 1001 tokens"):
                await (await one.admit("acme")).charge(1001)

    asyncio.run(run())


def test_a_frozen_redis_costs_one_time_limit_and_not_one_per_request(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 1, TenantLimits(requests_per_minute=1000), timeout_s=3.0) as (only,):
            assert await admitted(only) is not None
            redis_server.freeze()
            try:
                assert await admitted(only) is not None and only.is_away
                asked: list[int] = []
                spend = only._accounts.spend

                async def counted(*args: object, **kwargs: object) -> Spent:
                    asked.append(1)
                    return await spend(*args, **kwargs)  # type: ignore[arg-type]

                only._accounts.spend = counted  # type: ignore[method-assign]
                assert all([await admitted(only) for _ in range(50)]) and not asked
            finally:
                redis_server.thaw()
            await until(lambda: not only.is_away)
            assert await admitted(only) is not None and asked

    asyncio.run(run())


def test_a_client_that_leaves_while_it_is_let_in_holds_no_place(redis_server: RedisServer) -> None:
    async def run() -> None:
        async with replicas(redis_server, 1, TenantLimits(max_concurrent=1)) as (only,):
            for _ in range(20):
                task = asyncio.create_task(only.admit("acme"))
                await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError, RateLimited):
                    # it may have been let in before the cancellation reached it
                    (await task).leave(0)
            await eventually(lambda: admitted(only))

    asyncio.run(run())


def test_the_accounts_need_the_commands_of_the_acl_line_and_no_other(redis_server: RedisServer) -> None:
    async def run() -> None:
        with redis_server.client() as client:
            client.execute_command(*acl_line("limits", COMMANDS).replace("PASSWORD", "s3cret").split())
            url = redis_server.url_of("limits", "s3cret")

            async def all_calls() -> None:
                accounts = RedisAccounts(url, "store", timeout_s=PATIENCE_S)
                try:
                    await accounts.spend("acme", {"requests": 1, "tokens": 1}, lease="a:1", lease_us=10**7)
                    await accounts.renew("a", {"a:1": "acme"}, lease_us=10**7)
                    await accounts.give_back("acme", {"tokens": 1}, lease="a:1")
                finally:
                    await accounts.close()

            await all_calls()
            for needed in COMMANDS:
                client.execute_command("ACL", "SETUSER", "limits", f"-{needed}")
                with pytest.raises(AccountsAway):
                    await all_calls()
                client.execute_command("ACL", "SETUSER", "limits", f"+{needed}")
            keys = {key.split(":")[2] for key in client.keys("*")}
            assert keys == {"rates", "replicas", "running"}

    asyncio.run(run())
