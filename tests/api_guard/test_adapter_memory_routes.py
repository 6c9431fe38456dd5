"""Pins, prefetches, evictions and the status over HTTP: names of every spelling, refusals, an engine that is down."""

from dataclasses import replace

import pytest

from serve.adapter_messages import AdapterMove, AskReady, EvictAdapter, PinAdapter, PinState, UnpinAdapter
from serve.messages import AdapterState, Stats
from tests.api_guard.whole_api import BASE, WholeApi

ACTIONS = {"pin": PinAdapter, "unpin": UnpinAdapter, "evict": EvictAdapter}


def _stats(*adapters: AdapterState, pins: tuple[PinState, ...] = ()) -> Stats:
    return Stats(*(0,) * 7, list(adapters), *(0,) * 7, operator_pins=list(pins))


def _digest(api: WholeApi, name: str, *, seed: int = 0) -> str:
    digest: str = api.upload(name, seed=seed).json()["digest"].removeprefix("sha256:")
    return digest


@pytest.mark.parametrize("action", [*ACTIONS, "prefetch"])
def test_what_does_not_exist_is_no_adapter_to_act_on(api: WholeApi, action: str) -> None:
    _digest(api, "poet")
    for name in ("nobody", "poet@99", "poet:stable", "poet@sha256:" + "0" * 64, BASE, "poet:", "%20"):
        answer = api.http.post(f"/v1/adapters/{name}:{action}")
        assert answer.status_code == 404, name
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == "model_not_found"
    assert api.engine.asked == [] and api.engine.loaded == []


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_reaches_the_version_that_the_name_means(api: WholeApi, action: str) -> None:
    first, second = _digest(api, "ft:demo:org:poet:1"), _digest(api, "ft:demo:org:poet:1", seed=1)
    version = api.http.get("/v1/adapters/ft:demo:org:poet:1/versions").json()["data"][0]["version"]
    # an alias may be called as an action is
    for alias in ("stable", "pin"):
        api.http.post("/v1/adapters/ft:demo:org:poet:1/aliases", json={"alias": alias, "version": version})
    named = {"": second, ":stable": first, ":pin": first, f"@{version}": first, f"@sha256:{second}": second}
    for suffix, digest in named.items():
        api.engine.asked.clear()
        answer = api.http.post(f"/v1/adapters/ft:demo:org:poet:1{suffix}:{action}")
        assert answer.status_code in (200, 202), suffix
        (command,) = api.engine.asked
        assert isinstance(command, ACTIONS[action]) and not isinstance(command, AskReady), suffix
        assert command.digest == digest, suffix
        assert answer.json()["digest"] == f"sha256:{digest}"
        assert api.http.get(f"/v1/adapters/ft:demo:org:poet:1{suffix}/status").json()["digest"] == f"sha256:{digest}"


def test_a_refused_pin_says_why_and_is_not_to_be_retried(api: WholeApi) -> None:
    _digest(api, "poet")
    api.engine.operator_refusal = "1 adapters are pinned already, the limit is 1"
    answer = api.http.post("/v1/adapters/poet:pin")
    assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"] == {
        "message": "1 adapters are pinned already, the limit is 1",
        "type": "invalid_request_error",
        "param": None,
        "code": "conflict",
    }
    assert api.http.get("/v1/adapters/poet/status").json()["pinned"] is False


def test_a_pin_is_in_the_status_until_it_is_taken_back(api: WholeApi) -> None:
    digest = _digest(api, "poet")
    assert api.http.post("/v1/adapters/poet:pin").json()["pinned"] is True
    api.engine.stats = _stats(pins=(PinState(digest, "the file is damaged"),))
    status = api.http.get("/v1/adapters/poet/status").json()
    assert (status["pinned"], status["pin_error"], status["state"]) == (True, "the file is damaged", "absent")
    assert api.http.post("/v1/adapters/poet:unpin").json()["pinned"] is False


def test_an_eviction_reports_what_it_freed_or_that_it_waits(api: WholeApi) -> None:
    _digest(api, "poet")
    api.engine.num_bytes_freed = 4096
    now = api.http.post("/v1/adapters/poet:evict")
    assert (now.status_code, now.json()["bytes_freed"], now.json()["pending"]) == (200, 4096, False)
    api.engine.num_bytes_freed = None
    later = api.http.post("/v1/adapters/poet:evict")
    assert (later.status_code, later.json()["bytes_freed"], later.json()["pending"]) == (202, 0, True)


def test_the_status_tells_place_holders_and_history(api: WholeApi) -> None:
    digest = _digest(api, "poet")
    moves = [
        AdapterMove(digest, "load", 7, 0.75, "host"),
        AdapterMove(digest, "room", 7, 0.0, "host"),
        AdapterMove(digest, "load", 10, 0.5),
        AdapterMove(digest, "room", 10),
        AdapterMove(digest, "load", 10, 0.25),
    ]
    stats = _stats(AdapterState(digest, "device", 3, 10, 2, is_leaving=True, num_host_bytes=7))
    stats.adapter_moves.extend(moves)
    api.engine.stats = stats
    api.engine.desk.saw_heartbeat(stats)
    status = api.http.get("/v1/adapters/poet/status").json()
    replica = status.pop("replica")
    assert replica["id"] and replica["registry"] == {
        "kind": "sqlite", "change": None, "lag": None, "seen_seconds_ago": None, "redis": "none"
    }  # fmt: skip
    assert status == {
        "name": "poet",
        "version": api.http.get("/v1/adapters/poet").json()["version"],
        "digest": f"sha256:{digest}",
        "engine": "serving",
        "state": "leaving",
        "tier": "device",
        "bytes": 17,
        "device_bytes": 10,
        "host_bytes": 7,
        "pins": 3,
        "pinned": False,
        "pin_error": None,
        "loads": 2,
        "evictions": 1,
        "fetches": 1,
        "last_load_seconds": 0.25,
        "last_fetch_seconds": 0.75,
    }


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (AdapterState("", "fetching", 0, 0, 0), ("fetching", "disk", 0, 0)),
        (AdapterState("", "host", 0, 0, 8, num_host_bytes=7), ("host", "host", 0, 7)),
        (AdapterState("", "loading", 0, 10, 8, num_host_bytes=7), ("loading", "host", 0, 7)),
        (AdapterState("", "loading", 0, 10, 8), ("loading", "disk", 0, 0)),
        (AdapterState("", "device", 0, 10, 8), ("ready", "device", 10, 0)),
    ],
)
def test_the_status_tells_each_place_on_the_way(api: WholeApi, state: AdapterState, expected: object) -> None:
    api.engine.stats = _stats(replace(state, digest=_digest(api, "poet")))
    status = api.http.get("/v1/adapters/poet/status").json()
    assert (status["state"], status["tier"], status["device_bytes"], status["host_bytes"]) == expected


def test_an_engine_that_is_down_holds_nothing_and_takes_no_commands(api: WholeApi) -> None:
    _digest(api, "poet")
    api.http.post("/v1/adapters/poet:pin")
    api.engine.is_ready, api.engine.stats = False, None
    status = api.http.get("/v1/adapters/poet/status").json()
    assert (status["engine"], status["state"], status["tier"], status["pinned"]) == ("starting", "absent", "disk", True)
    api.engine.is_live = False
    assert api.http.get("/v1/adapters/poet/status").json()["engine"] == "down"
    for action in ACTIONS:
        answer = api.http.post(f"/v1/adapters/poet:{action}")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_loading"
        assert "retry-after" in answer.headers
