"""Which registry a store has: SQLite for one server, or the journal that replicas share.

Owns the rule; knows no Redis. Invariants: a store has exactly one of the two, and what is there decides, so a server
started with other flags refuses instead of serving an old registry; a way from one to the other that was cut short at
any point is walked to its end by the same command again, and nothing of an operator's is removed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from adapters_store.errors import InvalidOption, storage_errors
from adapters_store.registry_changes import Everything
from adapters_store.registry_redis import JOURNAL, SharedRegistry
from adapters_store.registry_sqlite import SqliteRegistry

SQLITE = "registry.sqlite"
Kind = Literal["sqlite", "journal"]


def kinds_of(root: Path) -> list[Kind]:
    """Return what lies in a store's folder: nothing yet, one, or both after a rebuild that was cut short."""
    found: list[Kind] = ["sqlite"] if (root / SQLITE).is_file() else []
    return [*found, "journal"] if (root / JOURNAL).is_dir() else found


def check_kind(root: Path, wanted: Kind) -> None:
    """Raise InvalidOption if the store's folder holds the other registry."""
    for found in kinds_of(root):
        if found != wanted:
            raise InvalidOption(_MISFIT[found], param="redis_url")


def open_embedded(root: Path) -> SqliteRegistry:
    """Open or make the registry of a store that one server has; raises InvalidOption, StorageFailed."""
    check_kind(root, "sqlite")
    return SqliteRegistry(root / SQLITE)


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
        if found.last_numbers:
            check_same(found, known)
        registry.adopt(known)
        put_aside(root / JOURNAL)
    except BaseException:
        registry.close()
        raise
    return registry


def check_same(one: Everything, other: Everything) -> None:
    """Raise InvalidOption if two registries of a store hold different adapters."""
    if _names(one) != _names(other):
        raise InvalidOption(
            f"{SQLITE} and {JOURNAL}/ hold different adapters; move aside the one that is wrong", param="store"
        )


def put_aside(path: Path) -> None:
    """Rename to a name that no store reads: nothing of an operator's is ever removed."""
    with storage_errors():
        number = 1
        while (aside := path.with_name(f"{path.name}.before-{number}")).exists():
            number += 1
        path.rename(aside)


_MISFIT: dict[Kind, str] = {
    "journal": "this store is shared by replicas: start with --redis-url, or take it back for one server with "
    "`chorale store rebuild --to sqlite`",
    "sqlite": "this store has a registry of its own: share it first with `chorale store rebuild --redis-url URL`, "
    "while no server uses it",
}


def _names(everything: Everything) -> Everything:
    return replace(everything, store_id="", retired={})
