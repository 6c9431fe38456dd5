"""The real server over real models gives, through HTTP, the tokens that transformers and PEFT gave.

Owns the comparison with ../shared/data/models/golden.json and with the text that stories260K's author published.
Invariant: every adapter of ../shared/data/adapters goes through POST /v1/adapters, never around it.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartServer
from tests.live_server import LiveServer

pytestmark = [pytest.mark.e2e, pytest.mark.shared_data]

# the author ran 257 positions from BOS alone; the last line of the published text ends inside a sentence
PUBLISHED_MAX_TOKENS = 256
NUM_PUBLISHED_CHARACTERS = 564


class Golden:
    """One base with its golden answers and a server that has all its adapters."""

    def __init__(self, base: str, shared_data: Path, start: StartServer) -> None:
        self.base = base
        self.answers = json.loads((shared_data / "models" / "golden.json").read_text())["models"][base]
        self.server: LiveServer = start(shared_data / "models" / base, "--dtype", "float32")
        self.uploads = {
            name: self.server.upload(name, shared_data / "adapters" / name) for name in self.answers["adapters"]
        }

    def cases(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (model name, golden answer) of the base and of every adapter."""
        cases = [(self.base, answer) for answer in self.answers["greedy"]]
        return cases + [(name, answer) for name, answers in self.answers["adapters"].items() for answer in answers]


@pytest.fixture(scope="module", params=["tinystories-656k", "stories260k-hf"])
def golden(request: pytest.FixtureRequest, shared_data: Path, live_server: StartServer) -> Golden:
    return Golden(request.param, shared_data, live_server)


def test_every_adapter_is_accepted_whole(golden: Golden) -> None:
    assert golden.uploads
    for name, response in golden.uploads.items():
        assert response.status_code == 201, response.text
        body = response.json()
        assert (body["name"], body["version"], body["family"], body["rank"]) == (name, 1, "lora", 8)
        assert body["report"]["applied"] and not body["report"]["ignored"] and not body["report"]["missing"]


@pytest.mark.parametrize("prompt_field", ["prompt_ids", "prompt"])
def test_greedy_ids_equal_the_golden_ones(golden: Golden, prompt_field: str) -> None:
    def ask(case: tuple[str, dict[str, Any]]) -> dict[str, object]:
        model, answer = case
        return golden.server.complete(
            model,
            prompt=answer[prompt_field],
            max_tokens=len(answer["greedy_ids"]),
            temperature=0,
            return_token_ids=True,
        )

    # all at once: base and adapters share the batch
    with ThreadPoolExecutor(len(golden.cases())) as pool:
        choices = list(pool.map(ask, golden.cases()))
    for (model, answer), choice in zip(golden.cases(), choices, strict=True):
        assert choice["prompt_token_ids"] == answer["prompt_ids"], (model, answer["prompt"])
        assert choice["token_ids"] == answer["greedy_ids"], (model, answer["prompt"])
        assert choice["finish_reason"] == ("stop" if answer["greedy_ids"][-1] == 2 else "length")


def test_logprobs_sum_to_the_golden_sum(golden: Golden) -> None:
    for answer in golden.answers["greedy"]:
        choice = golden.server.complete(
            golden.base, prompt=answer["prompt_ids"], max_tokens=len(answer["greedy_ids"]), temperature=0, logprobs=0
        )
        logprobs = choice["logprobs"]
        assert isinstance(logprobs, dict)
        # golden.json keeps four decimals of a sum over 96 tokens
        assert sum(logprobs["token_logprobs"]) == pytest.approx(answer["sum_logprob_generated"], abs=2e-3)


def test_stories260k_tells_the_story_its_author_published(shared_data: Path, live_server: StartServer) -> None:
    model_dir = shared_data / "models" / "stories260k-hf"
    fence = (model_dir / "PUBLISHED_GREEDY_TEXT.md").read_text().split("```")[3]
    published = fence.split("\n", 2)[2][:NUM_PUBLISHED_CHARACTERS]
    server = live_server(model_dir, "--dtype", "float32")
    choice = server.complete("stories260k-hf", prompt=[1], max_tokens=PUBLISHED_MAX_TOKENS, temperature=0)
    assert len(published) == NUM_PUBLISHED_CHARACTERS
    assert str(choice["text"]).strip()[:NUM_PUBLISHED_CHARACTERS] == published
