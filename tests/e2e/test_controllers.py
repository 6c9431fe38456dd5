"""AIBrix's and production-stack's controllers against the real server: their call sequences, retries included."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.process.adapter_controllers import AibrixController, ControllerError, ProductionStackOperator
from tests.tiny_model import TinyAdapter, write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e

KEY = "controllers-key"
PROMPT = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("controllers")
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path) -> TinyAdapter:
    return write_tiny_adapter(folder / "adapters", "sql", rank=4, seed=1)


@pytest.fixture(scope="module")
def server(folder: Path, adapter: TinyAdapter, any_server: StartServer) -> LiveServer:
    options = ("--device", "cpu", "--dtype", "float32", "--api-key", KEY, "--lora-root", str(folder / "adapters"))
    return any_server(write_tiny_model(folder / "tiny"), *options)


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def _answers(client: httpx.Client, model: str) -> int:
    return client.post(
        "/v1/completions", json={"model": model, **PROMPT}, headers={"Authorization": f"Bearer {KEY}"}
    ).status_code


def test_aibrix_loads_once_finds_it_loaded_unloads_and_loads_again(client: httpx.Client, adapter: TinyAdapter) -> None:
    controller = AibrixController(client, KEY)
    assert controller.unload("aibrix-sql") == 404
    assert controller.load("aibrix-sql", str(adapter.folder)) is True
    assert _answers(client, "aibrix-sql") == 200
    # every reconciliation asks again
    assert [controller.load("aibrix-sql", str(adapter.folder)) for _ in range(3)] == [False] * 3
    assert controller.unload("aibrix-sql") == 200
    assert _answers(client, "aibrix-sql") == 404
    assert controller.unload("aibrix-sql") == 404
    assert controller.load("aibrix-sql", str(adapter.folder)) is True
    assert controller.unload("aibrix-sql") == 200


def test_aibrix_learns_why_a_load_fails(client: httpx.Client, adapter: TinyAdapter) -> None:
    with pytest.raises(ControllerError, match="lora_path"):
        AibrixController(client, KEY).load("broken", str(adapter.folder.parent / "nowhere"))
    with pytest.raises(ControllerError, match=r"failed to get models: .*invalid_api_key"):
        AibrixController(client, None).load("broken", str(adapter.folder))


def test_production_stack_takes_already_loaded_for_loaded_and_reads_what_is_registered(
    client: httpx.Client, adapter: TinyAdapter
) -> None:
    operator = ProductionStackOperator(client, KEY)
    assert operator.registrations() == []
    for _ in range(3):
        operator.load("stack-sql", str(adapter.folder))
    (registration,) = operator.registrations()
    assert registration.name == "stack-sql" and registration.created > 0
    assert _answers(client, "stack-sql") == 200
    operator.unload("stack-sql")
    assert operator.registrations() == []
    with pytest.raises(ControllerError, match="404"):
        operator.unload("stack-sql")


def test_of_many_loads_at_once_one_wins_and_all_are_content(server: LiveServer, adapter: TinyAdapter) -> None:
    def load(_: int) -> None:
        with server.client() as client:
            ProductionStackOperator(client, KEY).load("race-sql", str(adapter.folder))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(4)))
    with server.client() as client:
        operator = ProductionStackOperator(client, KEY)
        assert [registration.name for registration in operator.registrations()] == ["race-sql"]
        operator.unload("race-sql")
        assert operator.registrations() == []


def test_production_stack_reports_every_other_refusal(client: httpx.Client, adapter: TinyAdapter) -> None:
    operator = ProductionStackOperator(client, KEY)
    with pytest.raises(ControllerError, match=r"400.*base model"):
        operator.load("tiny", str(adapter.folder))
    with pytest.raises(ControllerError, match="403"):
        operator.load("outside", "/etc")
    with pytest.raises(ControllerError, match="401"):
        ProductionStackOperator(client, "another-key").registrations()
