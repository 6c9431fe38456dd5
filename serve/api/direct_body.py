"""A piece of a streamed answer's body, written to its connection in one call, past the layers that only pass it on.

Owns one request's shortcut, offered by the connection as an ASGI extension under `DIRECT_BODY`. Invariant: what is
written is byte for byte what ASGI's `send` would have written of the same body at the same moment; where that would
have waited (the client does not read) or done anything else, the shortcut is closed, and `send` is the way.
"""

import weakref

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

DIRECT_BODY = "chorale.direct_body"


class DirectBody:
    """The middle of one answer. It neither begins nor ends one."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """Say whether the answer has begun, is chunked, has not ended, and its client takes it."""
        cycle = self._cycle
        is_under_way = cycle.response_started and not cycle.response_complete and cycle.chunked_encoding is True
        return is_under_way and not (cycle.flow.write_paused or cycle.disconnected)

    def write(self, body: bytes) -> None:
        """Write a piece that is not empty; only while open."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def offer(cycle: RequestResponseCycle, scope: Scope) -> None:
    """Offer the shortcut to the request of this scope; the scope keeps no hold on its connection by it."""
    scope.setdefault("extensions", {})[DIRECT_BODY] = weakref.ref(cycle)


def direct_body(scope: Scope) -> DirectBody | None:
    """Return the shortcut that the request's connection offers, if it does."""
    offered: weakref.ref[RequestResponseCycle] | None = scope.get("extensions", {}).get(DIRECT_BODY)
    cycle = None if offered is None else offered()
    return None if cycle is None else DirectBody(cycle)
