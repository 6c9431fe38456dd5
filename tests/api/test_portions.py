"""What the engine sent is handed out in portions: in order, each once, and the loop looks elsewhere between."""

import asyncio
import socket

import pytest

from serve.api.open_streams import OpenStreams
from serve.api.portions import Portions
from serve.api.request_stream import RequestStream
from serve.errors import EngineFailed
from serve.messages import Abort, Command, Event, Started, Tokens
from serve.metrics import Metrics
from tests.memory_objects import Moments


def tokens(*numbers: int, request_id: str = "a") -> list[Event]:
    """Return one event per number."""
    return [Tokens(request_id, [number]) for number in numbers]


def numbers_of(events: list[Event]) -> list[int]:
    """Return what was handed out, in order."""
    return [event.token_ids[0] for event in events if isinstance(event, Tokens)]


def test_a_quick_frame_is_handed_out_at_once() -> None:
    taken: list[Event] = []
    Portions(taken.append, clock=lambda: 0.0).take(tokens(*range(1000)))
    assert numbers_of(taken) == [*range(1000)]


def test_the_loop_answers_others_between_two_portions() -> None:
    async def run() -> None:
        taken: list[Event] = []
        portions = Portions(taken.append, clock=Moments())
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        found_after: list[int] = []
        with ours, theirs:

            def look() -> None:
                ours.recv(1)
                found_after.append(len(taken))

            loop.add_reader(ours, look)
            portions.take(tokens(*range(100)))
            assert numbers_of(taken) == [0]
            theirs.send(b"x")
            portions.take(tokens(*range(100, 110)))
            # later frames wait behind the earlier ones
            assert numbers_of(taken) == [0]
            for _ in range(200):
                await asyncio.sleep(0)
            loop.remove_reader(ours)
        assert numbers_of(taken) == [*range(110)]
        assert found_after and found_after[0] < 10

    asyncio.run(run())


def test_what_wakes_work_is_the_last_of_its_portion() -> None:
    async def run() -> None:
        taken: list[Event] = []
        begun = [Started(f"r{number}", 0, 0.0, 0.0) for number in range(4)]
        events: list[Event] = [*tokens(1, 2), begun[0], *tokens(3, request_id="r0"), *begun[1:], *tokens(4, 5)]
        Portions(taken.append, clock=lambda: 0.0).take(events)
        ends = [3, 5, 6, 7, 9]
        for end in ends:
            assert taken == events[:end]
            await asyncio.sleep(0)

    asyncio.run(run())


def test_what_waits_can_be_handed_out_at_once_and_comes_no_second_time() -> None:
    async def run() -> None:
        taken: list[Event] = []
        portions = Portions(taken.append, clock=Moments())
        portions.take(tokens(*range(10)))
        portions.finish()
        assert numbers_of(taken) == [*range(10)]
        portions.take(tokens(10, 11))
        for _ in range(5):
            await asyncio.sleep(0)
        assert numbers_of(taken) == [*range(12)]

    asyncio.run(run())


def test_an_event_that_cannot_be_taken_ends_its_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        sent: list[Command] = []
        streams, metrics = OpenStreams(sent.append), Metrics()
        bad, good = (RequestStream(lambda: 0.0, metrics.open_request()) for _ in range(2))
        streams.add("bad", bad)
        streams.add("good", good)

        def fail(event: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(bad, "push", fail)
        portions = Portions(streams.push, clock=lambda: 0.0)  # type: ignore[arg-type]
        portions.take([*tokens(1, request_id="bad"), *tokens(1, request_id="good")])
        assert sent == [Abort("bad")]
        with pytest.raises(EngineFailed, match="could not be handed on"):
            await bad.read()
        assert await good.read() == Tokens("good", [1])
        assert not good.has_ended

    asyncio.run(run())
