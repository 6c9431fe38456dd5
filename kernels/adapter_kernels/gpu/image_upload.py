"""From a mapped adapter file to its extent on the device, through a fixed set of pinned buffers.

Owns the buffers and the pace: one buffer is filled while others are on their way; nothing is allocated per load, and
an adapter of any size passes. Invariant: when `upload` raises, no copy of it is under way any more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels.gpu.copies import Copies, Fence, PinnedRing
from adapter_kernels.gpu.image_layout import ImageLayout
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES


class UploadCancelled(Exception):
    """Nobody wants the image any more."""


class ImageUpload:
    """The one upload at a time of a loader thread."""

    def __init__(self, copies: Copies, *, num_buffers: int = 3, buffer_bytes: int = 8 << 20) -> None:
        """Allocate the buffers; `buffer_bytes` is a multiple of 128."""
        assert buffer_bytes % ALIGNMENT_BYTES == 0, f"buffers of {buffer_bytes} bytes split an element"
        self._copies = copies
        self._ring = PinnedRing(copies, num_buffers, buffer_bytes)
        # stored elements are at most twice as wide as the model's: float32 and a 16-bit type
        self._scratch = torch.empty(2 * buffer_bytes, dtype=torch.uint8)

    def upload(
        self, layout: ImageLayout, extent: Tensor, after: Fence | None, is_cancelled: Callable[[], bool]
    ) -> Fence:
        """Copy an image to `extent`, [layout.num_bytes] uint8 on the device; return the point behind the last copy.

        Args:
            after: what the extent's former bytes are still read before.
            is_cancelled: asked before each buffer.
        Raises:
            ImageError: a weight is not finite in the model's dtype. UploadCancelled.
        """
        try:
            for begin in range(0, layout.num_bytes, self._ring.num_bytes):
                if is_cancelled():
                    raise UploadCancelled
                fence = self._send(layout, begin, extent, after)
        except BaseException:
            # whoever gets the extent next may write it on another stream
            self._ring.drain()
            raise
        return fence

    def _send(self, layout: ImageLayout, begin: int, extent: Tensor, after: Fence | None) -> Fence:
        """Send one buffer."""
        end = min(begin + self._ring.num_bytes, layout.num_bytes)
        buffer = self._ring.acquire()
        fence: Fence | None = None
        try:
            filled = buffer[: end - begin]
            layout.fill(begin, filled, self._scratch)
            layout.check_finite(begin, filled)
            fence = self._copies.upload(filled, extent[begin:end], after)
        finally:
            self._ring.release(buffer, fence)
        return fence
