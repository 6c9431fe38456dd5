"""Adapter memory of the real server: the operator's commands, and an endpoint picker that reads /metrics meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.process.endpoint_picker import EndpointState, extract, score
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

NAMES = [f"voice-{i}" for i in range(6)]
# each takes 49,152
NUM_FITTING, MAX_BYTES = 4, 200_000
SCRAPE_S = 0.05


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, any_server: StartServer) -> LiveServer:
    """A server of six adapters with room for four."""
    folder = tmp_path_factory.mktemp("memory")
    options = ("--device", "cpu", "--dtype", "float32", "--adapter-device-bytes", str(MAX_BYTES))
    server = any_server(write_tiny_model(folder / "tiny"), *options)
    for seed, name in enumerate(NAMES):
        adapter = write_tiny_adapter(folder, name, 4, seed=seed)
        assert server.upload(name, adapter.folder).status_code == 201
    return server


def _status(server: LiveServer, name: str) -> dict[str, object]:
    with server.client() as client:
        status: dict[str, object] = client.get(f"/v1/adapters/{name}/status").json()
    return status


def _eventually(server: LiveServer, name: str, claim: Callable[[dict[str, object]], bool]) -> dict[str, object]:
    """Return the status that the claim holds of; heartbeats carry it."""
    deadline = time.monotonic() + 120.0
    while not claim(status := _status(server, name)):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


def _use(server: LiveServer, name: str, *, max_tokens: int = 4) -> None:
    server.complete(name, prompt=[1, 2, 3], max_tokens=max_tokens, ignore_eos=True)


def _command(server: LiveServer, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["adapters", *arguments, "--url", server.url])
    assert result.exit_code == 0, result.output
    return result.output


@contextmanager
def _scraping(server: LiveServer) -> Iterator[list[EndpointState]]:
    """Scrape as the picker does while the block runs."""
    states: list[EndpointState] = []
    is_over = threading.Event()

    def scrape() -> None:
        with server.client() as client:
            while not is_over.wait(SCRAPE_S):
                states.append(extract(client.get("/metrics").text))

    with ThreadPoolExecutor(1) as pool:
        scraper = pool.submit(scrape)
        try:
            yield states
        finally:
            is_over.set()
            scraper.result()


def test_a_pinned_adapter_stays_while_all_others_come_and_go(server: LiveServer) -> None:
    _command(server, "pin", "voice-0")
    first = _eventually(server, "voice-0", lambda status: status["state"] == "ready")
    assert first["pinned"] is True and first["bytes"] and first["loads"] == 1
    for name in [*NAMES[1:], *NAMES[1:]]:
        _use(server, name)
    after = _eventually(server, "voice-4", lambda status: status["state"] == "ready")
    assert after["loads"]
    pinned = _status(server, "voice-0")
    assert (pinned["state"], pinned["loads"], pinned["evictions"]) == ("ready", 1, 0)
    # two take less than half of the bytes, three do not
    _command(server, "pin", "voice-1")
    refused = CliRunner().invoke(app, ["adapters", "pin", "voice-2", "--url", server.url])
    assert refused.exit_code == 1 and "half of the adapter bytes" in " ".join(refused.output.split())
    in_use = httpx.post(f"{server.url}/v1/adapters/voice-0:evict", timeout=120.0, trust_env=False)
    assert in_use.status_code == 409 and in_use.json()["error"]["code"] == "adapter_in_use"
    for name in ("voice-0", "voice-1"):
        _command(server, "unpin", name)


def test_an_eviction_frees_the_bytes_that_the_status_named(server: LiveServer) -> None:
    _command(server, "prefetch", "voice-2")
    status = _eventually(server, "voice-2", lambda status: status["state"] == "ready")
    assert f"{status['bytes']} bytes freed" in _command(server, "evict", "voice-2")
    gone = _eventually(server, "voice-2", lambda status: status["state"] == "absent")
    assert (gone["tier"], gone["bytes"]) == ("disk", 0)
    assert "disk" in _command(server, "status", "voice-2")


def test_the_picker_sees_one_true_series_while_adapters_load_and_leave(server: LiveServer) -> None:
    with _scraping(server) as states:
        deadline = time.monotonic() + 120.0
        # until adapters were seen to come and go, which a picker that gets no processor time may miss
        while len({state.running for state in states}) <= 2:
            assert time.monotonic() < deadline, states
            with ThreadPoolExecutor(len(NAMES)) as pool:
                list(pool.map(lambda name: _use(server, name, max_tokens=20), NAMES))
            with server.client() as client:
                client.post("/v1/adapters/voice-3:evict")
        _use(server, "voice-4")
        _eventually(server, "voice-4", lambda status: status["state"] == "ready")
        deadline = time.monotonic() + 120.0
        # the page is a tenth of a second old at most, the scrape twice a tenth
        while not states or "voice-4" not in states[-1].running:
            assert time.monotonic() < deadline, states[-1:]
            time.sleep(SCRAPE_S)
    last = states[-1]
    assert {state.num_lora_series for state in states} == {1}
    assert all(len(state.running) <= NUM_FITTING for state in states)
    assert all(state.running | state.waiting <= set(NAMES) for state in states)
    assert all(a.updated_at <= b.updated_at for a, b in pairwise(states))
    assert score(last, "voice-4") == 1.0
    absent = next(name for name in NAMES if name not in last.running)
    # bytes bind here, not slots, of which there is room
    assert score(last, absent) == 0.8
