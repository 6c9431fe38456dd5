"""What the engine sent in one frame, handed out a little at a time, so that nobody else waits for all of it.

Owns the events that wait for their turn. Each token's write wakes its client, and on a machine with few cores that
client takes the core at once: a frame of many tokens may take milliseconds in which no other socket is looked at. What
is no token (a beginning, an end, a heartbeat) wakes work of a millisecond, and many sequences may begin in one frame.
Invariants: events are handed out in the order in which they came, each once; between two portions the loop looks at its
sockets; what is no token is the last of its portion.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from serve.messages import Event, Tokens

_PORTION_S = 0.0002


class Portions:
    """The events of one engine, in front of whoever takes them. Event loop only."""

    def __init__(self, hand_out: Callable[[Event], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._hand_out = hand_out
        self._clock = clock
        self._waiting: deque[Event] = deque()
        self._is_due = False

    def take(self, events: Sequence[Event]) -> None:
        """Hand out events: some at once, unless earlier ones wait, and the rest in later turns of the loop."""
        self._waiting.extend(events)
        if not self._is_due:
            self._go_on()

    def finish(self) -> None:
        """Hand out at once all that waits."""
        while self._waiting:
            self._hand_out(self._waiting.popleft())

    def _go_on(self) -> None:
        self._is_due = False
        end_s = self._clock() + _PORTION_S
        while self._waiting:
            event = self._waiting.popleft()
            self._hand_out(event)
            if self._waiting and (not isinstance(event, Tokens) or self._clock() >= end_s):
                self._is_due = True
                asyncio.get_running_loop().call_soon(self._go_on)
                return
