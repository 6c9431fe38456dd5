"""Ray's tests run where Ray is installed: `make test-ray`, in `.venv-ray`.

Owns the collection only.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
collect_ignore_glob = [] if find_spec("ray") is not None else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)
