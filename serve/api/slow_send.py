"""The end of a task whose client does not read.

Owns one timer per stream, whatever the number of its sends: it looks when it comes, and comes again. Invariant: a send
that takes longer than the timeout has its task cancelled; a task that waits for anything else never has.
"""

import asyncio
import math
from types import TracebackType


class SlowSend:
    """Watches the sends of the task that enters it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._begun_s = math.inf
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "SlowSend":
        """Start the timer."""
        self._timer = self._loop.call_later(self._timeout_s, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def begins(self) -> None:
        """Note that a send begins."""
        self._begun_s = self._loop.time()

    def ends(self) -> None:
        """Note that the send is done."""
        self._begun_s = math.inf

    def _look(self) -> None:
        now_s = self._loop.time()
        if now_s - self._begun_s >= self._timeout_s:
            assert self._task is not None, "sends are watched inside a task"
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(min(self._begun_s, now_s) + self._timeout_s, self._look)
