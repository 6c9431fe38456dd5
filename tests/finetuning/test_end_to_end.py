"""The whole way, with real processes on the demo base: OpenAI's own client uploads, trains, follows, chats, deletes."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.conftest import StartServer
from tests.live_server import REPO_ROOT, LiveServer

DEMO = REPO_ROOT / "deploy" / "demo"
BASE = "chorale-demo"
# a step of the demo base takes a tenth of a second; the bound is for a machine that is busy with others
JOB_TIMEOUT_S = 600.0
FEW_STEPS = {"max_steps": 4, "batch_size": 2, "max_length": 64, "checkpoint_every": 2}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(any_server: StartServer) -> LiveServer:
    """Start a server with a worker beside it, and a probe before every publication."""
    return any_server(DEMO / "chorale-demo", "--device", "cpu", "--train-worker", "on", "--probe", "on")


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    """Return OpenAI's client as it is."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240) as client:
        yield client


def lines(*tasks: str | None) -> bytes:
    """Return sixteen examples, with the task labels in turn."""
    made = []
    for number in range(16):
        messages = [{"role": "user", "content": f"shout: word{number}"}]
        messages.append({"role": "assistant", "content": f"WORD{number}!"})
        task = tasks[number % len(tasks)] if tasks else None
        made.append(json.dumps({"messages": messages} | ({"task": task} if task else {})))
    return ("\n".join(made) + "\n").encode()


def upload(client: openai.OpenAI, content: bytes) -> str:
    """Return the id of a data file."""
    return client.files.create(file=("data.jsonl", content), purpose="fine-tune").id


def wait_for(client: openai.OpenAI, job: FineTuningJob, server: LiveServer) -> FineTuningJob:
    """Return the job when it has ended."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status in ("validating_files", "queued", "running", "succeeded", "failed", "cancelled")
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.1)
    raise AssertionError(f"{job.status} after {JOB_TIMEOUT_S} s\n{server.log_tail()}")


def chat(client: openai.OpenAI, model: str) -> str:
    """Return a model's answer, which must say by which model it was made."""
    answer = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "shout: abc"}], max_tokens=8, temperature=0
    )
    assert answer.headers["x-adapter-id"] == model
    return answer.parse().choices[0].message.content or ""


def check_succeeded(client: openai.OpenAI, job: FineTuningJob, server: LiveServer, suffix: str) -> str:
    """Follow one job to its end, look at all it leaves, and return its model's name."""
    done = wait_for(client, job, server)
    told = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert done.status == "succeeded", (done.error, told, server.log_tail())
    name = done.fine_tuned_model
    assert name is not None and name.startswith(f"ft:{BASE}:local:{suffix}:")
    assert done.trained_tokens is not None and done.trained_tokens > 0 and done.finished_at is not None
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert events[0].message == "The job has successfully completed"
    metrics = [event.data for event in events if event.type == "metrics"]
    steps = sorted(data["step"] for data in metrics if isinstance(data, dict) and "train_loss" in data)
    assert steps == [1, 2, 3, 4]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [each.step_number for each in checkpoints] == [2]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{name}:ckpt-step-2"
    assert checkpoints[0].metrics.train_loss is not None
    (result,) = done.result_files
    assert client.files.content(result).read().decode().splitlines()[0].startswith("step,train_loss")
    assert isinstance(chat(client, name), str) and isinstance(chat(client, f"{name}:ckpt-step-2"), str)
    card = client.models.retrieve(name)
    assert card.id == name
    return name


def test_upload_train_follow_chat_delete(client: openai.OpenAI, server: LiveServer) -> None:
    for adapter in ("reverse", "shout"):
        answer = server.upload(adapter, DEMO / "adapters" / adapter)
        assert answer.status_code == 201, answer.text
    data = upload(client, lines())
    labelled = upload(client, lines("reverse", "shout"))
    jobs = client.fine_tuning.jobs
    lora = jobs.create(
        model=BASE,
        training_file=data,
        suffix="lora-run",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"adapter": {"family": "lora", "rank": 4, **FEW_STEPS}},
    )
    s2ft = jobs.create(
        model=BASE,
        training_file=data,
        validation_file=data,
        suffix="s2ft-run",
        seed=2,
        extra_body={"adapter": {"family": "s2ft", "ratio": 0.05, "n_epochs": 1, "eval_every": 2, **FEW_STEPS}},
    )
    meteora = jobs.create(
        model=BASE,
        training_file=labelled,
        suffix="meteora-run",
        seed=3,
        extra_body={"adapter": {"family": "meteora", "experts": ["reverse@1", "shout"], "n_epochs": 1, **FEW_STEPS}},
    )
    unwanted = jobs.create(model=BASE, training_file=data, extra_body={"adapter": {"family": "ia3"}})
    assert jobs.cancel(unwanted.id).status == "cancelled"
    names = [
        check_succeeded(client, job, server, suffix)
        for job, suffix in ((lora, "lora-run"), (s2ft, "s2ft-run"), (meteora, "meteora-run"))
    ]
    assert jobs.retrieve(unwanted.id).fine_tuned_model is None
    listed = {model.id for model in client.models.list()}
    assert set(names) <= listed
    for name in names:
        assert client.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            chat(client, name)
    assert not set(names) & {model.id for model in client.models.list()}


def processes(server: LiveServer, word: str) -> list[psutil.Process]:
    """Return the server's descendants with this word in their command line."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if word in child.cmdline():
                found.append(child)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process is gone; one that is on its way out has no command line any more, but still runs."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(is_true: Callable[[], bool], what: str, server: LiveServer) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, f"waited in vain: {what}\n{server.log_tail()}"
        time.sleep(0.1)


def test_requests_are_answered_while_a_job_trains_and_cancelling_ends_its_process(
    client: openai.OpenAI, server: LiveServer
) -> None:
    # more steps than any machine that holds this test up could finish meanwhile
    data = upload(client, lines() * 50)
    jobs = client.fine_tuning.jobs
    job = jobs.create(
        model=BASE, training_file=data, extra_body={"adapter": {"n_epochs": 50, "batch_size": 1, "max_length": 64}}
    )

    def num_steps() -> int:
        return sum(event.type == "metrics" for event in jobs.list_events(job.id, limit=1000))

    wait_until(lambda: num_steps() > 0, "the first step", server)
    before = num_steps()
    for number in range(12):
        answer = client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": f"shout: word{number}"}], max_tokens=8
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
    wait_until(lambda: num_steps() > before, "steps beside requests", server)
    assert jobs.retrieve(job.id).status == "running"
    assert jobs.pause(job.id).status == "queued"
    wait_until(lambda: not processes(server, "serve.trainer"), "the end of a paused process", server)
    saved = num_steps()
    assert jobs.resume(job.id).status in ("queued", "running")
    wait_until(lambda: num_steps() > saved, "steps after the pause", server)
    told = [event.message for event in jobs.list_events(job.id, limit=1000)]
    assert any(message.startswith("Training ") and " from step " in message for message in told)
    (training,) = processes(server, "serve.trainer")
    assert jobs.cancel(job.id).status == "cancelled"
    wait_until(lambda: has_ended(training), "the end of the training process", server)
    assert jobs.retrieve(job.id).fine_tuned_model is None
    (worker,) = processes(server, "train-worker")
    worker.kill()
    wait_until(
        lambda: [each.pid for each in processes(server, "train-worker")] not in ([], [worker.pid]), "another", server
    )
    assert client.models.retrieve(BASE).id == BASE
