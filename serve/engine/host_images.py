"""The bytes of the host tier: adapter images in this process's own memory, read and verified once each.

Owns the memory and the thread that fills it; which images stay is `host_tier`'s decision. Invariants: the bytes that
are handed out are the very bytes that were hashed, so nothing that happens to the files later matters; what is held,
fetches under way included, never exceeds the budget; a failed fetch leaves no bytes.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from queue import SimpleQueue
from typing import BinaryIO, Protocol, cast

from adapters_store.blobs import HashedBytes
from adapters_store.errors import StoreError
from adapters_store.store import OpenAdapter
from serve.engine.plan import FetchResult
from serve.model.own_pages import own_pages

# read and hashed at a time: small enough that the thread lets go of the interpreter often, and that the piece is still
# in the cache when it is hashed
PIECE_BYTES = 1 << 20


class OpenImage(Protocol):
    """`adapters_store.blobs.open_image` of one folder of objects."""

    def __call__(self, digest: str, bring: Callable[[BinaryIO, int], HashedBytes]) -> OpenAdapter:
        """Open an image whose bytes `bring` reads; raises StoreError."""
        ...


class _NoRoomError(Exception):
    """The image takes `num_bytes`, more than are left."""

    def __init__(self, num_bytes: int, message: str) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


class HostImages:
    """`serve.engine.resident.ImageFetcher` over the store's objects."""

    def __init__(
        self,
        open_image: OpenImage,
        max_bytes: int,
        *,
        verify: Callable[[OpenAdapter], None] | None = None,
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        """Start the fetching thread.

        Args:
            verify: called with each image that comes from the store, after its hash was checked and before anybody may
                use it; raises StoreError to refuse it (signatures).
            prepare_thread: called once by the thread.
        """
        self._open_image = open_image
        self._max_bytes = max_bytes
        self._verify = verify
        self._lock = threading.Lock()
        self._images: dict[str, OpenAdapter] = {}
        self._sizes: dict[str, int] = {}
        self._ended: SimpleQueue[FetchResult] = SimpleQueue()
        self._is_closing = False
        self._thread = ThreadPoolExecutor(1, "adapter-fetch", initializer=prepare_thread)

    @property
    def num_bytes(self) -> int:
        """Bytes held, and of fetches under way."""
        with self._lock:
            return sum(self._sizes.values())

    def start_fetch(self, digest: str) -> None:
        """Queue a fetch; returns at once."""
        self._thread.submit(self._fetch, digest)

    def poll(self) -> list[FetchResult]:
        """Return fetches that ended since the last call."""
        results = []
        while not self._ended.empty():
            results.append(self._ended.get())
        return results

    def open(self, digest: str) -> OpenAdapter:
        """Return an image that is here; no disk is read."""
        with self._lock:
            return self._images[digest]

    def drop(self, digest: str) -> None:
        """Free an image; whoever still reads it keeps its bytes until then."""
        with self._lock:
            del self._images[digest]
            del self._sizes[digest]

    def close(self) -> None:
        """Stop the thread after the piece in flight."""
        self._is_closing = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, digest: str) -> None:
        begin, error = time.monotonic(), None
        adapter: OpenAdapter | None = None
        num_bytes_lacking = 0
        try:
            adapter = self._open_image(digest, bring=lambda file, num_bytes: self._read(digest, file, num_bytes))
            if self._verify is not None:
                self._verify(adapter)
        except _NoRoomError as full:
            error, num_bytes_lacking = str(full), full.num_bytes
        except StoreError as failure:
            error = str(failure)
        # the wall of this job: whatever a fetch raises fails that adapter's requests alone
        except Exception as failure:
            error = f"the adapter could not be read ({type(failure).__name__}); send the request again"
        with self._lock:
            if adapter is not None and error is None:
                self._images[digest] = adapter
            num_bytes = self._sizes.get(digest, 0) if error is None else self._sizes.pop(digest, 0)
        rank, seconds = 0 if adapter is None else adapter.rank, time.monotonic() - begin
        is_out_of_room = num_bytes_lacking > 0
        self._ended.put(FetchResult(digest, num_bytes or num_bytes_lacking, rank, seconds, error, is_out_of_room))

    def _read(self, digest: str, file: BinaryIO, num_bytes: int) -> HashedBytes:
        """Read and hash a file of known size into memory of our own, piece by piece."""
        with self._lock:
            num_held = sum(self._sizes.values())
            if num_held + num_bytes > self._max_bytes:
                raise _NoRoomError(num_bytes, f"{num_held} of {self._max_bytes} bytes for images are taken")
            self._sizes[digest] = num_bytes
        memory = own_pages(num_bytes, are_large=True)
        data, sha256 = memoryview(memory), hashlib.sha256()
        for begin in range(0, num_bytes, PIECE_BYTES):
            if self._is_closing:
                raise OSError("the server stops")
            piece = data[begin : begin + PIECE_BYTES]
            if cast(RawIOBase, file).readinto(piece) != len(piece):
                raise OSError("the file ends early")
            sha256.update(piece)
        return HashedBytes(memory, sha256.hexdigest())
