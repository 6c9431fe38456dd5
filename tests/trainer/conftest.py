"""Fixtures of the trainer's tests: one tiny base for all of them, one torch thread.

Owns lifetimes only.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer.tiny_base import Place, write_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base's folder; nobody writes into it."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def place(tiny_base: Path, tmp_path: Path) -> Place:
    """Return the tiny base with an empty folder to work in."""
    return Place(tiny_base, tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as the provenance of equal jobs must say."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
