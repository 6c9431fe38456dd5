"""A transport whose `close` lets the peer read the last answer.

Owns the end of a connection only. A socket that is closed while unread bytes wait in it is reset, and the peer may lose
the answer that explains why; so the writing side ends first, and what still arrives is thrown away for a short while.
Invariant: a closed transport is gone within `FLUSH_S`, whatever its peer does, and keeps no byte of what it reads.
"""

import asyncio
from collections.abc import Callable

# long enough for a client on a slow line to notice, short enough to be no foothold
LINGER_S = 2.0
# for a peer that does not read what was written before the close
FLUSH_S = 30.0


class ClosingTransport(asyncio.Transport):
    """Wraps a connection's transport; only what uvicorn's HTTP protocols call is passed on."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, expects_input: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._expects_input = expects_input
        self._is_closing = False

    def close(self) -> None:
        """Flush and close: at once between requests, lingering while the peer may still send."""
        if self.is_closing():
            return
        self._is_closing = True
        if not self._expects_input() or not self._transport.can_write_eof():
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self._loop.call_later(FLUSH_S, self._transport.abort)
            return
        self._transport.resume_reading()
        self._transport.write_eof()
        self._loop.call_later(LINGER_S, self._transport.abort)

    def is_closing(self) -> bool:
        """Say whether `close` was called or the peer is gone."""
        return self._is_closing or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write unless closing."""
        if not self.is_closing():
            self._transport.write(data)

    def pause_reading(self) -> None:
        """Pass on."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Pass on."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Pass on."""
        return self._transport.get_extra_info(name, default)
