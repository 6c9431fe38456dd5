"""What every test of deployment has in common: its mark, and where it can run.

Owns the collection only. `make test-deploy` runs these in `.venv-deploy`; elsewhere (`make test`, `make test-long`)
those that need Helm and Kubernetes' schemas are not collected. Invariant: in `.venv-deploy` nothing is left out.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
TIMEOUT_S = 1800
# the one that `make test-long` runs, too
_NEEDS_NO_HELM = "test_rolling_restarts.py"
collect_ignore_glob = (
    []
    if find_spec("helm_python") is not None
    else [path.name for path in _HERE.glob("test_*.py") if path.name != _NEEDS_NO_HELM]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, and let nothing in it be a matter of time."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.deploy)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))
