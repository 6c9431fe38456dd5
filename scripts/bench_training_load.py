"""What a training worker costs the server beside it: the same load with and without a job in training, in one run.

Owns the measurement: starts a server of its own with a worker, streams chats at a fixed concurrency, first without a
job, then beside one that trains all the while, and again without. Prints a table in Markdown with its environment.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

ROOT = Path(__file__).resolve().parents[1]
BASE = "chorale-demo"
_START_S = 120.0


@dataclass
class Load:
    """What one phase saw; times in milliseconds."""

    name: str
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    num_errors: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def row(self) -> str:
        """Return a row of the table."""
        numbers = [percentile(self.ttft_ms, 50), percentile(self.ttft_ms, 95)]
        numbers += [percentile(self.itl_ms, 50), percentile(self.itl_ms, 95), self.num_tokens / self.seconds]
        shown = " | ".join(f"{number:.1f}" for number in numbers)
        return f"| {self.name} | {len(self.ttft_ms)} | {self.num_errors} | {shown} |"


def percentile(values: list[float], percent: int) -> float:
    """Return the nearest-rank percentile; 0 for nothing."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


async def one_chat(client: httpx.AsyncClient, number: int, load: Load) -> None:
    """Stream one chat and note its times; an answer that is not whole is an error."""
    body = {"model": BASE, "stream": True, "max_tokens": 32, "ignore_eos": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": f"reverse: word{number}"}]
    start = last = time.perf_counter()
    is_first, is_done = True, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    now = time.perf_counter()
                    (load.ttft_ms if is_first else load.itl_ms).append(1000 * (now - (start if is_first else last)))
                    is_first, last = False, now
                    load.num_tokens += 1
    except httpx.HTTPError:
        is_done = False
    load.num_errors += not is_done


async def run_load(url: str, name: str, *, num_chats: int, concurrency: int) -> Load:
    """Send so many chats, so many at once."""
    load, places = Load(name), asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def place(number: int) -> None:
            async with places:
                await one_chat(client, number, load)

        start = time.perf_counter()
        await asyncio.gather(*(place(number) for number in range(num_chats)))
        load.seconds = time.perf_counter() - start
    return load


def start_job(client: httpx.Client) -> str:
    """Start a job that trains longer than anybody measures; return its id once it has taken a step."""
    line = json.dumps({"prompt": "reverse: " + "word " * 12, "completion": " drow" * 12})
    files = {"file": ("data.jsonl", ((line + "\n") * 64).encode())}
    data = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files).raise_for_status().json()["id"]
    body = {"model": BASE, "training_file": data, "adapter": {"n_epochs": 50, "batch_size": 4, "max_length": 256}}
    job = str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
    while steps_of(client, job) == 0:
        time.sleep(0.2)
    return job


def steps_of(client: httpx.Client, job: str) -> int:
    """Return the last step that was told."""
    events = client.get(f"/v1/fine_tuning/jobs/{job}/events", params={"limit": 5}).json()["data"]
    return max((event["data"].get("step", 0) for event in events), default=0)


def measure(url: str, num_chats: int, concurrency: int) -> tuple[list[Load], float]:
    """Return the phases, and how many steps a second the job took beside the load."""
    phases = []
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        asyncio.run(run_load(url, "warm-up", num_chats=concurrency * 2, concurrency=concurrency))

        def phase(name: str) -> None:
            phases.append(asyncio.run(run_load(url, name, num_chats=num_chats, concurrency=concurrency)))

        phase("no job")
        job = start_job(client)
        first, start = steps_of(client, job), time.perf_counter()
        phase("a job trains")
        rate = (steps_of(client, job) - first) / (time.perf_counter() - start)
        client.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
        time.sleep(3)
        phase("no job, again")
    return phases, rate


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=80)
    parser.add_argument("--concurrency", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "serve", "serve", "--model", str(ROOT / "deploy" / "demo" / BASE)]
        command += ["--store", f"{folder}/store", "--port", "0", "--train-worker", "on", "--log-level", "error"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            phases, rate = measure(url, arguments.chats, arguments.concurrency)
        finally:
            server.terminate()
            server.wait(_START_S)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')};")
    print(f"`scripts/bench_training_load.py --chats {arguments.chats} --concurrency {arguments.concurrency}`\n")
    print("| phase | chats | errors | TTFT p50 ms | TTFT p95 ms | ITL p50 ms | ITL p95 ms | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for load in phases:
        print(load.row())
    print(f"\nThe job took {rate:.2f} steps/s beside the load.")


if __name__ == "__main__":
    main()
