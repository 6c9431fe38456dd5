"""What a step costs the two processes of the server when no model runs: the real API and HTTP over `host_worker`.

Clients stream over HTTP; in the middle of their answers the processor time of both processes is read beside the number
of steps (the events of one stream), some seconds apart. Prints JSON with milliseconds per step at each stream count:
median, least and greatest of the samples; for the API also what it costs per second when nobody asks it anything.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import aiohttp

from scripts.bench_model import Shape, build_base

_SAMPLE_S = 3.0
_PROMPT_TOKENS = 128
_MAX_TOKENS = 1900
_START_S = 120.0
_LETTER = "x"


@dataclass(frozen=True, slots=True)
class Progress:
    """Processor seconds of the API and of the engine so far, and the engine's steps."""

    api_s: float
    engine_s: float
    steps: int


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--base", type=Path, default=Path(".chorale/bench/bench-base"))
    parser.add_argument("--chat", action="store_true", help="stream chats, not completions")
    args = parser.parse_args()
    build_base(args.base, Shape())
    path = "chat/completions" if args.chat else "completions"
    with _chatting(args.base) as base, _server(base) as (url, pid):
        found = {"0": _idle(pid, args.samples)}
        url = f"{url}/v1/{path}"
        found |= {str(count): asyncio.run(_measure(url, pid, count, args.samples)) for count in args.sequences}
    print(json.dumps(found))


@contextmanager
def _chatting(base: Path) -> Iterator[Path]:
    """Yield the same base with a chat template, and one letter that its tokenizer knows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in base.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[_LETTER] = vocabulary.pop(max(vocabulary))
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        yield folder


@contextmanager
def _server(base: Path) -> Iterator[tuple[str, int]]:
    """Run the server without a model; yield its address and process id."""
    command = [sys.executable, "-m", "scripts.host_server", str(base)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None, "the child was started with a pipe"
        yield _address(process.stdout), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def _address(lines: IO[str]) -> str:
    line = lines.readline()
    if "http://" not in line:
        raise RuntimeError(f"the server did not start; it said {line!r}")
    return "http://" + line.split("http://")[1].split()[0].rstrip("/")


async def _measure(url: str, pid: int, count: int, num_samples: int) -> dict[str, list[float]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [Stream() for _ in range(count)]
        clients = [asyncio.ensure_future(stream.read(session, url, index)) for index, stream in enumerate(streams)]
        try:
            await _until_all_stream(streams, clients)
            marks = [_progress(pid, streams[0].num_events)]
            for _ in range(num_samples):
                await asyncio.sleep(_SAMPLE_S)
                marks.append(_progress(pid, streams[0].num_events))
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    api = [1000 * (b.api_s - a.api_s) / (b.steps - a.steps) for a, b in pairwise(marks)]
    engine = [1000 * (b.engine_s - a.engine_s) / (b.steps - a.steps) for a, b in pairwise(marks)]
    return {"api_ms": _summary(api), "engine_ms": _summary(engine)}


def _idle(pid: int, num_samples: int) -> dict[str, list[float]]:
    """Return what the API costs in milliseconds per second while nothing runs."""
    marks = [_processor_s(pid)]
    for _ in range(num_samples):
        time.sleep(_SAMPLE_S)
        marks.append(_processor_s(pid))
    return {"api_ms_per_s": _summary([1000 * (b - a) / _SAMPLE_S for a, b in pairwise(marks)])}


class Stream:
    """One client and how many events it has seen."""

    def __init__(self) -> None:
        self.num_events = 0

    async def read(self, session: aiohttp.ClientSession, url: str, index: int) -> None:
        """Ask for a long answer and count its events."""
        chat = {"messages": [{"role": "user", "content": _LETTER * (index + 1)}]}
        prompt = {"prompt": [2 + index] * _PROMPT_TOKENS}
        body = (chat if url.endswith("/chat/completions") else prompt) | {
            "model": "bench-base",
            "max_tokens": _MAX_TOKENS,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(600)) as response:
            response.raise_for_status()
            async for data in response.content.iter_any():
                self.num_events += data.count(b"data: ")


async def _until_all_stream(streams: Sequence[Stream], clients: Sequence[asyncio.Future[None]]) -> None:
    end_s = time.monotonic() + _START_S
    while not all(stream.num_events > 1 for stream in streams):
        ended = [client for client in clients if client.done()]
        if ended or time.monotonic() > end_s:
            raise RuntimeError(f"not {len(streams)} streams at once after {_START_S:.0f} s: {ended}")
        await asyncio.sleep(0.2)


def _progress(pid: int, steps: int) -> Progress:
    (engine,) = _children(pid)
    return Progress(_processor_s(pid), _processor_s(engine), steps)


def _processor_s(pid: int) -> float:
    """Return what all threads of a process have computed, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text(encoding="ascii").split()]


def _summary(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
