"""One sequence's events on their way from the engine's socket to the request that awaits them.

Owns the queue between the two, bounded in length and in the time nobody reads it. Invariant: the reader sees the events
in order and then exactly one end: `Finished`, `Embedded` or one `ServeError`; what comes after the end is dropped.

A token costs the reader one wake-up and no timer: one timer per sequence looks, when it comes, how long it was silent.
While the reader waits for its next event, `take` is offered a token first, and what it takes costs no wake-up either.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable

from serve.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RequestTimeout,
    ServeError,
    Unavailable,
)
from serve.messages import Embedded, Failed, Finished, Started, Tokens
from serve.metrics import RequestMeter

StreamEvent = Started | Tokens | Embedded | Finished
# takes an event in its reader's place, which waits for it; False: it has not, and the reader gets it
Take = Callable[[Tokens], bool]

# about 64 KiB of plain tokens; a client that is this far behind is not reading
MAX_UNREAD_EVENTS = 4096
RETRY_AFTER_S = 2
# an event loop may call a timer this much early
TIMER_GRAIN_S = 0.001

_ERRORS_BY_STATUS: dict[int, type[ServeError]] = {
    400: InvalidRequest,
    404: NotFound,
    408: RequestTimeout,
    409: Conflict,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
    507: QuotaExceeded,
}


class RequestStream:
    """The events of one sequence, written by the socket's reader and read by one request."""

    def __init__(self, clock: Callable[[], float], meter: RequestMeter, take: Take | None = None) -> None:
        self._clock = clock
        self._meter = meter
        self._take = take
        self._events: deque[StreamEvent] = deque()
        self._error: ServeError | None = None
        self._read_at = clock()
        # the reader that waits: told True by an event or the end, False by silence
        self._waiter: asyncio.Future[bool] | None = None
        self._waits_from_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.has_ended = False

    def push(self, event: StreamEvent | Failed) -> None:
        """Append one event; a terminal one ends the stream."""
        if self.has_ended:
            return
        if isinstance(event, Failed):
            self.fail(error_from(event))
            return
        self._meter.saw(event)
        if isinstance(event, Tokens) and self._is_taken(event):
            return
        if not self._events:
            self._read_at = self._clock()
        self._events.append(event)
        self.has_ended = isinstance(event, Finished | Embedded)
        self._wake(has_news=True)

    def fail(self, error: ServeError) -> None:
        """End the stream with an error; the reader still sees what was pushed before."""
        if not self.has_ended:
            self.has_ended = True
            self._error = error
            self._meter.close("error")
            self._wake(has_news=True)

    def abandon(self) -> None:
        """End the stream because its reader has left."""
        self.has_ended = True
        self._meter.close("abort")

    def cut(self, error: ServeError) -> None:
        """Drop what nobody reads; a reader that comes back after all gets the error."""
        self._events.clear()
        self._error = error
        self.abandon()

    def is_stalled(self, timeout_s: float) -> bool:
        """Say whether the reader is too far behind, or has left events unread for longer than `timeout_s`."""
        if self._waiter is not None or not self._events:
            return False
        return len(self._events) > MAX_UNREAD_EVENTS or self._clock() - self._read_at > timeout_s

    async def read(self) -> StreamEvent:
        """Wait for the next event.

        Raises:
            ServeError: the stream ended with it, or the engine is gone.
        """
        event = await self.read_within(math.inf)
        assert event is not None, "nothing is said about endless silence"
        return event

    async def read_within(self, silence_s: float) -> StreamEvent | None:
        """Wait for the next event; return None once none has come for `silence_s`, the same in every call.

        Raises:
            ServeError: the stream ended with it, or the engine is gone.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if not await self._wait(silence_s):
                return None
        self._read_at = self._clock()
        return self._events.popleft()

    def stop_timer(self) -> None:
        """Forget the timer; called when the reader has left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, silence_s: float) -> bool:
        # asked for once: asyncio asks the system for the process id each time
        loop = self._loop = self._loop or asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._waits_from_s = loop.time()
        if self._timer is None and silence_s < math.inf:
            self._timer = loop.call_later(silence_s, self._look, silence_s)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _is_taken(self, event: Tokens) -> bool:
        """Offer tokens to `take`, which is only in order while the reader has seen everything and waits."""
        if self._take is None or self._waiter is None or self._waiter.done() or not self._take(event):
            return False
        assert self._loop is not None, "whoever waits knows its loop"
        self._waits_from_s = self._loop.time()
        return True

    def _wake(self, *, has_news: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(has_news)

    def _look(self, silence_s: float) -> None:
        """Tell a reader that has waited for `silence_s`, and come again when one may have."""
        loop = asyncio.get_running_loop()
        left_s = silence_s
        if self._waiter is not None:
            left_s += self._waits_from_s - loop.time()
            if left_s <= TIMER_GRAIN_S:
                self._wake(has_news=False)
                left_s = silence_s
        self._timer = loop.call_later(left_s, self._look, silence_s)


def error_from(event: Failed) -> ServeError:
    """Turn the engine's failure into the error of its HTTP status."""
    kind = _ERRORS_BY_STATUS.get(event.http_status, EngineFailed)
    is_retryable = issubclass(kind, RateLimited | Unavailable)
    return kind(event.message, code=event.code, retry_after_s=RETRY_AFTER_S if is_retryable else None)


def draining() -> Unavailable:
    """Return what a server on its way out says."""
    return Unavailable("the server is shutting down", code="draining", retry_after_s=RETRY_AFTER_S)


def stopped() -> EngineFailed:
    """Return what is said of an engine that is gone."""
    return EngineFailed("the engine stopped and is being restarted; send the request again")


def queue_full(num_sequences: int, num_in_flight: int, limit: int) -> QueueFull:
    """Return the refusal of what does not fit beside the sequences in flight."""
    return QueueFull(
        f"{num_sequences} more on top of {num_in_flight} sequences in flight; the limit is {limit}"
        " (--max-in-flight): try again later",
        retry_after_s=RETRY_AFTER_S,
    )
