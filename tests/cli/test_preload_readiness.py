"""A server that has yet to publish what it is to serve from its start on is not ready, and says why."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live_server import READY_LINE, REPO_ROOT, server_environment
from tests.tiny_model import write_tiny_adapter, write_tiny_model

TIMEOUT_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def listening_port(pid: int) -> int | None:
    """Return the port that a process listens on, if it does yet."""
    found = psutil.Process(pid).net_connections(kind="tcp")
    return next((each.laddr.port for each in found if each.status == psutil.CONN_LISTEN), None)


def test_not_ready_before_all_of_preload_is_published(tmp_path: Path) -> None:
    model, gate = write_tiny_model(tmp_path / "tiny"), tmp_path / "gate"
    write_tiny_adapter(tmp_path / "adapters", "voice", rank=2, seed=1)
    command = [sys.executable, "-m", "tests.cli.gated_preload"]
    arguments = [str(path) for path in (model, tmp_path / "store", tmp_path / "adapters", gate)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=REPO_ROOT,
            env=server_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        until(lambda: listening_port(process.pid) is not None, "no port")
        with httpx.Client(base_url=f"http://127.0.0.1:{listening_port(process.pid)}", trust_env=False) as client:

            def code() -> str | None:
                answer = client.get("/readyz", timeout=TIMEOUT_S)
                return None if answer.status_code == 200 else str(answer.json()["error"]["code"])

            until(lambda: code() not in ("model_loading",), "the engine does not start")
            assert code() == "preloading"
            assert client.get("/v1/adapters").json()["data"] == []
            gate.touch()
            assert process.stdout is not None and READY_LINE.match(process.stdout.readline().strip())
            assert code() is None
            assert [row["name"] for row in client.get("/v1/adapters").json()["data"]] == ["voice"]
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
        if process.stdout is not None:
            process.stdout.close()
