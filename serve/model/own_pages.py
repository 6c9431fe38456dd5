"""Memory that a process takes from the system by pages of its own, and gives back with the last reference.

Owns how it is asked for. Invariant: a page costs nothing until it is written, and reads as zeros before.
"""

import contextlib
import mmap
import sys


def own_pages(num_bytes: int, *, are_large: bool) -> mmap.mmap:
    """Return private zero pages.

    Args:
        num_bytes: at least 1.
        are_large: of 2 MiB where the system has them, which are filled faster: 17 MiB from the page cache in 4 ms, in
            12 otherwise. Small ones cost less where little of the whole is written: 48 tensors with a few blocks each
            took 80 MiB less (2026-11).
    """
    if sys.platform != "linux":
        return mmap.mmap(-1, num_bytes)
    # an anonymous mapping is shared memory in Python unless one asks
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a system without large pages says so
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE if are_large else mmap.MADV_NOHUGEPAGE)
    return memory
