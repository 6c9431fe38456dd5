"""litellm, langchain, instructor and lm-eval run unchanged against the live server.

Owns one honest use of each library. Runs in `.venv-clients` (`make test-clients`), where these are installed and the
server's own packages are not. Invariant: none of them reaches any host but this server.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.live_server import LiveServer
from tests.tiny_model import write_tiny_model

pytestmark = [pytest.mark.clients, pytest.mark.e2e]

QUESTION = "Tell me a story."


class Pet(BaseModel):
    """An answer that any model can be held to by a grammar."""

    # a random model would go on adding fields where the schema lets it
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    age: Annotated[int, Field(ge=0, le=99)]


def test_litellm_completes_streams_and_reports_errors(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # else its import fetches a price list
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    common = {"api_base": f"{server.url}/v1", "api_key": "unused", "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(model="openai/voice", messages=messages, **common)
    assert whole.usage.completion_tokens == 12
    chunks = list(litellm.completion(model="openai/voice", messages=messages, stream=True, **common))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nobody", messages=messages, **common)


def test_langchain_invokes_streams_and_structures(server: LiveServer) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="voice", base_url=f"{server.url}/v1", api_key="unused", temperature=0, max_tokens=16, max_retries=0
    )
    whole = chat.invoke(QUESTION)
    assert whole.usage_metadata["output_tokens"] == 16
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content
    roomy = chat.model_copy(update={"max_tokens": 500})
    pet = roomy.with_structured_output(Pet, method="json_schema").invoke(QUESTION)
    assert isinstance(pet, Pet)
    called = roomy.with_structured_output(Pet, method="function_calling").invoke(QUESTION)
    assert isinstance(called, Pet)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor_returns_the_class(server: LiveServer, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        pet = client.chat.completions.create(
            model="tiny",
            response_model=Pet,
            max_retries=1,
            max_tokens=500,
            messages=[{"role": "user", "content": QUESTION}],
        )
    assert isinstance(pet, Pet)


def test_lm_eval_scores_by_local_completions(server: LiveServer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"text": f"the word is {word}", "word": word} for word in ("cat", "dog", "sun", "sea")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "choices.yaml").write_text(
        "task: choices\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\n"
        "doc_to_choice: ['cat', 'dog', 'sun', 'sea']\n"
        "doc_to_target: '{{word}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "generate.yaml").write_text(
        "task: generate\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_text: '{{text}}'\n"
        "doc_to_target: '{{word}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    # as lm-eval does by default: it tokenises with the base's own files and sends ids
    tokenizer_dir = write_tiny_model(tmp_path / "tiny")
    settings = [
        "model=voice",
        f"base_url={server.url}/v1/completions",
        "num_concurrent=4",
        f"tokenizer={tokenizer_dir}",
    ]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "choices,generate"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    command += ["--model_args", ",".join(settings)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert 0.0 <= results["choices"]["acc,none"] <= 1.0
    assert results["generate"]["exact_match,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}
