"""The probe through a real server: faults that are planted into the converter, and adapters that are as they should be.

Every upload travels the whole way: HTTP, converter process, store, engine process, reference process, verdict.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters_store.base import SITES, read_base_dims
from tests.live_server import LiveServer, start_server, stop_server
from tests.probe.faults import FAULTS, RSLORA_LOST
from tests.probe.planted_server import FAULT_NAME
from tests.store.tiny_checkpoints import (
    S2ft,
    TinyBase,
    meteora_checkpoint,
    mixture,
    s2ft_checkpoint,
    write_checkpoint,
)
from tests.tiny_model import NUM_LAYERS, write_tiny_adapter, write_tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Live:
    """A running server with a converter that can err, its folder and its base."""

    server: LiveServer
    folder: Path
    base: TinyBase

    def plant(self, fault: str) -> None:
        """Let the converter err from now on; no fault: it is honest again."""
        (self.folder / FAULT_NAME).write_text(fault)

    def names(self) -> list[str]:
        with self.server.client() as client:
            return [card["name"] for card in client.get("/v1/adapters").json()["data"]]

    def traces(self) -> tuple[int, int]:
        """Return how many objects and staging folders there are."""
        store = self.folder / "store"
        return len(list((store / "objects").iterdir())), len(list((store / "staging").iterdir()))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    model = write_tiny_model(folder / "tiny")
    base = TinyBase(model, read_base_dims(model), load_file(model / "model.safetensors"))
    options = ("--device", "cpu", "--probe", "on", "--lora-root", str(folder))
    server = start_server(folder / "server.log", model, folder / "store", *options, module="tests.probe.planted_server")
    try:
        yield Live(server, folder, base)
    finally:
        stop_server(server)


@pytest.fixture
def rslora(tmp_path: Path) -> Path:
    """Return a LoRA of rank 4 whose scaling holds the root of its rank."""
    folder = write_tiny_adapter(tmp_path, "voice", rank=4, seed=1).folder
    return change_config(folder, use_rslora=True)


def change_config(folder: Path, **values: object) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))
    return folder


def scale_b(folder: Path, factor: float) -> Path:
    tensors = load_file(folder / WEIGHTS)
    scaled = {name: (values * np.float32(factor) if "lora_B" in name else values) for name, values in tensors.items()}
    save_file(scaled, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def error_of(response: httpx.Response) -> dict[str, str]:
    error = response.json()["error"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_converter_gets_wrong_is_never_published(fault: str, live: Live, rslora: Path) -> None:
    live.plant(fault)
    try:
        response = live.server.upload("wrong", rslora)
    finally:
        live.plant("")
    assert (response.status_code, error_of(response)["code"]) == (400, "probe_disagrees"), response.text
    message = error_of(response)["message"]
    assert "more than the" in message and "--probe off" in message
    if fault == RSLORA_LOST:
        assert "times the source's" in message
    assert "wrong" not in live.names() and live.traces() == (0, 0)


def test_an_honest_conversion_carries_its_proof_everywhere(live: Live, rslora: Path) -> None:
    response = live.server.upload("voice", rslora)
    assert response.status_code == 201, response.text
    card = response.json()
    proof = card["proof"]
    assert (proof["dtype"], proof["device"], card["not_probed"]) == ("float32", "cpu", None)
    assert [len(prompt) for prompt in proof["prompts"]] == [16, 16] and proof["num_compared"] >= 2 * 16 * 20
    assert proof["max_error"] <= proof["tolerance"]["max_error"] < 1e-2 < proof["served_effect"]
    assert proof["typical_error"] <= proof["tolerance"]["typical_error"] < 3e-4
    assert proof["gain"] == 1.0 and proof["first_differing_token"] is None and proof["kl"] < 1e-4
    assert proof["largest_change"]["ratio"] > 0 and proof["largest_change"]["site"] in SITES
    assert (proof["warnings"] == []) == (proof["largest_change"]["ratio"] <= 1)
    assert card["report"]["refused"] == [] and len(card["report"]["applied"]) == 7 * NUM_LAYERS
    with live.server.client() as client:
        assert client.get("/v1/adapters/voice").json()["proof"] == proof
        assert client.get("/v1/adapters/voice/versions").json()["data"][-1]["proof"] == proof
        # nothing that the probe asked is left in the engine
        assert client.delete("/v1/adapters/voice").status_code == 200
    live.server.wait_for_rest()


def test_the_vllm_shaped_endpoint_is_no_way_around(live: Live, rslora: Path) -> None:
    # inside the folder that the operator named
    folder = shutil.copytree(rslora, live.folder / "vllm")
    with live.server.client() as client:
        assert load(client, folder).status_code == 200
        assert client.get("/v1/adapters/vllm").json()["proof"]["gain"] == 1.0
        assert client.delete("/v1/adapters/vllm").status_code == 200
        live.plant(FAULTS[-1])
        try:
            refused = load(client, folder)
        finally:
            live.plant("")
        assert refused.status_code == 400 and "probe_disagrees" in refused.text
    assert "vllm" not in live.names()


def load(client: httpx.Client, folder: Path) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": "vllm", "lora_path": str(folder)})


def test_an_effect_below_every_rounding_is_no_effect(live: Live, rslora: Path) -> None:
    response = live.server.upload("faint", scale_b(rslora, 1e-30))
    assert (response.status_code, error_of(response)["code"]) == (400, "adapter_no_effect")
    assert "every log-probability" in error_of(response)["message"]
    # the nearest one that does something
    assert live.server.upload("faint", scale_b(rslora, 1e28)).status_code == 201


def test_values_that_overflow_in_the_model_are_not_finite(live: Live, rslora: Path) -> None:
    response = live.server.upload("loud", scale_b(rslora, 1e37))
    assert (response.status_code, error_of(response)["code"]) == (400, "probe_not_finite"), response.text
    assert "--dtype float32" in error_of(response)["message"]
    assert "loud" not in live.names()


def test_an_s2ft_checkpoint_is_proven_against_the_model_that_it_is(live: Live, tmp_path: Path) -> None:
    chosen = S2ft(v=[[], [], []], o=[[1], [3], []], up=[[5, 20], [], [7]], down=[[20, 3, 7], [], [1]])
    folder = write_checkpoint(tmp_path / "s2ft", s2ft_checkpoint(live.base, chosen)[0], "F32")
    card = upload_checkpoint(live, "s2ft", folder)
    assert card["family"] == "s2ft"
    check_proof(card)


def test_a_meteora_checkpoint_is_proven_token_by_token(live: Live, tmp_path: Path) -> None:
    made = mixture(live.base.dims, (2, 1, 3), ("q_proj", "v_proj", "down_proj"))
    folder = write_checkpoint(tmp_path / "mix", meteora_checkpoint(live.base, made), "F32")
    options = {"top_k": 2, "temperature": 0.7, "rank": [2, 1, 3], "alpha": [4, 2, 6]}
    card = upload_checkpoint(live, "mix", folder, format="meteora", options=json.dumps(options))
    assert card["family"] == "meteora"
    check_proof(card)


def upload_checkpoint(live: Live, name: str, folder: Path, **fields: str) -> dict[str, object]:
    files = [("files", ("model.safetensors", (folder / "model.safetensors").read_bytes(), "application/octet-stream"))]
    with live.server.client() as client:
        response = client.post("/v1/adapters", data={"name": name, **fields}, files=files)
    assert response.status_code == 201, response.text
    card = response.json()
    assert isinstance(card, dict)
    return card


def check_proof(card: dict[str, object]) -> None:
    proof = card["proof"]
    assert isinstance(proof, dict)
    # gates this sharp make of float32's rounding what is told apart from it still
    assert proof["max_error"] <= proof["tolerance"]["max_error"] < 1e-1 < proof["served_effect"]
    assert abs(proof["gain"] - 1) < 1e-3


@pytest.mark.slow
def test_a_dead_engine_costs_an_upload_nothing_but_time(live: Live, rslora: Path) -> None:
    before = live.traces()
    os.kill(live.server.engine_pid(), signal.SIGKILL)
    live.server.wait_for_status("/readyz", 503, 10.0)
    response = live.server.upload("late", rslora)
    assert (response.status_code, error_of(response)["code"]) == (503, "model_loading")
    assert int(response.headers["retry-after"]) >= 1
    assert live.traces() == before
    live.server.wait_for_status("/readyz", 200, 60.0)
    assert live.server.upload("late", rslora).status_code == 201
