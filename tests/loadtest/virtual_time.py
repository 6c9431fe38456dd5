"""An event loop whose time stands still while anything can be done, and jumps to the next timer when nothing can.

Owns the clock. Sockets are real; only waiting is not, so client and server in one loop over Unix sockets (which deliver
at once) see delays that are exact on any machine, however slow. Invariant: time moves only when no socket is ready.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import TypeVar

Result = TypeVar("Result")
# nothing is due and nothing is ready: only another thread or process could wake the loop
_IDLE_S = 30.0
Ready = list[tuple[selectors.SelectorKey, int]]


class _Selector(selectors.SelectSelector):
    """Never waits for a timer: it tells the loop to be there already."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Ready:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            return super().select(_IDLE_S)
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop; `pass_time` lets time go by as a busy process would."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual now."""
        return self._clock.now_s

    def pass_time(self, seconds: float) -> None:
        """Move the clock as if the loop had been busy for so long."""
        self._clock.now_s += seconds


def run_virtually(main: Coroutine[object, object, Result]) -> Result:
    """Run a coroutine in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
