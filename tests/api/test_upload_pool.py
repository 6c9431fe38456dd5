"""The threads of uploads: what receives bytes never waits for what converts them."""

import asyncio
import threading

import pytest

from serve.api.uploads import MAX_RUNNING_UPLOADS, UploadPool
from serve.errors import RateLimited


def test_bytes_are_received_while_every_place_converts() -> None:
    async def scenario() -> None:
        pool, may_end = UploadPool(), threading.Event()
        commits = [asyncio.create_task(pool.commit(may_end.wait)) for _ in range(MAX_RUNNING_UPLOADS)]
        try:
            async with asyncio.timeout(120):
                assert await pool.run(int, "7") == 7
            assert not any(commit.done() for commit in commits)
        finally:
            may_end.set()
            await asyncio.gather(*commits)
            pool.close()

    asyncio.run(scenario())


def test_a_client_that_leaves_waits_for_the_end_of_its_conversion() -> None:
    async def scenario() -> None:
        pool, begun, may_end = UploadPool(), threading.Event(), threading.Event()
        ended: list[bool] = []

        def convert() -> None:
            begun.set()
            ended.append(may_end.wait())

        commit = asyncio.create_task(pool.commit(convert))
        await asyncio.to_thread(begun.wait)
        commit.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert ended == [True]
        pool.close()

    asyncio.run(scenario())


def test_more_uploads_than_places_are_told_to_come_again() -> None:
    pool = UploadPool(max_running=1)
    with pool.place(), pytest.raises(RateLimited), pool.place():
        raise AssertionError("two in one place")
    with pool.place():
        pass
    pool.close()
