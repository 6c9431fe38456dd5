"""Every foreign format over HTTP: read by processes of their own, proven by the probe, answering as its own code.

Owns the whole way of an upload: multipart names of several files, pickles, options, the proof, the answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from adapters_store.parts import parts_in
from tests.live_server import LiveServer, start_server, stop_server
from tests.model.tiny_models import BY_NAME, save
from tests.store.foreign_models import MAKERS, Made
from tests.tiny_model import VOCAB_SIZE, write_tokenizer

# PEFT's own words about its own kinds
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.e2e, pytest.mark.slow]

TOLERANCE = 1e-4
PROMPT = [41, 7, 30, 12, 5, 90, 11, 6, 31, 44, 200, 17]


@dataclass(frozen=True)
class Http:
    """The live server over a base with biases, and that base."""

    root: Path
    base: LlamaForCausalLM
    server: LiveServer

    def upload(self, name: str, made: Made) -> httpx.Response:
        """Send the folder's files as the command line does."""
        folder = self.root / name
        files = [("files", (part, (folder / part).read_bytes())) for part in parts_in(folder, made.format)]
        data = {"name": name, "format": made.format}
        data |= {"options": json.dumps(made.options)} if made.options else {}
        with self.server.client() as client:
            return client.post("/v1/adapters", data=data, files=files)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http]:
    root = tmp_path_factory.mktemp("http")
    with torch.random.fork_rng():
        base = BY_NAME["llama3"].build(vocab_size=VOCAB_SIZE)
    assert isinstance(base, LlamaForCausalLM)
    folder = save(base, root / "base")
    write_tokenizer(folder)
    server = start_server(
        root / "log", folder, root / "store", "--device", "cpu", "--dtype", "float32", "--probe", "on"
    )
    try:
        yield Http(root, base, server)
    finally:
        stop_server(server)


@pytest.mark.parametrize("name", MAKERS)
def test_a_foreign_adapter_is_proven_and_answers_as_its_own_code(name: str, http: Http) -> None:
    with torch.no_grad():
        made = MAKERS[name](http.base, http.root / name)
        expected = made.model.eval()(input_ids=torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    response = http.upload(name, made)
    assert response.status_code == 201, response.text
    proof = response.json()["proof"]
    assert proof["typical_error"] <= proof["tolerance"]["typical_error"] < 1e-3
    choice = http.server.complete(name, prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=1)
    logprobs = choice["logprobs"]
    assert isinstance(logprobs, dict)
    wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(wanted, abs=TOLERANCE)
