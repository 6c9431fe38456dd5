"""The fixtures of the API's tests: one server for all, made clean for each."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import write_model_dir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with the byte tokenizer."""
    return write_model_dir(tmp_path_factory.mktemp("byte-model"))


@pytest.fixture(scope="session")
def running_api(model_dir: Path) -> Iterator[ApiServer]:
    """Run one server for the whole session."""
    server = ApiServer(model_dir)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def api(running_api: ApiServer) -> Iterator[ApiServer]:
    """Return the server with clean fakes; afterwards nothing may be left running."""
    running_api.engine.reset()
    running_api.store.reset()
    yield running_api
    assert running_api.engine.num_open == 0, "a test left sequences open"


@pytest.fixture
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    """Return OpenAI's client of the clean server."""
    with api.openai() as client:
        yield client
