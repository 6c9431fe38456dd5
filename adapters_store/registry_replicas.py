"""The registry of a store that replicas share, connected to their Redis.

Owns how it is opened, followed and made anew; the only way from here to the Redis client. Invariants: a Redis that is
away keeps no replica from starting, one that refuses this user does; no message holds a password.
"""

from pathlib import Path

from adapters_store.blob_choice import open_journal
from adapters_store.errors import InvalidOption, RegistryUnavailable, storage_errors
from adapters_store.redis_head import RedisHead, is_refused
from adapters_store.redis_url import masked
from adapters_store.registry_changes import Everything
from adapters_store.registry_choice import SQLITE, check_kind, check_same, put_aside
from adapters_store.registry_follower import LOOK_PAUSE_S, Follower
from adapters_store.registry_redis import JOURNAL, SharedRegistry
from adapters_store.registry_sqlite import SqliteRegistry

# each look is a request that costs money
REMOTE_LOOK_PAUSE_S = 0.5


def open_shared(root: Path, redis_url: str, *, blobs_url: str | None = None) -> SharedRegistry:
    """Open or make the registry that replicas share, and follow what the others do until it is closed.

    Args:
        blobs_url: the object store that holds the journal; None: the folder does.
    Raises:
        InvalidOption: the folder holds a registry of its own, a URL is none, or Redis refuses the user.
        StorageFailed: the folder fails. StoreAway: the object store does not answer.
    """
    with storage_errors():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_kind(root, "journal")
    if blobs_url is None:
        registry = SharedRegistry.open(root)
        connect(registry, redis_url, follow=True)
    else:
        registry = open_remote(root, blobs_url)
        connect(registry, redis_url, follow=True, look_pause_s=REMOTE_LOOK_PAUSE_S)
    return registry


def open_remote(root: Path, blobs_url: str) -> SharedRegistry:
    """Open or make the registry whose journal lies in an object store; raises InvalidOption, StorageFailed."""
    if (root / JOURNAL).is_dir():
        raise InvalidOption(
            f"this folder holds a shared store of its own ({JOURNAL}/); with an object store, choose another folder, "
            "which will hold copies alone",
            param="store",
        )
    return SharedRegistry(open_journal(blobs_url, JOURNAL))


def connect(registry: SharedRegistry, redis_url: str, *, follow: bool, look_pause_s: float = LOOK_PAUSE_S) -> None:
    """Let a shared registry change names; with `follow` a thread hears of others' changes until it is closed.

    Raises:
        InvalidOption: as `open_shared`. A Redis that is away is no error: it may come back.
    """
    head = RedisHead(redis_url, registry.store_id)
    try:
        head.top()
    except RegistryUnavailable as error:
        if is_refused(error):
            head.close()
            raise InvalidOption(
                f"{masked(redis_url)} refuses: {error.__cause__}; `chorale redis-acl` prints the user that it needs",
                param="redis_url",
            ) from error
    follower = Follower(registry, head, look_pause_s=look_pause_s)
    registry.connect(head, before_close=follower.stop)
    if follow:
        follower.start()


def rebuild_journal(root: Path, redis_url: str) -> SharedRegistry:
    """Return the shared registry with all that the folder knows, and let Redis say so; the caller closes it.

    A store that SQLite served is taken over first, and its file put aside.
    Raises:
        InvalidOption: both are there and differ, or as `open_shared`. StorageFailed, RegistryUnavailable.
    """
    registry = SharedRegistry.open(root)
    try:
        connect(registry, redis_url, follow=False)
        # numbers that Redis has from another life of this store would hide ours
        registry.announce_anew()
        if (root / SQLITE).is_file():
            known = _read_sqlite(root)
            if registry.number == 0:
                registry.adopt(known)
            check_same(known, registry.everything())
            put_aside(root / SQLITE)
    except BaseException:
        registry.close()
        raise
    return registry


def _read_sqlite(root: Path) -> Everything:
    registry = SqliteRegistry(root / SQLITE)
    try:
        return registry.everything()
    finally:
        registry.close()
