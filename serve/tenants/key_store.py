"""What a store of API keys and grants promises; SQLite implements it for one server, a journal for replicas.

A grant lets a tenant use another's adapter: it is of the adapter's name, and so of its later versions, until it is
withdrawn. Owns the protocol and the rotation's arithmetic. Invariant: a change returns only when it is durable, and
every change raises the version, so that a process which knows the version knows whether its copy is whole.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from serve.errors import NotFound
from serve.tenants.keys import KeyRecord


class KeyNotFound(NotFound):
    """404 `key_not_found`: no key has this id."""

    default_code = "key_not_found"


# a grant to this tenant is to all of them
EVERYBODY = "*"


@dataclass(frozen=True, slots=True)
class Grant:
    """`tenant` may use the adapter that the store keeps under `adapter`."""

    adapter: str
    tenant: str


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """All keys and grants as of one version."""

    version: int
    records: tuple[KeyRecord, ...]
    grants: tuple[Grant, ...] = ()


class KeyStore(Protocol):
    """Keys by id. Thread-safe; raises ServeError only: Unavailable when the storage fails."""

    def version(self) -> int:
        """Return a number that every change raises."""
        ...

    def snapshot(self) -> KeySnapshot:
        """Return all keys and grants, and the version they are of, read at once."""
        ...

    def add(self, record: KeyRecord) -> None:
        """Keep a new key."""
        ...

    def revoke(self, key_id: str, *, now: int) -> KeyRecord:
        """Make a key invalid for ever; revoking twice keeps the first time. Raises KeyNotFound."""
        ...

    def rotate(self, key_id: str, successor: KeyRecord, *, until: int) -> KeyRecord:
        """Keep `successor` and let the old key end at `until` at the latest, both or neither. Raises KeyNotFound."""
        ...

    def grant(self, grant: Grant) -> None:
        """Let a tenant use an adapter; twice is once."""
        ...

    def withdraw(self, adapter: str, tenant: str | None) -> int:
        """Take back one tenant's grant, or all of an adapter's; return how many there were."""
        ...

    def close(self) -> None:
        """Give back the connection."""
        ...


def unknown_key(key_id: str) -> KeyNotFound:
    """Return the error that says so."""
    return KeyNotFound(f"there is no key with the id {ascii(key_id)[:80]}; `chorale keys list` shows all")


def ends_by(record: KeyRecord, until: int) -> KeyRecord:
    """Return the record with its life shortened to `until`; a life is never made longer."""
    return replace(record, expires=until if record.expires is None else min(record.expires, until))
