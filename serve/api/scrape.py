"""The short way of a scrape: `GET /metrics` from a head to the page's bytes, past what only other routes need.

Owns the shortcut only: the page is the metrics', the decision who may read it the door's. Invariant: a request that is
not exactly this one, or that the door does not let in, goes the long way, where the same door decides, refuses and
counts; so the shortcut opens nothing that the route would not.
"""

from collections.abc import Sequence

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.route_scopes import required_scopes
from serve.api.state import ApiState
from serve.errors import ServeError
from serve.metrics import METRICS_TYPE

PATH = "/metrics"
# a body, or the promise of one
_BODY_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"expect"})


class ScrapeRoute:
    """ASGI layer in front of the application; the layers around it (request id, drain) see every scrape."""

    def __init__(self, app: ASGIApp, state: ApiState, routes: Sequence[BaseRoute]) -> None:
        """Take the long way's route from `routes`: it is what the log knows the request by."""
        self._app = app
        self._state = state
        self._route = next(route for route in routes if getattr(route, "path", "") == PATH)
        self._scopes = required_scopes("GET", PATH) or frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if not is_plain_scrape(scope) or not await self._may_read(scope):
            await self._app(scope, receive, send)
            return
        assert self._state.metrics is not None, "only a server with metrics lets a scrape in"
        page = self._state.metrics.render()
        scope["route"] = self._route
        await send({"type": "http.response.start", "status": 200, "headers": page_headers(page)})
        await send({"type": "http.response.body", "body": page})

    async def _may_read(self, scope: Scope) -> bool:
        if self._state.metrics is None:
            return False
        try:
            principal = await self._state.door.identify(sent_authorization(scope))
        except ServeError:
            return False
        return principal.may(self._scopes)


def is_plain_scrape(scope: Scope) -> bool:
    """Say whether a request is exactly `GET /metrics`, without a body."""
    return (
        scope["type"] == "http"
        and scope["path"] == PATH
        and scope.get("raw_path") == PATH.encode()
        and scope["method"] == "GET"
        and not any(name in _BODY_HEADERS for name, _ in scope["headers"])
    )


def sent_authorization(scope: Scope) -> list[str]:
    """Return the `Authorization` headers of a request."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]


def page_headers(page: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that are the page's own."""
    return [(b"content-type", METRICS_TYPE.encode()), (b"content-length", b"%d" % len(page))]
