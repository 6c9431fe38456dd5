"""What every test of deployment has in common: its mark, and where it can run.

Owns the collection only. `make test-deploy` runs these in `.venv-deploy`; elsewhere (`make test`, `make test-long`)
those that need Helm and Kubernetes' schemas are not collected. Invariant: in `.venv-deploy` nothing is left out.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_NEEDS_HELM = ("test_chart*.py", "test_manifests.py", "test_policies.py", "test_alerts.py", "test_observed.py")
collect_ignore_glob = [] if find_spec("helm_python") is not None else list(_NEEDS_HELM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.deploy)
