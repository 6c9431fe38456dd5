"""Work that ends when its client leaves.

Owns the race between an answer in the making and the disconnect of the one who asked. Invariant: when control returns
the work has ended or was cancelled and awaited; nothing keeps running for a client that is gone.
"""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client left before its answer was ready: nobody reads one."""


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[None, None, T]) -> T:
    """Return what `work` returns.

    Raises:
        ClientGone: the client left first; `work` was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
