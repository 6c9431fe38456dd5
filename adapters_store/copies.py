"""What a folder of copies promises to those who publish and open adapters; `blob_cache` keeps it over an object store.

Owns the protocols only, so that nobody needs an object store's client who has none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from adapters_store.blobs import HashedBytes, OpenAdapter, map_file


class OpenImage(Protocol):
    """Opens a verified image by its digest, from wherever it lies."""

    def __call__(self, digest: str, bring: Callable[[BinaryIO, int], HashedBytes] = map_file) -> OpenAdapter:
        """Open it; raises StoreError."""
        ...


class Copies(Protocol):
    """A folder's copies of objects that lie elsewhere; `blob_cache.BlobCache`."""

    def share(self, folder: Path, digest: str) -> None:
        """Write an object's files to where all replicas find them; raises StoreError."""
        ...

    def open(self, digest: str, bring: Callable[[BinaryIO, int], HashedBytes] = map_file) -> OpenAdapter:
        """Open an image, fetched if need be; raises StoreError."""
        ...

    def bring(self, digest: str) -> bool:
        """See that a copy is here; raises StoreError."""
        ...
