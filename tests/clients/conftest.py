"""One live server with a tiny random base and two adapters, shared by the tests of all outside clients.

Owns the server's life. Invariant: the clients see it only through HTTP, exactly as a user's script would.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live_server import LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_adapter, write_tiny_model


@pytest.fixture(scope="session")
def server(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serve `tiny` with adapters `voice` and `spare`; tests may delete `spare`."""
    folder: Path = tmp_path_factory.mktemp("clients")
    model_dir = write_tiny_model(folder / "tiny")
    options = ("--device", device, "--dtype", "float32")
    started = start_server(folder / "server.log", model_dir, folder / "store", *options)
    try:
        for seed, name in enumerate(("voice", "spare")):
            response = started.upload(name, write_tiny_adapter(folder, name, rank=8, seed=seed).folder)
            assert response.status_code == 201, response.text
        yield started
    finally:
        stop_server(started)
