"""`cold_start: "base"` of the real server: the base's very tokens while an adapter is cold, then the adapter's."""

import json
import time

import httpx
import pytest

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

INVOCATION = list(b"go!")
# more than two blocks, so that a prefix of the wrong kind could be found
PROMPT = [*range(40, 80), *INVOCATION, 7]
TARGETS: dict[str, dict[str, object]] = {
    "one": {"model": "voice"},
    "invoked": {"model": "late"},
    "composed": {"model": "tiny", "adapters": [{"name": "voice", "weight": 0.5}, {"name": "late-less", "weight": 1}]},
}
NAMES = {"one": ["voice"], "invoked": ["late"], "composed": ["voice", "late-less"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, any_server: StartServer) -> LiveServer:
    """A server of two plain adapters and one that waits for its invocation tokens."""
    folder = tmp_path_factory.mktemp("cold")
    server = any_server(write_tiny_model(folder / "tiny"), "--device", "cpu", "--dtype", "float32")
    for seed, name in enumerate(("voice", "late-less", "late")):
        path = write_tiny_adapter(folder, name, 4, seed=60 + seed).folder
        if name == "late":
            config = path / "adapter_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "alora_invocation_tokens": INVOCATION}))
        response = server.upload(name, path)
        assert response.status_code == 201, response.text
    return server


def _ask(server: LiveServer, **fields: object) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def _tokens(answer: httpx.Response) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer.json()["choices"]]


def _evict(server: LiveServer, name: str) -> None:
    """Free an adapter's memory; the trial of an upload may hold it for a moment."""
    deadline = time.monotonic() + 120.0
    with server.client() as client:
        while client.post(f"/v1/adapters/{name}:evict").status_code != 200:
            assert time.monotonic() < deadline, f"{name} is still held"
            time.sleep(0.05)


def test_an_embedding_is_refused_or_the_bases_while_its_adapter_is_cold(server: LiveServer) -> None:
    def embed(model: str, cold_start: str) -> httpx.Response:
        with server.client() as client:
            return client.post("/v1/embeddings", json={"model": model, "input": PROMPT, "cold_start": cold_start})

    def vector(answer: httpx.Response) -> list[float]:
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"][0]["embedding"])

    base, adapted = (vector(embed(model, "wait")) for model in ("tiny", "voice"))
    assert adapted != pytest.approx(base, abs=1e-3)
    assert vector(embed("tiny", "fail")) == pytest.approx(base, abs=1e-5)
    _evict(server, "voice")
    refused = embed("voice", "fail")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "adapter_not_loaded"
    assert int(refused.headers["retry-after"]) > 0
    deadline = time.monotonic() + 60.0
    # the refusal has begun the load
    while (later := embed("voice", "fail")).status_code == 503:
        assert time.monotonic() < deadline, "the prefetch never brought the adapter"
        time.sleep(0.02)
    assert vector(later) == pytest.approx(adapted, abs=1e-5)
    _evict(server, "voice")
    stand_in = embed("voice", "base")
    assert vector(stand_in) == pytest.approx(base, abs=1e-5)
    assert stand_in.headers["x-adapter-cold-start"] == "base"


@pytest.mark.parametrize("case", list(TARGETS))
def test_the_base_stands_in_with_its_own_tokens_and_then_the_adapter_answers(server: LiveServer, case: str) -> None:
    target = TARGETS[case]
    base = _ask(server, model="tiny", n=2)
    # the adapter's prefix is in the cache when the base stands in, and the base's when the adapter answers
    adapted = _ask(server, **target, n=2)
    assert _tokens(adapted) != _tokens(base)
    for name in NAMES[case]:
        _evict(server, name)
    num_before = server.metrics()["chorale_cold_start_base_total"]
    stand_in = _ask(server, **target, n=2, cold_start="base")
    assert _tokens(stand_in) == _tokens(base)
    assert stand_in.headers["x-adapter-cold-start"] == "base" and "x-adapter-id" not in stand_in.headers
    assert "x-adapter-digest" not in stand_in.headers and stand_in.json()["model"] == "tiny"
    assert stand_in.json()["system_fingerprint"] == base.json()["system_fingerprint"]
    deadline = time.monotonic() + 120.0
    while "x-adapter-id" not in (later := _ask(server, **target, n=2, cold_start="base")).headers:
        assert _tokens(later) == _tokens(base)
        assert time.monotonic() < deadline, "the prefetch never brought the adapter"
        time.sleep(0.02)
    assert "x-adapter-cold-start" not in later.headers
    assert _tokens(later) == _tokens(adapted)
    assert later.json()["system_fingerprint"] == adapted.json()["system_fingerprint"]
    server.wait_for_rest()
    assert server.metrics()["chorale_cold_start_base_total"] > num_before
