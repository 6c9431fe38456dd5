"""How long a scrape of /metrics takes, 20 times a second, while the server is idle and while it streams.

    python scripts/with_server.py --port 8123 -- python -m scripts.bench_metrics --url http://127.0.0.1:8123

Owns the scraper's clock and the load beside it, which runs in a process of its own; everything is plain HTTP. Not a
CI test. Invariant: every scrape counts, the slowest too, from the first byte sent to the last one received.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from urllib.parse import urlsplit

import httpx

from loadtest.environment import read_environment

_INTERVAL_S = 0.05
_RAMP_S = 3.0
_LOAD_OUTPUT_TOKENS = 200
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Scrapes:
    """One run's latencies in milliseconds; `num_bytes` is the size of the last page."""

    name: str
    num_scrapes: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    num_bytes: int
    generated_tokens_per_s: float


def main() -> int:
    """Run both measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", required=True)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=16, help="completions that stream at once under load")
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_only:
        asyncio.run(_load(options.url, options.streams))
        return 0
    print(json.dumps({"environment": read_environment(sys.argv[1:], "scripts.bench_metrics")}, indent=1), flush=True)
    found = [_scrape(options.url, "idle", options.seconds)]
    command = [sys.executable, "-m", "scripts.bench_metrics", "--url", options.url, "--load-only"]
    load = subprocess.Popen([*command, "--streams", str(options.streams)])
    try:
        time.sleep(_RAMP_S)
        found.append(_scrape(options.url, f"{options.streams} streams", options.seconds))
    finally:
        load.terminate()
        load.wait()
    for scrapes in found:
        print(json.dumps(asdict(scrapes)))
    return 0


def _scrape(url: str, name: str, seconds: float) -> Scrapes:
    """Scrape at fixed times over one connection; a late scrape does not move the next one."""
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None, url
    taken: list[float] = []
    page = b""
    with socket.create_connection((address.hostname, address.port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = _tokens(_get(peer))
        begin = time.monotonic()
        for index in range(int(seconds / _INTERVAL_S)):
            time.sleep(max(0.0, begin + index * _INTERVAL_S - time.monotonic()))
            sent = time.perf_counter()
            page = _get(peer)
            taken.append(1000 * (time.perf_counter() - sent))
        tokens_per_s = (_tokens(page) - before) / (time.monotonic() - begin)
    taken.sort()
    p50, p90, p99 = (round(taken[int(share * len(taken))], 2) for share in (0.5, 0.9, 0.99))
    return Scrapes(name, len(taken), p50, p90, p99, round(taken[-1], 2), len(page), round(tokens_per_s, 1))


def _get(peer: socket.socket) -> bytes:
    peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(peer)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"GET /metrics: {head[:200]!r}")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(lengths[0].split(b":")[1]):
        body += _receive(peer)
    return body


def _receive(peer: socket.socket) -> bytes:
    data = peer.recv(1 << 18)
    if not data:
        raise SystemExit("the server closed the scraper's connection")
    return data


def _tokens(page: bytes) -> float:
    lines = [line for line in page.decode().splitlines() if line.startswith("chorale_generation_tokens_total ")]
    return float(lines[0].split(" ")[1])


async def _load(url: str, num_streams: int) -> None:
    """Stream completions of the base and of every adapter in turn, for ever, on bare sockets.

    The load shares the cores with what is measured: with an HTTP library most of the tail would be that library's.
    """
    async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as client:
        models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    address, loop = urlsplit(url), asyncio.get_running_loop()
    assert address.hostname is not None and address.port is not None, url
    streams = [_Stream(models, index, num_streams) for index in range(num_streams)]
    for stream in streams:
        await loop.create_connection(partial(_itself, stream), address.hostname, address.port)
    await asyncio.gather(*(stream.lost for stream in streams))


def _itself(stream: "_Stream") -> "_Stream":
    return stream


class _Stream(asyncio.Protocol):
    """One connection that asks for an answer after the other and looks at no more of them than where they end."""

    def __init__(self, models: Sequence[str], index: int, stride: int) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self._models, self._index, self._stride = models, index, stride
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first answer."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Ask for the next answer at the end of this one."""
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(_LAST_CHUNK):
            if b"[DONE]" not in self._tail:
                self.lost.set_exception(RuntimeError(f"an answer ended with {self._tail!r}"))
            self._tail = b""
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the load: the server keeps a connection that it answers on."""
        if not self.lost.done():
            self.lost.set_exception(exc or RuntimeError(f"the server closed a stream after {self._tail!r}"))

    def _ask(self) -> None:
        model = self._models[self._index % len(self._models)]
        body = {"model": model, "prompt": f"{self._index} once upon", "ignore_eos": True}
        raw = json.dumps(body | {"max_tokens": _LOAD_OUTPUT_TOKENS, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json"
        self._transport.write(f"{head}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        self._index += self._stride


if __name__ == "__main__":
    sys.exit(main())
