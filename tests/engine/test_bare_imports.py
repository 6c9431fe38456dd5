"""The engine's pure side needs no package: it must import on a GPU machine that has torch and little else."""

import subprocess
import sys

import pytest

from tests.live_server import REPO_ROOT

# of the packages that the HTTP side and the wire need
BLOCKED = (
    "msgspec",
    "fastapi",
    "starlette",
    "pydantic",
    "redis",
    "orjson",
    "uvicorn",
    "prometheus_client",
    "llguidance",
)


@pytest.mark.parametrize("module", ["serve.engine.engine", "serve.engine.plan", "serve.engine.limits"])
def test_the_pure_engine_imports_without_the_packages_of_the_server(module: str) -> None:
    # None in sys.modules makes every import of that name fail
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); import {module}; print('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert (found.returncode, found.stdout.strip()) == (0, "False"), found.stderr
