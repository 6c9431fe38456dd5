"""What the C library and oneDNN may hold beside the weights: bounds on both, for the engine on a CPU.

Owns four settings of this process. glibc raises its threshold for blocks of their own with each large one that is
freed, so that weights end up on a heap full of holes; oneDNN keeps the code of 1024 products, one for each number of
rows that ever met a layer, half a megabyte each and more; torch holds on to 1024 of them once more, by kind of product,
also after oneDNN let go; and what lies free between such code stays with the process.
Invariant: results do not depend on any of this, and where the C library is another one nothing is changed.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# while weights are loaded: blocks from here on are mapped, and go back to the system as soon as they are freed
_LOADING_BYTES = 128 << 10
# while steps run: none is mapped anew for each layer, with 256 KiB a prefill takes a third longer (2 cores, 2026-11).
# The greatest values that glibc takes, and near those it would come to by itself
_SERVING_BYTES = 32 << 20
_SERVING_TOP_BYTES = 64 << 20
# products that oneDNN keeps the code of: five shapes of a model for 8 numbers of rows. A step with another number
# makes its code anew, five times 1 ms (2 cores beside other work, 2026-11)
_NUM_KEPT_PRODUCTS = 40
# products of each kind that torch holds on to by itself: those it holds no more it finds at oneDNN, unless they are
# among the oldest there. 4 and 1024 give the same tokens per second (0.5 B, 8 adapters, 32 streams, 2 cores, 2026-11)
_NUM_HELD_PRODUCTS = 4
# free memory goes back this often: 5 to 20 ms each time (2 cores beside other work, 2026-11)
_TRIM_EVERY_S = 5.0


def bound_kernel_cache() -> None:
    """Bound what oneDNN and torch keep of it, unless the operator did; call before torch's first product."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.setenv(b"ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_NUM_KEPT_PRODUCTS).encode(), 0)
        libc.setenv(b"LRU_CACHE_CAPACITY", str(_NUM_HELD_PRODUCTS).encode(), 0)


@contextmanager
def blocks_of_their_own() -> Iterator[None]:
    """Load weights inside: what is freed there goes back at once, and what stays leaves no holes."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, _SERVING_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _SERVING_TOP_BYTES)


class FreeMemory:
    """Gives free memory between live blocks back to the system, every few seconds of work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_at = clock() + _TRIM_EVERY_S

    def give_back(self) -> None:
        """Call after a step."""
        if self._clock() >= self._next_at:
            give_back_free_memory()
            self._next_at = self._clock() + _TRIM_EVERY_S


def give_back_free_memory() -> None:
    """Give free memory between live blocks back to the system now; the API's process does so once it has started."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
