"""A real uvicorn on a loopback port with the guarded protocol, and raw sockets to hurt it with."""

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.body import BodyGuard
from serve.api.http_guard import guarded_protocol
from serve.config import LimitsConfig

GET = b"GET /ok HTTP/1.1\r\nHost: t\r\n\r\n"
# only a hang takes so long
HANG_S = 60.0


@dataclass
class Served:
    """A running server: where it listens and what its application saw."""

    port: int
    seen: list[tuple[str, int]]

    def connect(self) -> socket.socket:
        """Open a socket to the server; reads time out when it hangs."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)

    def ask(self, data: bytes) -> bytes:
        """Send bytes, read until the server closes, return all of it."""
        with self.connect() as peer:
            peer.sendall(data)
            return read_all(peer)


@contextmanager
def served(limits: LimitsConfig, app: ASGIApp | None = None, *, keep_alive_s: int = 60) -> Iterator[Served]:
    """Serve `app` (default: one that reads its body and answers its length) until the block ends."""
    seen: list[tuple[str, int]] = []
    is_whole_api = isinstance(app, FastAPI)
    guarded: ASGIApp = app if isinstance(app, FastAPI) else BodyGuard(app or _counting_app(seen), limits)
    config = uvicorn.Config(
        guarded,
        http=guarded_protocol(limits, app.state.scrapes if isinstance(app, FastAPI) else None),
        port=0,
        lifespan="on" if is_whole_api else "off",
        log_config=None,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline_s = time.monotonic() + HANG_S
        while not server.started and thread.is_alive() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        yield Served(server.servers[0].sockets[0].getsockname()[1], seen)
    finally:
        server.should_exit = True
        thread.join(timeout=HANG_S)


def _counting_app(seen: list[tuple[str, int]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                seen.append(("disconnect", num_bytes))
                return
            num_bytes += len(message["body"])
            more = message["more_body"]
        seen.append((scope["path"], num_bytes))
        body = b"%d" % num_bytes
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    return app


def read_all(peer: socket.socket) -> bytes:
    """Read until the peer closes or resets."""
    data = b""
    try:
        while chunk := peer.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def read_answer(peer: socket.socket) -> tuple[bytes, bytes]:
    """Read one answer of known length; return its head and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(peer)
    head, _, body = data.partition(b"\r\n\r\n")
    size = next(int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
    while len(body) < size:
        body += _receive(peer)
    assert len(body) == size, f"{len(body) - size} bytes more than announced"
    return head, body


def _receive(peer: socket.socket) -> bytes:
    data = peer.recv(65536)
    assert data, "the server closed in the middle of an answer"
    return data


def send_until_answered(peer: socket.socket, block: bytes, num_bytes: int) -> None:
    """Send at most so many bytes; stop as soon as the server has said something, or has closed."""
    try:
        for _ in range(num_bytes // len(block)):
            if select.select([peer], [], [], 0)[0]:
                return
            peer.sendall(block)
    except (BrokenPipeError, ConnectionResetError):
        pass


def status_of(answer: bytes) -> int:
    """Return the status of the first answer in these bytes; 0 when there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def error_of(answer: bytes) -> dict[str, str | None]:
    """Return the error object of an answer, having checked that it has OpenAI's four keys."""
    error: dict[str, str | None] = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def reset_peak_rss() -> int:
    """Start a new peak measurement of this process; return the current resident bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def peak_rss() -> int:
    """Return the largest resident size since `reset_peak_rss`, bytes."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
