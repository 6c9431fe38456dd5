"""The real server over the fake engine, as a process of its own that tests talk to.

Owns one process. Invariant: whoever starts it ends it (the `start_fake` fixture does).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.live_server import REPO_ROOT, server_environment

StartFake = Callable[..., "FakeServer"]


class FakeServer:
    """A running fake server and its address."""

    def __init__(self, model_dir: Path, store_dir: Path, delay_s: float, timeout_s: float) -> None:
        command = [sys.executable, "-m", "tests.cli.fake_server", str(model_dir), str(store_dir)]
        command += [str(delay_s), str(timeout_s)]
        self.process = subprocess.Popen(
            command,
            cwd=REPO_ROOT,
            env=server_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        self.url = self.ready_line.removeprefix("chorale ready ").strip()

    def stream(self, num_tokens: int) -> Iterator[dict[str, object]]:
        """Yield the chunks of one streamed completion of so many tokens."""
        body = {"model": "fake", "prompt": [0, 1, 2], "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=120.0) as client,
            client.stream("POST", f"{self.url}/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def get(self, path: str) -> httpx.Response:
        """Send one GET on a connection of its own."""
        return httpx.get(f"{self.url}{path}", timeout=120.0, trust_env=False)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end and return status, the rest of stdout, and stderr."""
        out, err = self.process.communicate(timeout=240.0)
        return self.process.returncode, out, err
