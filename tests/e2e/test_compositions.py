"""Composed requests over HTTP: the tokens of a merged model that is never built in the server, alone and together."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import TinyAdapter, write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

NUM_NEW_TOKENS = 8
PROMPT = list(b"What do they say together, and what does each of them say?")
COMPOSITIONS = [
    (("voice-0", 0.75),),
    (("voice-0", 1.0), ("voice-1", 1.0)),
    (("voice-2", -1.5), ("voice-0", 0.5)),
    (("voice-0", 0.5), ("voice-1", -0.5), ("voice-2", 0.25)),
    (("voice-0", 0.0), ("voice-1", 0.0)),
]
Composition = tuple[tuple[str, float], ...]


class Merged:
    """The base under transformers with a composition merged into its weights in fp32: independent and slow."""

    def __init__(self, model_dir: Path, adapters: list[TinyAdapter]) -> None:
        self._model_dir = model_dir
        self._adapters = {adapter.name: adapter for adapter in adapters}

    def tokens(self, composition: Composition, prompt: list[int]) -> list[int]:
        """Continue a prompt greedily, whole sequences at a time."""
        model: Any = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=torch.float32)
        for name, weight in composition:
            folder = self._adapters[name].folder
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            for key in (key for key in tensors if ".lora_A." in key):
                a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                with torch.no_grad():
                    model.get_submodule(path).weight += weight * config["lora_alpha"] / config["r"] * (b @ a)
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NUM_NEW_TOKENS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    sites = [7, 3, 7]
    return [write_tiny_adapter(folder, f"voice-{i}", 3 + i, seed=40 + i, num_sites=sites[i]) for i in range(3)]


@pytest.fixture(scope="module")
def server(model_dir: Path, adapters: list[TinyAdapter], any_server: StartServer) -> LiveServer:
    server = any_server(model_dir, "--device", "cpu", "--dtype", "float32", "--max-step-tokens", "48")
    for adapter in adapters:
        assert server.upload(adapter.name, adapter.folder).status_code == 201
    return server


def fields(composition: Composition) -> dict[str, object]:
    return {
        "adapters": [{"name": name, "weight": weight} for name, weight in composition],
        "max_tokens": NUM_NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@pytest.fixture(scope="module")
def alone(server: LiveServer) -> list[object]:
    return [server.complete("tiny", prompt=PROMPT, **fields(own))["token_ids"] for own in COMPOSITIONS]


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_a_composed_request_answers_as_the_merged_model(
    index: int, model_dir: Path, adapters: list[TinyAdapter], alone: list[object]
) -> None:
    assert alone[index] == Merged(model_dir, adapters).tokens(COMPOSITIONS[index], PROMPT)


def test_compositions_differ_and_weight_zero_is_the_base(server: LiveServer, alone: list[object]) -> None:
    base = server.complete("tiny", prompt=PROMPT, **fields(()))["token_ids"]
    assert alone[-1] == base
    assert len({tuple(own) for own in alone}) == len(COMPOSITIONS)  # type: ignore[arg-type]


def test_composed_requests_beside_each_other_get_what_they_get_alone(server: LiveServer, alone: list[object]) -> None:
    jobs = [(own, expected) for own, expected in zip(COMPOSITIONS, alone, strict=True) for _ in range(4)]
    jobs += [((("voice-1", 1.0),), None), ((("voice-2", 1.0),), None)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: server.complete("tiny", prompt=PROMPT, **fields(job[0])), jobs))
    for (own, expected), answer in zip(jobs, answers, strict=True):
        assert expected is None or answer["token_ids"] == expected, own
    server.wait_for_rest()


def test_streams_and_several_choices_of_a_composition(server: LiveServer, alone: list[object]) -> None:
    body = {"model": "tiny", "prompt": PROMPT, **fields(COMPOSITIONS[2]), "n": 2}
    with server.client() as client:
        whole = client.post("/v1/completions", json=body)
        streamed = client.post("/v1/completions", json={**body, "stream": True})
    assert [choice["token_ids"] for choice in whole.json()["choices"]] == [alone[2]] * 2
    assert whole.json()["usage"]["completion_tokens"] == 2 * NUM_NEW_TOKENS
    assert whole.headers["x-adapter-id"] == "voice-2,voice-0" and whole.headers["x-adapter-weight"] == "-1.5,0.5"
    got: dict[int, list[int]] = {0: [], 1: []}
    for line in streamed.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                got[choice["index"]] += choice["token_ids"]
    assert got == {0: alone[2], 1: alone[2]}


def test_a_deleted_adapter_is_no_part_of_a_new_composition(server: LiveServer, adapters: list[TinyAdapter]) -> None:
    server.upload("gone", adapters[0].folder)
    with server.client() as client:
        assert client.delete("/v1/adapters/gone").status_code in (200, 204)
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "adapters": [{"name": "gone"}]})
        both = [{"name": "voice-0"}, {"name": "gone"}]
        composed = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "adapters": both})
    assert (answer.status_code, composed.status_code) == (404, 404)
    assert composed.json()["error"]["param"] == "adapters.1.name"
