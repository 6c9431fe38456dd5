"""The way in and the way out: what the server takes before it is prepared, and between a signal and its end.

Owns the phase and the count of open requests; who moves it on, and when, is the composition root's. Invariants: the
phase only moves on; a request that was let in is counted until its answer's last byte is written; probes are answered
in every phase and count for nothing.
"""

import asyncio
from enum import IntEnum

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import error_response
from serve.errors import Unavailable

# what load balancers, kubelets and Prometheus ask until the process is gone
_PROBES = frozenset({"/livez", "/readyz", "/health", "/startupz", "/metrics"})
# until then the next server has taken over, or this one is back
_RETRY_AFTER_S = 2


class Phase(IntEnum):
    """How far the server is on its way."""

    # not ready: what it is to serve from its start on is not published yet
    PREPARING = 0
    OPEN = 1
    # not ready, but what a load balancer still sends is served
    LEAVING = 2
    # what comes now is refused; what runs goes on
    REFUSING = 3


class Drain:
    """The phase and the open requests of one server. Event loop only."""

    def __init__(self, phase: Phase = Phase.OPEN) -> None:
        self._phase = phase
        self._num_open = 0
        self._has_emptied = asyncio.Event()

    @property
    def phase(self) -> Phase:
        """How far the server is."""
        return self._phase

    @property
    def num_open(self) -> int:
        """Requests let in whose answer is not complete."""
        return self._num_open

    def move_to(self, phase: Phase) -> None:
        """Go on; never back."""
        self._phase = max(self._phase, phase)

    async def wait_empty(self) -> None:
        """Return when no request is open; call it once the server refuses, or new ones keep it waiting."""
        while self._num_open:
            self._has_emptied.clear()
            await self._has_emptied.wait()

    def enter(self) -> None:
        """Count a request in."""
        self._num_open += 1

    def leave(self) -> None:
        """Count it out."""
        self._num_open -= 1
        if not self._num_open:
            self._has_emptied.set()


class DrainGate:
    """ASGI layer: refuses what comes too late, and asks kept-alive clients to come back by another connection."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            # also of a request that began before the signal: the next one on this connection would come too late
            if message["type"] == "http.response.start" and self._drain.phase > Phase.OPEN:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["path"] in _PROBES:
            await self._app(scope, receive, send_last)
        elif self._drain.phase is Phase.REFUSING:
            await error_response(draining())(scope, receive, send_last)
        else:
            self._drain.enter()
            try:
                await self._app(scope, receive, send_last)
            finally:
                self._drain.leave()


def draining() -> Unavailable:
    """Return the refusal of a server on its way out."""
    return Unavailable("the server is shutting down", code="draining", retry_after_s=_RETRY_AFTER_S)
