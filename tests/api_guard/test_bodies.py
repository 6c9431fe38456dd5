"""R07 and A16: bodies are bounded by the bytes that arrive, whatever they claim to be."""

import asyncio
import socket
import time

import pytest
from starlette.types import Receive, Scope, Send

from serve.config import LimitsConfig
from tests.api_guard.wire import (
    HANG_S,
    error_of,
    peak_rss,
    read_all,
    reset_peak_rss,
    send_until_answered,
    served,
    status_of,
)

LIMITS = LimitsConfig(header_timeout_s=120, body_timeout_s=120)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\n"
MB = 1 << 20


async def _buffering_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Do what JSON routes do: hold the whole body, then answer."""
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        pieces.append(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def _send_300_mb(peer: socket.socket, *, chunked: bool) -> None:
    """Send until the server says something."""
    block = b"x" * (64 << 10)
    send_until_answered(peer, b"%x\r\n%b\r\n" % (len(block), block) if chunked else block, 300 * MB)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_300_mb_body_is_refused_at_once_and_costs_no_memory(framing: str) -> None:
    field = b"Transfer-Encoding: chunked\r\n" if framing == "chunked" else b"Content-Length: %d\r\n" % (300 * MB)
    with served(LIMITS, _buffering_app) as server:
        assert status_of(server.ask(HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")) == 200
        before = reset_peak_rss()
        with server.connect() as peer:
            started_s = time.monotonic()
            peer.sendall(HEAD + field + b"\r\n")
            _send_300_mb(peer, chunked=framing == "chunked")
            answer = read_all(peer)
            assert time.monotonic() - started_s < 60
        grown = peak_rss() - before
    assert status_of(answer) == 413
    assert error_of(answer)["code"] == "file_too_large"
    assert str(LIMITS.max_body_bytes) in str(error_of(answer)["message"])
    assert b"connection: close" in answer
    # a chunked body may fill its 8 MiB before anyone can know that it is too long
    assert grown < (8 if framing == "length" else 20) * MB


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not() -> None:
    limits = LimitsConfig(max_body_bytes=1000)
    with served(limits) as server:
        for num_bytes, status in ((1000, 200), (1001, 413)):
            plain = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % num_bytes + b"x" * num_bytes
            assert status_of(server.ask(plain)) == status
            chunks = b"1\r\nx\r\n" * num_bytes + b"0\r\n\r\n"
            assert (
                status_of(server.ask(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks))
                == status
            )


def test_only_the_upload_route_takes_more_than_json_does() -> None:
    limits = LimitsConfig(max_body_bytes=100, max_upload_bytes=10_000)
    with served(limits) as server:
        for path, status in (("/v1/adapters", 200), ("/v1/adapters/x", 413), ("/v1/completions", 413)):
            head = f"POST {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: 5000\r\n\r\n"
            assert status_of(server.ask(head.encode() + b"x" * 5000)) == status


def test_a_million_chunks_of_one_byte_are_read_within_bounds() -> None:
    chunks = b"1\r\nx\r\n" * 10_000
    with served(LimitsConfig(body_timeout_s=120)) as server, server.connect() as peer:
        before = reset_peak_rss()
        peer.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            peer.sendall(chunks)
        peer.sendall(b"0\r\n\r\n")
        assert status_of(read_all(peer)) == 200
        assert server.seen == [("/v1/chat/completions", 1_000_000)]
        assert peak_rss() - before < 8 * MB


def test_a_chunk_longer_than_it_says_is_refused() -> None:
    with served(LIMITS) as server:
        assert status_of(server.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n")) == 400
        assert status_of(server.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc")) == 400
        assert {path for path, _ in server.seen} <= {"disconnect"}


def test_an_answer_before_the_whole_body_ends_the_reading() -> None:
    async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with served(LimitsConfig(max_body_bytes=400 * MB), hasty) as server, server.connect() as peer:
        peer.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (300 * MB))
        started_s = time.monotonic()
        _send_300_mb(peer, chunked=False)
        assert status_of(read_all(peer)) == 404
        assert time.monotonic() - started_s < 60


def test_a_refused_client_that_still_sends_reads_the_answer_and_a_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # long enough for any machine to read what was sent before the end
    monkeypatch.setattr("serve.api.closing.LINGER_S", HANG_S)
    with served(LIMITS, _buffering_app) as server, server.connect() as peer:
        peer.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (300 * MB) + b"x" * MB)
        answer = b""
        # a reset here would be an error, and could have cost the answer
        while chunk := peer.recv(65536):
            answer += chunk
        assert status_of(answer) == 413


def test_leaving_with_a_pipelined_request_behind_it_ends_the_running_one() -> None:
    left = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    with served(LIMITS, endless) as server:
        with server.connect() as peer:
            peer.sendall(b"GET /a HTTP/1.1\r\nHost: t\r\n\r\nGET /b HTTP/1.1\r\nHost: t\r\n\r\n")
            assert status_of(peer.recv(4096)) == 200
        deadline_s = time.monotonic() + HANG_S
        while not left.is_set() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert left.is_set()
