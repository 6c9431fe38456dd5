"""The life of an adapter over HTTP: upload, versions, aliases, status, deletion."""

import pytest

from serve.messages import AdapterState, Stats
from tests.api_guard.whole_api import BASE, WholeApi, form, good_parts, name_part
from tests.api_guard.wire import status_of


def stats_with(digest: str) -> Stats:
    adapter = AdapterState(digest=digest, tier="device", num_pins=3, num_bytes=10, rank=2)
    return Stats(*(0,) * 7, [adapter], *(0,) * 7)


@pytest.mark.parametrize("name_first", [True, False])
def test_an_upload_is_answered_with_what_it_became(api: WholeApi, name_first: bool) -> None:
    parts = [name_part("poet"), *good_parts()] if name_first else [*good_parts(), name_part("poet")]
    answer = api.post_raw(form(*parts))
    assert status_of(answer) == 201
    card = api.http.get("/v1/adapters/poet").json()
    assert card["name"] == "poet" and card["version"] >= 1 and card["family"] == "lora" and card["rank"] == 2
    assert card["digest"].startswith("sha256:") and len(card["digest"]) == 71 and card["bytes"] > 0
    assert card["base"]["hidden_size"] == 16
    assert set(card["report"]) == {"applied", "ignored", "missing", "refused"} and len(card["report"]["applied"]) == 14
    assert card["tier"] == "disk"


def test_a_second_upload_is_a_new_version_and_the_old_one_stays(api: WholeApi) -> None:
    first, second = api.upload("poet").json(), api.upload("poet", seed=1).json()
    assert second["version"] == first["version"] + 1 and second["digest"] != first["digest"]
    versions = api.http.get("/v1/adapters/poet/versions").json()["data"]
    assert [version["digest"] for version in versions][-2:] == [first["digest"], second["digest"]]
    assert [adapter["version"] for adapter in api.http.get("/v1/adapters").json()["data"]] == [second["version"]]


def test_an_alias_names_a_version(api: WholeApi) -> None:
    version = api.upload("poet").json()["version"]
    answer = api.http.post("/v1/adapters/poet/aliases", json={"alias": "stable", "version": version})
    assert answer.json() == {"name": "poet", "alias": "stable", "version": version}
    ref = api.store.resolve("poet:stable")
    assert ref is not None and ref.version == version
    for body in ({"alias": "a b", "version": version}, {"alias": "x", "version": 10**6}, {"alias": "x"}, {}, [1]):
        refused = api.http.post("/v1/adapters/poet/aliases", json=body)
        assert refused.status_code in (400, 404) and refused.json()["error"]["type"] == "invalid_request_error"


def test_names_with_colons_reach_every_route(api: WholeApi) -> None:
    name = "ft:demo:org:poet:1"
    digest = api.upload(name).json()["digest"].removeprefix("sha256:")
    assert api.http.get(f"/v1/adapters/{name}").json()["name"] == name
    assert api.http.get(f"/v1/adapters/{name}/status").json()["tier"] == "disk"
    assert api.http.post(f"/v1/adapters/{name}:prefetch").status_code == 202
    assert api.engine.loaded == [digest]
    assert api.http.delete(f"/v1/adapters/{name}").json()["deleted"] is True


def test_the_status_tells_where_the_engine_holds_it(api: WholeApi) -> None:
    digest = api.upload("poet").json()["digest"]
    api.engine.stats = stats_with(digest.removeprefix("sha256:"))
    status = api.http.get("/v1/adapters/poet/status").json()
    assert status["tier"] == "device" and status["pins"] == 3 and status["digest"] == digest


def test_deletion_is_final_and_told_to_the_engine(api: WholeApi) -> None:
    digests = {api.upload("poet", seed=seed).json()["digest"].removeprefix("sha256:") for seed in (0, 1)}
    assert api.http.delete("/v1/adapters/poet").json() == {"id": "poet", "object": "adapter", "deleted": True}
    assert digests <= set(api.engine.unloaded)
    for method, path in (
        ("GET", "/v1/adapters/poet"),
        ("DELETE", "/v1/adapters/poet"),
        ("GET", "/v1/adapters/poet/versions"),
        ("GET", "/v1/adapters/poet/status"),
        ("POST", "/v1/adapters/poet:prefetch"),
    ):
        answer = api.http.request(method, path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found", path


def test_the_base_itself_is_no_adapter(api: WholeApi) -> None:
    assert api.http.get(f"/v1/adapters/{BASE}").status_code == 404
    assert api.upload(BASE).status_code == 400


def test_other_methods_and_paths_are_refused_in_the_error_shape(api: WholeApi) -> None:
    for method, path, status in (
        ("PUT", "/v1/adapters", 405),
        ("POST", "/v1/adapters/", 404),
        ("GET", "/v1/adapters/a/b/c", 404),
        ("POST", "/v1/adapters/x:explode", 405),
        ("GET", "/v1/%61dapters", 404),
    ):
        answer = api.http.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
