"""The host tier of a device server: mapped adapter files, kept open so that a second load neither reads nor hashes.

Owns which maps stay open; the bytes are the page cache's, and the kernel may take them back. Invariant: what is handed
out was verified when it was mapped; files are replaced by rename alone, so a map keeps the bytes it was verified with.
"""

from collections import OrderedDict
from collections.abc import Callable

from adapters_store.store import OpenAdapter

# each map holds a file descriptor, of which a process has 1024 by default
MAX_IMAGES = 256


class HostImages:
    """Open images by digest, the least recently loaded first. One thread: the loader's."""

    def __init__(self, open_image: Callable[[str], OpenAdapter], max_bytes: int) -> None:
        """Wrap `open_image`, which maps and verifies; at most `max_bytes` and `MAX_IMAGES` stay mapped."""
        self._open_image = open_image
        self._max_bytes = max_bytes
        self._images: OrderedDict[str, OpenAdapter] = OrderedDict()
        self._num_bytes = 0

    def open(self, digest: str) -> OpenAdapter:
        """Return a verified image; raises what `open_image` raises."""
        image = self._images.get(digest)
        if image is None:
            image = self._open_image(digest)
            self._images[digest] = image
            self._num_bytes += image.num_bytes
        self._images.move_to_end(digest)
        while self._num_bytes > self._max_bytes or len(self._images) > MAX_IMAGES:
            self._num_bytes -= self._images.popitem(last=False)[1].num_bytes
        return image
