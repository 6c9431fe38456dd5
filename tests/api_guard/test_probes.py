"""Probes tell the truth at once, whatever the engine does."""

from pathlib import Path

import pytest

from serve.api.drain import Drain, Phase
from tests.api_guard.whole_api import WholeApi, whole_api


@pytest.mark.parametrize(
    ("is_live", "is_ready", "livez", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)],
)
def test_liveness_and_readiness_follow_the_engine(
    is_live: bool, is_ready: bool, livez: int, readyz: int, api: WholeApi
) -> None:
    api.engine.is_live, api.engine.is_ready = is_live, is_ready
    for path, status in (("/livez", livez), ("/readyz", readyz), ("/health", readyz)):
        answer = api.http.get(path)
        assert answer.status_code == status, path
        if status == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "server_error"


def test_ready_means_that_all_of_preload_is_there(model_dir: Path, tmp_path: Path) -> None:
    drain = Drain(Phase.PREPARING)
    with whole_api(model_dir, tmp_path / "store", drain=drain) as api:
        for path in ("/readyz", "/health"):
            answer = api.http.get(path)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "preloading"
            assert "--preload" in answer.json()["error"]["message"] and int(answer.headers["retry-after"]) > 0
        assert api.http.get("/livez").status_code == api.http.get("/startupz").status_code == 200
        # what is there already is served
        assert api.http.get("/v1/models").status_code == 200
        drain.move_to(Phase.OPEN)
        assert api.http.get("/readyz").status_code == api.http.get("/health").status_code == 200


def test_started_means_ready_once_and_stays(api: WholeApi) -> None:
    assert api.http.get("/startupz").status_code == 200
    api.engine.is_live = api.engine.is_ready = False
    assert api.http.get("/startupz").status_code == 200
    ready, api.engine.ready = api.engine.ready, None
    try:
        assert api.http.get("/startupz").status_code == 503
    finally:
        api.engine.ready = ready


def test_metrics_are_plain_text_and_rest_at_zero(api: WholeApi) -> None:
    answer = api.http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for name in ("kv_blocks_in_use", "requests_running", "requests_waiting", "adapter_pins"):
        assert f"chorale_{name} 0.0" in lines


def test_a_server_without_metrics_says_so(model_dir: Path, tmp_path: Path) -> None:
    with whole_api(model_dir, tmp_path / "store", metrics=None) as api:
        answer = api.http.get("/metrics")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
