"""The real server as a process, for end-to-end tests: start it, wait for its ready line, talk to it, stop it.

Owns the process it started and nothing else. Invariant: `stop` is bounded and ends the process and its engine child,
by process id, whatever state they are in.
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import httpx
import psutil

REPO_ROOT = Path(__file__).resolve().parents[1]
# one that cannot start ends, and is noticed at once; this is for a machine that is busy with other work
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
# gauges are fed by heartbeats every 0.5 s, so a single reading of 0 proves nothing
HEARTBEAT_S = 0.8
# the outside clients live in an environment of their own, without the server's packages
SERVER_PYTHON = os.environ.get("CHORALE_PYTHON", sys.executable)
READY_LINE = re.compile(r"^chorale ready (http://\S+)$")

# on which devices the whole HTTP suite runs
DEVICES = ("cpu", "cuda")

# the gauges that the documented contract promises to be 0 at rest
REST_GAUGES = (
    "chorale_kv_blocks_in_use",
    "chorale_requests_running",
    "chorale_requests_waiting",
    "chorale_adapter_pins",
)


def server_environment() -> dict[str, str]:
    """Return this process's environment with our packages on the path, installed or not."""
    paths = [str(REPO_ROOT), str(REPO_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def chorale_command(*arguments: str) -> list[str]:
    """Return the command line of `chorale ARGUMENTS`, installed or not."""
    return [SERVER_PYTHON, "-m", "serve", *arguments]


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A running server: its address, its process and where its log lies."""

    url: str
    process: "subprocess.Popen[str]"
    log_path: Path

    def client(self, timeout_s: float = 120.0) -> httpx.Client:
        """Return an HTTP client for this server; the caller closes it.

        Each request has a connection of its own: the server closes one that was idle for seconds, which on a busy
        machine may be just when the next request leaves.
        """
        fresh = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, timeout=timeout_s, limits=fresh, trust_env=False)

    def metrics(self) -> dict[str, float]:
        """Return every series of /metrics by its full name, labels included."""
        text = httpx.get(f"{self.url}/metrics", timeout=60.0, trust_env=False).text
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def wait_for_rest(self, timeout_s: float = 120.0) -> None:
        """Return once all rest gauges have read 0 for longer than a heartbeat; fail with what they read otherwise."""
        deadline = time.monotonic() + timeout_s
        rest_since = time.monotonic()
        busy: dict[str, float] = {}
        while time.monotonic() < deadline:
            series = self.metrics()
            if busy := {name: series[name] for name in REST_GAUGES if series[name] != 0.0}:
                rest_since = time.monotonic()
            elif time.monotonic() - rest_since > HEARTBEAT_S:
                return
            time.sleep(0.05)
        raise AssertionError(f"not at rest after {timeout_s} s: {busy}")

    def wait_for_work(self, timeout_s: float = 120.0) -> dict[str, float]:
        """Return the rest gauges once none of those that a running adapter request moves is 0."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            series = self.metrics()
            if all(series[name] > 0 for name in REST_GAUGES if name != "chorale_requests_waiting"):
                return {name: series[name] for name in REST_GAUGES}
            time.sleep(0.05)
        raise AssertionError(f"no work to be seen after {timeout_s} s")

    def wait_for_status(self, path: str, status: int, timeout_s: float = 120.0) -> None:
        """Return once GET `path` answers `status`."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        while time.monotonic() < deadline:
            seen = httpx.get(f"{self.url}{path}", timeout=60.0, trust_env=False).status_code
            if seen == status:
                return
            time.sleep(0.05)
        raise AssertionError(f"{path} answers {seen}, not {status}, after {timeout_s} s\n{self.log_tail()}")

    def engine_pid(self) -> int:
        """Return the process id of the engine child."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        engines = [child.pid for child in children if "serve.engine.worker" in child.cmdline()]
        assert len(engines) == 1, f"expected one engine process, found {engines}"
        return int(engines[0])

    def upload(self, name: str, folder: Path) -> httpx.Response:
        """Send a PEFT folder through POST /v1/adapters and return the answer."""
        files = [
            ("files", (file, (folder / file).read_bytes(), "application/octet-stream"))
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        with self.client() as client:
            return client.post("/v1/adapters", data={"name": name}, files=files)

    def complete(self, model: str, **fields: object) -> dict[str, object]:
        """Return the first choice of one completion; fails on any status but 200."""
        with self.client() as client:
            response = client.post("/v1/completions", json={"model": model, **fields})
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        assert isinstance(choice, dict)
        return choice

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


@cache
def missing_device(device: str) -> str | None:
    """Return why a server cannot run on this device here, or None; the interpreter that would serve is asked."""
    if device == "cpu":
        return None
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    is_missing = subprocess.run([SERVER_PYTHON, "-c", check], capture_output=True).returncode != 0
    return "needs a CUDA device: torch.cuda.is_available() is false" if is_missing else None


def start_server(log_path: Path, model_dir: Path, store_dir: Path, *options: str, module: str = "serve") -> LiveServer:
    """Start `chorale serve` on a free loopback port and wait for its ready line.

    Args:
        module: what runs; a test's own may plant a fault before it hands over to `serve`.
    Raises:
        AssertionError: it ended, or was not ready in time; the message holds the end of its log.
    """
    command = [SERVER_PYTHON, "-m", module, "serve", "--model", str(model_dir), "--store", str(store_dir)]
    command += ["--port", "0"]
    # tiny models gain nothing from more threads, and their barriers lose milliseconds each on a busy machine
    # and what is uploaded for other reasons need not be proven each time
    # and no load balancer stands before them
    command += ["--num-threads", "1", "--probe", "off", "--drain-delay-s", "0", *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=REPO_ROOT,
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    line = read_line(process.stdout, READY_LINE, START_TIMEOUT_S)
    url = line and line.group(1)
    server = LiveServer(url or "", process, log_path)
    if url is None:
        stop_server(server)
        raise AssertionError(
            f"{json.dumps(command)} gave no ready line (status {process.returncode})\n{server.log_tail()}"
        )
    return server


def stop_server(server: LiveServer) -> None:
    """End the server with SIGTERM, after a bounded wait with SIGKILL, and its children with it."""
    process = server.process
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
        for child in children:
            if child.is_running():
                child.kill()


def read_line(stdout: IO[str], wanted: re.Pattern[str], timeout_s: float) -> re.Match[str] | None:
    """Return the first line that a process prints and that is wanted; None: it ended, or the time is over.

    The pipe is read below its file object, which would keep lines that came with an earlier one where `select` sees
    none.
    """
    deadline, seen = time.monotonic() + timeout_s, b""
    while time.monotonic() < deadline:
        is_readable, _, _ = select.select([stdout], [], [], 1.0)
        if not is_readable:
            continue
        if not (data := os.read(stdout.fileno(), 1 << 16)):
            return None
        *lines, seen = (seen + data).split(b"\n")
        for line in lines:
            if match := wanted.match(line.decode(errors="replace").strip()):
                return match
    return None
