"""Clients that vanish, an engine that is killed, sockets that stall, bodies without end, more work than fits.

Owns the blast radius as a client sees it. Invariant: after each attack the rest gauges read 0 and the next valid
request gets the same tokens as before it.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest

from serve.config import LimitsConfig
from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

NUM_HALF_OPEN = 300
# header timeout of LimitsConfig plus slack for a busy machine
HALF_OPEN_DEADLINE_S = 120.0
HUGE_BODY_BYTES = 300 << 20
NUM_TOO_MANY = 24
MAX_RSS_GROWTH_BYTES = 64 << 20
# a stream that outlives every disconnect point below
LONG = {"model": "tiny", "prompt": "once", "max_tokens": 3000, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, live_server: StartServer) -> LiveServer:
    folder = tmp_path_factory.mktemp("resilience")
    started = live_server(write_tiny_model(folder / "tiny"), "--dtype", "float32")
    adapter = write_tiny_adapter(folder, "voice", rank=8, seed=1)
    assert started.upload("voice", adapter.folder).status_code == 201
    return started


@pytest.fixture(scope="module")
def expected(server: LiveServer) -> list[object]:
    return probe(server)


@pytest.fixture(autouse=True)
def the_server_is_unharmed(server: LiveServer, expected: list[object]) -> Iterator[None]:
    yield
    server.wait_for_rest()
    assert probe(server) == expected


def probe(server: LiveServer) -> list[object]:
    """Return the tokens of a fixed request to the base and to the adapter."""
    fields = {"prompt": "the next valid request", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    return [server.complete(model, **fields)["token_ids"] for model in ("tiny", "voice")]


def connect(server: LiveServer) -> socket.socket:
    """Open a raw connection."""
    address = urlsplit(server.url)
    assert address.hostname is not None and address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=120.0)


def raw_request(path: str, body: dict[str, object]) -> bytes:
    """Return one POST as it goes over the wire."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


@pytest.mark.parametrize("model", ["tiny", "voice"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_before_its_answer_frees_everything(
    server: LiveServer, is_stream: bool, model: str
) -> None:
    wire = raw_request("/v1/completions", {**LONG, "model": model, "stream": is_stream})
    body_start = wire.index(b"\r\n\r\n") + 4
    for num_bytes in (1, body_start - 2, body_start, body_start + 10, len(wire) - 1, len(wire)):
        for pause_s in (0.0, 0.02, 0.2):
            with connect(server) as connection:
                connection.sendall(wire[:num_bytes])
                time.sleep(pause_s)
    server.wait_for_rest()


def test_the_gauges_show_a_stream_while_it_runs_and_its_end_when_the_client_leaves(server: LiveServer) -> None:
    # without this the zeros below would prove nothing
    with server.client() as client:
        body = {**LONG, "model": "voice", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            # kept: a collected iterator would close the stream
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            gauges = server.wait_for_work()
    assert gauges["chorale_requests_running"] == gauges["chorale_adapter_pins"] == 1
    server.wait_for_rest()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_after_any_chunk_frees_everything(server: LiveServer, path: str) -> None:
    body = {**LONG, "model": "voice", "n": 2, "seed": 1, "temperature": 1.0, "stream": True}
    if path.endswith("chat/completions"):
        body = {**body, "messages": [{"role": "user", "content": body.pop("prompt")}]}
    for num_chunks in (1, 2, 3, 5, 8, 13, 40):
        with server.client() as client, client.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            for _ in range(num_chunks):
                next(lines)
    server.wait_for_rest()


def test_two_hundred_clients_that_all_leave_at_once_free_everything(server: LiveServer) -> None:
    wire = raw_request("/v1/completions", {**LONG, "stream": True, "max_tokens": 64})
    connections = [connect(server) for _ in range(200)]
    try:
        for connection in connections:
            connection.sendall(wire)
        time.sleep(0.5)
    finally:
        for connection in connections:
            connection.close()
    server.wait_for_rest()


def test_a_killed_engine_ends_the_stream_with_one_error_and_comes_back(server: LiveServer) -> None:
    engine_pid = server.engine_pid()
    with server.client() as client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        assert "choices" in json.loads(next(events))
        os.kill(engine_pid, signal.SIGKILL)
        rest = list(events)
    assert rest[-1] == "[DONE]"
    errors = [json.loads(event) for event in rest[:-1] if "error" in json.loads(event)]
    assert len(errors) == 1 and errors[0] == json.loads(rest[-2])
    assert set(errors[0]["error"]) == {"message", "type", "param", "code"}
    assert errors[0]["error"]["type"] == "server_error"
    with server.client() as client:
        refused = client.post("/v1/completions", json={**LONG, "max_tokens": 1})
    if refused.status_code == 503:
        assert int(refused.headers["retry-after"]) > 0
    else:
        # this process lay still for the seconds that another engine takes
        assert refused.status_code == 200 and server.engine_pid() != engine_pid
    server.wait_for_status("/readyz", 200)
    assert server.engine_pid() != engine_pid


def test_three_hundred_half_open_sockets_disturb_nobody_and_are_closed(server: LiveServer) -> None:
    connections = [connect(server) for _ in range(NUM_HALF_OPEN)]
    try:
        opened_at = time.monotonic()
        for connection in connections:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n")
        probe(server)
        deadline = opened_at + HALF_OPEN_DEADLINE_S
        num_open = sum(not is_closed_by_peer(connection, deadline) for connection in connections)
        assert num_open == 0, f"{num_open} of {NUM_HALF_OPEN} half-open sockets outlived {HALF_OPEN_DEADLINE_S} s"
    finally:
        for connection in connections:
            connection.close()


def is_closed_by_peer(connection: socket.socket, deadline: float) -> bool:
    """Read until the server closes, at the latest at `deadline`."""
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(4096):
                return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_a_huge_body_is_refused_without_being_kept(server: LiveServer, framing: str) -> None:
    process = psutil.Process(server.process.pid)
    rss_before = process.memory_info().rss
    piece = b" " * (1 << 20)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n" if framing == "chunked" else b"Content-Length: %d\r\n" % HUGE_BODY_BYTES
    frame = b"%x\r\n%s\r\n" % (len(piece), piece) if framing == "chunked" else piece
    num_sent = 0
    with connect(server) as connection:
        connection.sendall(head + b"\r\n")
        # refused while we still send: what a server should do
        while not select.select([connection], [], [], 0)[0] and num_sent < HUGE_BODY_BYTES:
            connection.sendall(frame)
            num_sent += len(piece)
        answer = connection.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0] and num_sent < HUGE_BODY_BYTES
    assert process.memory_info().rss - rss_before < MAX_RSS_GROWTH_BYTES


def test_a_body_over_the_limit_is_refused_by_its_announced_length(server: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    with connect(server) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (9 << 20))
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    status_line, _, rest = answer.partition(b"\r\n")
    assert b" 413 " in status_line
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["code"] == "file_too_large"


def whole_answer(connection: socket.socket, begun: bytes) -> tuple[int, dict[str, str], bytes]:
    """Read an answer of known length to its end; return status, headers and body."""
    data = begun
    while True:
        head, separator, rest = data.partition(b"\r\n\r\n")
        if separator:
            status, *lines = head.decode().lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            if len(rest) >= int(headers["content-length"]):
                return int(status.split()[1]), headers, rest
        more = connection.recv(4096)
        assert more, data
        data += more


def test_overload_is_refused_with_retry_after_before_any_work(server: LiveServer) -> None:
    body = {**LONG, "n": 16, "temperature": 1.0, "stream": True}
    num_let_in = LimitsConfig().max_in_flight // 16
    # none of them ends by itself within minutes
    connections = [connect(server) for _ in range(num_let_in + NUM_TOO_MANY)]
    try:
        for connection in connections:
            connection.sendall(raw_request("/v1/completions", body))
        waiting, streaming = set(connections), set[socket.socket]()
        refusals: list[tuple[int, dict[str, str], bytes]] = []
        deadline = time.monotonic() + 120.0
        while len(refusals) < NUM_TOO_MANY:
            assert time.monotonic() < deadline, f"{len(refusals)} were refused"
            for connection in select.select(waiting | streaming, [], [], 1.0)[0]:
                begun = connection.recv(1 << 16)
                if connection in streaming:
                    continue
                waiting.remove(connection)
                if begun.startswith(b"HTTP/1.1 200 "):
                    streaming.add(connection)
                else:
                    refusals.append(whole_answer(connection, begun))
    finally:
        for connection in connections:
            connection.close()
    for status, headers, rest in refusals:
        assert status in (429, 503) and int(headers["retry-after"]) > 0
        assert set(json.loads(rest)["error"]) == {"message", "type", "param", "code"}
    server.wait_for_rest()


def test_neither_log_nor_error_holds_the_prompt(server: LiveServer) -> None:
    canary = "canary-7f3a9c"
    server.complete("tiny", prompt=canary, max_tokens=1)
    with server.client() as client:
        refused = client.post("/v1/completions", json={"model": "tiny", "prompt": canary, "n": -1})
    assert refused.status_code == 400
    assert canary not in refused.text
    assert canary not in server.log_path.read_text()
