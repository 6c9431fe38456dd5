"""Two servers' APIs over a shared folder or object store, and a worker somewhere: what one is told all know."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters_store.errors import InvalidOption
from adapters_store.jobs.database import TRAINING_FILE, TrainingDatabase
from adapters_store.jobs.job import NewEvent, Progress
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.rows_choice import TRAINING_JOURNAL, open_folders, open_rows
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.pins import PINS_FILE, PinsFile
from adapters_store.registry_redis import SharedRegistry
from adapters_store.registry_replicas import open_remote
from adapters_store.shared_pins import open_pins
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import BASE, WholeApi, whole_api
from tests.finetuning.training_store import Clock, new_job
from tests.s3_server import S3Server, s3_in_environment

LINE = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"
DIGEST = "d" * 64


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Return an object store, which this process's environment names."""
    server = s3_in_environment(monkeypatch)
    yield server
    server.close()


@dataclass
class Site:
    """Two APIs, and where their store is."""

    replicas: list[WholeApi]
    worker_dir: Path
    blobs_url: str | None
    s3_server: S3Server | None


@pytest.fixture(params=["folder", "objects"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Run two APIs over one store; each has its own view of the journals in it."""
    server: S3Server | None = request.getfixturevalue("s3_server") if request.param == "objects" else None
    url = None if server is None else server.url("shared")
    model_dir, made = write_model_dir(tmp_path / "model"), []
    with ExitStack() as stack:
        for number in range(2):
            folder = tmp_path / ("store" if url is None else f"store{number}")
            folder.mkdir(exist_ok=True)
            registry = SharedRegistry.open(folder) if url is None else open_remote(folder, url)
            made.append(stack.enter_context(whole_api(model_dir, folder, registry=registry, blobs_url=url)))
        yield Site(made, tmp_path / ("store" if url is None else "elsewhere"), url, server)


def test_a_job_of_one_server_is_every_servers_and_any_workers(site: Site) -> None:
    a, b = (replica.http for replica in site.replicas)
    sent = a.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", LINE * 3)})
    file_id = sent.raise_for_status().json()["id"]
    assert b.get(f"/v1/files/{file_id}/content").content == LINE * 3
    body = {"model": BASE, "training_file": file_id}
    job_id = b.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    assert a.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "queued"
    assert b.delete(f"/v1/files/{file_id}").status_code == 200
    assert a.get(f"/v1/files/{file_id}").status_code == 404
    assert a.get(f"/v1/files/{file_id}/content").status_code == 404
    check_worked_on(site, job_id)
    assert a.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert b.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "cancelled"
    assert b.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["error"]["code"] == "invalid_job_state"
    if site.s3_server is not None:
        check_away(site, job_id)


def check_worked_on(site: Site, job_id: str) -> None:
    """A worker on a machine of its own takes the job, reads its data, and tells what both servers show."""
    a, b = (replica.http for replica in site.replicas)
    base = site.replicas[0].engine.ready
    assert base is not None
    clock = Clock(2e9)
    with (
        closing(open_rows(site.worker_dir, clock, site.blobs_url)) as rows,
        closing(open_folders(site.worker_dir, site.blobs_url)) as folders,
    ):
        assert isinstance(rows, SharedRows)
        queue = SqliteJobQueue(rows)
        claim = queue.claim("elsewhere", base.base_fingerprint, lease_s=30)
        assert claim is not None and claim.job.id == job_id
        folders.begin_run(job_id, claim.token)
        assert (folders.inputs(job_id) / "train.jsonl").read_bytes() == LINE * 3
        steps = [NewEvent(f"Step {n}", data={"step": n}, series="train", step=n) for n in range(1, 6)]
        queue.report(claim, steps, Progress(5, 10, 0.5, started=2e9, updated=2e9, steps_per_s=1.0))
        page = b.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 3}).json()
        rest = a.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 9, "after": page["last_id"]}).json()
        told = [event["message"] for event in page["data"] + rest["data"]]
        assert told[:6] == ["Step 5", "Step 4", "Step 3", "Step 2", "Step 1", "Fine-tuning job started"]
        assert page["has_more"] and not rest["has_more"]


def check_away(site: Site, job_id: str) -> None:
    """The object store is gone for good: clear answers within bounds, at both servers, and both go on serving."""
    assert site.s3_server is not None
    site.s3_server.close()
    body = {"model": BASE, "training_file": "file-x"}
    for http in (replica.http for replica in site.replicas):
        upload = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", LINE)})
        job = http.post("/v1/fine_tuning/jobs", json=body)
        for answer in (upload, job, http.get(f"/v1/fine_tuning/jobs/{job_id}"), http.get("/v1/files")):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "store_unavailable" and int(answer.headers["retry-after"]) > 0
        assert http.get("/v1/models").status_code == 200


@pytest.fixture
def blobs_url(s3_server: S3Server) -> str:
    return s3_server.url("shared")


def test_what_a_server_had_of_its_own_before_it_shared_objects_is_taken_over_or_refused(
    tmp_path: Path, blobs_url: str
) -> None:
    clock = Clock()
    # a server that never had a job has a file of them all the same
    TrainingDatabase(tmp_path, clock).close()
    open_rows(tmp_path, clock, blobs_url).close()
    assert (tmp_path / f"{TRAINING_FILE}.before-1").is_file() and not (tmp_path / TRAINING_FILE).exists()
    with closing(TrainingDatabase(tmp_path, clock)) as alone:
        job = SqliteJobs(alone).create(new_job())
    with pytest.raises(InvalidOption, match=job.id):
        open_rows(tmp_path, clock, blobs_url)
    assert (tmp_path / TRAINING_FILE).is_file()
    (tmp_path / "folder").mkdir()
    SharedRegistry.open(tmp_path / "folder").close()
    open_rows(tmp_path / "folder", clock).close()
    with pytest.raises(InvalidOption, match=TRAINING_JOURNAL.as_posix()):
        open_rows(tmp_path / "folder", clock, blobs_url)
    PinsFile(tmp_path).add(DIGEST)
    for _ in range(2):
        assert open_pins(tmp_path, blobs_url).read() == (DIGEST,)
    assert not (tmp_path / PINS_FILE).exists() and (tmp_path / f"{PINS_FILE}.before-1").is_file()
    open_pins(tmp_path / "other", blobs_url).discard([DIGEST])
    assert open_pins(tmp_path, blobs_url).read() == ()
