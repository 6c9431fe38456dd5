"""The operator's commands against a real engine process: refusals, silence, a lost engine, pins that outlive it."""

import asyncio
import contextlib

import pytest

from serve.api import adapter_desk
from serve.errors import Conflict, EngineFailed, ServeError, Unavailable
from tests.process.clients import collect, eventually, running_client, submit
from tests.process.fake_engine import CRASH


def test_a_refused_pin_is_a_conflict_and_no_pin() -> None:
    async def story() -> None:
        async with running_client() as client:
            with pytest.raises(Conflict, match="no room for this pin"):
                await client.desk.pin("refused")
            assert not client.desk.is_pinned("refused")
            assert (await client.desk.evict("d")).num_bytes_freed == 7

    asyncio.run(story())


def test_a_request_hears_from_the_engine_whether_its_adapters_are_there() -> None:
    async def story() -> None:
        async with running_client() as client:
            assert not await client.desk.is_ready(("a", "b"), "tenant", 1.0)
            assert await client.desk.is_ready(("b", "a"), "tenant", 1.0)
            await client.drain(0.0)
            with pytest.raises(Unavailable):
                await client.desk.is_ready(("a",), "tenant", 1.0)

    asyncio.run(story())


def test_a_silent_engine_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_desk, "ANSWER_TIMEOUT_S", 0.05)

    async def story() -> None:
        async with running_client() as client:
            with pytest.raises(Unavailable, match="did not answer"):
                await client.desk.pin("silent")
            assert not client.desk.is_pinned("silent")

    asyncio.run(story())


def test_pins_outlive_the_engine_and_open_questions_end_with_it() -> None:
    async def story() -> None:
        async with running_client() as client:
            for digest in ("a", "b", "c"):
                await client.desk.pin(digest)
            await client.desk.unpin("b")
            client.unload_adapter("c")
            asked = asyncio.create_task(client.desk.pin("silent"))
            first = client.engine_pid
            with contextlib.suppress(ServeError):
                await collect(client, submit("r", behaviour=CRASH))
            with pytest.raises(EngineFailed):
                await asked
            await eventually(lambda: client.is_ready and client.engine_pid != first)
            await eventually(lambda: client.stats is not None and bool(client.stats.operator_pins))
            assert client.stats is not None
            assert [pin.digest for pin in client.stats.operator_pins] == ["a"]
            assert client.desk.is_pinned("a") and not client.desk.is_pinned("b") and not client.desk.is_pinned("c")

    asyncio.run(story())


def test_a_command_while_the_engine_is_down_is_refused_at_once() -> None:
    async def story() -> None:
        async with running_client() as client:
            await client.drain(0.0)
            with pytest.raises(Unavailable):
                await client.desk.unpin("a")

    asyncio.run(story())
