"""Fixtures of the store's tests: an open store and a folder that it accepts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.store import AdapterStore
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder


@pytest.fixture
def store(store_dir: Path) -> Iterator[AdapterStore]:
    """Return an empty float32 store for the tiny base, called `base` in the API."""
    opened = open_store(store_dir, served_name="base")
    yield opened
    opened.close()


@pytest.fixture
def good_folder(tmp_path: Path) -> Path:
    """Return a PEFT folder of rank 2 on all seven sites."""
    return write_folder(tmp_path / "good", lora_config(), lora_tensors())
