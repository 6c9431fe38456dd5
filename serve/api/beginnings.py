"""How requests begin: one in a turn of the event loop.

Owns the requests that were read and wait for their turn. What a request does first, up to where it waits itself, takes
about a millisecond, and clients that were answered together ask again together: a crowd of them would hold the loop for
as long as all of them take. Invariants: requests begin in the order in which they were read; one that comes alone does
not wait; between two of them the loop looks at its sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable


class Beginnings:
    """The requests of one server that have not begun. Event loop only."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_due = False

    def add(self, begin: Callable[[], None]) -> None:
        """Call `begin` now, or in a later turn if another request has begun in this one."""
        self._waiting.append(begin)
        if not self._is_due:
            self._next()

    def _next(self) -> None:
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._next)
            self._waiting.popleft()()
