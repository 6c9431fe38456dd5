"""Tokens that are taken in their reader's place: only while it waits, in order, and never twice."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve.api.request_stream import RequestStream, StreamEvent
from serve.messages import Finished, FinishReason, Started, Tokens
from serve.metrics import Metrics

END = Finished("r", FinishReason.STOP)
BEGIN = Started("r", 0, 0.0, 0.0)


class Taker:
    """Takes what it is told to, and remembers what it was offered."""

    def __init__(self) -> None:
        self.offered: list[Tokens] = []
        self.takes = True

    def __call__(self, event: Tokens) -> bool:
        """Take or refuse."""
        self.offered.append(event)
        return self.takes


def run(scenario: Callable[[RequestStream, Taker], Awaitable[None]]) -> None:
    """Run a scenario on an open stream."""

    async def start() -> None:
        taker = Taker()
        await scenario(RequestStream(asyncio.get_running_loop().time, Metrics().open_request(), taker), taker)

    asyncio.run(start())


async def reading(stream: RequestStream) -> "asyncio.Task[StreamEvent]":
    """Return a task that waits for the next event."""
    task = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    return task


def test_tokens_are_taken_only_while_the_reader_waits() -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        stream.push(Tokens("r", [1]))
        assert not taker.offered, "the reader has not asked yet"
        assert await stream.read() == Tokens("r", [1])
        task = await reading(stream)
        stream.push(Tokens("r", [2]))
        stream.push(Tokens("r", [3]))
        assert taker.offered == [Tokens("r", [2]), Tokens("r", [3])] and not task.done()
        stream.push(END)
        assert await task == END

    run(scenario)


def test_behind_an_event_that_the_reader_has_yet_to_see_nothing_is_taken() -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        task = await reading(stream)
        stream.push(BEGIN)
        # the reader is woken and did not run yet
        stream.push(Tokens("r", [1]))
        assert await task == BEGIN and not taker.offered
        assert await stream.read() == Tokens("r", [1])

    run(scenario)


def test_what_is_refused_and_what_follows_it_comes_to_the_reader_in_order() -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        task = await reading(stream)
        taker.takes = False
        stream.push(Tokens("r", [1]))
        taker.takes = True
        stream.push(Tokens("r", [2]))
        assert taker.offered == [Tokens("r", [1])], "the second one would overtake the first"
        assert [await task, await stream.read()] == [Tokens("r", [1]), Tokens("r", [2])]
        # it has caught up
        task = await reading(stream)
        stream.push(Tokens("r", [3]))
        assert taker.offered[-1] == Tokens("r", [3]) and not task.done()
        task.cancel()

    run(scenario)


def test_nothing_is_taken_once_the_reader_is_cancelled() -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        task = await reading(stream)
        task.cancel()
        stream.push(Tokens("r", [1]))
        assert not taker.offered

    run(scenario)


def test_begin_and_end_are_the_readers() -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        for event in (BEGIN, END):
            task = await reading(stream)
            stream.push(event)
            assert await task == event
        assert not taker.offered and stream.has_ended

    run(scenario)


def test_silence_begins_with_the_last_token_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(stream: RequestStream, taker: Taker) -> None:
        loop, now_s = asyncio.get_running_loop(), [100.0]
        looks: list[tuple[float, Callable[[float], None]]] = []
        monkeypatch.setattr(loop, "time", lambda: now_s[0])
        monkeypatch.setattr(loop, "call_later", lambda delay_s, look, silence_s: looks.append((delay_s, look)))
        task = asyncio.create_task(stream.read_within(10.0))
        await asyncio.sleep(0)
        now_s[0] = 109.0
        stream.push(Tokens("r", [1]))
        now_s[0] = 110.0
        delay_s, look = looks.pop()
        assert delay_s == 10.0
        look(10.0)
        await asyncio.sleep(0)
        assert not task.done(), "a token came one second ago"
        delay_s, look = looks.pop()
        assert delay_s == 9.0
        now_s[0] = 119.0
        look(10.0)
        assert await task is None

    run(scenario)


def test_what_is_taken_is_measured_like_what_is_read() -> None:
    async def measured(*, takes: bool) -> list[str]:
        metrics, taker = Metrics(), Taker()
        taker.takes = takes
        stream = RequestStream(lambda: 0.0, metrics.open_request("d" * 64), taker)
        for event in (BEGIN, Tokens("r", [1]), Tokens("r", [2, 3]), END):
            task = await reading(stream)
            stream.push(event)
            await asyncio.sleep(0)
            task.cancel()
        page = metrics.render().decode().splitlines()
        return [line for line in page if "_count " in line or line.startswith("chorale_adapter_tokens")]

    taken, read = (asyncio.run(measured(takes=takes)) for takes in (True, False))
    assert taken == read and "chorale_inter_token_latency_seconds_count 1.0" in taken
