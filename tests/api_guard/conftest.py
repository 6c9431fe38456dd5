"""One whole API for the tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.pins import PINS_FILE
from serve.metrics import Metrics
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import WholeApi, whole_api


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with the byte tokenizer."""
    return write_model_dir(tmp_path_factory.mktemp("byte-model"))


@pytest.fixture(scope="module")
def running(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeApi]:
    """Serve one API for a module's tests."""
    folder = tmp_path_factory.mktemp("api")
    roots = (folder / "roots",)
    roots[0].mkdir()
    with whole_api(model_dir, folder / "store", lora_roots=roots, metrics=Metrics()) as api:
        yield api


@pytest.fixture
def api(running: WholeApi) -> Iterator[WholeApi]:
    """Return the API with an empty store; afterwards nothing may be staged."""
    running.engine.reset()
    # in this order: what the engine was told of, and the file, differ in nothing that it would be told of again
    (running.store_dir / PINS_FILE).unlink(missing_ok=True)
    for version in running.store.list():
        running.store.delete(version.name)
    yield running
    assert running.num_staged == 0, "a test left a staging folder"
