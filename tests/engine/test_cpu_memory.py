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

NAMES = (b"ONEDNN_PRIMITIVE_CACHE_CAPACITY", b"LRU_CACHE_CAPACITY")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def libc() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_char_p
    before = {name: library.getenv(name) for name in NAMES}
    for name in NAMES:
        library.unsetenv(name)
    yield library
    for name, value in before.items():
        library.unsetenv(name)
        if value is not None:
            library.setenv(name, value, 1)


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


PRODUCTS = """
import torch

from serve.engine.cpu_memory import bound_kernel_cache
from serve.model.layers import PackedLinear

def private():
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_Dirty:"))

bound_kernel_cache()
torch.set_num_threads(1)
linear, x = PackedLinear(torch.ones(64, 64), None), torch.ones(256, 64)
for num_rows in range(2, 50):
    linear(x[:num_rows])
start = private()
for num_rows in range(50, 250):
    linear(x[:num_rows])
print((private() - start) >> 20)
"""


def test_code_for_ever_new_numbers_of_rows_does_not_pile_up() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, timeout=300, cwd=REPO_ROOT
    )
    # half a megabyte each where nothing is let go: 93 MiB (AVX-512)
    assert int(run.stdout) < 40


def test_the_kept_code_is_bounded_unless_the_operator_did(libc: ctypes.CDLL) -> None:
    bound_kernel_cache()
    kept, held = (int(libc.getenv(name)) for name in NAMES)
    assert 1 <= held <= kept <= 128
    for name in NAMES:
        libc.setenv(name, b"7", 1)
    bound_kernel_cache()
    assert [libc.getenv(name) for name in NAMES] == [b"7", b"7"]


def test_with_another_c_library_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "_glibc", lambda: None)
    clock = Clock()
    memory = FreeMemory(clock)
    clock.now += 60
    memory.give_back()
    with blocks_of_their_own():
        weights = bytearray(b"1") * (1 << 20)
    assert len(weights) == 1 << 20
