"""R08: sockets that send half a request, or a body by drops, are closed in time and harm nobody."""

import socket
import time
from dataclasses import replace

from serve.config import LimitsConfig
from tests.api.api_server import wait_until
from tests.api_guard.wire import GET, HANG_S, error_of, read_all, served, status_of

LIMITS = LimitsConfig(header_timeout_s=0.5, body_timeout_s=0.5, min_upload_bytes_per_s=4096)


def test_300_half_open_sockets_are_closed_in_time_and_others_are_served_meanwhile() -> None:
    # long enough for the others to be served before, short enough to wait for
    with served(replace(LIMITS, header_timeout_s=2.0)) as server:
        half_open = [server.connect() for _ in range(300)]
        for peer in half_open:
            peer.sendall(b"GET /ok HTTP/1.1\r\nHost: t\r\nX-Half: ")
        assert status_of(server.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) == 200
        answers = [read_all(peer) for peer in half_open]
        assert {status_of(answer) for answer in answers} == {408}
        assert error_of(answers[0])["code"] == "request_timeout"
        for peer in half_open:
            peer.close()
        assert status_of(server.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) == 200


def test_a_socket_that_sends_nothing_is_closed_in_time() -> None:
    with served(LIMITS) as server, server.connect() as peer:
        assert status_of(read_all(peer)) == 408


def test_a_head_sent_byte_by_byte_earns_no_extra_time() -> None:
    with served(LIMITS) as server, server.connect() as peer:
        started_s = time.monotonic()
        answer = _drip(peer, b"GET /ok HTTP/1.1\r\nHost: t\r\n" + b"X-A: b\r\n" * 500, pause_s=0.02)
        assert status_of(answer) == 408
        # sending it all takes more than 70 s
        assert time.monotonic() - started_s < 60


def test_blank_lines_between_requests_do_not_keep_a_connection_open() -> None:
    with served(LIMITS) as server, server.connect() as peer:
        peer.sendall(GET)
        assert status_of(peer.recv(4096)) == 200
        assert status_of(_drip(peer, b"\r\n" * 200, pause_s=0.02)) == 408


def test_a_body_that_stops_before_its_end_is_answered_408_and_the_application_sees_it_leave() -> None:
    with served(LIMITS) as server:
        answer = server.ask(b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n" + b"x" * 99)
        assert status_of(answer) == 408
        assert "4096 bytes/s" in str(error_of(answer)["message"])
        # the application learns it on its own time
        wait_until(lambda: bool(server.seen), "the application sees its client leave")
        assert server.seen == [("disconnect", 99)]


def test_a_body_by_drops_is_closed_and_one_above_the_minimal_rate_is_not() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: "
    with served(LIMITS) as server, server.connect() as peer:
        peer.sendall(head + b"1000\r\n\r\n")
        assert status_of(_drip(peer, b"x" * 1000, pause_s=0.01)) == 408
    # its first piece earns a minute: no stall of the machine makes it look slow
    with served(replace(LIMITS, min_upload_bytes_per_s=10)) as server, server.connect() as peer:
        started_s = time.monotonic()
        peer.sendall(head + b"24000\r\n\r\n" + b"x" * 600)
        assert status_of(_drip(peer, b"x" * 23400, pause_s=0.02, piece=600)) == 200
        assert time.monotonic() - started_s > LIMITS.body_timeout_s


def test_chunk_extensions_are_no_body_and_earn_no_time() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1;ext="
    with served(LIMITS) as server, server.connect() as peer:
        peer.sendall(head)
        assert status_of(_drip(peer, b"e" * 50_000, pause_s=0.01, piece=500)) in (400, 408)


def test_an_idle_connection_is_closed_after_the_keep_alive_time() -> None:
    with served(LIMITS, keep_alive_s=1) as server, server.connect() as peer:
        started_s = time.monotonic()
        peer.sendall(GET)
        assert status_of(read_all(peer)) == 200
        assert 0.5 < time.monotonic() - started_s < 60


def test_connections_of_one_address_are_bounded_and_free_again_when_they_close() -> None:
    with served(LimitsConfig(max_connections_per_ip=5)) as server:
        peers = [server.connect() for _ in range(5)]
        refused = server.ask(GET)
        assert status_of(refused) == 429
        assert b"retry-after: 1\r\n" in refused
        assert error_of(refused)["type"] == "rate_limit_error"
        for peer in peers:
            peer.close()
        last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        wait_until(lambda: status_of(server.ask(last)) == 200, "the places are free again")


def _drip(peer: socket.socket, data: bytes, *, pause_s: float, piece: int = 1) -> bytes:
    """Send data piece by piece until the server answers or closes; return its answer."""
    peer.settimeout(pause_s)
    for start in range(0, len(data), piece):
        try:
            peer.sendall(data[start : start + piece])
            answer = peer.recv(4096)
            return answer
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
    peer.settimeout(HANG_S)
    return read_all(peer)
