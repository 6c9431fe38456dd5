"""GET and DELETE /v1/models, and selecting by name."""

from urllib.parse import unquote

import openai
import pytest

from serve.messages import AdapterState, Stats
from tests.api.api_server import ApiServer
from tests.api.fake_engine import MAX_MODEL_LEN
from tests.api.fake_store import BASE, digest_of


def stats_with(*adapters: AdapterState) -> Stats:
    """Return a heartbeat that reports these adapters."""
    return Stats(
        step_index=1,
        num_running=0,
        num_waiting=0,
        num_kv_blocks=64,
        num_kv_blocks_in_use=0,
        block_size=16,
        num_adapter_pins=0,
        adapters=list(adapters),
        num_preemptions_total=0,
        num_prompt_tokens_total=0,
        num_generated_tokens_total=0,
        num_prefix_hit_tokens_total=0,
        num_adapter_loads_total=0,
        num_adapter_evictions_total=0,
        num_steps_total=1,
    )


def test_the_list_begins_with_the_base(client: openai.OpenAI, api: ApiServer) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "clerk", "poet"]


def test_an_adapters_card_has_parent_and_digest(api: ApiServer) -> None:
    base, clerk, poet = api.http.get("/v1/models").json()["data"]
    assert base["parent"] is None and "adapter" not in base and base["max_model_len"] == MAX_MODEL_LEN
    assert poet["parent"] == BASE and poet["root"] == f"sha256:{digest_of('poet', 2)}"
    assert poet["adapter"] == {
        "family": "lora",
        "rank": 8,
        "version": 2,
        "digest": f"sha256:{digest_of('poet', 2)}",
        "tier": "disk",
        "bytes": 2000,
        "state": "stored",
    }
    assert clerk["adapter"]["rank"] == 16 and clerk["created"] == 1_700_000_001


def test_the_card_follows_the_engines_tiers(api: ApiServer) -> None:
    api.engine.stats = stats_with(
        AdapterState(digest_of("poet", 2), "device", 1, 2000, 8),
        AdapterState(digest_of("clerk", 1), "loading", 0, 0, 0),
    )
    _, clerk, poet = api.http.get("/v1/models").json()["data"]
    assert (poet["adapter"]["tier"], poet["adapter"]["state"]) == ("device", "ready")
    assert (clerk["adapter"]["tier"], clerk["adapter"]["state"]) == ("disk", "loading")
    listed = api.http.get("/v1/models", params={"state": "ready"}).json()["data"]
    assert [card["id"] for card in listed] == ["poet"]


def test_filters_narrow_the_list(api: ApiServer) -> None:
    def ids(**params: str | int) -> list[str]:
        return [card["id"] for card in api.http.get("/v1/models", params=params).json()["data"]]

    assert ids(parent=BASE) == ["clerk", "poet"] and ids(parent="other") == []
    assert ids(family="lora") == ["clerk", "poet"] and ids(family="s2ft") == []
    assert ids(limit=2) == [BASE, "clerk"] and ids(after=BASE, limit=1) == ["clerk"]
    page = api.http.get("/v1/models", params={"limit": 2}).json()
    assert page["has_more"] is True and page["last_id"] == "clerk"
    assert api.http.get("/v1/models", params={"after": "poet"}).json()["has_more"] is False


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": "x"}, {"after": "nobody"}])
def test_a_bad_filter_is_refused_in_our_shape(api: ApiServer, params: dict[str, str]) -> None:
    answer = api.http.get("/v1/models", params=params)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(params))


@pytest.mark.parametrize("name", ["poet", "poet@1", "poet:stable", f"{BASE}:poet", "poet%401"])
def test_one_card_is_found_by_every_name(api: ApiServer, name: str) -> None:
    card = api.http.get(f"/v1/models/{name}").json()
    assert card["id"] == unquote(name) and card["parent"] == BASE


def test_an_unknown_card_is_404(client: openai.OpenAI, api: ApiServer) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("nobody")
    assert raised.value.code == "model_not_found"


def test_deleting_unregisters_and_frees_the_engine(client: openai.OpenAI, api: ApiServer) -> None:
    deleted = client.models.delete("poet")
    assert deleted.deleted and deleted.id == "poet"
    assert sorted(api.engine.unloaded) == sorted([digest_of("poet", 1), digest_of("poet", 2)])
    assert api.chat(model="poet").status_code == 404
    assert [model.id for model in client.models.list()] == [BASE, "clerk"]


def test_the_base_and_single_versions_cannot_be_deleted(api: ApiServer) -> None:
    for name in (BASE, "poet@1", "poet:stable"):
        assert api.http.delete(f"/v1/models/{name}").status_code == 400
    assert api.http.delete("/v1/models/nobody").status_code == 404
    assert api.engine.unloaded == []
