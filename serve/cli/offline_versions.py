"""The version commands on a store's folder, with no server: the same moves that a server makes.

Owns the way into the store. Invariants: a store that replicas share is changed through one of them, who tells the
others; every move is in the audit log.
"""

from pathlib import Path

from adapters_store.pointers import Pointers, Sticky
from adapters_store.registry import AdapterVersion
from adapters_store.store import AdapterStore
from serve.cli.adapters_offline import check_not_shared, store_of
from serve.cli.offline_audit import operator, record
from serve.tenants.audit import AuditEvent
from serve.tenants.principal import LOCAL_TENANT


def by() -> str:
    """Return who moves pointers here."""
    return f"{LOCAL_TENANT}/{operator()}"


def promote(root: Path, name: str, version: int | str, to: str | None) -> AdapterVersion:
    """Let the name, or its alias `to`, mean a version; raises StoreError, StartError."""
    check_not_shared(root)
    with store_of(root, name) as store:
        found = store.promote(name, version, to, by=by())
    record(root, AuditEvent.PROMOTE, name, f"{to or 'the name'} is version {found.version} sha256:{found.digest}")
    return found


def roll_back(root: Path, name: str) -> AdapterVersion:
    """Let the name mean what it meant before; raises StoreError, StartError."""
    check_not_shared(root)
    with store_of(root, name) as store:
        found = store.rollback(name, by=by())
    record(root, AuditEvent.ROLLBACK, name, f"to version {found.version} sha256:{found.digest}")
    return found


def set_canary(root: Path, name: str, version: int | str, percent: float, sticky: Sticky) -> Pointers:
    """Give a version a share of the name's requests; raises StoreError, StartError."""
    check_not_shared(root)
    with store_of(root, name) as store:
        pointers = store.set_canary(name, version, percent, sticky=sticky, by=by())
    number = pointers.aliases["canary"]
    record(root, AuditEvent.CANARY, name, f"version {number} gets {pointers.share / 100} %")
    return pointers


def remove_alias(root: Path, name: str, alias: str) -> Pointers:
    """Forget an alias; the alias `canary` goes with its share. Raises StoreError, StartError."""
    check_not_shared(root)
    with store_of(root, name) as store:
        pointers = store.remove_alias(name, alias, by=by())
    record(root, AuditEvent.ALIAS, name, f"{alias} is no more")
    return pointers


def set_alias(root: Path, name: str, alias: str, version: int) -> None:
    """Let `name:alias` mean a version; raises StoreError, StartError."""
    check_not_shared(root)
    with store_of(root, name) as store:
        store.set_alias(name, alias, version, by=by())
    record(root, AuditEvent.ALIAS, name, f"{alias} is version {version}")


def versions(root: Path, name: str) -> tuple[list[AdapterVersion], Pointers]:
    """Return all versions, oldest first, and what points to them; raises StoreError, StartError."""
    with store_of(root, name) as store:
        return _versions(store, name)


def _versions(store: AdapterStore, name: str) -> tuple[list[AdapterVersion], Pointers]:
    return store.versions(name), store.pointers(name)
