"""The streams of all sequences that the API waits for, from the engine's frames to their readers.

Owns which streams are open and how each of them is left. Event loop only. Invariants: a stream that is left before its
end is aborted in the engine; an event of a sequence that nobody knows is dropped: it was aborted a moment ago.
"""

import asyncio
import logging
from collections.abc import Callable

from serve.api.request_stream import RequestStream
from serve.errors import EngineFailed, RequestTimeout, ServeError
from serve.messages import Abort, Command, Embedded, Failed, Finished, Started, Tokens

_log = logging.getLogger("chorale.api")


class OpenStreams:
    """The open streams by their sequences' ids."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        """Prepare; `send` hands a command to the engine."""
        self._send = send
        self._streams: dict[str, RequestStream] = {}
        self._has_emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def add(self, request_id: str, stream: RequestStream) -> None:
        """Open a stream under an id that no other open one has."""
        assert request_id not in self._streams, f"request id {request_id} is open already"
        self._streams[request_id] = stream

    def push(self, event: Started | Tokens | Embedded | Finished | Failed) -> None:
        """Hand an event to its stream; one that cannot take it ends with an error, and the others go on."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        try:
            stream.push(event)
        except Exception:
            _log.exception("an event of request %s was not taken", event.request_id)
            self._send(Abort(event.request_id))
            stream.fail(EngineFailed("the answer could not be handed on; the server's log says why"))

    def close(self, request_id: str, stream: RequestStream) -> None:
        """Forget the stream, whose reader has left; tell the engine if it still works on it."""
        stream.stop_timer()
        if not stream.has_ended:
            self._send(Abort(request_id))
            stream.abandon()
        if self._streams.get(request_id) is stream:
            self._forget(request_id)

    def fail_all(self, build_error: Callable[[], ServeError]) -> None:
        """End every stream that has not ended, each with an error of its own."""
        for request_id, stream in list(self._streams.items()):
            if not stream.has_ended:
                self._send(Abort(request_id))
                stream.fail(build_error())
            self._forget(request_id)

    def cut_stalled(self, timeout_s: float) -> None:
        """Free what slow readers hold: their sequence in the engine and their place among the streams."""
        for request_id, stream in list(self._streams.items()):
            if stream.is_stalled(timeout_s):
                if not stream.has_ended:
                    self._send(Abort(request_id))
                stream.cut(RequestTimeout(f"the client read nothing for {timeout_s:g} s; read faster or ask for less"))
                self._forget(request_id)

    async def wait_empty(self) -> None:
        """Return when no stream is open."""
        if self._streams:
            self._has_emptied.clear()
            await self._has_emptied.wait()

    def _forget(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._has_emptied.set()
