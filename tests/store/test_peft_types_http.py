"""Every kind of adapter that PEFT registers, uploaded to a live server: it answers as PEFT answers, or says why not.

The folders are saved by PEFT itself from a tiny Llama with random trained values; prompts go over HTTP, and the
log-probabilities of every prompt token and of the next one are compared with PEFT's own forward.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Refused
from tests.live_server import LiveServer, start_server, stop_server
from tests.model.tiny_models import reference_logits, save
from tests.store.peft_cases import CASES, INVOCATION, MODEL_CASES, Case, ask_peft, rename_to_bone, save_case, tiny_llama
from tests.tiny_model import VOCAB_SIZE, write_tokenizer

# PEFT's own words about its own kinds
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.e2e]

TOLERANCE = 1e-4
ALL_CASES = CASES | MODEL_CASES
# the invocation of the aLoRA lies in the middle, twice, and before it one token that ends nothing
PROMPT = [41, 7, 30, *INVOCATION, 12, 5, 90, 11, *INVOCATION, 6, 31, 44, 200, 17]
REGISTERED = sorted({kind.value for kind in PeftType} | {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING})


def first_of_each_type() -> dict[str, str]:
    """Return one case per type, the others being forms of it."""
    names: dict[str, str] = {}
    for name, case in ALL_CASES.items():
        names.setdefault("BONE" if name == "bone" else case.peft_type, name)
    return names


FIRST = first_of_each_type()


@dataclass(frozen=True)
class Answers:
    """The live server with the base, and what the base alone says."""

    root: Path
    model: torch.nn.Module
    server: LiveServer
    base: Tensor

    def expected(self, name: str, case: Case, seed: int) -> Tensor:
        """Save the case as PEFT saves it and return PEFT's log-probabilities [T, V]."""
        folder = self.root / name
        with torch.random.fork_rng():
            save_case(self.model, case, folder, seed)
            answer = ask_peft(self.model, folder, PROMPT, task_id=case.upload.get("task_id", 0))
        if name == "bone":
            rename_to_bone(folder)
        return answer.logprobs

    def upload(self, name: str, options: dict[str, object]) -> httpx.Response:
        """Send the case's two files."""
        parts = ("adapter_config.json", "adapter_model.safetensors")
        files = [("files", (part, (self.root / name / part).read_bytes())) for part in parts]
        data = {"name": name} | ({"options": json.dumps(options)} if options else {})
        with self.server.client() as client:
            return client.post("/v1/adapters", data=data, files=files)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    root = tmp_path_factory.mktemp("http")
    with torch.random.fork_rng():
        model = tiny_llama(vocab_size=VOCAB_SIZE)
        base_dir = save(model, root / "base")
        base = reference_logits(model, PROMPT).log_softmax(-1)
    write_tokenizer(base_dir)
    server = start_server(root / "log", base_dir, root / "store", "--device", "cpu", "--dtype", "float32",
                          "--max-rank", "128", "--probe", "on")  # fmt: skip
    try:
        yield Answers(root, model, server, base)
    finally:
        stop_server(server)


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_folder_of_pefts_answers_over_http_as_in_peft(name: str, answers: Answers) -> None:
    case = ALL_CASES[name]
    expected = answers.expected(name, case, seed=list(ALL_CASES).index(name))
    # otherwise the base would pass for its adapter
    assert (expected - answers.base).abs().max() > 100 * TOLERANCE
    response = answers.upload(name, case.upload)
    assert response.status_code == 201, response.text
    proof = response.json()["proof"]
    assert proof["typical_error"] <= proof["tolerance"]["typical_error"] < 1e-3 and proof["gain"] == pytest.approx(
        1, abs=1e-3
    )
    choice = answers.server.complete(name, prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=1)
    logprobs = choice["logprobs"]
    assert isinstance(logprobs, dict)
    found = logprobs["token_logprobs"]
    wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
    assert found[0] is None and len(found) == len(PROMPT) + 1
    assert found[1:-1] == pytest.approx(wanted, abs=TOLERANCE)
    assert found[-1] == pytest.approx(float(expected[-1].max()), abs=TOLERANCE)


@pytest.mark.parametrize(
    "peft_type",
    REGISTERED,
)
def test_every_type_that_peft_registers_is_covered_here_or_refused_with_a_reason(
    peft_type: str, answers: Answers
) -> None:
    kind = PEFT_TYPES[peft_type]
    if not isinstance(kind, Refused):
        assert peft_type in FIRST
        return
    assert peft_type not in FIRST
    folder = answers.root / peft_type
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    response = answers.upload(peft_type, {})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] in ("peft_type", "files") and (kind.reason in error["message"]), error


def test_peft_knows_no_type_that_its_own_table_of_configs_lacks() -> None:
    # were one added to either, it would show here
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= set(REGISTERED)


def test_a_task_is_chosen_once_and_for_a_kind_that_has_tasks(answers: Answers) -> None:
    for name in ("multitask", "prompt"):
        answers.expected(name, MODEL_CASES[name], seed=1)
    for name, options, param in (
        ("multitask", {}, "task_id"),
        ("multitask", {"task_id": 3}, "task_id"),
        ("multitask", {"task_id": "1"}, "task_id"),
        ("multitask", {"task": 1}, "options"),
        ("prompt", {"task_id": 0}, "task_id"),
    ):
        response = answers.upload(name, options)  # type: ignore[arg-type]
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
