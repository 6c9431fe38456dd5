"""The door over HTTP: headers, static keys beside kept ones, revocation while serving, a store that fails."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from serve.api.auth import Door
from serve.api.tenancy import Tenancy
from serve.config import ApiConfig
from serve.errors import InvalidApiKey, StartError, Unavailable
from serve.tenants.audit import AUDIT_FILE, AuditLog
from serve.tenants.key_ring import MAX_AGE_S, KeyRing
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore
from serve.tenants.keys import mint
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import Principal, Scope
from tests.api.api_server import wait_until
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import WholeApi, whole_api
from tests.tenants.test_key_store import Clock

STATIC = "sk-operator"


def config_of(folder: Path, **fields: object) -> ApiConfig:
    return ApiConfig(model_dir=folder, store_dir=folder, served_model_name="b", **fields)  # type: ignore[arg-type]


def identify(door: Door, *headers: str) -> Principal:
    return asyncio.run(door.identify(headers))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[SqliteKeyStore]:
    with closing(SqliteKeyStore(tmp_path / KEYS_FILE, read_pepper(tmp_path / PEPPER_FILE, create=True))) as store:
        yield store


def make_key(folder: Path, store: SqliteKeyStore, scope: Scope, tenant: str = "acme") -> tuple[str, str]:
    pepper = read_pepper(folder / PEPPER_FILE, create=False)
    text, record = mint(tenant, frozenset({scope}), pepper, now=int(time.time()), expires=None)
    store.add(record)
    return text, record.key_id


def test_without_keys_everybody_is_the_local_user(tmp_path: Path) -> None:
    principal = identify(Door.open(config_of(tmp_path)), "Bearer anything")
    assert (principal.tenant, principal.scopes) == ("local", frozenset(Scope))
    assert not (tmp_path / KEYS_FILE).exists() and not (tmp_path / PEPPER_FILE).exists()


def test_a_store_without_a_single_key_lets_nobody_in(tmp_path: Path) -> None:
    with closing(Door.open(config_of(tmp_path, require_keys=True))) as door:
        for headers in ((), ("",), ("Bearer",), ("Bearer ",), ("Bearer x",), ("Basic x",), ("Bearer x", "Bearer x")):
            with pytest.raises(InvalidApiKey):
                identify(door, *headers)


def test_static_keys_are_the_operators_beside_kept_ones(tmp_path: Path, kept: SqliteKeyStore) -> None:
    text, key_id = make_key(tmp_path, kept, Scope.INFER)
    with closing(Door.open(config_of(tmp_path, require_keys=True, api_keys=(STATIC,)))) as door:
        operator, tenant = identify(door, f"Bearer {STATIC}"), identify(door, f"bearer  {text} ")
        assert (operator.tenant, Scope.ADMIN in operator.scopes) == ("local", True)
        assert tenant == Principal("acme", frozenset({Scope.INFER}), key_id)
        for wrong in (f"Bearer {text}x", f"Bearer {text} {text}", f"Bearer {STATIC} {text}", f"Basic {text}", text):
            with pytest.raises(InvalidApiKey):
                identify(door, wrong)


def test_a_pepper_file_that_is_named_is_never_made(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="pepper"):
        Door.open(config_of(tmp_path, require_keys=True, pepper_file=tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_store_that_cannot_be_read_opens_nothing_but_to_the_operator(tmp_path: Path, kept: SqliteKeyStore) -> None:
    text, _ = make_key(tmp_path, kept, Scope.INFER)
    clock, pepper = Clock(), read_pepper(tmp_path / PEPPER_FILE, create=False)
    ring, audit = KeyRing(kept, pepper, monotonic=clock, clock=clock), AuditLog(tmp_path / AUDIT_FILE, clock=clock)
    door = Door((STATIC,), Tenancy(kept, ring, pepper, audit))
    assert identify(door, f"Bearer {text}").tenant == "acme"
    with closing(sqlite3.connect(tmp_path / KEYS_FILE)) as db:
        db.execute("DROP TABLE facts")
    clock.now += MAX_AGE_S
    with pytest.raises(Unavailable) as caught:
        identify(door, f"Bearer {text}")
    assert caught.value.code == "key_store_unavailable"
    assert identify(door, f"Bearer {STATIC}").tenant == "local"


def test_without_waiting_a_door_judges_by_keys_read_lately_alone(tmp_path: Path, kept: SqliteKeyStore) -> None:
    text, _ = make_key(tmp_path, kept, Scope.INFER)
    clock, pepper = Clock(), read_pepper(tmp_path / PEPPER_FILE, create=False)
    ring, audit = KeyRing(kept, pepper, monotonic=clock, clock=clock), AuditLog(tmp_path / AUDIT_FILE, clock=clock)
    door = Door((STATIC,), Tenancy(kept, ring, pepper, audit))
    assert door.recognise([f"Bearer {text}"]) is None
    known = identify(door, f"Bearer {text}")
    assert door.recognise([f"Bearer {text}"]) == known
    assert [door.recognise(sent) for sent in ([], ["Bearer"], [f"Bearer {text}x"], [f"Bearer {text}"] * 2)] == [
        None
    ] * 4
    clock.now += MAX_AGE_S
    assert door.recognise([f"Bearer {text}"]) is None
    operator = door.recognise([f"Bearer {STATIC}"])
    assert operator is not None and operator.tenant == "local"


@pytest.fixture
def api(tmp_path: Path, kept: SqliteKeyStore) -> Iterator[WholeApi]:
    model_dir = write_model_dir(tmp_path / "model")
    with whole_api(model_dir, tmp_path, require_keys=True) as running:
        yield running


def ask(api: WholeApi, key: str, method: str = "GET", path: str = "/v1/models") -> httpx.Response:
    return api.http.request(method, path, headers={"authorization": f"Bearer {key}"})


def test_a_key_made_and_revoked_while_the_server_runs(api: WholeApi, tmp_path: Path, kept: SqliteKeyStore) -> None:
    assert ask(api, "none").status_code == 401
    text, key_id = make_key(tmp_path, kept, Scope.INFER)
    wait_until(lambda: ask(api, text).status_code == 200, "the new key opens")
    kept.revoke(key_id, now=int(time.time()))
    wait_until(lambda: ask(api, text).status_code == 401, "the revoked key is dead")


def test_refusals_tell_the_scope_and_nothing_of_the_server(api: WholeApi, tmp_path: Path, kept: SqliteKeyStore) -> None:
    text, _ = make_key(tmp_path, kept, Scope.INFER)
    wait_until(lambda: ask(api, text).status_code == 200, "the new key opens")
    answer = ask(api, text, "DELETE", "/v1/adapters/poet")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (403, "permission_error", "insufficient_scope")
    assert "adapters:write" in error["message"] and str(tmp_path) not in answer.text


def test_wrong_expired_revoked_and_unknown_keys_get_the_same_bytes(
    api: WholeApi, tmp_path: Path, kept: SqliteKeyStore
) -> None:
    pepper, now = read_pepper(tmp_path / PEPPER_FILE, create=False), int(time.time())
    good, _ = make_key(tmp_path, kept, Scope.INFER)
    texts = [good[:-72] + "0" * 72, "pk_" + good[3:19] + "_" + "0" * 72, "x"]
    for expires, is_revoked in ((now - 1, False), (None, True)):
        text, record = mint("acme", frozenset({Scope.ADMIN}), pepper, now=now, expires=expires)
        kept.add(record)
        if is_revoked:
            kept.revoke(record.key_id, now=now)
        texts.append(text)
    wait_until(lambda: ask(api, good).status_code == 200, "the keys are known")
    answers = [ask(api, text) for text in texts]
    assert {answer.content for answer in answers} == {ask(api, "nobody").content}
    assert {tuple(sorted(answer.headers)) for answer in answers} == {tuple(sorted(ask(api, "nobody").headers))}
