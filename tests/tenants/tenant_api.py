"""The whole API with tenants: a real store, real keys, one client per principal.

Owns the wiring. Invariant: keys are made before the server starts, so no test waits for them to be known.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve.config import TenantLimits
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore
from serve.tenants.keys import mint
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import LOCAL_TENANT, Scope
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import BASE, WholeApi, adapter_files, whole_api

USER = frozenset({Scope.INFER, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE})
KEYS = {
    "acme": ("acme", USER),
    "bob": ("bob", USER),
    "carol": ("carol", USER),
    "local": (LOCAL_TENANT, USER),
    "admin": (LOCAL_TENANT, frozenset({Scope.ADMIN})),
}


@dataclass
class Client:
    """One principal's requests."""

    http: httpx.Client
    api: WholeApi

    def upload(self, name: str, *, seed: int = 0) -> httpx.Response:
        files = [("files", (filename, data)) for filename, data in adapter_files(seed).items()]
        return self.http.post("/v1/adapters", data={"name": name}, files=files)

    def publish(self, name: str, *, seed: int = 0) -> str:
        """Upload an adapter and return its digest."""
        answer = self.upload(name, seed=seed)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["digest"]).removeprefix("sha256:")

    def run(self, model: str) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 1})

    def digest_run(self, model: str) -> str | None:
        """Run a model and return the digest that the engine was asked for."""
        answer = self.run(model)
        assert answer.status_code == 200, answer.text
        return self.api.engine.submits[-1].adapter_digest

    def names(self) -> list[str]:
        return [adapter["name"] for adapter in self.http.get("/v1/adapters").json()["data"]]

    def models(self) -> list[str]:
        return [card["id"] for card in self.http.get("/v1/models").json()["data"] if card["id"] != BASE]

    def grant(self, name: str, tenant: str) -> httpx.Response:
        return self.http.post(f"/v1/adapters/{name}/grants", json={"tenant": tenant})


@dataclass
class TenantApi:
    """The server and its principals."""

    api: WholeApi
    clients: dict[str, Client]
    folder: Path

    def __getitem__(self, principal: str) -> Client:
        return self.clients[principal]


@contextmanager
def tenant_api(folder: Path, *, tenant_limits: TenantLimits | None = None) -> Iterator[TenantApi]:
    """Serve until the block ends."""
    store_dir, now = folder / "store", int(time.time())
    store_dir.mkdir()
    pepper, texts = read_pepper(store_dir / PEPPER_FILE, create=True), {}
    with closing(SqliteKeyStore(store_dir / KEYS_FILE, pepper)) as keys:
        for name, (tenant, scopes) in KEYS.items():
            texts[name], record = mint(tenant, scopes, pepper, now=now, expires=None)
            keys.add(record)
    model_dir = write_model_dir(folder / "model")
    with whole_api(model_dir, store_dir, require_keys=True, tenant_limits=tenant_limits) as api, ExitStack() as stack:
        clients = {}
        for name, text in texts.items():
            headers = {"authorization": f"Bearer {text}"}
            # on a busy machine the server may close an idle connection just as the next request leaves
            fresh = httpx.Limits(max_keepalive_connections=0)
            http = httpx.Client(base_url=str(api.http.base_url), headers=headers, timeout=120, limits=fresh)
            clients[name] = Client(stack.enter_context(closing(http)), api)
        yield TenantApi(api, clients, store_dir)
