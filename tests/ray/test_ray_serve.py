"""Ray Serve runs two replicas of a real server over one store: routing by adapter, a killed replica, an update.

Owns one local Ray of its own and everything in it. Invariant: nothing of it is left when the module ends.
"""

import asyncio
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from chorale.ray import Settings, app
from tests.deploy.proxies import own_address
from tests.live_server import server_environment
from tests.redis_server import RedisServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

NAMES = [f"voice{number}" for number in range(8)]
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the application's arguments: the tiny model, one store, one Redis."""
    folder = tmp_path_factory.mktemp("ray")
    redis = RedisServer()
    try:
        yield {
            "model": str(write_tiny_model(folder / "tiny")),
            "store": str(folder / "store"),
            "redis_url": redis.url,
            "min_replicas": "2",
            "max_replicas": "2",
            "num_cpus": "0.5",
            "adapters_per_replica": "4",
            "flags": "--num-threads 1 --probe off --dtype float32 --log-level warning",
        }
    finally:
        redis.close()


@pytest.fixture(scope="module")
def url(arguments: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve two replicas with eight adapters and return the address."""
    os.environ.update(PYTHONPATH=server_environment()["PYTHONPATH"], RAY_USAGE_STATS_ENABLED="0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    address = own_address(0)
    try:
        serve.start(http_options={"host": address.host, "port": address.port})
        serve.run(app(arguments), route_prefix="/")
        found = f"http://{address}"
        for number, name in enumerate(NAMES):
            folder = write_tiny_adapter(tmp_path_factory.mktemp("adapters"), name, rank=4, seed=number).folder
            files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            answer = httpx.post(f"{found}/v1/adapters", data={"name": name}, files=files, timeout=TIMEOUT_S)
            assert answer.status_code == 201, answer.text
        asyncio.run(until_both_know(found))
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


async def complete(client: httpx.AsyncClient, name: str) -> tuple[str, str]:
    """Return which replica answered, and what; a refusal or a lost connection is tried again, as clients do."""
    body = {"model": name, "prompt": "ab", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    for _ in range(60):
        try:
            answer = await client.post("/v1/completions", json=body)
        except httpx.TransportError:
            await asyncio.sleep(0.5)
            continue
        if answer.status_code == 200:
            return answer.headers["x-chorale-replica"], answer.json()["choices"][0]["text"]
        assert answer.status_code in {500, 503}, answer.text
        await asyncio.sleep(0.5)
    raise AssertionError(f"{name} was not served after sixty tries: {answer.status_code} {answer.text}")


async def until_both_know(url: str) -> None:
    """Return once two replicas have answered, and every adapter is known."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        for _ in range(100):
            answers = await asyncio.gather(*(complete(client, name) for name in [*NAMES, "tiny"] * 2))
            if len({replica for replica, _ in answers}) == 2:
                return
    raise AssertionError("one replica answers everything")


async def load(url: str, num_rounds: int) -> list[tuple[str, str, str]]:
    """Ask for every adapter in turn, three clients at once; return (adapter, replica, text)."""
    found: list[tuple[str, str, str]] = []

    async def ask(offset: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            for number in range(num_rounds * len(NAMES)):
                name = NAMES[(number + offset) % len(NAMES)]
                found.append((name, *await complete(client, name)))

    await asyncio.gather(*(ask(3 * number) for number in range(3)))
    return found


def texts_by_adapter(found: list[tuple[str, str, str]]) -> dict[str, set[str]]:
    """Return what each adapter said."""
    texts = defaultdict(set)
    for name, _, text in found:
        texts[name].add(text)
    return texts


def test_requests_go_where_their_adapter_is(url: str) -> None:
    asyncio.run(load(url, 3))
    found = asyncio.run(load(url, 12))
    assert all(len(said) == 1 for said in texts_by_adapter(found).values())
    replicas = {name: Counter(replica for other, replica, _ in found if other == name) for name in NAMES}
    locality = sum(max(counts.values()) for counts in replicas.values()) / len(found)
    print(f"locality {locality:.2f} over {len(found)} requests, {dict(Counter(r for _, r, _ in found))}")
    # by chance alone two replicas give about 0.58
    assert locality >= 0.75


def test_a_killed_replica_loses_no_request_that_is_retried(url: str) -> None:
    async def kill_in_between() -> list[tuple[str, str, str]]:
        running = asyncio.create_task(load(url, 15))
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            replica, _ = await complete(client, NAMES[0])
        os.kill(int(replica), signal.SIGKILL)
        return await running

    found = asyncio.run(kill_in_between())
    assert len(found) == 3 * 15 * len(NAMES)
    assert all(len(said) == 1 for said in texts_by_adapter(found).values())
    # and a new one takes its place
    asyncio.run(until_both_know(url))


def test_a_rolling_update_loses_no_request(url: str, arguments: dict[str, str]) -> None:
    async def update_in_between() -> list[tuple[str, str, str]]:
        running = asyncio.create_task(load(url, 15))
        changed = arguments | {"flags": f"{arguments['flags']} --max-in-flight 300"}
        await asyncio.to_thread(serve.run, app(changed), route_prefix="/")
        return await running

    before = {replica for _, replica, _ in asyncio.run(load(url, 2))}
    found = asyncio.run(update_in_between())
    assert all(len(said) == 1 for said in texts_by_adapter(found).values())
    after = {replica for _, replica, _ in asyncio.run(load(url, 2))}
    assert len(before) == len(after) == 2 and not before & after


def test_the_stream_comes_piece_by_piece(url: str) -> None:
    body = {"model": NAMES[0], "prompt": "ab", "max_tokens": 8, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and len(lines) > 8


def test_refusals_of_the_server_come_through(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "nobody", "prompt": "a"}, timeout=TIMEOUT_S)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert httpx.post(f"{url}/v1/completions", content=b"{", timeout=TIMEOUT_S).status_code == 400


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"model": "m"}, "'store' is missing"),
        ({"model": "m", "store": "s"}, "give redis_url"),
        ({"model": "m", "store": "s", "replica": "2"}, "unknown argument 'replica'"),
        ({"model": "m", "store": "s", "max_replicas": "two"}, "two"),
    ],
)
def test_arguments_that_cannot_work_say_so(args: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings.read(args)


def test_numbers_may_come_as_text() -> None:
    settings = Settings.read({"model": "m", "store": "s", "max_replicas": "1", "num_gpus": "0.5"})
    assert settings.max_replicas == 1 and settings.num_gpus == 0.5


def test_the_manifest_names_this_application() -> None:
    text = (Path(__file__).resolve().parents[2] / "deploy" / "ray" / "rayservice.yaml").read_text(encoding="utf-8")
    assert "import_path: chorale.ray:app" in text
