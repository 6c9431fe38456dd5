"""Who may move what a name means, who gets the canary of a shared adapter, and what of it is in the audit log."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.tenants.audit import AUDIT_FILE, verify
from tests.api.api_server import wait_until
from tests.tenants.tenant_api import TenantApi, tenant_api


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantApi]:
    """Serve `poet` of acme, in two versions, shared with bob."""
    with tenant_api(tmp_path_factory.mktemp("tenants")) as running:
        for seed in (1, 2):
            running["acme"].publish("poet", seed=seed)
        running["acme"].grant("poet", "bob")
        wait_until(lambda: running["bob"].run("acme/poet").status_code == 200, "the grant is known")
        yield running


def test_who_an_adapter_is_shared_with_uses_it_and_moves_nothing(api: TenantApi) -> None:
    bob, acme = api["bob"].http, api["acme"].http
    assert api["bob"].run("acme/poet").headers["x-adapter-version"] == "2"
    assert acme.post("/v1/adapters/poet/promote", json={"version": 1}).status_code == 200
    assert api["bob"].run("acme/poet").headers["x-adapter-version"] == "1"
    # paths take plain names only, and of that name bob has none
    for path in ("promote", "rollback", "canary"):
        body = None if path == "rollback" else {"version": 2, "percent": 5}
        assert bob.post(f"/v1/adapters/poet/{path}", json=body).status_code == 404
        assert bob.post(f"/v1/adapters/acme%2Fpoet/{path}", json=body).status_code in (404, 405)
    assert acme.post("/v1/adapters/poet/rollback").json()["version"] == 2


def test_a_shared_adapters_canary_is_the_same_for_the_same_user_whoever_asks(api: TenantApi) -> None:
    acme = api["acme"].http
    acme.post("/v1/adapters/poet/canary", json={"version": 1, "percent": 50})
    drawn = {}
    for tenant, name in (("acme", "poet"), ("bob", "acme/poet"), ("admin", "acme/poet")):
        for user in range(16):
            body = {"model": name, "prompt": "x", "max_tokens": 1, "user": f"u{user}"}
            answer = api[tenant].http.post("/v1/completions", json=body)
            drawn[tenant, user] = answer.headers["x-adapter-version"]
    assert {drawn["acme", user] for user in range(16)} == {"1", "2"}
    assert all(drawn["acme", user] == drawn["bob", user] == drawn["admin", user] for user in range(16))
    # by key: one key, one version
    acme.post("/v1/adapters/poet/canary", json={"version": 1, "percent": 50, "sticky": "key"})
    by_key = {api["bob"].run("acme/poet").headers["x-adapter-version"] for _ in range(12)}
    assert len(by_key) == 1
    acme.delete("/v1/adapters/poet/canary")


def test_every_move_is_in_the_log_under_who_made_it(api: TenantApi) -> None:
    log: Path = api.folder / AUDIT_FILE
    before = len(log.read_bytes().splitlines())
    acme = api["acme"].http
    acme.post("/v1/adapters/poet/canary", json={"version": 1, "percent": 5})
    acme.post("/v1/adapters/poet/promote", json={"alias": "canary"})
    acme.post("/v1/adapters/poet/rollback")
    acme.post("/v1/adapters/poet/promote", json={"version": 77})
    lines = log.read_bytes().splitlines(keepends=True)
    assert verify(lines) is None
    records = [json.loads(line) for line in lines[before:]]
    assert [record["event"] for record in records] == ["canary", "promote", "rollback"]
    assert {(record["tenant"], record["subject"]) for record in records} == {("acme", "poet")}
    moves = acme.get("/v1/adapters/poet/history").json()["data"]
    assert [move["what"] for move in moves[:3]] == ["rollback", "promote", "canary"]
    assert all(move["by"].startswith("acme/") for move in moves)
