"""The ASGI layer that bounds what one request may send: its spelling, its encoding and its body's bytes.

Owns the caps as the bytes arrive; the wire below (`http_guard`) owns time, the routes above own meaning. Invariant:
however a body states its length, no more than the cap reaches the application, and one byte more is answered 413.
"""

import contextlib
import re

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import error_response
from serve.config import LimitsConfig
from serve.errors import BodyTooLarge, InvalidRequest, MethodNotAllowed, NotFound, ServeError, UnsupportedMediaType

# the routes that take files; every other body is JSON
_UPLOADS = frozenset({("POST", "/v1/adapters"), ("POST", "/v1/files")})
# no leading slash, an escape before the third slash, an empty segment, a dot segment: a second spelling of some route
_ODD_SPELLING = re.compile(rb"[^/]|/[^/]*%|/[^/]*/[^/]*%|.*//|.*/(?:\.|%2[eE]){1,2}(?:/|\Z)")
_DIGITS = re.compile(rb"[0-9]{1,19}\Z")


class BodyGuard:
    """Wraps the application; `limits.max_body_bytes` for JSON, `limits.max_upload_bytes` for uploads."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = (scope["method"], scope["path"]) in _UPLOADS
        cap = self._limits.max_upload_bytes if is_upload else self._limits.max_body_bytes
        error = _check_scope(scope, cap)
        if error is None:
            await _CappedRequest(receive, send, cap).serve(self._app, scope)
        else:
            await _refuse(error, scope, receive, send)


class _CappedRequest:
    """Counts one request's body; past the cap it answers itself, and the application sees its client leave."""

    def __init__(self, receive: Receive, send: Send, cap: int) -> None:
        self._receive = receive
        self._send = send
        self._cap = cap
        self._num_bytes = 0
        self._has_started = False
        self._is_refused = False

    async def serve(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application; answer 413 if its body was too large and no answer had begun."""
        # a client that left needs no answer, unless it was we who cut its body
        with contextlib.suppress(ClientDisconnect):
            await app(scope, self._receive_counted, self._send_unless_refused)
        if self._is_refused and not self._has_started:
            await _refuse(_too_large(self._cap), scope, self._receive, self._send)

    async def _receive_counted(self) -> Message:
        if self._is_refused:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._cap:
            self._is_refused = True
            return {"type": "http.disconnect"}
        return message

    async def _send_unless_refused(self, message: Message) -> None:
        if self._is_refused and not self._has_started:
            return
        self._has_started = True
        await self._send(message)


def _check_scope(scope: Scope, cap: int) -> ServeError | None:
    if scope["method"] in ("TRACE", "CONNECT"):
        return MethodNotAllowed(f"method {scope['method']} is not served; use GET, POST or DELETE")
    if _ODD_SPELLING.match(scope.get("raw_path") or scope["path"].encode("utf-8", "replace")):
        return NotFound("no such route; paths are read as they are spelt, without escapes or empty segments")
    headers = scope["headers"]
    encodings = [value for name, value in headers if name == b"content-encoding"]
    if any(value.strip().lower() not in (b"", b"identity") for value in encodings):
        return UnsupportedMediaType("compressed bodies are not read here; send it without Content-Encoding")
    lengths = [value for name, value in headers if name == b"content-length"]
    if any(not _DIGITS.match(value) for value in lengths):
        return InvalidRequest("Content-Length is not a number of bytes")
    return _too_large(cap) if any(int(value) > cap for value in lengths) else None


def _too_large(cap: int) -> ServeError:
    return BodyTooLarge(f"the body is larger than {cap} bytes, this route's limit")


async def _refuse(error: ServeError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)
