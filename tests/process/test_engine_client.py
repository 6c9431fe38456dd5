"""The client against a real child process over a real socket: streams, admission, disconnects, drain."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from serve.api.engine_client import EngineClient
from serve.config import LimitsConfig
from serve.errors import Conflict, EngineLoading, QueueFull, RequestTimeout, Unavailable
from serve.messages import Embed, Finished, Started, Tokens
from tests.process.clients import QUICK, build_client, collect, eventually, running_client, submit
from tests.process.fake_engine import REFUSE


def is_at_rest(client: EngineClient) -> bool:
    """Say whether the engine's gauges and the client's own counters are zero."""
    stats = client.stats
    if stats is None or client.num_in_flight:
        return False
    return not (stats.num_running or stats.num_waiting or stats.num_kv_blocks_in_use or stats.num_adapter_pins)


def open_stream(
    client: EngineClient, request_id: str
) -> contextlib.aclosing[AsyncGenerator[Started | Tokens | Finished, None]]:
    """Open a stream that does not end by itself, closed by `async with`."""
    return contextlib.aclosing(client.generate(submit(request_id, max_tokens=100_000, adapter="digest")))


def test_tokens_of_many_requests_arrive_in_order_and_leave_nothing_behind() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            requests = [submit(f"r{i}", max_tokens=3 + i, adapter=f"digest-{i % 3}") for i in range(20)]
            outputs = await asyncio.gather(*(collect(client, request) for request in requests))
            assert outputs == [list(range(3 + i)) for i in range(20)]
            await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())


def test_a_reader_that_leaves_early_frees_its_sequence() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            for num_read in (1, 2, 5):
                async with open_stream(client, "r") as stream:
                    for _ in range(num_read):
                        await anext(stream)
                await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())


def test_a_request_cancelled_at_any_await_frees_its_sequence() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            for delay_s in (0.0, 0.001, 0.005, 0.02):
                task = asyncio.create_task(collect(client, submit("r", max_tokens=100_000, adapter="d")))
                await asyncio.sleep(delay_s)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())


def test_a_failed_sequence_raises_its_own_error_and_no_other_ends() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            other = asyncio.create_task(collect(client, submit("other", max_tokens=30)))
            with pytest.raises(Unavailable, match="adapter 'x' could not be loaded") as caught:
                await collect(client, submit("r", behaviour=REFUSE))
            assert caught.value.code == "adapter_not_loaded"
            assert caught.value.retry_after_s is not None
            assert await other == list(range(30))

    asyncio.run(scenario())


def test_embeddings_come_back_whole() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            assert await client.embed(Embed("e", [7, 8, 9])) == [7.0, 8.0, 9.0]
            await eventually(lambda: is_at_rest(client))

    asyncio.run(scenario())


def test_one_request_id_cannot_be_used_twice_at_once() -> None:
    async def scenario() -> None:
        async with running_client() as client, open_stream(client, "same") as stream:
            await anext(stream)
            with pytest.raises(Conflict, match="'same' is in use"):
                await collect(client, submit("same"))
            assert isinstance(await anext(stream), Tokens)

    asyncio.run(scenario())


def test_admission_refuses_before_the_engine_is_ready() -> None:
    async def scenario() -> None:
        client = build_client()
        client.start()
        try:
            with pytest.raises(EngineLoading) as caught:
                client.admit(1)
            assert caught.value.retry_after_s
            assert client.is_live
            assert not client.is_ready
        finally:
            await client.close()

    asyncio.run(scenario())


def test_a_burst_is_refused_at_the_bound_before_any_of_it_is_submitted() -> None:
    async def request(client: EngineClient) -> None:
        client.admit(2)
        # stands for tokenising in a thread
        await asyncio.sleep(0.05)

    async def scenario() -> None:
        async with running_client(limits=LimitsConfig(max_in_flight=8)) as client:
            outcomes = await asyncio.gather(*(request(client) for _ in range(10)), return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
            assert len(refused) == 6
            assert "the limit is 8 (--max-in-flight)" in refused[0].message
            assert refused[0].retry_after_s
            assert client.num_in_flight == 0

    asyncio.run(scenario())


def test_a_reader_that_stalls_is_aborted_and_told_if_it_comes_back() -> None:
    async def scenario() -> None:
        limits = LimitsConfig(slow_client_timeout_s=0.3)
        async with running_client(limits=limits) as client, open_stream(client, "slow") as stream:
            await anext(stream)
            await eventually(lambda: is_at_rest(client))
            with pytest.raises(RequestTimeout, match="read nothing for"):
                await anext(stream)

    asyncio.run(scenario())


def test_a_slow_but_steady_reader_is_left_alone() -> None:
    async def scenario() -> None:
        now = 0.0
        limits, watchdog = LimitsConfig(slow_client_timeout_s=30.0), replace(QUICK, heartbeat_timeout_s=1e6)
        async with running_client(limits=limits, watchdog=watchdog, clock=lambda: now) as client:
            tokens = []
            async for event in client.generate(submit("steady", max_tokens=10)):
                now += 20.0
                # what the watch does by itself several times a second
                client._end_stalled()
                tokens += event.token_ids if isinstance(event, Tokens) else []
            assert tokens == list(range(10))

    asyncio.run(scenario())


def test_draining_lets_open_streams_end_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            running = asyncio.create_task(collect(client, submit("r", max_tokens=50)))
            await eventually(lambda: client.num_in_flight == 1)
            drained = asyncio.create_task(client.drain(240.0))
            await asyncio.sleep(0)
            assert not client.is_ready
            with pytest.raises(Unavailable, match="shutting down") as caught:
                client.admit(1)
            assert caught.value.code == "draining"
            assert await running == list(range(50))
            await drained

    asyncio.run(scenario())


def test_draining_ends_what_outlives_its_deadline_with_one_error() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            running = asyncio.create_task(collect(client, submit("r", max_tokens=100_000)))
            await eventually(lambda: client.num_in_flight == 1)
            started_at = time.monotonic()
            await client.drain(0.2)
            assert time.monotonic() - started_at < 120.0
            with pytest.raises(Unavailable, match="shutting down"):
                await running

    asyncio.run(scenario())
