"""The server process from its ready line to its end, over the fake engine: drain, hurry, lost engines and orphans."""

import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cli.fake_server_process import FakeServer, StartFake
from tests.process.fake_engine import HOLD

# only a hang takes so long
HANG_S = 120.0


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that, while it is there, keeps a server's streams from ending and its engines from starting."""
    monkeypatch.setenv(HOLD, str(tmp_path / "hold"))
    return tmp_path / "hold"


class Reader(threading.Thread):
    """Reads one stream to its end, in the background."""

    def __init__(self, server: FakeServer, num_tokens: int) -> None:
        super().__init__()
        self._server = server
        self._num_tokens = num_tokens
        self.chunks: list[dict[str, object]] = []
        self.has_begun = threading.Event()

    def run(self) -> None:
        try:
            for chunk in self._server.stream(self._num_tokens):
                self.chunks.append(chunk)
                self.has_begun.set()
        except httpx.TransportError:
            # a server in a hurry closes the connection
            pass
        finally:
            self.has_begun.set()

    @property
    def finish_reasons(self) -> list[object]:
        """The reasons of the chunks that have one."""
        choices = [chunk["choices"] for chunk in self.chunks if "choices" in chunk]
        return [
            choice[0]["finish_reason"]
            for choice in choices
            if isinstance(choice, list) and choice and choice[0]["finish_reason"]
        ]


def begin_stream(server: FakeServer, num_tokens: int) -> Reader:
    """Start a reader and return once its first chunk is there."""
    reader = Reader(server, num_tokens)
    reader.start()
    assert reader.has_begun.wait(HANG_S)
    return reader


def test_sigterm_finishes_running_streams_refuses_new_ones_and_ends_with_status_0(
    start_fake: StartFake, hold: Path
) -> None:
    server = start_fake(timeout_s=600.0)
    assert server.ready_line.startswith("chorale ready http://127.0.0.1:")
    assert server.get("/readyz").status_code == 200
    hold.touch()
    reader = begin_stream(server, 50)
    server.process.send_signal(signal.SIGTERM)
    assert wait_for_status(server, "/readyz", 503)
    assert server.get("/readyz").json()["error"]["code"] == "draining"
    body = {"model": "fake", "prompt": [0], "max_tokens": 1}
    refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=HANG_S, trust_env=False)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"
    assert server.get("/livez").status_code == server.get("/startupz").status_code == 200
    hold.unlink()
    reader.join(HANG_S)
    assert reader.finish_reasons == ["length"]
    status, out, err = server.end()
    assert (status, out, err) == (0, "", "")


def test_ctrl_c_waits_for_no_load_balancer(start_fake: StartFake) -> None:
    server = start_fake(delay_s=600.0, timeout_s=600.0)
    server.process.send_signal(signal.SIGINT)
    assert server.end()[0] == 0


def test_what_load_balancers_still_send_is_served_on_connections_that_end(start_fake: StartFake) -> None:
    # ten minutes of window: what is asked here is certainly inside it
    server = start_fake(delay_s=600.0, timeout_s=600.0)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_S) as kept:
        assert "connection" not in kept.get("/v1/models").headers
        server.process.send_signal(signal.SIGTERM)
        assert wait_for_status(server, "/readyz", 503)
        taken = kept.post("/v1/completions", json={"model": "fake", "prompt": [0], "max_tokens": 4})
        assert taken.status_code == 200 and taken.headers["connection"] == "close"
        assert kept.get("/livez").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0


def test_a_drain_that_outlives_its_grace_ends_the_rest_with_an_error(start_fake: StartFake, hold: Path) -> None:
    server = start_fake(timeout_s=0.6)
    hold.touch()
    reader = begin_stream(server, 50)
    server.process.send_signal(signal.SIGINT)
    status, _, _ = server.end()
    reader.join(HANG_S)
    assert status == 0
    assert reader.finish_reasons == []
    error = reader.chunks[-1]["error"]
    assert isinstance(error, dict) and error["code"] == "draining"


def test_a_second_signal_ends_at_once_with_status_0(start_fake: StartFake, hold: Path) -> None:
    server = start_fake(timeout_s=600.0)
    hold.touch()
    reader = begin_stream(server, 50)
    server.process.send_signal(signal.SIGTERM)
    assert wait_for_status(server, "/readyz", 503)
    engines = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    status, out, _ = server.end()
    reader.join(HANG_S)
    # it was cut, and told why
    assert reader.finish_reasons == []
    error = reader.chunks[-1]["error"]
    assert isinstance(error, dict) and error["code"] == "draining"
    assert (status, out) == (0, "")
    assert engines and not any(engine.is_running() for engine in engines)


def test_a_killed_engine_shows_in_the_probes_until_the_next_one_is_ready(start_fake: StartFake, hold: Path) -> None:
    server = start_fake()
    hold.touch()
    (engine,) = psutil.Process(server.process.pid).children(recursive=True)
    engine.kill()
    assert wait_for_status(server, "/readyz", 503)
    assert server.get("/livez").status_code == 200
    hold.unlink()
    assert wait_for_status(server, "/readyz", 200)
    assert sum(1 for _ in server.stream(5)) >= 2
    assert "chorale_engine_restarts_total 1.0" in server.get("/metrics").text


def test_a_killed_server_leaves_no_engine_behind(start_fake: StartFake) -> None:
    server = start_fake()
    (engine,) = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    engine.wait(HANG_S)
    assert not engine.is_running()


def wait_for_status(server: FakeServer, path: str, status: int, timeout_s: float = HANG_S) -> bool:
    """Say whether GET `path` answers `status` in time."""
    end_at = time.monotonic() + timeout_s
    while time.monotonic() < end_at:
        if server.get(path).status_code == status:
            return True
    return False
