"""What the engine's process gives back to the system, seen from outside: by the kernel's own count of its pages."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serve.engine import cpu_memory
from serve.engine.cpu_memory import FreeMemory, blocks_of_their_own, bound_kernel_cache
from tests.live_server import REPO_ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

NAME = b"ONEDNN_PRIMITIVE_CACHE_CAPACITY"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def libc() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_char_p
    before = library.getenv(NAME)
    library.unsetenv(NAME)
    yield library
    library.unsetenv(NAME)
    if before is not None:
        library.setenv(NAME, before, 1)


# in a process of its own: what tests before this one left free would be counted
PROGRAM = """
from serve.engine.cpu_memory import FreeMemory, blocks_of_their_own

MIB = 1 << 20
now = 100.0

def resident():
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))

def every_other_block(count):
    blocks = [bytearray(b"1") * MIB for _ in range(count)]
    return blocks[::2]

start = resident()
with blocks_of_their_own():
    # left to itself the C library maps nothing below such a block any more
    bytearray(16 * MIB)
    weights = every_other_block(128)
print((resident() - start) // MIB)

memory, start = FreeMemory(lambda: now), resident()
buffers = every_other_block(128)
now += 4.9
memory.give_back()
print((resident() - start) // MIB)
now += 0.2
memory.give_back()
print((resident() - start) // MIB)
assert all(block == b"1" * MIB for block in weights + buffers)
"""


def test_holes_go_back_at_once_while_weights_are_loaded_and_every_few_seconds_of_work() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300, cwd=REPO_ROOT
    )
    loaded, early, late = (int(line) for line in run.stdout.split())
    assert 60 <= loaded <= 72, "half of 128 MiB is kept"
    assert early >= 120, "what is freed between kept blocks stays for a while"
    assert 60 <= late <= 72


def test_the_kept_code_is_bounded_unless_the_operator_did(libc: ctypes.CDLL) -> None:
    bound_kernel_cache()
    assert 5 <= int(libc.getenv(NAME)) <= 128
    libc.setenv(NAME, b"7", 1)
    bound_kernel_cache()
    assert libc.getenv(NAME) == b"7"


def test_with_another_c_library_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "_glibc", lambda: None)
    clock = Clock()
    memory = FreeMemory(clock)
    clock.now += 60
    memory.give_back()
    with blocks_of_their_own():
        weights = bytearray(b"1") * (1 << 20)
    assert len(weights) == 1 << 20
