"""Clients of the tier benchmark: streams whose gaps are timed, and requests that tell what they waited for.

Owns the requests and their clocks; computes nothing. Written on bare sockets: on a machine where client and server
share two cores, an HTTP library's own time would be most of what is seen.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field

# a question of a chat and an answer
WARM_PROMPT_TOKENS, WARM_OUTPUT_TOKENS = 96, 64
_OTHER_PROMPT_TOKENS = 24


@dataclass(slots=True)
class Warm:
    """What one streaming client saw: when each token came, and how far apart, seconds."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    num_requests: int = 0


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request of a single token: seconds until its answer, and the server's own account of it in ms."""

    total_s: float
    parts_ms: dict[str, float]


async def stream_until(port: int, model: str, stop: asyncio.Event, seed: int, warm: Warm) -> None:
    """Stream answers one after the other until told to stop; each has a prompt of its own."""
    number = 0
    while not stop.is_set():
        number += 1
        prompt = [2 + (seed * 7919 + number * 104729 + index * 31) % 100_000 for index in range(WARM_PROMPT_TOKENS)]
        body = {"model": model, "prompt": prompt, "max_tokens": WARM_OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
        reader, writer = await _send(port, body)
        last: float | None = None
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                now = time.perf_counter()
                if last is not None:
                    warm.gaps.append((now, now - last))
                last = now
        writer.close()
        warm.num_requests += 1


async def first_token(port: int, model: str, seed: int) -> FirstToken:
    """Ask for one token."""
    prompt = [2 + (seed * 104729 + index * 7919) % 100_000 for index in range(_OTHER_PROMPT_TOKENS)]
    begin = time.perf_counter()
    reader, writer = await _send(port, {"model": model, "prompt": prompt, "max_tokens": 1, "ignore_eos": True})
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    await reader.read()
    total_s = time.perf_counter() - begin
    writer.close()
    if " 200 " not in head.splitlines()[0]:
        raise RuntimeError(f"{model}: {head.splitlines()[0]}")
    timing = next(line for line in head.splitlines() if line.lower().startswith("server-timing:"))
    parts = dict(part.strip().split(";dur=") for part in timing.split(":", 1)[1].split(","))
    return FirstToken(total_s, {name: float(value) for name, value in parts.items()})


async def ask_until(port: int, models: list[str], stop: asyncio.Event, seed: int) -> list[FirstToken]:
    """Ask for one token of each model in turn, over and over, until told to stop."""
    found: list[FirstToken] = []
    while not stop.is_set():
        # where the last slice left off, more or less: else each would begin with what the last one left in memory
        found.append(await first_token(port, models[(seed + len(found)) % len(models)], seed + len(found)))
    return found


async def _send(port: int, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    )
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + raw)
    await writer.drain()
    return reader, writer
