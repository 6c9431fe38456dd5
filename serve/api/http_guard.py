"""The HTTP/1.1 protocol of the server: uvicorn's, with the deadlines and bounds that it lacks.

Owns one connection: how long its heads and bodies may take, how large a head may be, how many connections one address
may hold, and what is refused before any route runs. Routes, body sizes and authentication live above. Invariant: a
connection is at any time idle, in answer, or under a deadline; what breaks a rule is told why and closed.
"""

import asyncio
import logging
from collections import Counter, deque
from typing import Any, ClassVar, cast

import httptools
import orjson
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serve.api.beginnings import Beginnings
from serve.api.closing import ClosingTransport
from serve.api.direct_body import offer
from serve.api.known_scrapes import KnownScrapes
from serve.api.request_head import MAX_HEADERS, check_head
from serve.config import LimitsConfig
from serve.errors import InvalidRequest, RateLimited, RequestTimeout, ServeError

# of a body whose answer is already out: a small rest is read so that the connection stays usable
_MAX_LATE_BODY_BYTES = 256 << 10

_log = logging.getLogger("chorale.http")


def guarded_protocol(limits: LimitsConfig, scrapes: KnownScrapes | None = None) -> type["GuardedHttpProtocol"]:
    """Return the protocol class for one server, for `uvicorn.Config(http=...)`.

    Its peers are counted together, its requests begin one after the other, and `scrapes` answers what it knows.
    """
    own = {"limits": limits, "peers": Counter(), "beginnings": Beginnings(), "scrapes": scrapes}
    return type("GuardedHttpProtocol", (GuardedHttpProtocol,), own)


class GuardedHttpProtocol(HttpToolsProtocol):
    """One connection. Subclassed by `guarded_protocol`, which sets what all of a server's connections share."""

    limits: ClassVar[LimitsConfig]
    # open connections by address, of all connections of one server
    peers: ClassVar[Counter[str]]
    # of all connections too
    beginnings: ClassVar[Beginnings]
    scrapes: ClassVar[KnownScrapes | None]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._peer = ""
        self._deadline: asyncio.TimerHandle | None = None
        # a request's head or body is being read; False between requests
        self._in_head = True
        self._in_body = False
        self._num_head_bytes = 0
        self._num_body_bytes = 0
        self._num_late_bytes = 0
        self._body_started_s = 0.0
        # requests read and not yet answered, in order: the first is running, pipelined ones wait
        self._open_cycles: deque[RequestResponseCycle] = deque()
        # the parser stands where a request begins
        self._is_between = True

    # the connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the peer's connections and start the first head's deadline."""
        super().connection_made(ClosingTransport(transport, self.loop, lambda: self._in_head or self._in_body))
        self._peer = self.client[0] if self.client else ""
        self.peers[self._peer] += 1
        if self.peers[self._peer] > self.limits.max_connections_per_ip:
            limit = self.limits.max_connections_per_ip
            # nothing was read yet: no need to linger
            self._in_head = False
            self._refuse(RateLimited(f"more than {limit} open connections from one address", retry_after_s=1))
            return
        self._arm(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline, uncount the peer, and tell every open request that its client is gone."""
        self._disarm()
        self._disconnect()
        self.peers[self._peer] -= 1
        if self.peers[self._peer] <= 0:
            del self.peers[self._peer]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; refuse what it or a rule does not accept."""
        if self.transport.is_closing() or self._is_answered(data):
            return
        was_between = self._is_between and not self._open_cycles
        self._unset_keepalive_if_required()
        if self._deadline is None and not self._in_body:
            # bytes between requests, blank lines included, begin a head
            self._in_head = True
            self._arm(self.limits.header_timeout_s)
        try:
            self._feed(data)
            self._is_between = not (self._in_head or self._in_body)
            if was_between:
                self._learn(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            # the parser's own text may quote the input
            self._refuse(cause if isinstance(cause, ServeError) else InvalidRequest("this is not valid HTTP/1.1"))
        except ServeError as error:
            self._refuse(error)

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        before = self._num_head_bytes
        while rest and not self.transport.is_closing():
            try:
                self.parser.feed_data(rest)
                break
            except httptools.HttpParserUpgrade as upgrade:
                # an upgrade that is not taken: what follows is plain HTTP/1.1
                rest = rest[upgrade.args[0] :]
        if self._in_head and self._num_head_bytes == before:
            # an unfinished line reaches no callback
            self._count_head(len(data))

    # the parser's callbacks

    def on_message_begin(self) -> None:
        """Start a request."""
        self._in_head = True
        self._num_head_bytes = 0
        if self._deadline is None:
            self._arm(self.limits.header_timeout_s)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header; one that follows the body (a trailer) is dropped."""
        self._count_head(len(name) + len(value) + 4)
        if self._in_body:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise InvalidRequest(f"the request has more than {MAX_HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the head, start the application and the body's deadline."""
        error = check_head(self.parser.get_method(), self.parser.get_http_version(), self.headers)
        if error is not None:
            raise error
        super().on_headers_complete()
        # its task has the same scope, and starts later
        offer(self.cycle, cast(Scope, self.scope))
        self._open_cycles.append(self.cycle)
        self._in_head = False
        self._in_body = True
        self._num_body_bytes = self._num_late_bytes = 0
        self._body_started_s = self.loop.time()
        self._arm(self.limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        """Count the body's bytes for its deadline; close when much of it comes after its answer."""
        self._num_body_bytes += len(body)
        if self.cycle.response_complete:
            self._num_late_bytes += len(body)
            if self._num_late_bytes > _MAX_LATE_BODY_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request's reading; the answer has no deadline here."""
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Forget the answered request and start the next pipelined one."""
        self._open_cycles.popleft()
        super().on_response_complete()

    # how requests begin

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        start = super()._start_asgi_task
        self.beginnings.add(lambda: start(cycle, app))

    def _is_answered(self, data: bytes) -> bool:
        """Answer a scrape that is like an earlier one, if nothing else is under way here."""
        if self.scrapes is None or not self._is_between or self._open_cycles or self.flow.write_paused:
            return False
        answer = self.scrapes.answer(data, self.server_state.default_headers)
        if answer is None:
            return False
        self._in_head = False
        self._disarm()
        self.transport.write(answer)
        # the connection waits for the next request, as after any answer
        super().on_response_complete()
        return True

    def _learn(self, data: bytes) -> None:
        """Let a scrape that was all of these bytes be known again."""
        is_whole = len(self._open_cycles) == 1 and not (self._in_head or self._in_body)
        if self.scrapes is not None and is_whole and self._open_cycles[0].keep_alive:
            self.scrapes.learn(data, cast(Scope, self._open_cycles[0].scope))

    # bounds

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self.limits.max_header_bytes:
            raise InvalidRequest(f"the request's head is larger than {self.limits.max_header_bytes} bytes")

    def _arm(self, delay_s: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(delay_s, self._on_deadline)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            # it is we who do not read: the clock starts again
            self._body_started_s, self._num_body_bytes = self.loop.time(), 0
            self._arm(self.limits.body_timeout_s if self._in_body else self.limits.header_timeout_s)
        elif self._in_body:
            self._check_body_rate()
        elif self._in_head:
            self._refuse(RequestTimeout(f"the request's head took longer than {self.limits.header_timeout_s:g} s"))

    def _check_body_rate(self) -> None:
        earned_s = self._num_body_bytes / self.limits.min_upload_bytes_per_s
        left_s = self._body_started_s + self.limits.body_timeout_s + earned_s - self.loop.time()
        if left_s > 0:
            self._arm(left_s)
            return
        rate = self.limits.min_upload_bytes_per_s
        self._refuse(
            RequestTimeout(f"the request's body took longer than {self.limits.body_timeout_s:g} s at {rate} bytes/s")
        )

    # refusing

    def _refuse(self, error: ServeError) -> None:
        """Answer an error unless another answer is under way, tell the application, and close."""
        _log.info("refused a request: %s", error.message)
        self._disarm()
        if self._may_answer():
            self.transport.write(_answer(error))
        self._disconnect()
        self.transport.close()

    def _may_answer(self) -> bool:
        if not self._in_body:
            return not self._open_cycles
        # the only open request is the one being read, and its answer has not begun
        return len(self._open_cycles) == 1 and not self._open_cycles[0].response_started

    def _disconnect(self) -> None:
        self.pipeline.clear()
        for cycle in self._open_cycles:
            cycle.disconnected = True
            cycle.message_event.set()


def _answer(error: ServeError) -> bytes:
    body = orjson.dumps(error.body())
    head = [
        STATUS_LINE[error.http_status],
        b"content-type: application/json\r\n",
        b"content-length: %d\r\n" % len(body),
        b"connection: close\r\n",
    ]
    if error.http_status == 405:
        head.append(b"allow: DELETE, GET, POST\r\n")
    if error.retry_after_s is not None:
        head.append(b"retry-after: %d\r\n" % error.retry_after_s)
    return b"".join([*head, b"\r\n", body])
