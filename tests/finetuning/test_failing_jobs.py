"""Trainings that go wrong, seen through the service: the job says why, nothing is published, requests go on."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.conftest import StartServer
from tests.live_server import REPO_ROOT, LiveServer

DEMO_BASE = REPO_ROOT / "deploy" / "demo" / "chorale-demo"
BASE = "chorale-demo"
JOB_TIMEOUT_S = 300.0
# address space: enough for Python, torch and the base, not for the steps of the job below
WORKER_BYTES = 5 << 30

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

# what is asked for, what the error's code is, what its message says
WILD = ({"learning_rate": 1.0, "alpha": 10_000.0, "rank": 16, "max_steps": 40, "batch_size": 2}, "nan", "learning rate")
GREEDY = ({"batch_size": 256, "max_length": 512, "packing": True, "n_epochs": 1}, "oom", "lower batch_size")


@pytest.fixture(scope="module")
def server(any_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start a server, and a worker of its own with little memory."""
    store = tmp_path_factory.mktemp("failing") / "store"
    server = any_server(DEMO_BASE, "--device", "cpu", store_dir=store)
    command = [sys.executable, "-m", "serve", "train-worker", "--model", str(DEMO_BASE), "--store", str(store)]
    worker = subprocess.Popen([*command, "--max-memory-bytes", str(WORKER_BYTES)], cwd=REPO_ROOT)
    try:
        yield server
        assert worker.poll() is None, "a job that fails does not end its worker"
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def long_examples() -> bytes:
    """Return as many rows of the base's full length as one batch of the greedy job takes."""
    words = " ".join(["word"] * 120)
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    return (json.dumps({"messages": messages}) + "\n").encode() * 512


def ended(client: openai.OpenAI, job: FineTuningJob, server: LiveServer) -> FineTuningJob:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, f"{job.status}\n{server.log_tail()}"
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def ask_until(client: openai.OpenAI, is_over: Event) -> int:
    """Ask one question after the other; every one is answered. Return how many."""
    num_asked = 0
    while not is_over.is_set():
        answer = client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "What does a cow eat?"}], max_tokens=8, temperature=0
        )
        assert answer.choices[0].message.content
        num_asked += 1
    return num_asked


@pytest.mark.parametrize(("asked", "code", "message"), [WILD, GREEDY], ids=["diverges", "needs too much memory"])
def test_a_job_that_goes_wrong_says_why_and_disturbs_nobody(
    asked: dict[str, object], code: str, message: str, client: openai.OpenAI, server: LiveServer
) -> None:
    data = client.files.create(file=("data.jsonl", long_examples()), purpose="fine-tune").id
    is_over = Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_until, client, is_over)
        try:
            job = client.fine_tuning.jobs.create(model=BASE, training_file=data, extra_body={"adapter": asked})
            done = ended(client, job, server)
        finally:
            is_over.set()
        assert asking.result() > 0
    assert done.status == "failed" and done.fine_tuned_model is None
    assert done.error is not None and done.error.code == code and message in done.error.message
    assert [model.id for model in client.models.list()] == [BASE]
    told = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any(message in text for text in told), told
