"""Versions over HTTP: promote, roll back, canary, removal, history, and which version a request gets."""

from collections import Counter

import httpx
import pytest

from serve.api.owned_adapters import OwnedAdapters
from serve.tenants.principal import local_principal
from tests.api_guard.whole_api import BASE, WholeApi, adapter_files


@pytest.fixture
def numbers(api: WholeApi) -> list[int]:
    """Upload three versions of `poet` and return their numbers."""
    return [api.upload("poet", seed=seed).json()["version"] for seed in range(3)]


def served(api: WholeApi, model: str = "poet", **fields: object) -> int:
    """Return the version that answers a request."""
    body = {"model": model, "prompt": [1, 2], "max_tokens": 1} | fields
    answer = api.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-adapter-id"] == "poet"
    return int(answer.headers["x-adapter-version"])


def post(api: WholeApi, action: str, **body: object) -> httpx.Response:
    return api.http.post(f"/v1/adapters/poet/{action}", json=body)


def test_a_promotion_moves_the_plain_name_and_nothing_else(api: WholeApi, numbers: list[int]) -> None:
    assert served(api) == numbers[2]
    answer = post(api, "promote", version=numbers[0])
    assert answer.status_code == 200 and answer.json()["version"] == numbers[0] and answer.json()["to"] is None
    assert served(api) == served(api, f"{BASE}:poet") == numbers[0]
    assert served(api, f"poet@{numbers[2]}") == numbers[2]
    assert api.http.get("/v1/adapters/poet").json()["version"] == numbers[0]
    assert [card["version"] for card in api.http.get("/v1/adapters").json()["data"]] == [numbers[0]]
    versions = api.http.get("/v1/adapters/poet/versions").json()["data"]
    assert [card["current"] for card in versions] == [True, False, False]


def test_rollbacks_go_back_step_by_step_and_end_at_the_beginning(api: WholeApi, numbers: list[int]) -> None:
    post(api, "promote", version=numbers[0])
    for expected in (numbers[2], numbers[1], numbers[0]):
        answer = api.http.post("/v1/adapters/poet/rollback")
        assert answer.status_code == 200 and answer.json()["version"] == served(api) == expected
    refused = api.http.post("/v1/adapters/poet/rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_previous_version")
    assert served(api) == numbers[0]


def test_an_upload_after_a_rollback_is_what_the_name_means_unless_it_waits(api: WholeApi, numbers: list[int]) -> None:
    api.http.post("/v1/adapters/poet/rollback")
    assert api.upload("poet", seed=7).json()["version"] == served(api)
    files = [("files", part) for part in adapter_files(8).items()]
    waiting = api.http.post("/v1/adapters", data={"name": "poet", "promote": "false"}, files=files)
    assert waiting.status_code == 201
    number = waiting.json()["version"]
    assert served(api) == number - 1 and served(api, f"poet@{number}") == number
    refused = api.http.post("/v1/adapters", data={"name": "poet", "promote": "no"}, files=files)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "promote")


def test_an_alias_can_be_promoted_from_and_to(api: WholeApi, numbers: list[int]) -> None:
    assert post(api, "promote", version=numbers[0], to="stable").json()["to"] == "stable"
    assert served(api, "poet:stable") == numbers[0] and served(api) == numbers[2]
    assert post(api, "promote", alias="stable").status_code == 200
    assert served(api) == numbers[0]
    assert api.http.delete("/v1/adapters/poet/aliases/stable").json()["deleted"] is True
    assert api.http.post("/v1/completions", json={"model": "poet:stable", "prompt": "x"}).status_code == 404


WRONG: list[tuple[str, dict[str, object], int, str]] = [
    ("promote", {}, 400, "version"),
    ("promote", {"version": 1, "alias": "x"}, 400, "version"),
    ("promote", {"version": 10**6}, 404, "version"),
    ("promote", {"version": 0}, 400, "version"),
    ("promote", {"version": "1"}, 400, "version"),
    ("promote", {"alias": "nowhere"}, 404, "alias"),
    ("canary", {"version": 10**6, "percent": 10}, 404, "version"),
    ("canary", {"alias": "nowhere", "percent": 10}, 404, "alias"),
    ("canary", {"alias": "first"}, 400, "percent"),
    ("canary", {"alias": "first", "percent": 101}, 400, "percent"),
    ("canary", {"alias": "first", "percent": -1}, 400, "percent"),
    ("canary", {"alias": "first", "percent": 0.001}, 400, "percent"),
    ("canary", {"alias": "first", "percent": True}, 400, "percent"),
    ("canary", {"alias": "first", "percent": 1, "sticky": "moon"}, 400, "sticky"),
    ("canary", {"alias": "last", "percent": 10}, 400, "version"),
]


def test_a_wrong_wish_changes_nothing_and_says_what_is_wrong(api: WholeApi, numbers: list[int]) -> None:
    for alias, number in (("first", numbers[0]), ("last", numbers[2])):
        post(api, "aliases", alias=alias, version=number)
    before = api.store.pointers("poet")
    for action, body, status, param in WRONG:
        answer = post(api, action, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (action, body, answer.text)
        assert api.store.pointers("poet") == before, (action, body)


def test_a_canary_gets_its_share_and_the_same_user_the_same_version(api: WholeApi, numbers: list[int]) -> None:
    answer = post(api, "canary", version=numbers[0], percent=30)
    assert answer.json() == {"name": "poet", "version": numbers[0], "percent": 30.0, "sticky": "user"}
    first = {f"u{index}": served(api, user=f"u{index}") for index in range(60)}
    assert set(first.values()) == {numbers[0], numbers[2]}
    assert first == {user: served(api, safety_identifier=user) for user in first}
    # more share: who has the canary keeps it
    post(api, "canary", version=numbers[0], percent=70)
    second = {user: served(api, user=user) for user in first}
    assert all(second[user] == numbers[0] for user in first if first[user] == numbers[0])
    assert Counter(second.values())[numbers[0]] > Counter(first.values())[numbers[0]]
    assert served(api, f"poet@{numbers[2]}", user="u0") == numbers[2]
    assert served(api, "poet:canary") == numbers[0]
    post(api, "canary", version=numbers[0], percent=100)
    assert {served(api, user=user) for user in ("a", "b", "c")} == {numbers[0]}
    assert api.http.delete("/v1/adapters/poet/canary").status_code == 200
    assert {served(api, user=user) for user in first} == {numbers[2]}
    assert api.http.get("/v1/adapters/poet/canary").json()["version"] is None


def test_without_a_user_the_request_id_decides(api: WholeApi, numbers: list[int]) -> None:
    post(api, "canary", version=numbers[0], percent=50)
    body = {"model": "poet", "prompt": [1], "max_tokens": 1}

    def version(request_id: str) -> str:
        answer = api.http.post("/v1/completions", json=body, headers={"x-request-id": request_id})
        return str(answer.headers["x-adapter-version"])

    drawn = {f"r{index}": version(f"r{index}") for index in range(40)}
    assert len(set(drawn.values())) == 2
    assert drawn == {request_id: version(request_id) for request_id in drawn}


def test_promoting_the_canary_ends_it(api: WholeApi, numbers: list[int]) -> None:
    post(api, "canary", version=numbers[0], percent=50)
    card = api.http.get("/v1/adapters/poet").json()
    assert (
        card["canary"] == {"version": numbers[0], "percent": 50.0, "sticky": "user"} and card["version"] == numbers[2]
    )
    assert post(api, "promote", alias="canary").json()["version"] == numbers[0]
    card = api.http.get("/v1/adapters/poet").json()
    assert card["canary"] is None and card["aliases"] == {} and card["version"] == numbers[0]


def test_each_arm_has_series_of_its_own(api: WholeApi, numbers: list[int]) -> None:
    post(api, "canary", version=numbers[0], percent=50)
    seen = OwnedAdapters(api.store, BASE, local_principal(), lambda tenant: frozenset())

    def series(model: str) -> str:
        ref = seen.resolve(model)
        assert ref is not None
        return seen.metrics_name(ref)

    # one digest has one name, however it was asked for
    assert series("poet:canary") == series(f"poet@{numbers[0]}") == "poet:canary"
    assert series("poet") == series(f"poet@{numbers[2]}") == "poet"


def test_a_version_goes_only_when_nothing_holds_it(api: WholeApi, numbers: list[int]) -> None:
    post(api, "aliases", alias="stable", version=numbers[0])

    def remove(number: int) -> httpx.Response:
        return api.http.delete(f"/v1/adapters/poet/versions/{number}")

    for number, word in ((numbers[2], "what the name means"), (numbers[1], "rollback"), (numbers[0], "'stable'")):
        refused = remove(number)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
        assert word in refused.json()["error"]["message"]
    api.http.delete("/v1/adapters/poet/aliases/stable")
    assert remove(numbers[0]).json() == {"id": f"poet@{numbers[0]}", "object": "adapter", "deleted": True}
    assert remove(numbers[0]).status_code == 404 and api.http.delete("/v1/adapters/poet/versions/x").status_code == 400
    assert api.http.get(f"/v1/models/poet@{numbers[0]}").status_code == 404
    assert served(api) == numbers[2]


def test_the_history_says_who_pointed_where(api: WholeApi, numbers: list[int]) -> None:
    post(api, "canary", version=numbers[0], percent=12.5)
    post(api, "promote", alias="canary")
    api.http.post("/v1/adapters/poet/rollback")
    moves = api.http.get("/v1/adapters/poet/history").json()["data"]
    seen = [(move["what"], move["version"], move["alias"], move["percent"]) for move in moves[:4]]
    assert seen == [
        ("rollback", numbers[2], None, None),
        ("promote", numbers[0], None, None),
        ("canary", numbers[0], "canary", 12.5),
        ("publish", numbers[2], None, None),
    ]
    assert {move["by"] for move in moves} == {"local/none"} and all(move["at"] > 0 for move in moves)


def test_the_list_tells_the_last_use_and_is_filtered(api: WholeApi, numbers: list[int]) -> None:
    api.upload("clerk", seed=9)
    before = {card["name"]: card["last_used"] for card in api.http.get("/v1/adapters").json()["data"]}
    assert before["clerk"] is None
    served(api)
    cards = {card["name"]: card for card in api.http.get("/v1/adapters?family=lora&state=stored").json()["data"]}
    assert cards["poet"]["last_used"] > 1_700_000_000 and cards["poet"]["tier"] == "disk" and cards["poet"]["bytes"] > 0
    for query in ("family=s2ft", "state=ready"):
        assert api.http.get(f"/v1/adapters?{query}").json()["data"] == []


def test_the_list_has_pages(api: WholeApi, numbers: list[int]) -> None:
    api.upload("clerk", seed=9)
    whole = api.http.get("/v1/adapters").json()
    names = [card["name"] for card in whole["data"]]
    assert len(names) > 1 and (whole["last_id"], whole["has_more"]) == (names[-1], False)
    seen, after = [], ""
    for _ in names:
        page = api.http.get(f"/v1/adapters?limit=1{after}").json()
        seen += [card["name"] for card in page["data"]]
        after = f"&after={page['last_id']}"
        assert page["has_more"] == (len(seen) < len(names))
    assert seen == names and api.http.get(f"/v1/adapters?limit=1{after}").json()["data"] == []
    for query, param, words in (("limit=0", "limit", "got '0'"), ("after=nobody", "after", "'after' is 'nobody'")):
        refused = api.http.get(f"/v1/adapters?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert words in refused.json()["error"]["message"]


def test_nobody_is_promoted_who_does_not_exist(api: WholeApi) -> None:
    for method, path in (
        ("POST", "promote"),
        ("POST", "rollback"),
        ("POST", "canary"),
        ("DELETE", "canary"),
        ("GET", "canary"),
        ("GET", "history"),
        ("DELETE", "versions/1"),
        ("DELETE", "aliases/stable"),
    ):
        body = {"version": 1, "percent": 1} if path in ("promote", "canary") and method == "POST" else None
        answer = api.http.request(method, f"/v1/adapters/nobody/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path
