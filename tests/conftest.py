"""Fixtures that every room's tests share: the real data, a store folder, the real server on each device.

Owns where things lie and how long they live, and which files come first; what is tested belongs to the rooms.
Invariants: whatever a fixture starts it stops, also when the test failed; a test that needs a device which is not here
skips before anything is started; every process of a run orders the tests in the same way.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, settings

from tests.live_server import DEVICES, REPO_ROOT, LiveServer, missing_device, start_server, stop_server

_TESTS = Path(__file__).parent

# before anything imports triton: kernels run on CPU tensors; what compiles them does so in a process of its own
os.environ.setdefault("TRITON_INTERPRET", "1")
# the same examples in every run, on slow machines too; HYPOTHESIS_PROFILE=search looks for new ones
_TIMELESS = [HealthCheck.too_slow]
settings.register_profile("search", deadline=None, suppress_health_check=_TIMELESS)
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=_TIMELESS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


# what takes longest comes first, or one of two processes would wait for the other at the end: files, then rooms
_LONGEST = (
    "kernels/gpu/test_compile.py",
    "engine/test_traces.py",
    "test_readme.py",
    "engine/test_device_families.py",
    "finetuning",
    "e2e",
    "campaign",
    "process",
    "demo",
    "scripts",
    "engine",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, the same in every process; inside a file tests keep their order."""
    items.sort(key=lambda item: _place(item.path))


def _place(path: Path) -> int:
    """Return where a test file comes: small numbers first."""
    parts = path.relative_to(_TESTS).as_posix() if path.is_relative_to(_TESTS) else ""
    for place, name in enumerate(_LONGEST):
        if parts == name or parts.startswith(f"{name}/"):
            return place
    return len(_LONGEST)


class StartServer(Protocol):
    """What the `live_server` fixture hands out."""

    def __call__(self, model_dir: Path, *options: str, store_dir: Path | None = None) -> LiveServer:
        """Start `chorale serve` for this model with more options; stopped when the test's scope ends."""
        ...


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real models, adapters and traces, or skip where it is missing."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not (folder / "models" / "golden.json").is_file():
        pytest.skip("needs ../shared/data (real models and adapters), which is not part of the repository")
    return folder


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Return a folder for a store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return the device that the real server runs on; every test of the real server runs once on each."""
    if (reason := missing_device(request.param)) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def live_server(device: str, any_server: StartServer) -> StartServer:
    """Hand out a function that starts real servers on the test's device, stopped at the end of the module."""

    def start(model_dir: Path, *options: str, store_dir: Path | None = None) -> LiveServer:
        return any_server(model_dir, "--device", device, *options, store_dir=store_dir)

    return start


@pytest.fixture(scope="module")
def any_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Hand out a function that starts real servers whose options name the device; as `live_server` otherwise."""
    servers: list[LiveServer] = []

    def start(model_dir: Path, *options: str, store_dir: Path | None = None) -> LiveServer:
        folder = tmp_path_factory.mktemp("server")
        server = start_server(folder / "server.log", model_dir, store_dir or folder / "store", *options)
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in servers:
            stop_server(server)
