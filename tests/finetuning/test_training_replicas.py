"""Two servers' APIs over one shared store, and a worker somewhere: what one is told all know."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from adapters_store.jobs.job import NewEvent, Progress
from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.rows_choice import TRAINING_JOURNAL, open_rows
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.registry_redis import SharedRegistry
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import BASE, WholeApi, whole_api
from tests.finetuning.training_store import Clock

LINE = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[WholeApi]]:
    """Run two APIs over one folder; each has its own view of the journals in it."""
    model_dir, made = write_model_dir(tmp_path / "model"), []
    with ExitStack() as stack:
        (tmp_path / "store").mkdir()
        for _ in range(2):
            registry = SharedRegistry.open(tmp_path / "store")
            made.append(stack.enter_context(whole_api(model_dir, tmp_path / "store", registry=registry)))
        yield made


def test_a_job_of_one_server_is_every_servers_and_any_workers(replicas: list[WholeApi], tmp_path: Path) -> None:
    a, b = (replica.http for replica in replicas)
    sent = a.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", LINE * 3)})
    file_id = sent.raise_for_status().json()["id"]
    assert b.get(f"/v1/files/{file_id}/content").content == LINE * 3
    job_id = (
        b.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id}).raise_for_status().json()["id"]
    )
    assert a.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "queued"
    assert b.delete(f"/v1/files/{file_id}").status_code == 200
    assert a.get(f"/v1/files/{file_id}").status_code == 404
    base = replicas[0].engine.ready
    assert base is not None and (tmp_path / "store" / TRAINING_JOURNAL).is_dir()
    with closing(open_rows(tmp_path / "store", Clock(2e9))) as rows:
        assert isinstance(rows, SharedRows)
        queue = SqliteJobQueue(rows)
        claim = queue.claim("elsewhere", base.base_fingerprint, lease_s=30)
        assert claim is not None and claim.job.id == job_id
        steps = [NewEvent(f"Step {n}", data={"step": n}, series="train", step=n) for n in range(1, 6)]
        queue.report(claim, steps, Progress(5, 10, 0.5, started=2e9, updated=2e9, steps_per_s=1.0))
        page = b.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 3}).json()
        rest = a.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 9, "after": page["last_id"]}).json()
        told = [event["message"] for event in page["data"] + rest["data"]]
        assert told[:6] == ["Step 5", "Step 4", "Step 3", "Step 2", "Step 1", "Fine-tuning job started"]
        assert page["has_more"] and not rest["has_more"]
        assert a.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        assert b.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "cancelled"
        assert b.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["error"]["code"] == "invalid_job_state"
