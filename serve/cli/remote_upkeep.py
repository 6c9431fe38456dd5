"""What `chorale store verify|gc --blobs` do: the same upkeep, of a store that lies in an object store.

Owns the way to what needs the object store's client, which is an extra. Invariant: a prefix that holds no store is
refused, and nothing is made in it.
"""

from collections.abc import Iterator
from pathlib import Path

from adapters_store.blob_choice import open_cache, open_journal
from adapters_store.registry import Registry
from adapters_store.registry_redis import JOURNAL, SharedRegistry
from adapters_store.upkeep import Collected, Finding
from serve.errors import StartError


def open_remote(blobs_url: str) -> SharedRegistry:
    """Read the registry of the store that lies there; raises StartError, StoreError."""
    journal = open_journal(blobs_url, JOURNAL)
    if journal.read(0) is None:
        raise StartError(f"{blobs_url} holds no adapter store; `chorale serve --blobs` makes one")
    return SharedRegistry(journal)


def verify_remote(store: Path, blobs_url: str, registry: Registry) -> Iterator[Finding]:
    """Yield every object with what is wrong with it; raises StoreError."""
    cache = open_cache(store, blobs_url, cache_bytes=0)
    # its client is there: the registry was read with it
    from adapters_store.object_store import ObjectStore  # noqa: PLC0415
    from adapters_store.upkeep_objects import verify_objects  # noqa: PLC0415

    assert cache is not None, "there is a URL"
    yield from verify_objects(ObjectStore(blobs_url), cache, registry)


def collect_remote(blobs_url: str, registry: Registry, *, retired_since: int) -> Collected:
    """Remove what nothing needs; raises StoreError."""
    from adapters_store.object_store import ObjectStore  # noqa: PLC0415
    from adapters_store.upkeep_objects import collect_objects  # noqa: PLC0415

    return collect_objects(ObjectStore(blobs_url), registry, retired_since=retired_since)
