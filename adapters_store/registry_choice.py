"""Which registry a store has: SQLite for one server, or the journal that replicas share and Redis announces.

Owns the rule and the way from one to the other. Invariants: a store has exactly one of the two, and what is there
decides, so a server started with other flags refuses instead of serving an old registry; a way cut short at any point
is walked to its end by the same command again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from adapters_store.errors import InvalidOption, RegistryUnavailable, storage_errors
from adapters_store.registry import Registry
from adapters_store.registry_changes import Everything
from adapters_store.registry_redis import JOURNAL, SharedRegistry
from adapters_store.registry_sqlite import SqliteRegistry

SQLITE = "registry.sqlite"
Kind = Literal["sqlite", "journal"]


def kinds_of(root: Path) -> list[Kind]:
    """Return what lies in a store's folder: nothing yet, one, or both after a rebuild that was cut short."""
    found: list[Kind] = ["sqlite"] if (root / SQLITE).is_file() else []
    return [*found, "journal"] if (root / JOURNAL).is_dir() else found


def open_registry(root: Path, redis_url: str | None) -> Registry:
    """Open the registry of a store, or make its first one; with Redis it also follows what other replicas do.

    Raises:
        InvalidOption: the flag does not fit what the folder holds, the URL or Redis' password is wrong, or the client
            is not installed. StorageFailed: the folder fails.
    """
    wanted: Kind = "sqlite" if redis_url is None else "journal"
    for found in kinds_of(root):
        if found != wanted:
            raise InvalidOption(_MISFIT[found], param="redis_url")
    if redis_url is None:
        return SqliteRegistry(root / SQLITE)
    registry = SharedRegistry.open(root)
    connect(registry, redis_url, follow=True)
    return registry


def connect(registry: SharedRegistry, redis_url: str, *, follow: bool) -> None:
    """Let a shared registry change names; with `follow` a thread hears of others' changes until it is closed.

    Raises:
        InvalidOption: as `open_registry`. A Redis that is away is no error: it may come back.
    """
    try:
        # the client is an extra that single servers do not have
        from adapters_store.redis_head import RedisHead, is_refused, masked  # noqa: PLC0415
        from adapters_store.registry_follower import Follower  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise InvalidOption("--redis-url needs the Redis client: pip install 'chorale[redis]'") from error
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
    follower = Follower(registry, head)
    registry.connect(head, before_close=follower.stop)
    if follow:
        follower.start()


def rebuild_journal(root: Path, redis_url: str) -> SharedRegistry:
    """Return the shared registry with all that the folder knows, and let Redis say so; the caller closes it.

    A store that SQLite served is taken over first, and its file put aside.
    Raises:
        InvalidOption: both are there and differ, or as `open_registry`. StorageFailed, RegistryUnavailable.
    """
    registry = SharedRegistry.open(root)
    try:
        connect(registry, redis_url, follow=False)
        # numbers that Redis has from another life of this store would hide ours
        registry.announce_anew()
        if (root / SQLITE).is_file():
            known = _read_sqlite(root)
            if registry.number > 0 and _names(known) != _names(registry.everything()):
                raise InvalidOption(
                    f"{SQLITE} and {JOURNAL}/ hold different adapters; move aside the one that is wrong", param="store"
                )
            if registry.number == 0:
                registry.adopt(known)
            _put_aside(root / SQLITE)
    except BaseException:
        registry.close()
        raise
    return registry


def rebuild_sqlite(root: Path) -> SqliteRegistry:
    """Return a SQLite registry with all that the journal holds, and put the journal aside; the caller closes it.

    Raises:
        InvalidOption: there is no journal, or both are there and differ. StorageFailed.
    """
    if not (root / JOURNAL).is_dir():
        raise InvalidOption(f"the store has no {JOURNAL}/ to rebuild from", param="store")
    known = SharedRegistry.open(root).everything()
    registry = SqliteRegistry(root / SQLITE)
    try:
        found = registry.everything()
        if found.last_numbers and _names(found) != _names(known):
            raise InvalidOption(
                f"{SQLITE} and {JOURNAL}/ hold different adapters; move aside the one that is wrong", param="store"
            )
        registry.adopt(known)
        _put_aside(root / JOURNAL)
    except BaseException:
        registry.close()
        raise
    return registry


_MISFIT: dict[Kind, str] = {
    "journal": "this store is shared by replicas: start with --redis-url, or take it back for one server with "
    "`chorale store rebuild --to sqlite`",
    "sqlite": "this store has a registry of its own: share it first with `chorale store rebuild --redis-url URL`, "
    "while no server uses it",
}


def _read_sqlite(root: Path) -> Everything:
    registry = SqliteRegistry(root / SQLITE)
    try:
        return registry.everything()
    finally:
        registry.close()


def _names(everything: Everything) -> Everything:
    return replace(everything, store_id="", retired={})


def _put_aside(path: Path) -> None:
    """Rename to a name that no store reads: nothing of an operator's is ever removed."""
    with storage_errors():
        number = 1
        while (aside := path.with_name(f"{path.name}.before-{number}")).exists():
            number += 1
        path.rename(aside)
