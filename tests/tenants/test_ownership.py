"""One tenant cannot learn of another's adapters, by answer or by work done; sharing, quotas and salts beside it."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store.quotas import OwnerQuota
from adapters_store.registry_sqlite import SqliteRegistry
from serve.tenants.audit import AUDIT_FILE, verify
from tests.api.api_server import wait_until
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import BASE, whole_api
from tests.tenants.tenant_api import Client, TenantApi, tenant_api

# every way in which a request can name an adapter
ASKS: dict[str, Callable[[Client, str], httpx.Response]] = {
    "run": lambda client, name: client.run(name),
    "run version": lambda client, name: client.run(f"{name}@1"),
    "run digest": lambda client, name: client.run(f"{name}@sha256:{'0' * 64}"),
    "run alias": lambda client, name: client.run(f"{name}:stable"),
    "run behind the base": lambda client, name: client.run(f"{BASE}:{name}"),
    "adapter_id": lambda client, name: client.http.post(
        "/v1/completions", json={"model": BASE, "prompt": "Hi", "adapter_id": name}
    ),
    "composition": lambda client, name: client.http.post(
        "/v1/completions", json={"model": BASE, "prompt": "Hi", "adapters": [{"name": name, "weight": 0.5}]}
    ),
    "chat": lambda client, name: client.http.post(
        "/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    ),
    "embed": lambda client, name: client.http.post("/v1/embeddings", json={"model": name, "input": "Hi"}),
    "tokenize": lambda client, name: client.http.post("/tokenize", json={"model": name, "prompt": "Hi"}),
    "card": lambda client, name: client.http.get(f"/v1/models/{name}"),
    "delete card": lambda client, name: client.http.delete(f"/v1/models/{name}"),
    "unload": lambda client, name: client.http.post("/v1/unload_lora_adapter", json={"lora_name": name}),
    "get": lambda client, name: client.http.get(f"/v1/adapters/{name}"),
    "versions": lambda client, name: client.http.get(f"/v1/adapters/{name}/versions"),
    "status": lambda client, name: client.http.get(f"/v1/adapters/{name}/status"),
    "file": lambda client, name: client.http.get(f"/v1/adapters/{name}/files/adapter.json"),
    "prefetch": lambda client, name: client.http.post(f"/v1/adapters/{name}:prefetch"),
    "alias": lambda client, name: client.http.post(
        f"/v1/adapters/{name}/aliases", json={"alias": "mine", "version": 1}
    ),
    "promote": lambda client, name: client.http.post(f"/v1/adapters/{name}/promote", json={"version": 1}),
    "rollback": lambda client, name: client.http.post(f"/v1/adapters/{name}/rollback"),
    "set canary": lambda client, name: client.http.post(
        f"/v1/adapters/{name}/canary", json={"version": 1, "percent": 5}
    ),
    "canary": lambda client, name: client.http.get(f"/v1/adapters/{name}/canary"),
    "end canary": lambda client, name: client.http.delete(f"/v1/adapters/{name}/canary"),
    "forget alias": lambda client, name: client.http.delete(f"/v1/adapters/{name}/aliases/stable"),
    "history": lambda client, name: client.http.get(f"/v1/adapters/{name}/history"),
    "remove version": lambda client, name: client.http.delete(f"/v1/adapters/{name}/versions/1"),
    "delete": lambda client, name: client.http.delete(f"/v1/adapters/{name}"),
    "grants": lambda client, name: client.http.get(f"/v1/adapters/{name}/grants"),
    "grant": lambda client, name: client.grant(name, "carol"),
    "withdraw": lambda client, name: client.http.delete(f"/v1/adapters/{name}/grants/carol"),
    "page": lambda client, name: client.http.get("/v1/models", params={"after": name}),
}
VARYING = {"date", "x-request-id", "openai-processing-ms"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantApi]:
    with tenant_api(tmp_path_factory.mktemp("tenants")) as api:
        yield api


@pytest.fixture
def api(shared: TenantApi) -> TenantApi:
    shared.api.engine.reset()
    for name in shared["admin"].names():
        assert shared["admin"].http.delete(f"/v1/models/{name}").status_code == 200
    return shared


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    """Count up: a name that was never given has no versions yet."""
    return itertools.count(100)


def told(answer: httpx.Response, name: str) -> tuple[int, dict[str, str], str]:
    """Return all that an answer tells, without the name that was asked for."""
    headers = {key: value for key, value in answer.headers.items() if key not in VARYING}
    return answer.status_code, headers, answer.text.replace(name, "NAME")


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_a_foreign_adapter_and_none_give_the_same_answer_after_the_same_lookups(
    api: TenantApi,
    numbers: Iterator[int],
    ask: Callable[[Client, str], httpx.Response],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poet, clerk = f"poet{next(numbers)}", f"clerk{next(numbers)}"
    for owner, name in (("bob", poet), ("local", clerk)):
        api[owner].publish(name)
        alias = {"alias": "stable", "version": 1}
        assert api[owner].http.post(f"/v1/adapters/{name}/aliases", json=alias).status_code == 200
    lookups: list[str] = []
    many = SqliteRegistry._many

    def counted(registry: SqliteRegistry, clause: str, *values: str | int) -> object:
        found = many(registry, clause, *values)
        lookups.append(f"{clause} {len(found)}")
        return found

    monkeypatch.setattr(SqliteRegistry, "_many", counted)
    seen = []
    # bob's, nobody's of the same owner; the operator's by its plain and full name, and nobody's
    for name in (f"bob/{poet}", "bob/none000", clerk, "nones000", f"local/{clerk}", "local/nones000"):
        for principal in ("acme", "local") if name.startswith("bob") else ("acme",):
            lookups.clear()
            answer = ask(api[principal], name)
            seen.append((name, principal, told(answer, name), tuple(lookups)))
            assert answer.status_code in (400, 404), (name, answer.text)
    for first, second in ((0, 2), (1, 3), (4, 5), (6, 7)):
        assert seen[first][2:] == seen[second][2:], (seen[first], seen[second])
    monkeypatch.undo()
    assert api["bob"].names() == [poet] and api["local"].names() == [clerk]


def test_the_check_above_sees_a_leak(api: TenantApi, numbers: Iterator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"poet{next(numbers)}"
    api["bob"].publish(name)
    monkeypatch.setattr("serve.api.owned_adapters.OwnedAdapters._may_see", lambda self, stored: True)
    leaks = []
    for ask, call in ASKS.items():
        if "delete" in ask or ask == "unload":
            continue
        foreign, unknown = call(api["acme"], f"bob/{name}"), call(api["acme"], "bob/none000")
        leaks += [ask] if told(foreign, f"bob/{name}") != told(unknown, "bob/none000") else []
    named = {"run", "run version", "run behind the base", "chat", "embed", "tokenize", "composition", "adapter_id"}
    assert {*named, "card", "page"} <= {*leaks}


def test_each_sees_its_own(api: TenantApi) -> None:
    digests = {name: api[name].publish("poet", seed=seed) for seed, name in enumerate(("acme", "bob", "local"))}
    for name, digest in digests.items():
        assert api[name].digest_run("poet") == digest == api[name].digest_run(f"poet@sha256:{digest}")
        assert api[name].names() == api[name].models() == ["poet"]
        assert api[name].run("poet").headers["x-adapter-id"] == "poet"
    assert api["acme"].digest_run("acme/poet") == digests["acme"]
    assert api["carol"].names() == api["carol"].models() == []
    assert api["acme"].http.delete("/v1/adapters/poet").status_code == 200
    assert api["acme"].run("poet").status_code == 404
    assert api["bob"].digest_run("poet") == digests["bob"]


def test_one_object_of_two_owners_outlives_one_of_them(api: TenantApi) -> None:
    digests = {api[name].publish("poet") for name in ("acme", "bob")}
    assert len(digests) == 1
    assert api["acme"].http.delete("/v1/adapters/poet").status_code == 200
    api.api.store.sweep()
    assert api["bob"].http.get("/v1/adapters/poet/files/adapter.json").status_code == 200


def test_the_operator_sees_all_and_may_delete(api: TenantApi) -> None:
    digest = api["acme"].publish("poet")
    api["local"].publish("clerk", seed=1)
    assert api["admin"].names() == ["acme/poet", "clerk"] == api["admin"].models()
    assert api["admin"].digest_run("acme/poet") == digest
    assert api["admin"].http.delete("/v1/models/acme/poet").status_code == 200
    assert api["acme"].names() == []


@pytest.mark.parametrize("name", ["bob/poet", "acme/poet", "/poet", "local/poet", "poet/", "../poet"])
def test_nobody_uploads_under_another_name_than_a_plain_one(api: TenantApi, name: str) -> None:
    for principal in ("acme", "admin"):
        answer = api[principal].upload(name)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "name"
    assert api["admin"].names() == []


def test_a_grant_opens_use_and_nothing_else(api: TenantApi) -> None:
    digest = api["bob"].publish("poet")
    api["bob"].publish("poet:draft", seed=1)
    api["bob"].publish("poetry", seed=2)
    assert api["bob"].grant("poet", "acme").status_code == 200
    wait_until(lambda: api["acme"].run("bob/poet").status_code == 200, "the grant is known")
    assert api["acme"].digest_run(f"bob/poet@sha256:{digest}") == digest
    assert api["acme"].names() == api["acme"].models() == ["bob/poet"]
    assert api["acme"].run("bob/poet").headers["x-adapter-id"] == "bob/poet"
    # neither a plain name nor one that merely begins alike, nor another tenant
    for principal, name in (
        ("acme", "poet"),
        ("acme", "bob/poet:draft"),
        ("acme", "bob/poetry"),
        ("carol", "bob/poet"),
    ):
        assert api[principal].run(name).status_code == 404, name
    answer = api["acme"].http.delete("/v1/models/bob/poet")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "adapter_forbidden")
    assert api["acme"].http.post("/v1/unload_lora_adapter", json={"lora_name": "bob/poet"}).status_code == 403
    later = api["bob"].publish("poet", seed=3)
    assert api["acme"].digest_run("bob/poet") == later


def test_a_withdrawn_grant_closes_and_a_deleted_adapter_takes_its_grants_along(api: TenantApi) -> None:
    api["bob"].publish("poet")
    for tenant in ("acme", "carol"):
        api["bob"].grant("poet", tenant)
    assert api["bob"].http.get("/v1/adapters/poet/grants").json()["data"] == ["acme", "carol"]
    wait_until(lambda: api["acme"].run("bob/poet").status_code == 200, "the grant is known")
    assert api["bob"].http.delete("/v1/adapters/poet/grants/acme").status_code == 200
    assert api["bob"].http.delete("/v1/adapters/poet/grants/acme").status_code == 404
    wait_until(lambda: api["acme"].run("bob/poet").status_code == 404, "the grant is gone")
    assert api["carol"].run("bob/poet").status_code == 200
    api["bob"].http.delete("/v1/adapters/poet")
    api["bob"].publish("poet")
    wait_until(lambda: api["carol"].run("bob/poet").status_code == 404, "the deleted one's grant is gone")


def test_only_an_admin_shares_with_everybody(api: TenantApi) -> None:
    digest = api["local"].publish("house")
    refused = api["local"].grant("house", "*")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert api["acme"].run("house").status_code == 404
    assert api["admin"].grant("house", "*").status_code == 200
    wait_until(lambda: api["acme"].run("house").status_code == 200, "it is public")
    assert api["acme"].digest_run("house") == api["bob"].digest_run("local/house") == digest
    assert api["acme"].names() == ["local/house"]
    # a tenant's own comes before the operator's of the same name
    own = api["acme"].publish("house", seed=1)
    assert api["acme"].digest_run("house") == own and api["acme"].digest_run("local/house") == digest


@pytest.mark.parametrize("tenant", ["Acme", "", "a/b", "**", "x" * 65, "a\nb"])
def test_a_grant_to_no_tenant_is_refused(api: TenantApi, tenant: str) -> None:
    api["bob"].publish("poet")
    assert api["bob"].grant("poet", tenant).status_code == 400
    assert api["bob"].http.get("/v1/adapters/poet/grants").json()["data"] == []


def test_prefixes_are_a_tenants_own(api: TenantApi) -> None:
    salts = {}
    for name in ("acme", "bob", "local", "admin"):
        api[name].run(BASE)
        api[name].run(BASE)
        first, second = api.api.engine.submits[-2:]
        assert first.cache_salt == second.cache_salt and len(first.cache_salt) == 64
        salts[name] = first.cache_salt
        # what is only embedded is kept as prefixes too
        assert api[name].http.post("/v1/embeddings", json={"model": BASE, "input": "Hi"}).status_code == 200
        assert api.api.engine.embeds[-1].cache_salt == first.cache_salt
    assert salts["local"] == salts["admin"] and len(set(salts.values())) == 3


def test_a_server_of_one_user_needs_no_salt_and_knows_no_grants(tmp_path: Path) -> None:
    with whole_api(write_model_dir(tmp_path / "model"), tmp_path / "store") as alone:
        assert alone.upload("poet").status_code == 201
        body = {"model": "poet", "prompt": "Hi", "max_tokens": 1}
        assert alone.http.post("/v1/completions", json=body).status_code == 200
        assert alone.engine.submits[-1].cache_salt == ""
        answer = alone.http.post("/v1/adapters/poet/grants", json={"tenant": "bob"})
        assert answer.status_code == 400 and "--require-keys" in answer.json()["error"]["message"]
        assert not (tmp_path / "store" / AUDIT_FILE).exists()


def test_what_was_done_and_refused_is_in_the_log(api: TenantApi) -> None:
    log = api.folder / AUDIT_FILE
    before = len(log.read_bytes().splitlines()) if log.exists() else 0
    digest = api["acme"].publish("poet")
    version = api["acme"].http.get("/v1/adapters/poet").json()["version"]
    api["acme"].http.post("/v1/adapters/poet/aliases", json={"alias": "stable", "version": version})
    api["acme"].grant("poet", "bob")
    api["acme"].http.get("/metrics")
    api["acme"].http.delete("/v1/adapters/poet")
    lines = log.read_bytes().splitlines(keepends=True)
    assert verify(lines) is None
    records = [json.loads(line) for line in lines[before:]]
    assert [record["event"] for record in records] == ["upload", "alias", "shared", "denied", "delete"]
    assert {record["tenant"] for record in records} == {"acme"}
    assert digest in records[0]["detail"] and records[3]["subject"] == "GET /metrics"


@pytest.fixture
def quota(api: TenantApi) -> Iterator[Callable[[OwnerQuota], None]]:
    def set_quota(quota: OwnerQuota) -> None:
        api.api.store.quota = quota

    yield set_quota
    api.api.store.quota = OwnerQuota()


def test_one_adapter_too_many_is_507_and_leaves_nothing(api: TenantApi, quota: Callable[[OwnerQuota], None]) -> None:
    quota(OwnerQuota(max_adapters=2))
    for name in ("a", "b"):
        api["acme"].publish(name)
    refused = api["acme"].upload("c")
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "quota_exceeded")
    assert "the limit is 2" in refused.json()["error"]["message"]
    # another version is no other adapter, and another tenant has bounds of its own
    api["acme"].publish("a", seed=1)
    api["bob"].publish("c")
    assert api["acme"].names() == ["a", "b"] and api.api.num_staged == 0
    api["acme"].http.delete("/v1/adapters/a")
    api["acme"].publish("c")


def test_bytes_count_every_version(api: TenantApi, quota: Callable[[OwnerQuota], None]) -> None:
    api["acme"].publish("a")
    size = api["acme"].http.get("/v1/adapters/a").json()["bytes"]
    quota(OwnerQuota(max_bytes=2 * size))
    api["acme"].publish("a", seed=1)
    for name in ("a", "b"):
        refused = api["acme"].upload(name, seed=2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (507, "files")
    assert len(api["acme"].http.get("/v1/adapters/a/versions").json()["data"]) == 2


def test_uploads_at_once_never_pass_the_bound_together(api: TenantApi, quota: Callable[[OwnerQuota], None]) -> None:
    quota(OwnerQuota(max_adapters=3))
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(api["acme"].upload(f"a{n}", seed=n).status_code))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] * 3 + [507] * 5
    assert len(api["acme"].names()) == 3
