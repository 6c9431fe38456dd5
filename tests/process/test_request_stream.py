"""The queue between the engine's socket and one reader: order, one end, bounds in length and time."""

import asyncio
import contextlib
from dataclasses import dataclass

import pytest

from serve.api.request_stream import MAX_UNREAD_EVENTS, RequestStream, error_from
from serve.errors import EngineFailed, RateLimited, RequestTimeout, ServeError, Unavailable
from serve.messages import Failed, Finished, FinishReason, Tokens
from serve.metrics import Metrics

END = Finished("r", FinishReason.STOP)


@dataclass(slots=True)
class FakeClock:
    """Time that moves when told."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def build_stream(clock: FakeClock | None = None) -> RequestStream:
    """Return an open stream."""
    return RequestStream(clock or FakeClock(), Metrics().open_request())


def read_all(stream: RequestStream) -> list[object]:
    """Return what a reader sees until the stream says no more."""

    async def read() -> list[object]:
        seen: list[object] = []
        try:
            while True:
                seen.append(await asyncio.wait_for(stream.read(), 0.05))
        except (ServeError, TimeoutError) as error:
            seen.append(type(error))
        return seen

    return asyncio.run(read())


def test_what_comes_after_the_end_is_dropped() -> None:
    stream = build_stream()
    for event in (Tokens("r", [1]), END, Tokens("r", [2]), END, Failed("r", "engine_error", "late")):
        stream.push(event)
    stream.fail(EngineFailed("later still"))
    assert read_all(stream) == [Tokens("r", [1]), END, TimeoutError]


def test_an_error_comes_after_the_tokens_that_came_before_it_and_only_the_first_counts() -> None:
    stream = build_stream()
    stream.push(Tokens("r", [1]))
    stream.push(Failed("r", "overloaded", "no room", 503))
    stream.fail(EngineFailed("the engine died too"))
    assert read_all(stream) == [Tokens("r", [1]), Unavailable]


def test_a_reader_is_stalled_only_while_something_lies_unread_for_too_long() -> None:
    clock = FakeClock()
    stream = build_stream(clock)
    clock.now = 100.0
    assert not stream.is_stalled(30.0)
    stream.push(Tokens("r", [1]))
    clock.now = 130.0
    assert not stream.is_stalled(30.0)
    clock.now = 130.5
    assert stream.is_stalled(30.0)


def test_a_reader_that_is_too_far_behind_is_stalled_at_once() -> None:
    stream = build_stream()
    for _ in range(MAX_UNREAD_EVENTS):
        stream.push(Tokens("r", [1]))
    assert not stream.is_stalled(30.0)
    stream.push(Tokens("r", [1]))
    assert stream.is_stalled(30.0)


def test_a_cut_stream_holds_no_events_and_tells_the_late_reader() -> None:
    stream = build_stream()
    stream.push(Tokens("r", [1]))
    stream.cut(RequestTimeout("too slow"))
    assert read_all(stream) == [RequestTimeout]


@pytest.mark.parametrize(
    ("status", "kind", "is_retryable"),
    [(400, ServeError, False), (429, RateLimited, True), (503, Unavailable, True), (500, EngineFailed, False)],
)
def test_a_failure_becomes_the_error_of_its_status(status: int, kind: type[ServeError], is_retryable: bool) -> None:
    error = error_from(Failed("r", "some_code", "what was wrong", status))
    assert isinstance(error, kind)
    assert (error.http_status, error.code, error.message) == (status, "some_code", "what was wrong")
    assert (error.retry_after_s is not None) == is_retryable


def test_silence_is_told_again_and_again_and_news_ends_it() -> None:
    async def run() -> list[object]:
        stream = build_stream()
        seen: list[object] = [await stream.read_within(0.01), await stream.read_within(0.01)]
        stream.push(Tokens("r", [1]))
        seen.append(await stream.read_within(0.01))
        seen.append(await stream.read_within(0.01))
        asyncio.get_running_loop().call_soon(stream.push, END)
        # an event that comes in time; on the slowest machine silence is told first
        while (event := await stream.read_within(0.01)) is None:
            pass
        stream.stop_timer()
        return [*seen, event]

    assert asyncio.run(run()) == [None, None, Tokens("r", [1]), None, END]


def test_a_timer_that_was_stopped_tells_nothing_more() -> None:
    async def run() -> bool:
        stream = build_stream()
        assert await stream.read_within(0.01) is None
        stream.stop_timer()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stream.read(), 0.1)
            return False
        return True

    assert asyncio.run(run())
