"""The outermost layer of one HTTP request: its id, its processing time, its line in the log, its trace, and
the wall for unexpected errors.

Owns the two headers that every answer carries, and the end of the request's share of its tenant's limits. Invariant: an
exception that nobody foresaw is logged once with the request id and becomes a 500 without details; the client always
gets an answer.
"""

import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import error_response
from serve.api.request_log import RequestObserver, RequestRecord
from serve.api.tenant_share import TenantShare

Headers = Iterable[tuple[bytes, bytes]]

logger = logging.getLogger("chorale.api")

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class RequestContext:
    """ASGI layer around the application; `request_id(request)` reads what it set."""

    def __init__(self, app: ASGIApp, traces: RequestObserver | None = None) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()
        identity = _sent_request_id(scope) or new_request_id()
        record = RequestRecord(identity)
        scope.setdefault("state", {}).update(request_id=identity, record=record)
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                extra = own_headers(identity, time.monotonic() - start_s)
                headers = _with_standings(message.get("headers", ()), scope)
                message = {**message, "headers": [*headers, *extra]}
            record.sends(message)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            # a broken stream cannot be answered any more; its own layer has already ended it
            logger.exception("request %s failed unexpectedly", identity)
            if not has_started:
                await error_response(error)(scope, receive, send_with_headers)
        finally:
            share: TenantShare | None = scope["state"].get("share")
            if share is not None:
                share.leave()
            record.write(scope)
            if self._traces is not None:
                self._traces.ended(record, scope)


def new_request_id() -> str:
    """Return an id for a request that was sent without one."""
    return f"req_{uuid.uuid4().hex}"


def own_headers(identity: str, elapsed_s: float) -> list[tuple[bytes, bytes]]:
    """Return the two headers that every answer carries."""
    return [(b"x-request-id", identity.encode()), (b"openai-processing-ms", b"%d" % int(elapsed_s * 1000))]


def request_id(request: Request) -> str:
    """Return the id under which this request is logged and answered."""
    return str(request.state.request_id)


def _with_standings(headers: Headers, scope: Scope) -> Headers:
    """Let what the tenant has left replace what a refusal of the whole server says of it."""
    share: TenantShare | None = scope["state"].get("share")
    ours = share.headers() if share is not None else []
    names = {name for name, _ in ours}
    return [*((name, value) for name, value in headers if name not in names), *ours]


def _sent_request_id(scope: Scope) -> str | None:
    sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
    text = sent[0].decode("latin-1") if len(sent) == 1 else ""
    return text if _VALID_REQUEST_ID.match(text) else None
