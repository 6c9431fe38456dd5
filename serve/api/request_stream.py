"""One sequence's events on their way from the engine's socket to the request that awaits them.

Owns the queue between the two, bounded in length and in the time nobody reads it. Invariant: the reader sees the events
in order and then exactly one end: `Finished`, `Embedded` or one `ServeError`; what comes after the end is dropped.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from serve.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RateLimited,
    RequestTimeout,
    ServeError,
    Unavailable,
)
from serve.messages import Embedded, Failed, Finished, Started, Tokens
from serve.metrics import RequestMeter

StreamEvent = Started | Tokens | Embedded | Finished

# about 64 KiB of plain tokens; a client that is this far behind is not reading
MAX_UNREAD_EVENTS = 4096
RETRY_AFTER_S = 2

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

    def __init__(self, clock: Callable[[], float], meter: RequestMeter) -> None:
        self._clock = clock
        self._meter = meter
        self._events: deque[StreamEvent] = deque()
        self._error: ServeError | None = None
        self._wakeup = asyncio.Event()
        self._read_at = clock()
        self._is_reading = False
        self.has_ended = False

    def push(self, event: StreamEvent | Failed) -> None:
        """Append one event; a terminal one ends the stream."""
        if self.has_ended:
            return
        if isinstance(event, Failed):
            self.fail(error_from(event))
            return
        if not self._events:
            self._read_at = self._clock()
        self._events.append(event)
        self._meter.saw(event)
        self.has_ended = isinstance(event, Finished | Embedded)
        self._wakeup.set()

    def fail(self, error: ServeError) -> None:
        """End the stream with an error; the reader still sees what was pushed before."""
        if not self.has_ended:
            self.has_ended = True
            self._error = error
            self._meter.close("error")
            self._wakeup.set()

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
        if self._is_reading or not self._events:
            return False
        return len(self._events) > MAX_UNREAD_EVENTS or self._clock() - self._read_at > timeout_s

    async def read(self) -> StreamEvent:
        """Wait for the next event.

        Raises:
            ServeError: the stream ended with it, or the engine is gone.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._wakeup.clear()
            self._is_reading = True
            try:
                await self._wakeup.wait()
            finally:
                self._is_reading = False
        self._read_at = self._clock()
        return self._events.popleft()


def error_from(event: Failed) -> ServeError:
    """Turn the engine's failure into the error of its HTTP status."""
    kind = _ERRORS_BY_STATUS.get(event.http_status, EngineFailed)
    is_retryable = issubclass(kind, RateLimited | Unavailable)
    return kind(event.message, code=event.code, retry_after_s=RETRY_AFTER_S if is_retryable else None)
