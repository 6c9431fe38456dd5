"""Every route, every kind of caller, twenty spellings of the path, over a real socket: nothing opens that should not.

An answer counts as an opening unless it is the door's refusal (401, 403), "no such route", 405, or the wire's own
refusal, which never reaches the application. The store is real and empty, so what does open changes nothing.
"""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import APIRouter

from serve.api import app as app_module
from serve.api.route_scopes import OPEN, ROUTE_SCOPES, check_routes, endpoints, required_scopes
from serve.errors import StartError
from serve.metrics import Metrics
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore
from serve.tenants.keys import key_text, mint
from serve.tenants.pepper import PEPPER_FILE, read_pepper
from serve.tenants.principal import Scope
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import WholeApi, whole_api

SAMPLES = {"{model_id:path}": "poet", "{name}": "poet", "{file}": "adapter.json"}
# what clients, proxies and attackers make of "/v1/models"
SPELLINGS: dict[str, Callable[[str], str]] = {
    "exact": lambda path: path,
    "query": lambda path: f"{path}?x=/livez",
    "fragment": lambda path: f"{path}#/livez",
    "double slash first": lambda path: f"/{path}",
    "double slash inside": lambda path: path[0] + path[1:].replace("/", "//"),
    "trailing slash": lambda path: f"{path}/",
    "trailing dot": lambda path: f"{path}/.",
    "dot first": lambda path: f"/.{path}",
    "parent": lambda path: f"/livez/..{path}",
    "parent escaped": lambda path: f"/livez/%2e%2e{path}",
    "parent of a probe behind": lambda path: f"{path}/../livez",
    "upper case": str.upper,
    "first letter escaped": lambda path: f"/%{ord(path[1]):02x}{path[2:]}",
    "slashes escaped": lambda path: path[0] + path[1:].replace("/", "%2F"),
    "escaped twice": lambda path: f"/%25{ord(path[1]):02x}{path[2:]}",
    "semicolon": lambda path: f"{path};/livez",
    "backslashes": lambda path: path.replace("/", "\\"),
    "null": lambda path: f"{path}%00",
    "space behind": lambda path: f"{path}%20",
    "absolute form": lambda path: f"http://t{path}",
    "absolute form of a probe's host": lambda path: f"http://livez{path}",
    "overlong": lambda path: path.replace("/", "/%c0%af", 1),
}
ROUTES = sorted(ROUTE_SCOPES)


@dataclass(frozen=True, slots=True)
class Caller:
    """A kind of caller: its header, and the scopes that its key is good for."""

    header: bytes
    scopes: frozenset[Scope] | None


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("store")
    return folder


@pytest.fixture(scope="module")
def callers(store_dir: Path) -> dict[str, Caller]:
    pepper, now = read_pepper(store_dir / PEPPER_FILE, create=True), int(time.time())
    admin = frozenset({Scope.ADMIN})
    made: dict[str, tuple[frozenset[Scope], int | None, bool]] = {
        scope.value: (frozenset({scope}), None, False) for scope in Scope
    }
    made |= {"expired": (admin, now - 1, False), "revoked": (admin, None, True)}
    result = {"none": Caller(b"", None), "wrong": Caller(_bearer(key_text("0" * 16, "0" * 64)), None)}
    with closing(SqliteKeyStore(store_dir / KEYS_FILE, pepper)) as store:
        for name, (scopes, expires, is_revoked) in made.items():
            text, record = mint("acme", scopes, pepper, now=now, expires=expires)
            store.add(record)
            if is_revoked:
                store.revoke(record.key_id, now=now)
            is_dead = is_revoked or expires is not None
            result[name] = Caller(_bearer(text), None if is_dead else scopes)
        # the right id with another key's secret
        _, first = mint("acme", admin, pepper, now=now, expires=None)
        store.add(first)
        result["wrong secret"] = Caller(_bearer(key_text(first.key_id, "1" * 64)), None)
    return result


@pytest.fixture(scope="module")
def api(store_dir: Path, callers: dict[str, Caller], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeApi]:
    model_dir = write_model_dir(tmp_path_factory.mktemp("model"))
    with whole_api(model_dir, store_dir, metrics=Metrics(), require_keys=True) as running:
        yield running


def _bearer(text: str) -> bytes:
    return f"Authorization: Bearer {text}\r\n".encode()


class Wire:
    """One connection that sends request lines as they are, and opens another when the server has closed it."""

    def __init__(self, api: WholeApi) -> None:
        self._api = api
        self._peer: socket.socket | None = None
        self._rest = b""

    def ask(self, method: str, target: str, header: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the answer."""
        head = f"{method} {target} HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n".encode("latin-1") + header + b"\r\n"
        if self._peer is None:
            self._peer, self._rest = self._api.server.connect(), b""
        self._peer.sendall(head)
        while b"\r\n\r\n" not in self._rest:
            self._receive()
        raw, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = self._body(headers)
        if headers.get("connection") == "close":
            self.close()
        return int(first.split(" ")[1]), headers, body

    def close(self) -> None:
        """Give back the connection."""
        if self._peer is not None:
            self._peer.close()
        self._peer = None

    def _body(self, headers: dict[str, str]) -> bytes:
        size = int(headers["content-length"])
        while len(self._rest) < size:
            self._receive()
        body, self._rest = self._rest[:size], self._rest[size:]
        return body

    def _receive(self) -> None:
        assert self._peer is not None
        data = self._peer.recv(65536)
        assert data, "the server closed without an answer"
        self._rest += data


def is_opening(status: int, headers: dict[str, str], body: bytes) -> bool:
    """Return whether an answer comes from behind the door."""
    if "x-request-id" not in headers:
        # the wire's own refusal: the application has not seen this request
        return status != 400
    code = json.loads(body)["error"]["code"] if status >= 400 else None
    refusals = {(401, "invalid_api_key"), (403, "insufficient_scope"), (404, "not_found"), (405, "method_not_allowed")}
    return (status, code) not in refusals


def is_allowed(caller: Caller, scopes: frozenset[Scope]) -> bool:
    """Return, from the declaration alone, whether this caller may reach this route."""
    if scopes == OPEN:
        return True
    return caller.scopes is not None and (Scope.ADMIN in caller.scopes or bool(caller.scopes & scopes))


def path_of(template: str) -> str:
    for name, sample in SAMPLES.items():
        template = template.replace(name, sample)
    # parameters of routes that came later need no entry to be tried
    return re.sub(r"\{\w+(:\w+)?\}", "sample-1", template)


def test_no_spelling_opens_a_route_to_whom_it_is_closed(api: WholeApi, callers: dict[str, Caller]) -> None:
    openings, num_asked, wire = [], 0, Wire(api)
    for method, template in ROUTES:
        scopes = ROUTE_SCOPES[method, template]
        for name, caller in callers.items():
            if is_allowed(caller, scopes):
                continue
            for spelling, spell in SPELLINGS.items():
                target = spell(path_of(template))
                answer = wire.ask(method, target, caller.header)
                num_asked += 1
                if is_opening(*answer):
                    openings.append((method, target, name, spelling, answer[0], answer[2][:80]))
    wire.close()
    assert openings == []
    assert num_asked > 4000


def test_the_finder_sees_what_is_open(api: WholeApi, callers: dict[str, Caller]) -> None:
    wire = Wire(api)
    for method, template in ROUTES:
        for name, caller in callers.items():
            answer = wire.ask(method, path_of(template), caller.header)
            assert is_opening(*answer) is is_allowed(caller, ROUTE_SCOPES[method, template]), (method, template, name)
    wire.close()


def test_a_hole_in_the_table_is_found(
    api: WholeApi, callers: dict[str, Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    for planted in (OPEN, frozenset({Scope.INFER})):
        monkeypatch.setattr(
            "serve.api.auth.required_scopes",
            lambda method, template, planted=planted: (
                planted if template == "/v1/adapters" else required_scopes(method, template)
            ),
        )
        wire = Wire(api)
        caller = callers["none" if planted == OPEN else "infer"]
        assert is_opening(*wire.ask("GET", "/v1/adapters", caller.header))
        wire.close()


def test_a_route_without_a_scope_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = APIRouter()

    @room.get("/v1/forgotten")
    async def forgotten() -> None: ...

    with pytest.raises(StartError, match="GET /v1/forgotten declares no scope"):
        check_routes(room.routes)
    rooms = (*app_module._ROOMS, type("Room", (), {"router": room}))
    monkeypatch.setattr(app_module, "_ROOMS", rooms)
    model_dir = write_model_dir(tmp_path / "model")
    with pytest.raises(StartError, match="/v1/forgotten"), whole_api(model_dir, tmp_path / "store"):
        raise AssertionError("it was served")


def test_the_table_names_real_routes_only_and_probes_alone_are_open() -> None:
    routes = [route for room in app_module._ROOMS for route in room.router.routes]
    with pytest.raises(StartError, match="is no route"):
        check_routes(routes)
    assert {*ROUTE_SCOPES} - {*endpoints(routes)} == {("GET", "/docs"), ("GET", "/openapi.json")}
    opened = {template for (_, template), scopes in ROUTE_SCOPES.items() if scopes == OPEN}
    assert opened == {"/livez", "/readyz", "/health", "/startupz"}
    assert required_scopes("GET", "/nowhere") is None and required_scopes("PUT", "/livez") is None
