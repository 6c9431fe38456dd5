"""R09 and R23: heads with two meanings, too large or in another protocol are refused with one clear answer."""

import pytest
from starlette.types import Receive, Scope, Send

from serve.config import LimitsConfig
from tests.api_guard.wire import GET, error_of, read_all, served, status_of

# no time limit that a busy machine could meet
LIMITS = LimitsConfig(header_timeout_s=120, body_timeout_s=120)
CLOSE = b"Connection: close\r\n"

REFUSED = {
    "no host": (b"GET /ok HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /ok HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "host with a path": (b"GET /ok HTTP/1.1\r\nHost: t/health?x=\r\n\r\n", 400),
    "empty host": (b"GET /ok HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "length and chunks": (
        b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "chunks and length": (
        b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        400,
    ),
    "two lengths": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "a list of lengths": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 1, 1\r\n\r\na", 400),
    "negative length": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n", 400),
    "length with a sign": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: +1\r\n\r\na", 400),
    "length past 64 bits": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
    "xchunked": (b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "gzip, chunked": (b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "twice chunked": (
        b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "10,000 headers": (b"GET /ok HTTP/1.1\r\nHost: t\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", 400),
    "101 headers": (b"GET /ok HTTP/1.1\r\nHost: t\r\n" + b"a: b\r\n" * 100 + b"\r\n", 400),
    "1 MB header": (b"GET /ok HTTP/1.1\r\nHost: t\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n", 400),
    "1 MB header without end": (b"GET /ok HTTP/1.1\r\nHost: t\r\nX: " + b"a" * (1 << 20), 400),
    "1 MB header name": (b"GET /ok HTTP/1.1\r\nHost: t\r\n" + b"a" * (1 << 20), 400),
    "1 MB target": (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: t\r\n\r\n", 400),
    "websocket": (
        b"GET /ok HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        400,
    ),
    "http/2 prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "trace": (b"TRACE /ok HTTP/1.1\r\nHost: t\r\n\r\n", 405),
    "connect": (b"CONNECT t:80 HTTP/1.1\r\nHost: t\r\n\r\n", 405),
    "unknown method": (b"HACK /ok HTTP/1.1\r\nHost: t\r\n\r\n", 400),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
    "bare authority": (b"GET http://t HTTP/1.1\r\nHost: t\r\n\r\n", 400),
    "bytes past ASCII in the target": (b"GET /\xff\xfe HTTP/1.1\r\nHost: t\r\n\r\n", 400),
    "NUL in a header": (b"GET /ok HTTP/1.1\r\nHost: t\r\nX: a\0b\r\n\r\n", 400),
    "folded header": (b"GET /ok HTTP/1.1\r\nHost: t\r\nX: a\r\n b: c\r\n\r\n", 400),
    "space before colon": (b"GET /ok HTTP/1.1\r\nHost: t\r\nContent-Length : 5\r\n\r\nabcde", 400),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "garbage": (b"\0" * 500, 400),
    "gzip body": (b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", 415),
    "two slashes": (b"GET //v1/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
    "escaped slash": (b"GET /v1%2fmodels HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
    "escaped letter": (b"GET /%761/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
    "dot segments": (b"GET /v1/../admin HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
    "escaped dot segments": (b"GET /v1/models/%2e%2E/x HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", 404),
}


@pytest.fixture(scope="module", name="ask")
def _ask() -> object:
    # an answer to what asks for no end ends with the connection's idle time
    with served(LIMITS, keep_alive_s=1) as server:
        yield server.ask


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_head_that_breaks_a_rule_is_refused_in_the_error_shape_and_closed(case: str, ask: object) -> None:
    data, status = REFUSED[case]
    assert callable(ask)
    answer = ask(data)
    assert status_of(answer) == status
    assert (status == 405) == (b"\r\nallow: DELETE, GET, POST\r\n" in answer)
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert b"Traceback" not in answer and b"/usr" not in answer


ACCEPTED = {
    "http/1.0 without host": b"GET /ok HTTP/1.0\r\n\r\n",
    "ipv6 host": b"GET /ok HTTP/1.1\r\nHost: [::1]:8000\r\n" + CLOSE + b"\r\n",
    "absolute form": b"GET http://t/ok HTTP/1.1\r\nHost: t\r\n" + CLOSE + b"\r\n",
    "escaped slash in an id": b"GET /v1/models/a%2Fb HTTP/1.1\r\nHost: t\r\n" + CLOSE + b"\r\n",
    "offered h2c": b"GET /ok HTTP/1.1\r\nHost: t\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nConnection: Upgrade\r\n\r\n",
    "99 headers": b"GET /ok HTTP/1.1\r\nHost: t\r\n" + CLOSE + b"a: b\r\n" * 97 + b"\r\n",
}


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_a_head_with_one_meaning_is_served(case: str, ask: object) -> None:
    assert callable(ask)
    assert status_of(ask(ACCEPTED[case])) == 200


def test_an_offer_of_h2c_is_ignored_without_a_body_and_refused_with_one() -> None:
    offer = b"Upgrade: h2c\r\nHTTP2-Settings: AA\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    with served(LIMITS) as server:
        get = b"GET /a HTTP/1.1\r\nHost: t\r\n" + offer + b"\r\n"
        answer = server.ask(get + GET.replace(b"Host: t\r\n", b"Host: t\r\n" + CLOSE))
        assert answer.count(b"HTTP/1.1 200") == 2
        assert server.seen == [("/a", 0), ("/ok", 0)]
        # the parser would take this body for a second request
        smuggled = b"POST /x HTTP/1.1\r\nHost: t\r\n" + offer + b"Content-Length: %d\r\n\r\n" % len(GET) + GET
        assert status_of(server.ask(smuggled)) == 400
        assert len(server.seen) == 2
        many = get * 1500 + GET.replace(b"Host: t\r\n", b"Host: t\r\n" + CLOSE)
        assert server.ask(many).count(b"HTTP/1.1 200") == 1501


def test_1000_pipelined_requests_are_answered_in_order() -> None:
    with served(LIMITS) as server:
        requests = b"".join(b"GET /r%d HTTP/1.1\r\nHost: t\r\n\r\n" % index for index in range(999))
        answer = server.ask(requests + b"GET /last HTTP/1.1\r\nHost: t\r\n" + CLOSE + b"\r\n")
        assert answer.count(b"HTTP/1.1 200") == 1000
        assert [path for path, _ in server.seen] == [f"/r{index}" for index in range(999)] + ["/last"]


def test_a_bad_request_behind_a_good_one_does_not_mix_into_its_answer() -> None:
    with served(LIMITS) as server, server.connect() as peer:
        peer.sendall(GET)
        first = peer.recv(4096)
        peer.sendall(b"GET /ok HTTP/1.1\r\n\r\n")
        assert status_of(first) == 200
        assert status_of(read_all(peer)) == 400


def test_trailers_do_not_become_headers() -> None:
    names: list[bytes] = []

    async def late_reader(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        names[:] = [name for name, _ in scope["headers"]]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    chunks = b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n" + CLOSE + b"\r\n3\r\nabc\r\n0\r\n"
    with served(LIMITS, late_reader) as server:
        assert status_of(server.ask(chunks + b"Authorization: Bearer x\r\n\r\n")) == 200
        assert sorted(names) == [b"connection", b"host", b"transfer-encoding"]
        assert status_of(server.ask(chunks + b"Content-Length: 9\r\n\r\n")) == 400
        assert status_of(server.ask(chunks + b"X: y\r\n" * 20_000 + b"\r\n")) == 400
