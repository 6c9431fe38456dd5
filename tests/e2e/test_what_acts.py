"""Over HTTP: compositions against a merged model, adapters with invocation tokens against PEFT, prompts by hand."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import TinyAdapter, write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

NUM_NEW_TOKENS = 5
PROMPT = list(b"What do they say together, and what does each of them say?")
COMPOSITIONS = [
    (("voice-0", 0.75),),
    (("voice-0", 1.0), ("voice-1", 1.0)),
    (("voice-2", -1.5), ("voice-0", 0.5)),
    (("voice-0", 0.5), ("voice-1", -0.5), ("voice-2", 0.25)),
    (("voice-0", 0.0), ("voice-1", 0.0)),
]
Composition = tuple[tuple[str, float], ...]


INVOCATION = list(b"go!")
NUM_VIRTUAL = 5


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
        return continued(lambda ids: model(input_ids=torch.tensor([ids])).logits, prompt)


def continued(logits: Callable[[list[int]], Tensor], prompt: list[int]) -> list[int]:
    """Take the most likely token after the whole sequence, again and again."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_NEW_TOKENS):
            ids.append(int(logits(ids)[0, -1].argmax()))
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


@pytest.fixture(scope="module")
def late(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upload an adapter that waits for its invocation tokens."""
    folder = write_tiny_adapter(tmp_path_factory.mktemp("late"), "late", 4, seed=50).folder
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": INVOCATION}))
    response = server.upload("late", folder)
    assert response.status_code == 201, response.text
    return folder


def test_an_adapter_with_invocation_tokens_answers_as_under_peft(
    server: LiveServer, late: Path, model_dir: Path
) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, late).eval()
    before = list(b"a long beginning that only the base has ever read, and then: ")
    prompts = {
        "once": [*before, *INVOCATION, *b" now"],
        "twice": [*b"go! ", *before, *INVOCATION],
        "at once": [*INVOCATION, *before],
        "never": before,
    }
    base_answers = {
        name: server.complete("tiny", prompt=own, **fields(()))["token_ids"] for name, own in prompts.items()
    }
    for name, prompt in prompts.items():
        answer = server.complete("late", prompt=prompt, **fields(()))["token_ids"]
        assert answer == continued(lambda ids: model(input_ids=torch.tensor([ids])).logits, prompt), name
        assert (answer == base_answers[name]) is (name == "never"), name


def test_blocks_before_the_invocation_are_shared_with_the_base(server: LiveServer, late: Path) -> None:
    def cached(model: str, prompt: list[int]) -> int:
        with server.client() as client:
            body = {"model": model, "prompt": prompt, **fields(())}
            return int(
                client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            )

    first, second = list(range(40, 90)), list(range(60, 110))
    # 16 positions a block: three blocks of 50 positions end before the invocation
    assert (cached("tiny", first), cached("late", [*first, *INVOCATION, 7])) == (0, 48)
    assert (cached("late", [*second, *INVOCATION, 7]), cached("tiny", [*second, 8])) == (0, 48)
    assert cached("late", [*second, *INVOCATION, 7, *range(20)]) == 48


def test_an_adapters_own_prompt_comes_first_and_is_billed_to_nobody(
    server: LiveServer, model_dir: Path, tmp_path: Path
) -> None:
    embeddings = torch.randn(NUM_VIRTUAL, 64, generator=torch.Generator().manual_seed(3))
    save_file({"prompt_embeddings": embeddings}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "num_virtual_tokens": NUM_VIRTUAL,
        "token_dim": 64,
        "num_transformer_submodules": 1,
        "num_attention_heads": 4,
        "num_layers": 3,
        "prompt_tuning_init": "RANDOM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    response = server.upload("prompted", tmp_path)
    assert response.status_code == 201, response.text
    base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def logits(ids: list[int]) -> Tensor:
        own = base.get_input_embeddings()(torch.tensor([ids]))
        found: Tensor = base(inputs_embeds=torch.cat((embeddings[None], own), dim=1)).logits
        return found

    with server.client() as client:
        body = {"model": "prompted", "prompt": PROMPT, **fields(())}
        answers = [client.post("/v1/completions", json=body).json() for _ in range(2)]
        composed = client.post(
            "/v1/completions", json={**body, "model": "tiny", "adapters": [{"name": "prompted"}, {"name": "voice-0"}]}
        )
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [continued(logits, PROMPT)] * 2
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(PROMPT)] * 2
    shared = (NUM_VIRTUAL + len(PROMPT) - 1) // 16 * 16 - NUM_VIRTUAL
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, shared]
    assert composed.status_code == 400 and "5 virtual tokens" in composed.json()["error"]["message"]
