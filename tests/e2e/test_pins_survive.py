"""A pin of the operator outlives the server that promised it."""

import time
from pathlib import Path

import pytest

from tests.live_server import LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 60.0


def status(server: LiveServer, name: str) -> dict[str, object]:
    with server.client() as client:
        return dict(client.get(f"/v1/adapters/{name}/status").raise_for_status().json())


def wait_ready(server: LiveServer, name: str) -> None:
    """Return once an adapter is pinned and on the device; nobody asks for it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (seen := status(server, name))["pinned"] or seen["state"] != "ready":
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def test_a_pin_is_held_again_by_the_next_server(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    for life in range(3):
        # the first is killed, the second ended
        server = start_server(tmp_path / f"{life}.log", model, tmp_path / "store", "--device", "cpu")
        try:
            with server.client() as client:
                if life == 0:
                    for seed, name in enumerate(("kept", "let-go", "deleted")):
                        adapter = write_tiny_adapter(tmp_path, name, 2, seed=seed)
                        assert server.upload(name, adapter.folder).status_code == 201
                        assert client.post(f"/v1/adapters/{name}:pin").status_code == 202
                    assert client.post("/v1/adapters/let-go:unpin").status_code == 200
                    assert client.delete("/v1/adapters/deleted").status_code == 200
                    server.process.kill()
                    continue
            wait_ready(server, "kept")
            assert status(server, "let-go")["pinned"] is False
        finally:
            stop_server(server)
    assert "is to be pinned, and is not" not in (tmp_path / "1.log").read_text()
