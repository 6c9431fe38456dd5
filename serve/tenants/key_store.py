"""What a store of API keys promises; SQLite implements it, others may follow.

Owns the protocol and the rotation's arithmetic. Invariant: a change returns only when it is durable, and every change
raises the version, so that a process which knows the version knows whether its copy is whole.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from serve.errors import NotFound
from serve.tenants.keys import KeyRecord


class KeyNotFound(NotFound):
    """404 `key_not_found`: no key has this id."""

    default_code = "key_not_found"


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """All keys as of one version."""

    version: int
    records: tuple[KeyRecord, ...]


class KeyStore(Protocol):
    """Keys by id. Thread-safe; raises ServeError only: Unavailable when the storage fails."""

    def version(self) -> int:
        """Return a number that every change raises."""
        ...

    def snapshot(self) -> KeySnapshot:
        """Return all keys and the version they are of, read at once."""
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

    def close(self) -> None:
        """Give back the connection."""
        ...


def ends_by(record: KeyRecord, until: int) -> KeyRecord:
    """Return the record with its life shortened to `until`; a life is never made longer."""
    return replace(record, expires=until if record.expires is None else min(record.expires, until))
