"""A server that answers as a script says, at known moments, and writes down what it saw and did by its loop's clock.

Owns raw HTTP/1.1 over a Unix socket. Invariant: every request leaves one `Served`; what was sent is recorded before it
is written.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Script:
    """How one request is answered.

    gaps_s: seconds before each piece, the first counted from the request. end: "done" (finish, usage, [DONE]),
    "no_usage", "cut" (the connection closes in mid-stream), "ended" (the body ends properly, the events do not),
    "error" (an error event), "malformed" (half a JSON object), "hang" (nothing more ever comes). status: anything but
    200 is answered after the first gap, without a stream.
    cut_into: bytes per write, 0 for one write per event.
    """

    gaps_s: tuple[float, ...] = (0.1, 0.02, 0.02)
    end: str = "done"
    status: int = 200
    newline: str = "\n"
    cut_into: int = 0
    is_chat: bool = False
    texts: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Served:
    """One request as the server saw it; moments by the loop's clock."""

    body: Body
    received_s: float
    connection: int
    authorization: str | None
    sent_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0


class SyntheticServer:
    """Answers by `script(body, number of the request)`."""

    def __init__(self, script: Callable[[Body, int], Script]) -> None:
        self.served: list[Served] = []
        self.num_connections = 0
        self._script = script

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """Serve on a Unix socket while the block runs; connections that are still open are closed after it."""
        writers: list[asyncio.StreamWriter] = []

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await self._serve(reader, writer)

        server = await asyncio.start_unix_server(on_connection, str(path), backlog=1024)
        try:
            yield
        finally:
            server.close()
            for writer in writers:
                writer.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self.num_connections
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not await self._answer(head.decode(), reader, writer, connection):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> bool:
        """Answer one request; tell whether the connection stays."""
        loop = asyncio.get_running_loop()
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body: Body = json.loads(await reader.readexactly(int(headers["content-length"])))
        served = Served(body, loop.time(), connection, headers.get("authorization"))
        self.served.append(served)
        script = self._script(body, len(self.served) - 1)
        if script.status != 200:
            await asyncio.sleep(script.gaps_s[0])
            text = b'{"error":{"message":"as the script says"}}'
            writer.write(f"HTTP/1.1 {script.status} X\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
            served.ended_s = loop.time()
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index, gap_s in enumerate(script.gaps_s):
            await asyncio.sleep(gap_s)
            served.sent_s.append(loop.time())
            _write(writer, script, _token(script, index))
        served.ended_s = loop.time()
        return await self._end(writer, script)

    async def _end(self, writer: asyncio.StreamWriter, script: Script) -> bool:
        if script.end == "hang":
            await asyncio.sleep(1e6)
        if script.end == "cut":
            return False
        if script.end == "ended":
            writer.write(b"0\r\n\r\n")
            return True
        if script.end == "error":
            _write(writer, script, json.dumps({"error": {"message": "the engine is gone"}}))
        elif script.end == "malformed":
            _write(writer, script, '{"choices": [')
        else:
            key: Body = {"delta": {}} if script.is_chat else {"text": ""}
            _write(writer, script, json.dumps({"choices": [{"index": 0, **key, "finish_reason": "length"}]}))
            if script.end == "done":
                usage = {"prompt_tokens": 7, "completion_tokens": len(script.gaps_s)}
                _write(writer, script, json.dumps({"choices": [], "usage": usage}))
        _write(writer, script, "[DONE]")
        writer.write(b"0\r\n\r\n")
        return True


def _token(script: Script, index: int) -> str:
    text = script.texts[index] if script.texts else f"w{index} "
    key = {"delta": {"content": text}} if script.is_chat else {"text": text}
    ids = {"token_ids": [script.token_ids[index]]} if script.token_ids else {}
    return json.dumps({"choices": [{"index": 0, **key, **ids, "finish_reason": None}]})


def _write(writer: asyncio.StreamWriter, script: Script, data: str) -> None:
    event = f": a comment{script.newline}data: {data}{script.newline}{script.newline}".encode()
    size = script.cut_into or len(event)
    for begin in range(0, len(event), size):
        piece = event[begin : begin + size]
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
