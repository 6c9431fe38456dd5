"""The short way of a scrape says what the long way says, and opens nothing that the long way keeps shut."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.api import health
from serve.api.auth import Door
from serve.api.scrape import ScrapeRoute
from serve.api.state import ApiState
from serve.metrics import METRICS_TYPE, Metrics
from tests.api_guard.whole_api import WholeApi

KEY = "a-static-key-of-the-operator"
BEARER = (b"authorization", f"Bearer {KEY}".encode())


class Layer:
    """The layer over an application that only remembers that it was asked."""

    def __init__(self, *, keys: tuple[str, ...] = (), metrics: Metrics | None = None) -> None:
        self.asked: list[str] = []
        state = cast(ApiState, SimpleNamespace(door=Door(keys, None), metrics=metrics))
        self.layer = ScrapeRoute(self._app, state, health.router.routes)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])

    def send(self, *headers: tuple[bytes, bytes], method: str = "GET", path: str = "/metrics") -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            raise AssertionError("a scrape has no body to read")

        raw = path.encode()
        scope = {"type": "http", "method": method, "path": path.replace("%6D", "m"), "raw_path": raw}
        asyncio.run(self.layer(scope | {"headers": list(headers)}, receive, send))
        return sent


def test_a_plain_scrape_gets_the_page_without_the_application() -> None:
    metrics = Metrics()
    layer = Layer(metrics=metrics)
    start, body = layer.send()
    assert layer.asked == [] and body["body"] == metrics.render()
    assert start["status"] == 200
    assert dict(start["headers"]) == {
        b"content-type": METRICS_TYPE.encode(),
        b"content-length": b"%d" % len(body["body"]),
    }


@pytest.mark.parametrize("headers", [(), ((b"authorization", b"Bearer wrong"),), (BEARER, BEARER)])
def test_whom_the_door_does_not_know_goes_the_long_way(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    layer = Layer(keys=(KEY,), metrics=Metrics())
    assert layer.send(*headers) == [] and layer.asked == ["/metrics"]
    assert layer.send(BEARER)[0]["status"] == 200 and layer.asked == ["/metrics"]


@pytest.mark.parametrize(
    "other",
    [
        {"method": "POST"},
        {"method": "HEAD"},
        {"path": "/metrics/"},
        {"path": "//metrics"},
        {"path": "/%6Detrics"},
        {"path": "/livez"},
    ],
    ids=lambda other: "-".join(other.values()),
)
def test_what_is_not_exactly_a_scrape_goes_the_long_way(other: dict[str, str]) -> None:
    layer = Layer(metrics=Metrics())
    assert layer.send(**other) == [] and len(layer.asked) == 1


@pytest.mark.parametrize("header", [b"content-length", b"transfer-encoding", b"expect"])
def test_a_scrape_with_a_body_goes_the_long_way(header: bytes) -> None:
    layer = Layer(metrics=Metrics())
    assert layer.send((header, b"0")) == [] and layer.asked == ["/metrics"]


def test_a_server_without_metrics_answers_the_long_way() -> None:
    layer = Layer()
    assert layer.send() == [] and layer.asked == ["/metrics"]


def test_both_ways_send_the_same_headers(api: WholeApi) -> None:
    short, long = api.http.get("/metrics"), api.http.get("/metrics", headers={"content-length": "0"})
    assert short.status_code == long.status_code == 200
    assert short.headers.keys() == long.headers.keys()
    assert short.headers["content-type"] == long.headers["content-type"]
