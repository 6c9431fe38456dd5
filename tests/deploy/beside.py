"""A program on loopback beside the servers under test, for as long as a block runs.

Owns the process it started. Invariant: it has ended when the block is left.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.deploy.proxies import START_TIMEOUT_S


@contextlib.contextmanager
def beside(command: Sequence[str], is_up: Callable[[], bool], folder: Path) -> Iterator[None]:
    """Start a program in a folder, with a log there, and wait until it answers."""
    name = Path(command[0]).name
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            assert process.poll() is None and time.monotonic() < deadline, f"{' '.join(command)} does not start"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
