"""Requests that come, go, fail and lose their engine at random: every one ends once, and nothing is left behind."""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter

import pytest

from serve.api.engine_client import EngineClient
from serve.errors import EngineFailed, EngineLoading, QueueFull, ServeError, Unavailable
from serve.messages import Finished, Tokens
from tests.process.clients import eventually, running_client, submit
from tests.process.fake_engine import COUNT, REFUSE

MAX_TOKENS = 30


async def live(client: EngineClient, request_id: str, rng: random.Random) -> str:
    """Run one request that may leave early; return how it ended."""
    patience = rng.choice([1, 3, 10, MAX_TOKENS * 2])
    request = submit(
        request_id,
        max_tokens=rng.randint(1, MAX_TOKENS),
        behaviour=REFUSE if rng.random() < 0.1 else COUNT,
        adapter=rng.choice([None, "a", "b"]),
    )
    expected = 0
    num_ends = 0
    try:
        client.admit(1)
        async with contextlib.aclosing(client.generate(request)) as stream:
            async for event in stream:
                assert num_ends == 0, "an event after the end"
                if isinstance(event, Tokens):
                    # in order, none lost, none doubled
                    assert event.token_ids == list(range(expected, expected + len(event.token_ids)))
                    expected += len(event.token_ids)
                elif isinstance(event, Finished):
                    num_ends += 1
                    assert expected == request.sampling.max_tokens
                if expected >= patience:
                    return "left"
    except (QueueFull, EngineLoading, EngineFailed, Unavailable) as error:
        return type(error).__name__
    assert num_ends == 1
    return "finished"


async def churn(client: EngineClient, num_requests: int, seed: int, kill_at: int = -1) -> Counter[str]:
    """Run the requests, some at once; cancel a few at random; return how they ended.

    Args:
        kill_at: the number of the request before which the engine is killed, while others are under way.
    """
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    tasks: set[asyncio.Task[str]] = set()
    for i in range(num_requests):
        if i == kill_at:
            tasks |= await kill_in_mid_stream(client, seed)
        tasks.add(asyncio.create_task(live(client, f"{seed}-{i}", random.Random(rng.random()))))
        if rng.random() < 0.05:
            rng.choice(sorted(tasks, key=id)).cancel()
        await asyncio.sleep(rng.random() * 0.004)
        done = {task for task in tasks if task.done()}
        tasks -= done
        ends.update("cancelled" if task.cancelled() else task.result() for task in done)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError | ServeError):
            raise result
    ends.update(result if isinstance(result, str) else type(result).__name__ for result in results)
    return ends


async def kill_in_mid_stream(client: EngineClient, seed: int) -> set[asyncio.Task[str]]:
    """Kill the engine under a request that would not end by itself; return that request."""
    begun = asyncio.Event()

    async def endless() -> str:
        client.admit(1)
        try:
            async with contextlib.aclosing(client.generate(submit(f"{seed}-endless", max_tokens=10**6))) as stream:
                async for _ in stream:
                    begun.set()
        except EngineFailed as error:
            return type(error).__name__
        return "finished"

    request = asyncio.create_task(endless())
    await begun.wait()
    assert client.engine_pid is not None
    os.kill(client.engine_pid, signal.SIGKILL)
    return {request}


def is_at_rest(client: EngineClient) -> bool:
    """Say whether nothing is held on either side."""
    stats = client.stats
    if stats is None or client.num_in_flight:
        return False
    return not (stats.num_running or stats.num_kv_blocks_in_use or stats.num_adapter_pins)


@pytest.mark.parametrize("num_requests", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_requests_that_come_and_go_at_random_leave_nothing_behind(num_requests: int) -> None:
    async def scenario() -> None:
        async with running_client() as client:
            ends = await churn(client, num_requests, seed=7)
            assert {"finished", "left", "Unavailable"} <= ends.keys()
            assert ends.total() == num_requests
            await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())


@pytest.mark.parametrize("num_kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_engines_killed_at_random_under_churn_lose_no_request_silently(num_kills: int) -> None:
    async def scenario() -> None:
        rng = random.Random(11)
        async with running_client() as client:
            num_requests = 0
            ends: Counter[str] = Counter()
            for seed in range(num_kills):
                pid = client.engine_pid
                ends += await churn(client, 60, seed, kill_at=rng.randrange(2, 30))
                num_requests += 61
                await eventually(lambda: client.is_ready and client.engine_pid != pid)  # noqa: B023  (awaited here)
            assert ends.total() == num_requests
            assert ends["EngineFailed"] >= num_kills
            assert ends["EngineLoading"] > 0
            await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())
