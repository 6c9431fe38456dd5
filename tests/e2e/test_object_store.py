"""Real servers, each with a folder of its own, that share a Redis and an S3-compatible store (moto's server).

Invariants: what one publishes the other fetches, proves and serves alike; while the object store is away, what is here
is served, and what cannot be made durable is refused.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live_server import LiveServer, start_server, stop_server
from tests.redis_server import PASSWORD, RedisServer
from tests.s3_server import S3Server
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

PATIENCE_S = 120.0


@pytest.fixture
def servers(tmp_path: Path, redis_server: RedisServer, s3_server: S3Server) -> Iterator[list[LiveServer]]:
    """Return two replicas."""
    model = write_tiny_model(tmp_path / "tiny")
    options = ["--device", "cpu", "--dtype", "float32", "--redis-url", redis_server.url_of("replicas", PASSWORD)]
    options += ["--blobs", s3_server.url("shared"), "--tenant-limit", "requests-per-minute=100000"]

    def start(name: str) -> LiveServer:
        return start_server(tmp_path / f"{name}.log", model, tmp_path / name, *options)

    with ThreadPoolExecutor(2) as pool:
        started = list(pool.map(start, "ab"))
    yield started
    for server in started:
        stop_server(server)
    logs = [server.log_path.read_text(encoding="utf-8") for server in started]
    assert all("not-to-be-logged" not in log for log in logs)


def ask(server: LiveServer, model: str) -> object:
    return server.complete(model, prompt="once", max_tokens=4, temperature=0, return_token_ids=True)["token_ids"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.02)


def knows(server: LiveServer, name: str) -> bool:
    with server.client() as client:
        return client.get(f"/v1/adapters/{name}").status_code == 200


def status_of(server: LiveServer, name: str) -> dict[str, object]:
    with server.client() as client:
        found = client.get(f"/v1/adapters/{name}/status").raise_for_status().json()
    assert isinstance(found, dict)
    return found


def test_two_replicas_that_share_no_folder(servers: list[LiveServer], tmp_path: Path, s3_server: S3Server) -> None:
    a, b = servers
    folders = [write_tiny_adapter(tmp_path, f"source{seed}", rank=2, seed=seed).folder for seed in range(3)]
    for name, folder in zip(("known", "far"), folders, strict=False):
        answer = a.upload(name, folder)
        assert answer.status_code == 201, answer.text
        until(lambda name=name: knows(b, name))  # type: ignore[misc]
    digest = answer.json()["digest"].removeprefix("sha256:")
    assert not list((tmp_path / "b" / "objects").iterdir())
    expected = ask(a, "known")
    assert expected != ask(a, "tiny") and ask(b, "known") == expected
    place = status_of(b, "known")
    assert isinstance(place["last_fetch_seconds"], float) and place["last_fetch_seconds"] > 0
    replica, other = place["replica"], status_of(a, "known")["replica"]
    assert isinstance(replica, dict) and isinstance(other, dict) and replica["id"] != other["id"]
    assert replica["registry"]["kind"] == "journal" and replica["registry"]["change"] == 2
    assert (replica["registry"]["lag"], replica["registry"]["redis"]) == (0, "connected")
    job_id = share_jobs_and_pins(a, b)
    # gone for good: what is here is served, and nothing else is promised
    s3_server.close()
    assert ask(b, "known") == expected and ask(a, "far") != expected
    with b.client() as client:
        cold = client.post("/v1/completions", json={"model": "far", "prompt": "once", "max_tokens": 1})
    assert cold.status_code >= 500 and not (tmp_path / "b" / "objects" / digest).exists(), cold.text
    refused = a.upload("new", folders[2])
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "store_unavailable" and int(refused.headers["retry-after"]) > 0
    assert not knows(a, "new") and not knows(b, "new")
    for server in servers:
        with server.client() as client:
            told = client.get(f"/v1/fine_tuning/jobs/{job_id}")
            unpinned = client.post("/v1/adapters/known:unpin")
        for answer in (told, unpinned):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "store_unavailable"
        assert pinned(server, "known") and ask(server, "known") == expected


def share_jobs_and_pins(a: LiveServer, b: LiveServer) -> str:
    """Give one server data, the other one a job over it and a pin; each knows of all. Return the job's id."""
    line = b'{"prompt": "a", "completion": "b"}\n'
    with a.client() as on_a, b.client() as on_b:
        sent = on_a.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", line)})
        body = {"model": "tiny", "training_file": sent.raise_for_status().json()["id"]}
        job = on_b.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
        assert on_a.get(f"/v1/fine_tuning/jobs/{job['id']}").json() == job
        assert on_b.get(f"/v1/files/{body['training_file']}/content").content == line
        on_b.post("/v1/adapters/known:pin").raise_for_status()
    until(lambda: pinned(a, "known") and pinned(b, "known"))
    return str(job["id"])


def pinned(server: LiveServer, name: str) -> bool:
    return bool(status_of(server, name)["pinned"])
