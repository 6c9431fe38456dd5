"""A scrape like an earlier one gets the same answer sooner, and nothing that the ordinary way would refuse."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.types import Scope as AsgiScope

from serve.api.auth import Door
from serve.api.drain import Drain, Phase
from serve.api.known_scrapes import KnownScrapes
from serve.metrics import Metrics
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore
from serve.tenants.keys import mint
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import Scope
from tests.api.api_server import wait_until
from tests.api_guard.whole_api import LIMITS, WholeApi, whole_api
from tests.api_guard.wire import GET, read_all, read_answer

LIVEZ = GET.replace(b"/ok", b"/livez")


def scrape(*lines: str) -> bytes:
    return "\r\n".join(("GET /metrics HTTP/1.1", "Host: t", *lines, "", "")).encode()


def names_of(head: bytes) -> list[bytes]:
    return [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return, for each request that asked for it, whether the short way answered."""
    found: list[bool] = []
    answer = KnownScrapes.answer

    def watched(*args: object) -> bytes | None:
        given = answer(*args)  # type: ignore[arg-type]
        found.append(given is not None)
        return given

    monkeypatch.setattr(KnownScrapes, "answer", watched)
    return found


@pytest.fixture
def peer(api: WholeApi, taken: list[bool]) -> Iterator[socket.socket]:
    with api.server.connect() as connected:
        yield connected


def test_the_same_bytes_again_get_the_same_answer(peer: socket.socket, taken: list[bool]) -> None:
    head = scrape("User-Agent: test-of-the-same-bytes")
    answers = []
    for _ in range(3):
        peer.sendall(head)
        answers.append(read_answer(peer))
    assert taken == [False, True, True]
    assert len({tuple(names_of(answer)) for answer, _ in answers}) == 1
    assert {answer.split(b"\r\n")[0] for answer, _ in answers} == {b"HTTP/1.1 200 OK"}
    assert all(b"\nchorale_requests_running 0.0\n" in page for _, page in answers)
    # each has an id of its own
    lines = [line for answer, _ in answers for line in answer.split(b"\r\n") if line.startswith(b"x-request-id: req_")]
    assert len(set(lines)) == 3


def test_other_connections_know_it_too_and_other_requests_come_between(
    api: WholeApi, peer: socket.socket, taken: list[bool]
) -> None:
    head = scrape("User-Agent: test-of-other-connections")
    for data in (head, head, LIVEZ, head, LIVEZ):
        peer.sendall(data)
        assert read_answer(peer)[0].startswith(b"HTTP/1.1 200 ")
    with api.server.connect() as other:
        for data in (head, LIVEZ, head):
            other.sendall(data)
            assert read_answer(other)[0].startswith(b"HTTP/1.1 200 ")
    assert taken == [False, True, False, True, False, True, False, True]


def test_a_known_head_behind_a_request_in_answer_waits_for_its_turn(peer: socket.socket, taken: list[bool]) -> None:
    head = scrape("User-Agent: test-of-order")
    peer.sendall(head)
    read_answer(peer)
    data = LIVEZ + head + LIVEZ + head.replace(b"Host", b"Connection: close\r\nHost")
    peer.sendall(data)
    statuses = read_all(peer).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [b'{"status":"ok"}' in answer for answer in statuses] == [True, False, True, False]
    assert taken[1:] == [False]


def test_a_known_head_in_two_pieces_is_answered_once(peer: socket.socket, taken: list[bool]) -> None:
    head = scrape("User-Agent: test-of-pieces")
    for _ in range(2):
        peer.sendall(head)
        read_answer(peer)
    for cut in (1, 20, len(head) - 1):
        peer.sendall(head[:cut])
        # the server has read the first piece: it answers others meanwhile
        time.sleep(0.02)
        peer.sendall(head[cut:])
        assert read_answer(peer)[0].startswith(b"HTTP/1.1 200 ")
    # blank lines before a head are allowed, and belong to it
    peer.sendall(b"\r\n")
    time.sleep(0.02)
    peer.sendall(head)
    assert read_answer(peer)[0].startswith(b"HTTP/1.1 200 ")
    assert taken[:2] == [False, True]


@pytest.mark.parametrize("line", ["X-Request-ID: mine", "Upgrade: h2c", "Connection: close"])
def test_what_concerns_one_request_or_connection_is_not_learned(line: str, api: WholeApi, taken: list[bool]) -> None:
    head = scrape(line)
    for _ in range(3):
        with api.server.connect() as connected:
            connected.sendall(head)
            answer, _page = read_answer(connected)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert (b"x-request-id: mine" in answer) == (line == "X-Request-ID: mine")
            assert (b"connection: close" in answer) == (line == "Connection: close")
    assert taken == [False] * 3


def test_the_deadline_of_a_head_ends_with_the_short_way_too(model_dir: Path, tmp_path: Path, taken: list[bool]) -> None:
    # a new connection begins with it, and the next head has one of its own
    limits = replace(LIMITS, header_timeout_s=3)
    with whole_api(model_dir, tmp_path / "store", limits=limits, metrics=Metrics()) as api:
        for connected in (api.server.connect(), api.server.connect()):
            with connected:
                connected.sendall(scrape())
                read_answer(connected)
                if taken[-1]:
                    time.sleep(2)
                    connected.sendall(LIVEZ[:9])
                    time.sleep(1.5)
                    connected.sendall(LIVEZ[9:])
                    assert read_answer(connected)[0].startswith(b"HTTP/1.1 200 ")
    assert taken[:2] == [False, True]


def test_a_server_on_its_way_out_says_so(model_dir: Path, tmp_path: Path, taken: list[bool]) -> None:
    drain = Drain()
    with whole_api(model_dir, tmp_path / "store", metrics=Metrics(), drain=drain) as api, api.server.connect() as peer:
        for _ in range(2):
            peer.sendall(scrape())
            assert b"connection: close" not in read_answer(peer)[0]
        drain.move_to(Phase.LEAVING)
        peer.sendall(scrape())
        assert b"connection: close" in read_answer(peer)[0]
        assert taken == [False, True, False]


def test_a_key_that_was_revoked_opens_no_known_scrape(model_dir: Path, tmp_path: Path, taken: list[bool]) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    pepper, now = read_pepper(folder / PEPPER_FILE, create=True), int(time.time())
    with closing(SqliteKeyStore(folder / KEYS_FILE, pepper)) as keys:
        heads = {}
        for scope in (Scope.METRICS, Scope.INFER):
            text, record = mint("acme", frozenset({scope}), pepper, now=now, expires=None)
            keys.add(record)
            heads[scope] = scrape(f"Authorization: Bearer {text}"), record.key_id
        with whole_api(model_dir, folder, metrics=Metrics(), require_keys=True) as api, api.server.connect() as peer:

            def status(head: bytes) -> bytes:
                peer.sendall(head)
                return read_answer(peer)[0].split(b" ")[1]

            head, key_id = heads[Scope.METRICS]
            wait_until(lambda: status(head) == b"200" and taken[-1], "the short way is taken")
            for wrong in (heads[Scope.INFER][0], scrape("Authorization: Bearer wrong"), scrape()):
                for _ in range(3):
                    assert status(wrong) in (b"401", b"403") and not taken[-1]
            keys.revoke(key_id, now=now)
            wait_until(lambda: status(head) == b"401" and not taken[-1], "the revoked key is dead")


def asgi_scope(*headers: tuple[bytes, bytes], method: str = "GET", path: str = "/metrics") -> AsgiScope:
    return {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": list(headers)}


def test_only_so_many_heads_of_only_such_a_length_are_known() -> None:
    scrapes = KnownScrapes(Door((), None), Metrics(), Drain())
    heads = [scrape(f"User-Agent: {number}") for number in range(20)]
    for head in heads:
        scrapes.learn(head, asgi_scope())
        # again, which takes no other's place
        scrapes.learn(head, asgi_scope())
    assert [scrapes.answer(head, []) is not None for head in heads] == [False] * 4 + [True] * 16
    long = scrape(f"User-Agent: {'x' * 5000}")
    scrapes.learn(long, asgi_scope())
    assert scrapes.answer(long, []) is None


@pytest.mark.parametrize(
    "other", [{"method": "HEAD"}, {"path": "/livez"}, {"path": "/metrics/"}], ids=lambda other: "-".join(other.values())
)
def test_only_plain_scrapes_are_learned(other: dict[str, str]) -> None:
    scrapes = KnownScrapes(Door((), None), Metrics(), Drain())
    # the scope decides, whatever the bytes say
    scrapes.learn(scrape(), asgi_scope(**other))
    assert scrapes.answer(scrape(), []) is None
