"""Fixtures that every room's tests share: the real data, a store folder, the real server.

Owns where things lie and how long they live; what is tested belongs to the rooms. Invariant: whatever a fixture starts
it stops, also when the test failed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.live_server import REPO_ROOT, LiveServer, start_server, stop_server

# before anything imports triton: kernels run on CPU tensors; what compiles them does so in a process of its own
os.environ.setdefault("TRITON_INTERPRET", "1")


class StartServer(Protocol):
    """What the `live_server` fixture hands out."""

    def __call__(self, model_dir: Path, *options: str, store_dir: Path | None = None) -> LiveServer:
        """Start `chorale serve` for this model with more options; stopped when the test's scope ends."""
        ...


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real models, adapters and traces, or skip where it is missing."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not (folder / "models" / "golden.json").is_file():
        pytest.skip("needs ../shared/data (real models and adapters), which is not part of the repository")
    return folder


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Return a folder for a store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Hand out a function that starts real servers; all of them are stopped at the end of the module."""
    servers: list[LiveServer] = []

    def start(model_dir: Path, *options: str, store_dir: Path | None = None) -> LiveServer:
        folder = tmp_path_factory.mktemp("server")
        server = start_server(folder / "server.log", model_dir, store_dir or folder / "store", *options)
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in servers:
            stop_server(server)
