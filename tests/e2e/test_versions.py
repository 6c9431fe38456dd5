"""Versions on the real server: running requests keep theirs, a canary's arms answer as their version does alone."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = list(b"Say what you are, and stay it")
LONG = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, any_server: StartServer) -> LiveServer:
    """A server of `voice` in three versions."""
    folder = tmp_path_factory.mktemp("versions")
    # room for one adapter: every switch of versions goes through the disk
    options = ("--device", "cpu", "--dtype", "float32", "--adapter-device-count", "1")
    server = any_server(write_tiny_model(folder / "tiny"), *options)
    for seed in (1, 2, 3):
        adapter = write_tiny_adapter(folder / str(seed), "voice", 4, seed=seed)
        assert server.upload("voice", adapter.folder).status_code == 201
    return server


def _body(model: str, num_tokens: int, **fields: object) -> dict[str, object]:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0}
    return asked | {"ignore_eos": True, "return_token_ids": True} | fields


def _run(client: httpx.Client, model: str, num_tokens: int, **fields: object) -> tuple[list[int], httpx.Response]:
    answer = client.post("/v1/completions", json=_body(model, num_tokens, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"], answer


def _chunks(stream: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in stream.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_running_request_finishes_on_the_version_it_began_with(server: LiveServer) -> None:
    with server.client() as client:
        alone = {number: _run(client, f"voice@{number}", LONG)[0] for number in (1, 2, 3)}
        assert len({tuple(tokens) for tokens in alone.values()}) == 3
        body = _body("voice", LONG, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.headers["x-adapter-version"] == "3"
            chunks = _chunks(stream)
            first = next(chunks)
            streamed = list(first["choices"][0]["token_ids"])
            assert len(streamed) < LONG, "the move comes too late to prove anything"
            with server.client() as operator:
                moved = operator.post("/v1/adapters/voice/promote", json={"version": 1})
                assert moved.json()["version"] == 1
                # the name means another version, and the old one's memory is asked back, while its request runs
                operator.post("/v1/adapters/voice@3:evict")
            fingerprints = {first["system_fingerprint"]}
            for chunk in chunks:
                streamed += chunk["choices"][0]["token_ids"]
                fingerprints.add(chunk["system_fingerprint"])
        assert streamed == alone[3] and len(fingerprints) == 1
        after, answer = _run(client, "voice", LONG)
        assert after == alone[1] and answer.headers["x-adapter-version"] == "1"
        assert answer.json()["system_fingerprint"] not in fingerprints
        assert client.post("/v1/adapters/voice/rollback").json()["version"] == 3
        again, answer = _run(client, "voice", LONG)
        assert again == alone[3] and answer.json()["system_fingerprint"] in fingerprints


def test_each_arm_of_a_canary_answers_as_its_version_and_is_counted(server: LiveServer) -> None:
    with server.client() as client:
        alone = {number: _run(client, f"voice@{number}", 8)[0] for number in (2, 3)}
        assert client.post("/v1/adapters/voice/canary", json={"version": 2, "percent": 40}).status_code == 200
        num_seen = {2: 0, 3: 0}
        for user in range(24):
            tokens, answer = _run(client, "voice", 8, user=f"u{user}")
            number = int(answer.headers["x-adapter-version"])
            assert tokens == alone[number]
            num_seen[number] += 1
        assert min(num_seen.values()) > 0
        server.wait_for_rest()
        series = server.metrics()
        assert series['chorale_adapter_requests_total{adapter="voice:canary"}'] == num_seen[2]
        assert series['chorale_adapter_requests_total{adapter="voice"}'] >= num_seen[3]
        assert client.post("/v1/adapters/voice/promote", json={"alias": "canary"}).json()["version"] == 2
        assert {_run(client, "voice", 8, user=f"u{user}")[1].headers["x-adapter-version"] for user in range(6)} == {"2"}
        removed = client.delete("/v1/adapters/voice/versions/1")
        assert removed.status_code == 200 and client.get("/v1/models/voice@1").status_code == 404
