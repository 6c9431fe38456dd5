"""Two tenants of a real server with a real engine: each has a prefix cache of its own.

Owns one server. Invariant: the same prompt is a prefix hit for the tenant that sent it before, and for nobody else.
"""

from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from tests.conftest import StartServer
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.e2e

PROMPT = [5 + index % 50 for index in range(96)]


def test_one_tenant_hits_no_prefix_of_another(any_server: StartServer, tmp_path: Path) -> None:
    keys = {}
    for tenant in ("acme", "bob"):
        command = ["keys", "create", "--store", str(tmp_path / "store"), "--tenant", tenant, "--scope", "infer"]
        keys[tenant] = CliRunner().invoke(app, command).stdout.strip()
    model_dir = write_tiny_model(tmp_path / "model")
    server = any_server(model_dir, "--device", "cpu", "--require-keys", store_dir=tmp_path / "store")

    def ask(tenant: str) -> httpx.Response:
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
        headers = {"authorization": f"Bearer {keys[tenant]}"}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False)

    usages = [ask(tenant).json()["usage"] for tenant in ("acme", "bob", "acme", "bob")]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[:2] == [0, 0] and min(cached[2:]) >= 64
    assert httpx.get(f"{server.url}/v1/models", timeout=120, trust_env=False).status_code == 401
