"""Table rows from the host to the device while steps run.

Owns the pinned memory that a row is copied from. Invariant: a buffer is written again only after the main stream has
passed the copy out of it, and nobody waits for that: who finds all buffers under way comes back later.
"""

import torch
from torch import Tensor

from adapter_kernels.gpu.copies import Copies, Fence, PinnedRing
from adapter_kernels.gpu.tables import DeviceTables

# each poll and each piece of a move makes a write or a few, and two steps are in flight
_NUM_BUFFERS = 16


class TableWriter:
    """Writes adapter slots between two steps. One thread, with the stream current on which the steps run."""

    def __init__(self, tables: DeviceTables, copies: Copies) -> None:
        self._tables = tables
        self._copies = copies
        num_bytes = tables.rows[:, 0].numel() * tables.rows.itemsize
        self._ring = PinnedRing(copies, _NUM_BUFFERS, num_bytes)

    @property
    def is_ready(self) -> bool:
        """Say whether `write` can be called now."""
        return self._ring.is_ready

    def write(self, slot: int, entries: Tensor) -> None:
        """Change a slot's row behind all steps submitted so far; `entries` may be changed when this returns."""
        assert self.is_ready, "a table row is written while every buffer is under way"
        buffer = self._ring.acquire()
        fence: Fence | None = None
        try:
            pinned = buffer.view(torch.int64).view(entries.shape)
            pinned.copy_(entries)
            self._tables.write(slot, pinned)
            fence = self._copies.fence()
        finally:
            self._ring.release(buffer, fence)

    def clear(self, slot: int) -> None:
        """Let a slot lack every site behind all steps submitted so far."""
        self._tables.clear(slot)
