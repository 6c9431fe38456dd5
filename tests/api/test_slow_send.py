"""The end of a task whose client does not read, and of no other."""

import asyncio
import contextlib

import pytest

from serve.api.slow_send import SlowSend
from serve.api.sse import ChunkFrames, data_frame


async def _send_for_ever(slow: SlowSend) -> None:
    slow.begins()
    await asyncio.Event().wait()


async def _send_for_ever_after_others(slow: SlowSend) -> None:
    for _ in range(3):
        slow.begins()
        slow.ends()
        # longer than the timeout: what passes between two sends is no send
        await asyncio.sleep(0.02)
    await _send_for_ever(slow)


async def _wait_elsewhere(slow: SlowSend) -> None:
    slow.begins()
    slow.ends()
    await asyncio.sleep(0.1)


async def _watched(work: object) -> None:
    with SlowSend(0.01) as slow:
        await work(slow)  # type: ignore[operator]


@pytest.mark.parametrize("work", [_send_for_ever, _send_for_ever_after_others])
def test_a_send_that_takes_too_long_ends_its_task(work: object) -> None:
    async def run() -> bool:
        task = asyncio.ensure_future(_watched(work))
        done, _ = await asyncio.wait({task}, timeout=60)
        return task in done and task.cancelled()

    assert asyncio.run(run())


def test_a_task_that_waits_for_anything_else_goes_on() -> None:
    async def run() -> bool:
        task = asyncio.ensure_future(_watched(_wait_elsewhere))
        await asyncio.wait({task}, timeout=60)
        return task.done() and not task.cancelled() and task.exception() is None

    assert asyncio.run(run())


def test_nothing_is_cancelled_after_the_watch_has_ended() -> None:
    async def work() -> None:
        with contextlib.suppress(RuntimeError), SlowSend(0.01) as slow:
            slow.begins()
            raise RuntimeError("the connection broke")
        await asyncio.sleep(0.1)

    async def run() -> bool:
        task = asyncio.ensure_future(work())
        await asyncio.wait({task}, timeout=60)
        return task.done() and not task.cancelled()

    assert asyncio.run(run())


@pytest.mark.parametrize("tail", [{}, {"usage": None}])
def test_a_prepared_chunk_has_the_bytes_of_one_encoded_whole(tail: dict[str, object]) -> None:
    envelope: dict[str, object] = {"id": 'cmpl-"1"', "created": 5, "model": "a\nb", "system_fingerprint": "x"}
    frames = ChunkFrames(envelope, tail)
    for choice in ({"index": 0, "text": "é \\ \n", "finish_reason": None}, {"index": 1, "delta": {}}):
        assert frames.frame(choice) == data_frame({**envelope, "choices": [choice], **tail})
