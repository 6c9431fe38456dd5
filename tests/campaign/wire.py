"""One keep-alive connection to the server: requests out, status, headers and body or server-sent events back.

Owns the bytes of HTTP/1.1 as this server writes it, and little else: a full client costs more than the tiny model. Not
for hostile servers. Invariant: a connection that was left in the middle of an answer is closed, never used again.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from dataclasses import dataclass

# the server closes connections that were idle for 5 s
_MAX_IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers (lower case) and, unless it is a stream, the body."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> dict[str, object]:
        """Return the body as a JSON object."""
        parsed = json.loads(self.body)
        assert isinstance(parsed, dict), self.body
        return parsed


class Wire:
    """A connection that is opened when first used; an answer must have come `timeout_s` after its request was sent."""

    def __init__(self, host: str, port: int, timeout_s: float = 120.0) -> None:
        self._address = (host, port)
        self._timeout_s = timeout_s
        self._due_at = 0.0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used_at = 0.0

    async def ask(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> Answer:
        """Send one request and return its whole answer."""
        answer = await self.begin(method, path, body, content_type)
        pieces = [piece async for piece in self.pieces(answer)]
        return Answer(answer.status, answer.headers, b"".join(pieces))

    async def begin(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> Answer:
        """Send one request and return the head of its answer; read `pieces`, or `close`."""
        await self.send(method, path, body, content_type)
        return await self.head()

    async def send(self, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> None:
        """Send one request; over a new connection when the server may just be closing the old one as idle."""
        if time.monotonic() - self._used_at > _MAX_IDLE_S:
            self.close()
        head = f"{method} {path} HTTP/1.1\r\nHost: campaign\r\nContent-Type: {content_type}\r\n"
        self._due_at = asyncio.get_running_loop().time() + self._timeout_s
        async with asyncio.timeout_at(self._due_at):
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._address)
            self._streams[1].write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await self._streams[1].drain()

    async def head(self) -> Answer:
        """Return the head of the next answer."""
        raw = await self._within(self._reader().readuntil(b"\r\n\r\n"))
        first, *lines = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines if line)
        return Answer(int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs})

    async def pieces(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """Yield the body of an answer as it comes."""
        reader = self._reader()
        if answer.headers.get("transfer-encoding") == "chunked":
            while size := int(await self._within(reader.readuntil(b"\r\n")), 16):
                yield (await self._within(reader.readexactly(size + 2)))[:-2]
            await self._within(reader.readexactly(2))
        elif size := int(answer.headers.get("content-length", "0")):
            yield await self._within(reader.readexactly(size))
        self._used_at = time.monotonic()
        if answer.headers.get("connection") == "close":
            self.close()

    async def events(self, answer: Answer) -> AsyncGenerator[str, None]:
        """Yield the data of each server-sent event."""
        rest = b""
        async for piece in self.pieces(answer):
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event.removeprefix(b"data: ").decode()

    def close(self) -> None:
        """Leave, in the middle of an answer too."""
        if self._streams is not None:
            with suppress(OSError, RuntimeError):
                self._streams[1].transport.abort()
        self._streams = None

    async def _within(self, read: Coroutine[None, None, bytes]) -> bytes:
        async with asyncio.timeout_at(self._due_at):
            return await read

    def _reader(self) -> asyncio.StreamReader:
        assert self._streams is not None, "nothing was sent"
        return self._streams[0]
