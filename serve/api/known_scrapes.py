"""Scrapes that are byte for byte like an earlier one: their answer, without parsing or routing them again.

A scraper sends one head over and over, and what a head means does not change: on cores whose caches the engine uses,
the way through parser and layers is most of what a scrape costs. Owns the heads that were parsed, checked and found to
be plain scrapes, and the bytes of an answer. Invariants: who may read is asked of the door each time; what is not
exactly as before, or cannot be answered without waiting, goes the ordinary way; heads are bounded in number and size.
"""

from collections.abc import Iterable

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serve.api.auth import Door
from serve.api.drain import Drain, Phase
from serve.api.request_context import new_request_id, own_headers
from serve.api.route_scopes import required_scopes
from serve.api.scrape import PATH, is_plain_scrape, page_headers, sent_authorization
from serve.metrics import Metrics

_BEGIN = b"GET %b " % PATH.encode()
_MAX_HEADS = 16
_MAX_HEAD_BYTES = 4096
# headers that say something of one request or its connection alone
_OWN = frozenset({b"x-request-id", b"upgrade"})


class KnownScrapes:
    """The heads known to one server. Event loop only."""

    def __init__(self, door: Door, metrics: Metrics, drain: Drain) -> None:
        self._door = door
        self._metrics = metrics
        self._drain = drain
        self._scopes = required_scopes("GET", PATH) or frozenset()
        # what each sends as its authorization
        self._heads: dict[bytes, list[str]] = {}

    def learn(self, head: bytes, scope: Scope) -> None:
        """Remember the bytes of one whole request, if that was a plain scrape; the oldest one makes room."""
        if len(head) > _MAX_HEAD_BYTES or not head.startswith(_BEGIN) or not is_plain_scrape(scope):
            return
        if any(name in _OWN for name, _ in scope["headers"]):
            return
        while head not in self._heads and len(self._heads) >= _MAX_HEADS:
            del self._heads[next(iter(self._heads))]
        self._heads[head] = sent_authorization(scope)

    def answer(self, head: bytes, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Return the whole answer to these bytes; None: they have to go the ordinary way."""
        if len(head) > _MAX_HEAD_BYTES or not head.startswith(_BEGIN) or self._drain.phase > Phase.OPEN:
            return None
        authorization = self._heads.get(head)
        principal = None if authorization is None else self._door.recognise(authorization)
        if principal is None or not principal.may(self._scopes):
            return None
        page = self._metrics.render()
        lines = [STATUS_LINE[200]]
        for name, value in (*default_headers, *page_headers(page), *own_headers(new_request_id(), 0.0)):
            lines += (name, b": ", value, b"\r\n")
        return b"".join((*lines, b"\r\n", page))
