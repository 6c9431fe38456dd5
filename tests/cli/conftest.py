"""Fixtures of the command's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.fake_server_process import FakeServer, StartFake
from tests.tiny_model import write_tiny_model


@pytest.fixture
def start_fake(tmp_path: Path) -> Iterator[StartFake]:
    """Hand out a function that starts fake servers; all are ended with the test."""
    servers: list[FakeServer] = []

    def start(*, delay_s: float = 0.0, timeout_s: float = 60.0) -> FakeServer:
        model_dir = write_tiny_model(tmp_path / f"model{len(servers)}")
        servers.append(FakeServer(model_dir, tmp_path / "store", delay_s, timeout_s))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.process.kill()
            server.process.communicate()
