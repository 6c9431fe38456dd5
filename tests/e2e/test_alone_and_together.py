"""A request's tokens do not depend on its batch mates, on chunking, preemption, prefix hits or adapters still loading.

Owns one wave of 64 requests over a random base and 16 adapters of mixed ranks: first each alone on a roomy server, then
all at once on servers that are squeezed in different places. Invariant: fp32 on the CPU, compared token by token.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import TinyAdapter, write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

RANKS = [1, 2, 3, 4, 5, 8, 8, 12, 16, 16, 24, 32, 48, 64, 64, 128]
NUM_REQUESTS = 64
# these are uploaded by the wave itself, each by the first request that names it
LATE_ADAPTERS = {f"voice-{i}" for i in range(8, 16)}

SQUEEZES = {
    "chunked prefill": ["--max-step-tokens", "24"],
    "tiny KV cache": ["--kv-blocks", "24"],
    # the largest adapter alone takes 1.6 MB
    "adapters evict each other": ["--max-num-seqs", "5", "--adapter-device-bytes", "2000000"],
}

Wave = list[dict[str, object]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_tiny_adapter(folder, f"voice-{i}", rank, seed=100 + i, num_sites=[7, 2, 4, 7][i % 4])
        for i, rank in enumerate(RANKS)
    ]


def make_wave() -> Wave:
    """Return 64 requests: greedy and sampled, n up to 3, some with a shared prefix longer than two KV blocks."""
    rng = random.Random(7)
    shared_prefix = [rng.randrange(256) for _ in range(40)]
    wave: Wave = []
    for i in range(NUM_REQUESTS):
        tail = [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
        request: dict[str, object] = {
            "model": "tiny" if i % 17 == 16 else f"voice-{i % 17}",
            "prompt": shared_prefix + tail if i % 3 == 0 else tail,
            "max_tokens": rng.randrange(16, 65),
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if i % 2:
            request |= {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": i, "n": 1 + i % 3}
        else:
            request |= {"temperature": 0, "presence_penalty": 0.5 * (i % 4)}
        wave.append(request)
    return wave


def token_ids(server: LiveServer, request: dict[str, object]) -> list[list[int]]:
    """Run one request and return the ids of its choices in order."""
    with server.client(timeout_s=120.0) as client:
        response = client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["token_ids"] for choice in choices]


def upload(server: LiveServer, adapter: TinyAdapter) -> None:
    response = server.upload(adapter.name, adapter.folder)
    assert response.status_code == 201, response.text


def upload_all(server: LiveServer, adapters: list[TinyAdapter]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload, [server] * len(adapters), adapters))


@pytest.fixture(scope="module")
def alone(model_dir: Path, adapters: list[TinyAdapter], live_server: StartServer) -> list[list[list[int]]]:
    server = live_server(model_dir, "--dtype", "float32")
    upload_all(server, adapters)
    return [token_ids(server, request) for request in make_wave()]


def test_adapters_and_seeds_change_the_tokens(alone: list[list[list[int]]]) -> None:
    # the comparison below would prove nothing if all answers were alike
    first_tokens = {tuple(choices[0][:6]) for choices in alone}
    assert len(first_tokens) > NUM_REQUESTS // 2
    sampled = [choices for choices in alone if len(choices) > 1]
    num_distinct = sum(len({tuple(choice) for choice in choices}) == len(choices) for choices in sampled)
    assert num_distinct > len(sampled) // 2


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_together_each_gives_what_it_gives_alone(
    squeeze: str,
    model_dir: Path,
    adapters: list[TinyAdapter],
    alone: list[list[list[int]]],
    live_server: StartServer,
) -> None:
    server = live_server(model_dir, "--dtype", "float32", *SQUEEZES[squeeze])
    late = {adapter.name: adapter for adapter in adapters if adapter.name in LATE_ADAPTERS}
    upload_all(server, [adapter for adapter in adapters if adapter.name not in LATE_ADAPTERS])
    wave = make_wave()
    # requests of late adapters wait for their upload, which happens while the others run
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        uploads = {name: pool.submit(upload, server, adapter) for name, adapter in late.items()}

        def run(request: dict[str, object]) -> list[list[int]]:
            if (pending := uploads.get(str(request["model"]))) is not None:
                pending.result()
            return token_ids(server, request)

        together = list(pool.map(run, wave))
    wrong = [i for i in range(NUM_REQUESTS) if together[i] != alone[i]]
    assert wrong == [], f"{len(wrong)} of {NUM_REQUESTS} requests differ, first {wave[wrong[0]]}"
    series = server.metrics()
    if squeeze == "tiny KV cache":
        assert series["chorale_preemptions_total"] > 0
    if squeeze == "adapters evict each other":
        assert series["chorale_adapter_evictions_total"] > 0
    if squeeze == "chunked prefill":
        assert series["chorale_prefix_hit_tokens_total"] > 0
    server.wait_for_rest()
