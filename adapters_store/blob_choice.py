"""Where the objects and journals of a store lie: in its folder, or in an object store with copies in the folder.

Owns the way to what needs the object store's client, which is an extra, and its message. Invariants: importing this
needs no client; a folder that holds a shared store of its own is never used for copies of another.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.blobs import ImageHeads, open_image
from adapters_store.change_log import ChangeLog
from adapters_store.copies import OpenImage
from adapters_store.errors import InvalidOption

if TYPE_CHECKING:
    from adapters_store.blob_cache import BlobCache
    from adapters_store.object_store import ObjectStore


def image_opener(root: Path, blobs_url: str | None, *, cache_bytes: int) -> OpenImage:
    """Return how a process opens the images of a store, again and again; raises InvalidOption, StorageFailed."""
    cache = open_cache(root, blobs_url, cache_bytes=cache_bytes)
    return partial(open_image, root / "objects", heads=ImageHeads()) if cache is None else cache.open


def open_cache(root: Path, blobs_url: str | None, *, cache_bytes: int) -> "BlobCache | None":
    """Return a folder's copies of what an object store holds; None if it holds the objects themselves.

    Raises:
        InvalidOption: the URL cannot be used, or its client is not installed. StorageFailed: the folder fails.
    """
    if blobs_url is None:
        return None
    objects = open_objects(blobs_url)
    # behind the check: it needs the client too
    from adapters_store.blob_cache import BlobCache  # noqa: PLC0415

    return BlobCache(root, objects, max_bytes=cache_bytes)


def open_journal(blobs_url: str, name: str) -> ChangeLog:
    """Return a journal that lies in an object store; raises InvalidOption."""
    objects = open_objects(blobs_url)
    from adapters_store.object_journal import ObjectJournal  # noqa: PLC0415

    return ObjectJournal(objects, name)


def open_objects(blobs_url: str) -> "ObjectStore":
    """Return an object store; raises InvalidOption if the URL cannot be used or the client is not installed."""
    try:
        from adapters_store.object_store import ObjectStore  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise InvalidOption(
            "keeping adapters in an object store needs its client: pip install 'chorale[s3]'", param="blobs"
        ) from error
    return ObjectStore(blobs_url)
