"""Signatures on the real server: what was tampered with, or whose key counts no more, reaches no faster tier again."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from adapters_store.signing.keys import SigningKey, public_pem
from adapters_store.signing.sign import sign_folder
from tests.live_server import LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

KEY, OTHER = (SigningKey(ec.derive_private_key(number, ec.SECP256R1())) for number in (41, 42))
TIMEOUT_S = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that requires signatures, with the probe on."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ours.pem").write_bytes(public_pem(KEY.public.key))
    options = ("--device", "cpu", "--dtype", "float32", "--probe", "on")
    signing = ("--signatures", "require", "--trust-roots", str(tmp_path / "keys"))
    server = start_server(tmp_path / "log", write_tiny_model(tmp_path / "tiny"), tmp_path / "store", *options, *signing)
    yield server
    stop_server(server)


def publish(server: LiveServer, folder: Path, name: str, seed: int) -> str:
    """Upload a signed adapter; return its digest."""
    adapter = write_tiny_adapter(folder / "sources", name, 4, seed=seed)
    sign_folder(adapter.folder, KEY)
    parts = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.folder.iterdir())]
    with server.client() as client:
        answer = client.post("/v1/adapters", data={"name": name}, files=parts)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["digest"]).removeprefix("sha256:")


def ask(server: LiveServer, model: str) -> httpx.Response:
    with server.client() as client:
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        return client.post("/v1/completions", json=body)


def tokens(answer: httpx.Response) -> object:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def evict(server: LiveServer, name: str) -> None:
    """Free an adapter's memory in all tiers."""
    with server.client() as client:
        until(lambda: client.post(f"/v1/adapters/{name}:evict").status_code == 200, f"{name} is still held")


def test_an_image_that_was_changed_on_the_disk_is_never_served(server: LiveServer, tmp_path: Path) -> None:
    digest = publish(server, tmp_path, "poet", 1)
    before = tokens(ask(server, "poet"))
    evict(server, "poet")
    image = tmp_path / "store" / "objects" / digest / "adapter.safetensors"
    honest = image.read_bytes()
    image.chmod(0o600)
    image.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    refused = ask(server, "poet")
    assert refused.status_code == 503 and "poet" not in str(refused.json().get("choices")), refused.text
    image.write_bytes(honest)
    # what was refused is asked for anew
    until(lambda: ask(server, "poet").status_code == 200, "the honest bytes are served again")
    assert tokens(ask(server, "poet")) == before
    # what was left for the engine is made good by the next use, whose signature the registry holds
    evict(server, "poet")
    (seal,) = (tmp_path / "store" / "seals" / digest).glob("*.json")
    said = seal.read_bytes()
    seal.write_bytes(said[:-9])
    assert tokens(ask(server, "poet")) == before and seal.read_bytes() == said


def test_a_pinned_adapters_key_that_counts_no_more_ends_it_with_the_engine(server: LiveServer, tmp_path: Path) -> None:
    publish(server, tmp_path, "poet", 1)
    with server.client() as client:
        assert client.post("/v1/adapters/poet:pin").status_code == 202
        until(lambda: client.get("/v1/adapters/poet/status").json()["state"] == "ready", "pinned and loaded")
    (tmp_path / "keys" / "ours.pem").write_bytes(public_pem(OTHER.public.key))
    until(lambda: ask(server, "poet").status_code == 403, "the key counts no longer than a second")
    # the next engine is told of the pin by its digest alone, and checks for itself
    psutil.Process(server.engine_pid()).kill()
    server.wait_for_status("/readyz", 200, 120.0)
    with server.client() as client:
        until(lambda: client.get("/v1/adapters/poet/status").json()["pin_error"] is not None, "the pin's error")
        status = client.get("/v1/adapters/poet/status").json()
    assert "may not be loaded" in status["pin_error"] and status["tier"] == "disk"
