"""Training over replicas: two real servers, workers of their own, one shared folder or object store, one real Redis.

Invariants: a job made at one server is followed and served at another; a worker that is killed costs no step and no
job; without Redis jobs go on, and what cannot be published waits; without the object store everything waits, and is
told so; whoever publishes, it is published once.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.live_server import LiveServer, chorale_command, server_environment, start_server, stop_server
from tests.redis_server import PASSWORD, RedisServer
from tests.s3_server import S3Server
from tests.tiny_model import write_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

# a training process takes a minute to start on a machine that does much else
TIMEOUT_S = 600.0
NUM_STEPS, CHECKPOINT_EVERY = 60, 20
LEASE_S = 10.0
LINES = b"".join(
    json.dumps({"prompt": f"word{number}", "completion": f"WORD{number}!"}).encode() + b"\n" for number in range(32)
)


class Site:
    """Two servers over one store, and the workers that a test starts."""

    def __init__(self, folder: Path, redis_server: RedisServer, s3_server: S3Server | None) -> None:
        self.folder = folder
        self.s3_server = s3_server
        # without one, all have the same folder
        self._blobs = () if s3_server is None else ("--blobs", s3_server.url("shared"))
        self.model = write_tiny_model(folder / "tiny")
        self._workers: list[subprocess.Popen[bytes]] = []
        options = ("--device", "cpu", "--dtype", "float32", "--redis-url", redis_server.url_of("replicas", PASSWORD))

        def start(number: int) -> LiveServer:
            store = self._own_folder(f"server{number}")
            return start_server(folder / f"{number}.log", self.model, store, *options, *self._blobs)

        # before the store is there: it waits for a server to make one
        self.start_worker()
        with ThreadPoolExecutor(2) as pool:
            self.servers = list(pool.map(start, range(2)))

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start one more worker."""
        store = self._own_folder(f"worker{len(self._workers)}")
        command = chorale_command("train-worker", "--store", str(store), "--model", str(self.model), *self._blobs)
        command += ["--num-threads", "1", "--lease-s", str(LEASE_S)]
        with (self.folder / f"worker{len(self._workers)}.log").open("w") as log:
            worker = subprocess.Popen(command, env=server_environment(), stdout=subprocess.DEVNULL, stderr=log)
        self._workers.append(worker)
        return worker

    def _own_folder(self, name: str) -> Path:
        return self.folder / (name if self._blobs else "store")

    def kill_worker(self) -> None:
        """End the newest worker by SIGKILL."""
        self._workers[-1].kill()
        self._workers[-1].wait()

    def close(self) -> None:
        """End all of it."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for server in self.servers:
            stop_server(server)


class Client:
    """What a client sees of one job at one server; each call on a connection of its own, as they come minutes apart."""

    def __init__(self, server: LiveServer, job_id: str) -> None:
        self._server = server
        self._url = f"/v1/fine_tuning/jobs/{job_id}"

    def job(self) -> dict[str, object]:
        """Return the job."""
        with self._server.client() as http:
            return dict(http.get(self._url).raise_for_status().json())

    def status(self) -> int:
        """Return how the server answers when it is asked for the job."""
        with self._server.client() as http:
            return http.get(self._url).status_code

    def events(self) -> list[dict[str, object]]:
        """Return all events, oldest first, read page by page."""
        found: list[dict[str, object]] = []
        while True:
            params = {"limit": 7} | ({"after": str(found[-1]["id"])} if found else {})
            with self._server.client() as http:
                page = http.get(f"{self._url}/events", params=params).raise_for_status().json()
            found += page["data"]
            if not page["has_more"]:
                return found[::-1]

    def steps(self) -> list[int]:
        """Return the steps that were told, in order."""
        told = [event["data"] for event in self.events() if event["type"] == "metrics"]
        return [int(data["step"]) for data in told if isinstance(data, dict) and "train_loss" in data]

    def has_been_told(self, words: str) -> bool:
        """Return whether an event says so."""
        return any(words in str(event["message"]) for event in self.events())

    def post(self, action: str) -> httpx.Response:
        """Cancel, pause or resume."""
        with self._server.client() as http:
            return http.post(f"{self._url}/{action}")


@pytest.fixture(params=["folder", "objects"])
def site(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> Iterator[Site]:
    site = Site(tmp_path, redis_server, request.getfixturevalue("s3_server") if request.param == "objects" else None)
    yield site
    site.close()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.2)


def create_job(server: LiveServer) -> str:
    with server.client() as http:
        sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", LINES)})
        fields = {"rank": 2, "max_steps": NUM_STEPS, "batch_size": 2, "max_length": 32, "n_epochs": 50}
        body = {
            "model": "tiny",
            "training_file": sent.raise_for_status().json()["id"],
            "suffix": "shared",
            "seed": 3,
            "adapter": {**fields, "checkpoint_every": CHECKPOINT_EVERY},
        }
        return str(http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def test_a_job_of_one_replica_is_trained_anywhere_followed_and_served_on_all(
    site: Site, redis_server: RedisServer
) -> None:
    a, b = site.servers
    job_id = create_job(a)
    on_a, on_b = Client(a, job_id), Client(b, job_id)
    until(lambda: len(on_b.steps()) > 0, "the first step, seen at the other server")
    site.kill_worker()
    site.start_worker()
    until(lambda: on_b.has_been_told("resumed (worker 2)"), "another worker")
    if site.s3_server is not None:
        check_silence(site.s3_server, on_a, on_b)
    redis_server.freeze()
    # jobs need no Redis: told at one server, known at the other
    before = len(on_b.steps())
    other = create_job(a)
    for client, action, status in ((Client(b, other), "pause", "queued"), (Client(a, other), "cancel", "cancelled")):
        assert client.post(action).json()["status"] == status
    until(lambda: on_b.has_been_told("Training finished"), "the end of the training without Redis")
    assert len(on_b.steps()) >= before and on_b.job()["status"] == "running"
    redis_server.thaw()
    until(lambda: on_b.job()["status"] != "running", "the publication")
    done = on_b.job()
    assert done["status"] == "succeeded", (done, on_b.events(), a.log_tail(), b.log_tail())
    assert on_a.job() == done and on_a.events() == on_b.events()
    assert on_b.steps() == list(range(1, NUM_STEPS + 1))
    name = str(done["fine_tuned_model"])
    check_served(site, name, on_b)


def check_silence(s3_server: S3Server, on_a: Client, on_b: Client) -> None:
    """While the object store says nothing every question about jobs is answered so, and then goes on."""
    s3_server.freeze()
    for client in (on_a, on_b):
        until(lambda client=client: client.status() == 503, "a clear answer without the object store")  # type: ignore[misc]
    s3_server.thaw()
    for client in (on_a, on_b):
        until(lambda client=client: client.status() == 200, "the job again")  # type: ignore[misc]


def check_served(site: Site, name: str, on_b: Client) -> None:
    """The result and its checkpoints answer at both servers in the same way, and were published once."""
    names = [name, *(f"{name}:ckpt-step-{step}" for step in range(CHECKPOINT_EVERY, NUM_STEPS, CHECKPOINT_EVERY))]
    for model in names:
        until(lambda model=model: all(is_listed(server, model) for server in site.servers), f"{model} on both")  # type: ignore[misc]
        answers = []
        for server in site.servers:
            with server.client() as http:
                body = {"model": model, "messages": [{"role": "user", "content": "word"}], "max_tokens": 4}
                answer = http.post("/v1/chat/completions", json={**body, "temperature": 0})
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-adapter-id"] == model
                answers.append(answer.json()["choices"][0]["message"])
        assert answers[0] == answers[1]
        with site.servers[1].client() as http:
            assert http.get(f"/v1/adapters/{model}").json()["version"] == 1
    told = [str(event["message"]) for event in on_b.events()]
    assert [message.startswith("New fine-tuned model created") for message in told].count(True) == 1


def is_listed(server: LiveServer, model: str) -> bool:
    with server.client() as http:
        return http.get(f"/v1/adapters/{model}").status_code == 200
