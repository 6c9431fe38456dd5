"""Whose data files and jobs are whose, over HTTP with real keys: nobody sees another's, or has more than its bound."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.config import TenantLimits
from serve.tenants.principal import Scope
from tests.api_guard.whole_api import BASE
from tests.tenants import tenant_api as tenants
from tests.tenants.tenant_api import TenantApi, tenant_api

TRAINS = frozenset(Scope) - {Scope.ADMIN}
LINE = b'{"prompt": "a", "completion": "b"}\n'
LIMITS = TenantLimits(max_training_jobs=2, max_training_bytes=10 * len(LINE))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantApi]:
    """Serve two tenants that may train, and one that may not."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("acme", "bob"):
            patched.setitem(tenants.KEYS, name, (name, TRAINS))
        with tenant_api(tmp_path_factory.mktemp("tenants"), tenant_limits=LIMITS) as running:
            yield running


def send_file(http: httpx.Client, num_lines: int = 1) -> httpx.Response:
    """Upload a data file."""
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", LINE * num_lines)})


def send_job(http: httpx.Client, file_id: str, **fields: object) -> httpx.Response:
    """Create a job."""
    return http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, **fields})


def test_without_the_scope_nothing_opens(api: TenantApi) -> None:
    for http in (api["carol"].http, api["local"].http):
        for answer in (send_file(http), http.get("/v1/files"), http.get("/v1/fine_tuning/jobs"), send_job(http, "x")):
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "insufficient_scope"


def test_a_foreign_file_or_job_answers_as_one_that_never_was(api: TenantApi) -> None:
    acme, bob = api["acme"].http, api["bob"].http
    file_id = send_file(acme).json()["id"]
    job_id = send_job(acme, file_id).json()["id"]
    # of the same length: the message holds the id
    unknown_file, unknown_job = "file-" + "0" * 24, "ftjob-" + "0" * 24
    requests = [("GET", "/v1/files/F"), ("GET", "/v1/files/F/content"), ("DELETE", "/v1/files/F")]
    requests += [
        ("GET", "/v1/files?after=F"),
        ("GET", "/v1/fine_tuning/jobs?after=J"),
        ("GET", "/v1/fine_tuning/jobs/J"),
    ]
    requests += [("POST", f"/v1/fine_tuning/jobs/J/{act}") for act in ("cancel", "pause", "resume")]
    requests += [("GET", f"/v1/fine_tuning/jobs/J/{act}") for act in ("events", "checkpoints")]
    for method, path in requests:
        foreign = bob.request(method, path.replace("F", file_id).replace("J", job_id))
        never = bob.request(method, path.replace("F", unknown_file).replace("J", unknown_job))
        assert foreign.status_code == never.status_code == 404, path
        assert foreign.text.replace(file_id, "").replace(job_id, "") == never.text.replace(unknown_file, "").replace(
            unknown_job, ""
        )
    assert send_job(bob, file_id).status_code == 404
    assert send_job(bob, send_file(bob).json()["id"], validation_file=file_id).status_code == 404
    assert bob.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert file_id not in {file["id"] for file in bob.get("/v1/files").json()["data"]}
    assert acme.get(f"/v1/fine_tuning/jobs/{job_id}").json()["organization_id"] == "acme"
    assert api["admin"].http.get(f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
    acme.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")


def test_an_expert_must_be_one_that_the_tenant_sees(api: TenantApi) -> None:
    api["bob"].publish("bobs-own", seed=4)
    acme = api["acme"].http
    file_id = send_file(acme).json()["id"]
    for name in ("bob/bobs-own", "bobs-own", "bob/never-was"):
        answer = send_job(acme, file_id, adapter={"family": "meteora", "experts": [name, "x"]})
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "adapter.experts"


def test_no_tenant_has_more_jobs_or_bytes_than_its_bound(api: TenantApi) -> None:
    acme, bob = api["acme"].http, api["bob"].http
    for file in acme.get("/v1/files").json()["data"]:
        acme.delete(f"/v1/files/{file['id']}")
    file_id = send_file(acme, 9).json()["id"]
    refused = send_file(acme, 2)
    assert refused.status_code == 507 and refused.json()["error"]["code"] == "quota_exceeded"
    assert send_file(bob, 2).status_code == 200
    jobs = [send_job(acme, file_id).json()["id"] for _ in range(2)]
    refused = send_job(acme, file_id)
    assert refused.status_code == 507 and "the limit is 2" in refused.json()["error"]["message"]
    acme.post(f"/v1/fine_tuning/jobs/{jobs[0]}/cancel")
    assert send_job(acme, file_id).status_code == 200
    acme.delete(f"/v1/files/{file_id}")
    assert send_file(acme, 10).status_code == 200


def test_the_audit_log_tells_of_files_and_jobs(api: TenantApi) -> None:
    acme = api["acme"].http
    jobs = acme.get("/v1/fine_tuning/jobs").json()["data"]
    text = (Path(api.folder) / "audit.jsonl").read_text()
    assert jobs[0]["id"] in text and '"data_file"' in text and '"training"' in text
