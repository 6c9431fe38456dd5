"""Real servers over one store and one real Redis, which is killed, frozen and emptied under requests.

Owns what clients see of it. Invariants: a known adapter never fails; nothing that was acknowledged is lost; what cannot
be told to all is refused with 503; afterwards all replicas say the same.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.live_server import LiveServer, start_server, stop_server
from tests.redis_server import PASSWORD, RedisServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

# three servers on a slow machine that does much else
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

VISIBLE_S = 1.0
CONVERGED_S = 5.0
# what a busy machine may add to either
SLACK_S = 120.0


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
        self.answered_s = 0.0
        self._clients: dict[str, httpx.Client] = {}

    def start(self, number: int) -> LiveServer:
        """Start one more replica."""
        log = self.folder / f"server{number}.{time.monotonic_ns()}.log"
        url = self.redis_server.url_of("replicas", PASSWORD)
        options = ("--device", "cpu", "--dtype", "float32", "--redis-url", url)
        return start_server(log, self.model, self.folder / "store", *options)

    def upload(self, server: LiveServer, name: str, source: int = 0) -> httpx.Response:
        """Send an adapter, and note what was acknowledged."""
        response = server.upload(name, self.adapters[source])
        self.answered_s = time.monotonic()
        if response.status_code == 201:
            self.acknowledged[name] = response.json()["version"]
        else:
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "registry_unavailable", response.text
            assert int(response.headers["retry-after"]) > 0
        return response

    def publish(self, server: LiveServer, name: str, source: int = 0) -> int:
        """Send an adapter until it is taken, and return its version: a Redis that a busy machine holds up is away."""
        answers: list[httpx.Response] = []

        def is_taken() -> bool:
            answers.append(self.upload(server, name, source))
            return answers[-1].status_code == 201

        until(is_taken, CONVERGED_S + SLACK_S)
        return int(answers[-1].json()["version"])

    def wait_visible(self, name: str, version: int) -> None:
        """Return once every replica serves that version; note how long after the last answer to an upload that was."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(lambda server: self._wait_for(server, name, version), self.servers))
        self.delays_s.append(time.monotonic() - self.answered_s)

    def versions_of(self, server: LiveServer) -> dict[str, int]:
        """Return what a replica lists."""
        rows = self._get(server, "/v1/adapters").raise_for_status().json()["data"]
        return {row["name"]: row["version"] for row in rows}

    def _wait_for(self, server: LiveServer, name: str, version: int) -> None:
        def is_there() -> bool:
            row = self._get(server, f"/v1/adapters/{name}")
            return row.status_code == 200 and row.json()["version"] >= version

        until(is_there, VISIBLE_S + SLACK_S)

    def _get(self, server: LiveServer, path: str) -> httpx.Response:
        try:
            return self._client_of(server).get(path)
        except httpx.RemoteProtocolError:
            # the server closed a connection that was idle for long just when it was used again
            return self._client_of(server).get(path)

    def _client_of(self, server: LiveServer) -> httpx.Client:
        """Return a client whose connection is there already: what is timed is not the asking."""
        if server.url not in self._clients:
            self._clients[server.url] = server.client()
        return self._clients[server.url]

    def wait_converged(self) -> float:
        """Return after how long all replicas said the same, all that was acknowledged in it."""
        began = time.monotonic()

        def is_converged() -> bool:
            seen = [self.versions_of(server) for server in self.servers]
            return all(each == seen[0] for each in seen) and all(
                seen[0].get(name, 0) >= version for name, version in self.acknowledged.items()
            )

        until(is_converged, CONVERGED_S + SLACK_S)
        return time.monotonic() - began

    def close(self) -> None:
        """Stop all of it; no log may hold the password."""
        for client in self._clients.values():
            client.close()
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


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


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
    both.publish(a, "known")
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
        both.publish(b, "new")
        both.wait_visible("new", 1)
        redis_server.freeze()
        assert both.upload(a, "new", 1).status_code == 503
        redis_server.thaw()
        both.publish(a, "new", 1)
        both.wait_visible("new", 2)
        with redis_server.client() as client_of_redis:
            client_of_redis.flushall()
        both.publish(b, "other")
        both.wait_converged()
        until(lambda: all(asker.num_answers > 5 for asker in askers), SLACK_S)
    finally:
        for asker in askers:
            asker.stop()
    assert [asker.wrong for asker in askers] == [[], []]
    assert both.versions_of(a) == {"known": 1, "new": 2, "other": 1} == both.acknowledged
    print(f"visible on all after {both.delays_s} s")


def test_three_replicas_through_random_faults(replicas: Callable[[int], Replicas], redis_server: RedisServer) -> None:
    campaign = Campaign(replicas(3), redis_server, seed=20261121, max_pause_s=0.5)
    campaign.run(5, kill_a_replica_at={2})
    assert len(campaign.converged_s) == 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_three_replicas_through_200_faults(
    replicas: Callable[[int], Replicas], redis_server: RedisServer, seed: int
) -> None:
    campaign = Campaign(replicas(3), redis_server, seed=seed, max_pause_s=2.5)
    campaign.run(40, kill_a_replica_at={9, 19, 29, 39})
    assert max(campaign.converged_s) <= CONVERGED_S
    assert max(campaign.replicas.delays_s) <= VISIBLE_S


class Campaign:
    """Faults at seeded random points under load, and after each what all replicas must say."""

    def __init__(self, replicas: Replicas, redis_server: RedisServer, *, seed: int, max_pause_s: float) -> None:
        self.replicas, self.redis_server = replicas, redis_server
        self._choose, self._max_pause_s = random.Random(seed), max_pause_s
        self.converged_s: list[float] = []
        self.num_refused = 0

    def run(self, num_faults: int, *, kill_a_replica_at: set[int]) -> None:
        """Let so many faults happen; those numbers take a replica with them."""
        replicas = self.replicas
        replicas.publish(replicas.servers[0], "known")
        replicas.wait_visible("known", 1)
        expected = ask(replicas.servers[0], "known")
        askers = [Asker(server, expected) for server in replicas.servers]
        try:
            for number in range(num_faults):
                self._fail_once(f"n{self._choose.randrange(20)}")
                if number in kill_a_replica_at:
                    self._replace_a_replica(askers, expected)
                self.converged_s.append(replicas.wait_converged())
                # Redis is just back: whoever acknowledges now must be heard by all at once
                self._publish_at_once()
                assert [asker.wrong for asker in askers] == [[], [], []], f"after fault {number}"
            until(lambda: all(asker.num_answers > 0 for asker in askers), SLACK_S)
        finally:
            for asker in askers:
                asker.stop()
        assert [asker.wrong for asker in askers] == [[], [], []]
        self._report(num_faults, sum(asker.num_answers for asker in askers))

    def _fail_once(self, name: str) -> None:
        with ThreadPoolExecutor(2) as pool:
            servers = self._choose.sample(self.replicas.servers, 2)
            uploads = [pool.submit(self.replicas.upload, server, name) for server in servers]
            time.sleep(self._choose.uniform(0, 0.8))
            fault(self._choose, self.redis_server, self._max_pause_s)
        self.num_refused += sum(upload.result().status_code == 503 for upload in uploads)

    def _replace_a_replica(self, askers: list[Asker], expected: object) -> None:
        """Kill one in the middle of an upload; what it had not acknowledged may be there or not."""
        victim = self._choose.randrange(3)
        servers = self.replicas.servers
        askers[victim].stop()
        assert askers[victim].wrong == []
        with ThreadPoolExecutor(1) as pool:
            cut_short = pool.submit(servers[victim].upload, "cut-short", self.replicas.adapters[1])
            time.sleep(self._choose.uniform(0, 0.8))
            servers[victim].process.kill()
            with suppress(httpx.TransportError):
                assert cut_short.result().status_code in (201, 503)
        stop_server(servers[victim])
        servers[victim] = self.replicas.start(victim)
        askers[victim] = Asker(servers[victim], expected)

    def _publish_at_once(self) -> None:
        server = self._choose.choice(self.replicas.servers)
        self.replicas.wait_visible("last", self.replicas.publish(server, "last"))

    def _report(self, num_faults: int, num_answers: int) -> None:
        delays_s = sorted(self.replicas.delays_s)
        print(
            f"{num_faults} faults, {num_answers} answers of a known adapter, all right; {self.num_refused} uploads "
            f"refused with 503; converged after at most {max(self.converged_s):.2f} s; {len(delays_s)} publications "
            f"visible on all after {delays_s[len(delays_s) // 2]:.2f} s (median), "
            f"{delays_s[int(0.9 * len(delays_s))]:.2f} s (90 %), {delays_s[-1]:.2f} s (slowest)"
        )


def fault(choose: random.Random, redis_server: RedisServer, max_pause_s: float) -> None:
    """Let Redis be away or forget, for a moment."""
    kind = choose.choice(["kill", "freeze", "flush"])
    if kind == "flush":
        with redis_server.client() as client:
            client.flushall()
        return
    (redis_server.kill if kind == "kill" else redis_server.freeze)()
    time.sleep(choose.uniform(0, max_pause_s))
    (redis_server.start if kind == "kill" else redis_server.thaw)()
