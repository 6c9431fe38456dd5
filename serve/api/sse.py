"""Server-sent events: the frames, and the response that carries them.

Owns framing, the headers that keep proxies from buffering, and the end of a stream. Invariants: a stream that began
ends with `[DONE]`, after one error frame if something failed; a client that leaves or does not read ends the work
behind it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.direct_body import DirectBody, direct_body
from serve.api.disconnect import wait_for_disconnect
from serve.api.errors import error_body
from serve.api.request_log import RequestRecord
from serve.api.short_way import Outlet
from serve.api.slow_send import SlowSend
from serve.errors import ServeError

logger = logging.getLogger("chorale.api")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ChunkFrames:
    """The events of one stream whose chunks differ in their choices only: what stays the same is encoded once."""

    def __init__(self, envelope: Mapping[str, object], tail: Mapping[str, object]) -> None:
        """Prepare; a chunk is `{**envelope, "choices": [choice], **tail}`."""
        self._encoder = msgspec.json.Encoder()
        self._begin = b"data: " + self._encoder.encode(envelope)[:-1] + b',"choices":['
        end = self._encoder.encode(tail)[1:-1]
        self._end = b"]" + (b"," + end if end else b"") + b"}\n\n"

    def frame(self, choice: object) -> bytes:
        """Return the event of one choice."""
        return self._begin + self._encoder.encode(choice) + self._end

    def text_frames(self, choice: object) -> "TextFrames":
        """Return the events of a choice that differ in a text only; it stands as "", once, in `choice`."""
        begin, end = self.frame(choice).removeprefix(self._begin).split(b'""')
        return TextFrames(self._begin + begin, end)


class TextFrames:
    """The events of one choice that differ in a text only."""

    def __init__(self, begin: bytes, end: bytes) -> None:
        """Prepare: what stands before the text's JSON, and after it."""
        self._begin = begin
        self._end = end
        self._encode = msgspec.json.Encoder().encode

    def frame(self, text: str) -> bytes:
        """Return the event with this text."""
        return b"%b%b%b" % (self._begin, self._encode(text), self._end)


def data_frame(value: object) -> bytes:
    """Return one event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def with_end(frames: AsyncGenerator[bytes, None], record: RequestRecord) -> AsyncGenerator[bytes, None]:
    """Yield `frames`, then an error frame if they failed, which the record learns of, then `[DONE]`."""
    async with aclosing(frames):
        try:
            async for frame in frames:
                yield frame
        # the request's wall: headers are out, so the error becomes the last event
        except Exception as error:
            if not isinstance(error, ServeError):
                logger.exception("request %s failed in mid-stream", record.request_id)
            record.fails(error.code if isinstance(error, ServeError) else "engine_error")
            yield data_frame(error_body(error))
    yield DONE


class EventStream(Response):
    """Sends frames as they come; closes them when the client leaves or reads nothing for `send_timeout_s`."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        *,
        send_timeout_s: float,
        outlet: Outlet | None = None,
    ) -> None:
        """Prepare; frames may leave by `outlet` too, while `frames` is waited for and the connection takes them."""
        super().__init__(headers={**_HEADERS, **headers})
        # the length is not known, and the empty body's one would be wrong
        del self.headers["content-length"]
        self._frames = frames
        self._send_timeout_s = send_timeout_s
        self._outlet = outlet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        sending = asyncio.ensure_future(self._send_all(send, direct_body(scope)))
        gone = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._outlet is not None:
                self._outlet.close()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send_all(self, send: Send, body: DirectBody | None) -> None:
        async with aclosing(self._frames):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if self._outlet is not None:
                self._outlet.open(body)
            # a client that does not read: cancelled here, and uvicorn closes the unfinished answer
            with SlowSend(self._send_timeout_s) as slow:
                async for frame in self._frames:
                    slow.begins()
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                    slow.ends()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
