"""The engine is told whose a request is: it shares its service among tenants.

Owns the way from the key to the engine's messages; what the engine does with them is `tests/engine`'s.
"""

from pathlib import Path

from serve.tenants.principal import LOCAL_TENANT
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import BASE, whole_api
from tests.tenants.tenant_api import tenant_api

COMPLETION = {"model": BASE, "prompt": "Hi", "max_tokens": 1, "n": 2}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
EMBEDDINGS = {"model": BASE, "input": ["Hi", "Ho"]}


def test_every_request_is_its_callers_tenants(tmp_path: Path) -> None:
    with tenant_api(tmp_path) as api:
        engine = api.api.engine
        for name, tenant in (("acme", "acme"), ("bob", "bob"), ("admin", LOCAL_TENANT)):
            engine.submits.clear()
            engine.embeds.clear()
            for path, body in (("completions", COMPLETION), ("chat/completions", CHAT), ("embeddings", EMBEDDINGS)):
                assert api[name].http.post(f"/v1/{path}", json=body).status_code == 200
            assert [submit.tenant for submit in engine.submits] == [tenant] * 3
            assert [embed.tenant for embed in engine.embeds] == [tenant] * 2


def test_a_server_without_keys_has_one_tenant(tmp_path: Path) -> None:
    with whole_api(write_model_dir(tmp_path / "model"), tmp_path / "store") as alone:
        assert alone.http.post("/v1/completions", json=COMPLETION).status_code == 200
        assert {submit.tenant for submit in alone.engine.submits} == {LOCAL_TENANT}
