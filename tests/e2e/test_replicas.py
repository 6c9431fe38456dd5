"""Real servers over one store and one real Redis, which is killed, frozen and emptied under requests.

Owns what clients see of it. Invariants: a known adapter never fails; nothing that was acknowledged is lost; what cannot
be told to all is refused with 503; afterwards all replicas say the same.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapters_store.redis_head import acl_line
from tests.live_server import LiveServer, start_server, stop_server
from tests.redis_server import RedisServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

VISIBLE_S = 1.0
CONVERGED_S = 5.0
# what a busy machine may add to either
SLACK_S = 10.0
NUM_FAULTS = 200
PASSWORD = "not-to-be-logged"


class Replicas:
    """Servers over one store, and what their clients were told."""

    def __init__(self, folder: Path, redis_server: RedisServer, num_servers: int) -> None:
        self.folder, self.redis_server = folder, redis_server
        self.model = write_tiny_model(folder / "tiny")
        self.adapters = [write_tiny_adapter(folder, f"source{seed}", rank=2, seed=seed).folder for seed in range(2)]
        with ThreadPoolExecutor(num_servers) as pool:
            self.servers = list(pool.map(self.start, range(num_servers)))
        self.acknowledged: dict[str, int] = {}
        self.delays_s: list[float] = []

    def start(self, number: int) -> LiveServer:
        """Start one more replica."""
        log = self.folder / f"server{number}.{time.monotonic_ns()}.log"
        url = self.redis_server.url_of("replicas", PASSWORD)
        options = ("--device", "cpu", "--dtype", "float32", "--redis-url", url)
        return start_server(log, self.model, self.folder / "store", *options)

    def upload(self, server: LiveServer, name: str, source: int = 0) -> httpx.Response:
        """Send an adapter, and note what was acknowledged."""
        response = server.upload(name, self.adapters[source])
        if response.status_code == 201:
            self.acknowledged[name] = response.json()["version"]
        else:
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "registry_unavailable", response.text
            assert int(response.headers["retry-after"]) > 0
        return response

    def wait_visible(self, name: str, version: int) -> None:
        """Return once every replica serves that version; note how long the last one took."""
        began = time.monotonic()
        for server in self.servers:
            until(lambda server=server: versions_of(server).get(name) == version, VISIBLE_S + SLACK_S)  # type: ignore[misc]
        self.delays_s.append(time.monotonic() - began)

    def wait_converged(self) -> float:
        """Return after how long all replicas said the same, all that was acknowledged in it."""
        began = time.monotonic()

        def is_converged() -> bool:
            seen = [versions_of(server) for server in self.servers]
            return all(each == seen[0] for each in seen) and all(
                seen[0].get(name, 0) >= version for name, version in self.acknowledged.items()
            )

        until(is_converged, CONVERGED_S + SLACK_S)
        return time.monotonic() - began

    def close(self) -> None:
        """Stop all of it; no log may hold the password."""
        for server in self.servers:
            stop_server(server)
        logs = [log.read_text(encoding="utf-8") for log in self.folder.glob("*.log")]
        assert logs and all(PASSWORD not in log and "unix://replicas:***@" in log for log in logs)


class Asker:
    """A client that asks one replica for a known adapter all the time, and remembers what was not as it should be."""

    def __init__(self, server: LiveServer, expected: object) -> None:
        self.server, self.expected = server, expected
        self.num_answers, self.wrong = 0, list[str]()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if (tokens := ask(self.server, "known")) != self.expected:
                    self.wrong.append(f"{tokens}, not {self.expected}")
            except (AssertionError, httpx.HTTPError) as error:
                self.wrong.append(repr(error))
            self.num_answers += 1


def ask(server: LiveServer, model: str) -> object:
    return server.complete(model, prompt="once", max_tokens=4, temperature=0, return_token_ids=True)["token_ids"]


def versions_of(server: LiveServer) -> dict[str, int]:
    with server.client() as client:
        return {row["name"]: row["version"] for row in client.get("/v1/adapters").raise_for_status().json()["data"]}


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis of the test's own."""
    server = RedisServer(acl_line("replicas").replace("PASSWORD", PASSWORD))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def replicas(tmp_path: Path, redis_server: RedisServer) -> Iterator[Callable[[int], Replicas]]:
    """Hand out a function that starts servers over one store."""
    started: list[Replicas] = []

    def start(num_servers: int) -> Replicas:
        started.append(Replicas(tmp_path, redis_server, num_servers))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            each.close()


def test_two_replicas_serve_through_the_loss_of_redis_and_agree_afterwards(
    replicas: Callable[[int], Replicas], redis_server: RedisServer
) -> None:
    both = replicas(2)
    a, b = both.servers
    assert both.upload(a, "known").status_code == 201
    both.wait_visible("known", 1)
    expected = ask(a, "known")
    assert expected != ask(a, "tiny") and ask(b, "known") == expected
    askers = [Asker(server, expected) for server in both.servers]
    try:
        redis_server.kill()
        assert both.upload(b, "new").status_code == 503
        with a.client() as client:
            assert client.delete("/v1/adapters/known").status_code == 503
        redis_server.start()
        until(lambda: both.upload(b, "new").status_code == 201, CONVERGED_S + SLACK_S)
        both.wait_visible("new", 1)
        redis_server.freeze()
        assert both.upload(a, "new", 1).status_code == 503
        redis_server.thaw()
        until(lambda: both.upload(a, "new", 1).status_code == 201, CONVERGED_S + SLACK_S)
        both.wait_visible("new", 2)
        with redis_server.client() as client_of_redis:
            client_of_redis.flushall()
        assert both.upload(b, "other").status_code == 201
        both.wait_converged()
    finally:
        for asker in askers:
            asker.stop()
    assert [asker.wrong for asker in askers] == [[], []]
    assert all(asker.num_answers > 5 for asker in askers)
    assert versions_of(a) == {"known": 1, "new": 2, "other": 1} == both.acknowledged
    print(f"visible on all after {both.delays_s} s")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_replicas_through_200_faults(replicas: Callable[[int], Replicas], redis_server: RedisServer) -> None:
    choose = random.Random(20261121)
    three = replicas(3)
    assert three.upload(three.servers[0], "known").status_code == 201
    three.wait_visible("known", 1)
    expected = ask(three.servers[0], "known")
    converged_s, num_refused = [], 0
    askers = [Asker(server, expected) for server in three.servers]
    try:
        for number in range(NUM_FAULTS):
            with ThreadPoolExecutor(1) as pool:
                uploaded = pool.submit(three.upload, choose.choice(three.servers), f"n{choose.randrange(20)}")
                time.sleep(choose.uniform(0, 0.8))
                fault(choose, redis_server)
            num_refused += uploaded.result().status_code == 503
            if number % 20 == 19:
                # a replica dies in the middle of its work, and another takes its place
                victim = choose.randrange(3)
                askers[victim].stop()
                assert askers[victim].wrong == []
                three.servers[victim].process.kill()
                stop_server(three.servers[victim])
                three.servers[victim] = three.start(victim)
                askers[victim] = Asker(three.servers[victim], expected)
            converged_s.append(three.wait_converged())
            assert [asker.wrong for asker in askers] == [[], [], []], f"after fault {number}"
    finally:
        for asker in askers:
            asker.stop()
    for number in range(20):
        answer = three.upload(three.servers[number % 3], "last")
        assert answer.status_code == 201
        three.wait_visible("last", answer.json()["version"])
    print(f"{num_refused} of {NUM_FAULTS} refused; converged after at most {max(converged_s):.2f} s")
    nearly_all_s = sorted(three.delays_s)[int(0.9 * len(three.delays_s))]
    print(f"visible on all after {nearly_all_s:.2f} s at the 90th percentile, at most {max(three.delays_s):.2f} s")
    assert max(converged_s) <= CONVERGED_S and max(three.delays_s) <= VISIBLE_S


def fault(choose: random.Random, redis_server: RedisServer) -> None:
    """Let Redis be away or forget, for a moment."""
    kind = choose.choice(["kill", "freeze", "flush"])
    if kind == "flush":
        with redis_server.client() as client:
            client.flushall()
        return
    (redis_server.kill if kind == "kill" else redis_server.freeze)()
    time.sleep(choose.uniform(0, 2.5))
    (redis_server.start if kind == "kill" else redis_server.thaw)()
