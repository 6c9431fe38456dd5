"""Shapes and headers of refusals, request ids, keys, the OpenAPI document."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from adapters_store.errors import StoreError
from serve.api.errors import error_response
from serve.api.route_scopes import OPEN, ROUTE_SCOPES
from serve.errors import Conflict, EngineLoading, InvalidApiKey, QueueFull
from tests.api.api_server import ApiServer
from tests.api.fake_store import BASE

KEY = "sk-right"


@pytest.fixture(scope="module")
def locked(model_dir: Path) -> Iterator[ApiServer]:
    """Run a server that wants a key."""
    server = ApiServer(model_dir, api_keys=(KEY, "sk-other"))
    try:
        yield server
    finally:
        server.stop()


def test_a_request_id_is_echoed_if_it_is_valid(api: ApiServer) -> None:
    assert api.http.get("/version", headers={"x-request-id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    for bad in ("a b", "x" * 129, "é", ""):
        answer = api.http.get("/version", headers=[(b"x-request-id", bad.encode())])
        assert answer.headers["x-request-id"].startswith("req_")


def test_every_answer_tells_its_processing_time(api: ApiServer) -> None:
    for path in ("/version", "/nowhere"):
        assert int(api.http.get(path).headers["openai-processing-ms"]) >= 0


def test_the_engines_request_ids_never_come_from_the_client(api: ApiServer) -> None:
    for _ in range(2):
        api.http.post("/v1/completions", json={"model": BASE, "prompt": "a"}, headers={"x-request-id": "same"})
    first, second = (submit.request_id for submit in api.engine.submits)
    assert first != second and "same" not in first


def test_a_full_queue_answers_429_before_tokenising(api: ApiServer) -> None:
    api.engine.script.admit_error = QueueFull("the queue is full", retry_after_s=7)
    answer = api.complete([10**9])
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["code"] == "queue_full" and answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["x-ratelimit-limit-requests"] == "576"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert not api.engine.submits


def test_a_starting_engine_answers_503(api: ApiServer) -> None:
    api.engine.script.admit_error = EngineLoading("loading", retry_after_s=2)
    answer = api.chat()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "model_loading"


def test_a_store_error_has_the_same_shape(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise StoreError("the registry is unreadable", param="model")

    monkeypatch.setattr(api.store, "resolve", fail)
    answer = api.chat(model="poet")
    assert answer.status_code == 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_unexpected_is_logged_once_and_tells_nothing(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(model: str) -> None:
        raise RuntimeError("secret /path/to/thing")

    monkeypatch.setattr(api.store, "resolve", fail)
    answer = api.http.post(
        "/v1/completions", json={"model": "poet", "prompt": "a"}, headers={"x-request-id": "find-me"}
    )
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "find-me"
    assert "secret" not in answer.text and answer.json()["error"]["code"] == "engine_error"
    assert len([record for record in caplog.records if "find-me" in record.getMessage()]) == 1


def test_a_conflict_tells_clients_not_to_retry() -> None:
    assert error_response(Conflict("in use")).headers["x-should-retry"] == "false"
    assert error_response(InvalidApiKey("no")).headers["www-authenticate"] == "Bearer"


def test_routes_that_do_not_exist_answer_in_our_shape(api: ApiServer) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/", 404)):
        answer = api.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_route_but_the_probes_wants_a_key(locked: ApiServer) -> None:
    for (method, template), scopes in ROUTE_SCOPES.items():
        path = template.replace("{model_id:path}", "poet").replace("{name}", "poet").replace("{file}", "adapter.json")
        answer = locked.http.request(method, path)
        assert (answer.status_code == 401) is (scopes != OPEN), (method, path, answer.status_code)
        assert (scopes == OPEN) is (template in ("/livez", "/readyz", "/health", "/startupz"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"authorization": "Bearer ' OR '1'='1"},
        {"api-key": KEY},
    ],
)
def test_a_wrong_key_is_401(locked: ApiServer, headers: dict[str, str]) -> None:
    answer = locked.http.get("/v1/models", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_two_keys_in_one_request_are_refused(locked: ApiServer) -> None:
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer sk-other")]
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


def test_a_right_key_opens(locked: ApiServer) -> None:
    for key in (KEY, "sk-other"):
        with locked.openai(key) as client:
            assert client.models.list().data[0].id == BASE
    assert locked.http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    with locked.openai("sk-wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_document_declares_every_error_and_every_field(api: ApiServer) -> None:
    document = api.http.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        route = document["paths"][path]["post"]
        assert {"400", "401", "404", "413", "415", "429", "500", "503"} <= set(route["responses"])
        assert route["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "429" in document["paths"]["/v1/models"]["get"]["responses"]
    assert api.http.get("/docs").status_code == 200


def test_a_405_allows_what_all_routes_of_the_path_take(api: ApiServer) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/models/some/model", "DELETE, GET"),
        ("PATCH", "/v1/adapters", "GET, POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
    ):
        answer = api.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path
    assert api.http.request("TRACE", "/v1/models").headers["allow"] == "DELETE, GET, POST"


def test_the_document_tells_bodies_and_content_types(api: ApiServer) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/{name}/aliases"):
        assert "application/json" in paths[path]["post"]["requestBody"]["content"], path
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {"text/plain"}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
