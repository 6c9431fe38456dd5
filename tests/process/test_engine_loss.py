"""Real engine processes that die, hang, or never start: one clean error per stream, and a new engine."""

import asyncio
import os
import signal
from dataclasses import replace

import psutil
import pytest

from serve.api.engine_client import EngineClient
from serve.errors import EngineFailed, EngineLoading, ServeError, StartError
from serve.messages import Submit, Tokens
from tests.process.clients import HASTY, QUICK, build_client, collect, eventually, running_client, submit
from tests.process.fake_engine import CRASH, EXIT, HANG


async def read_to_the_end(client: EngineClient, request: Submit) -> tuple[list[int], list[ServeError]]:
    """Return the tokens that arrived and the errors the stream ended with."""
    tokens: list[int] = []
    errors: list[ServeError] = []
    try:
        async for event in client.generate(request):
            tokens += event.token_ids if isinstance(event, Tokens) else []
    except ServeError as error:
        errors.append(error)
    return tokens, errors


async def assert_recovers(client: EngineClient, old_pid: int) -> None:
    """Wait for another engine and let it answer."""
    await eventually(lambda: client.is_ready)
    assert client.engine_pid not in (None, old_pid)
    assert not psutil.pid_exists(old_pid)
    assert await collect(client, submit("after", max_tokens=4)) == [0, 1, 2, 3]
    assert client.num_in_flight == 0


def test_sigkill_in_mid_stream_ends_every_stream_once_and_the_server_recovers() -> None:
    async def scenario() -> None:
        async with running_client() as client:
            requests = [submit(f"r{i}", max_tokens=100_000) for i in range(10)]
            streams = [asyncio.create_task(read_to_the_end(client, request)) for request in requests]
            await eventually(lambda: _num_running(client) == 10)
            pid = client.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            for tokens, errors in await asyncio.gather(*streams):
                assert tokens == list(range(len(tokens)))
                assert [type(error) for error in errors] == [EngineFailed]
                assert "the engine stopped and is being restarted; send the request again" in errors[0].message
            assert not client.is_ready
            with pytest.raises(EngineLoading):
                client.admit(1)
            await assert_recovers(client, pid)

    asyncio.run(scenario())


@pytest.mark.parametrize("behaviour", [CRASH, EXIT], ids=["step raises", "process exits"])
def test_an_engine_that_falls_over_a_request_takes_it_and_its_mates_down_once(behaviour: int) -> None:
    async def scenario() -> None:
        async with running_client() as client:
            pid = client.engine_pid
            assert pid is not None
            mate = asyncio.create_task(read_to_the_end(client, submit("mate", max_tokens=100_000)))
            await eventually(lambda: _num_running(client) == 1)
            _, errors = await read_to_the_end(client, submit("r", behaviour=behaviour))
            _, mate_errors = await mate
            assert [error.code for error in (*errors, *mate_errors)] == ["engine_error", "engine_error"]
            await assert_recovers(client, pid)

    asyncio.run(scenario())


def test_a_stopped_engine_is_found_by_its_silence_and_replaced() -> None:
    async def scenario() -> None:
        async with running_client(watchdog=HASTY) as client:
            stream = asyncio.create_task(read_to_the_end(client, submit("r", max_tokens=100_000)))
            await eventually(lambda: _num_running(client) == 1)
            pid = client.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            _, errors = await asyncio.wait_for(stream, HASTY.heartbeat_timeout_s + 120.0)
            assert [error.code for error in errors] == ["engine_error"]
            await assert_recovers(client, pid)

    asyncio.run(scenario())


def test_a_step_that_hangs_leaves_its_stacks_and_is_replaced(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # time enough to write them on a machine that does much else
    monkeypatch.setattr("serve.engine.launch._STACK_DUMP_S", 2.0)

    async def scenario() -> None:
        async with running_client(watchdog=HASTY) as client:
            pid = client.engine_pid
            assert pid is not None
            _, errors = await read_to_the_end(client, submit("r", behaviour=HANG))
            assert [error.code for error in errors] == ["engine_error"]
            await assert_recovers(client, pid)

    asyncio.run(scenario())
    assert "in _advance" in capfd.readouterr().err


def test_an_idle_engine_is_not_taken_for_a_hung_one() -> None:
    async def scenario() -> None:
        # no machine keeps it from a word for so long; that a word in time keeps it alive is the watchdog's own test
        async with running_client(watchdog=replace(QUICK, heartbeat_timeout_s=20.0)) as client:
            pid, heard = client.engine_pid, list[object]()
            for _ in range(4):
                heard.append(client.stats)
                await eventually(lambda: client.stats is not heard[-1])
            assert client.engine_pid == pid
            assert client.is_live and client.is_ready

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("refused", "^architecture 'Mystery' is not supported; supported: Llama$"),
        ("broken", "^ValueError: no such tensor$"),
        ("dies", "^its process ended with status 9$"),
    ],
)
def test_a_first_start_that_fails_is_told_in_one_line_and_not_repeated(start: str, line: str) -> None:
    async def scenario() -> None:
        client = build_client(start=start)
        client.start()
        try:
            with pytest.raises(StartError, match=line):
                await client.wait_ready()
            await eventually(lambda: not client.is_live)
            assert client.engine_pid is None
        finally:
            await client.close()

    asyncio.run(scenario())


def test_a_start_that_takes_too_long_is_ended() -> None:
    async def scenario() -> None:
        client = build_client(start="sleeps", watchdog=replace(QUICK, start_timeout_s=1.0))
        client.start()
        try:
            with pytest.raises(StartError, match="not ready after 1 s"):
                await client.wait_ready()
        finally:
            await client.close()

    asyncio.run(scenario())


def test_closing_while_the_engine_starts_leaves_no_process() -> None:
    async def scenario() -> None:
        client = build_client(start="sleeps")
        client.start()
        await eventually(lambda: client.engine_pid is not None)
        pid = client.engine_pid
        assert pid is not None
        await client.close()
        assert not psutil.pid_exists(pid)

    asyncio.run(scenario())


def _num_running(client: EngineClient) -> int:
    return 0 if client.stats is None else client.stats.num_running
