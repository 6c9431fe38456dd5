"""The keys and grants as one process knows them: a copy of the store that is never older than a bound.

Owns the copy and its age. Invariant: no key opens anything once `max_age_s` have passed since it was revoked in the
store, in every process; when the store cannot be read, nothing opens (fail closed), since a revocation could be missed.
"""

import threading
from collections.abc import Callable, Iterable

from serve.tenants.key_store import EVERYBODY, Grant, KeyStore
from serve.tenants.keys import KeyRecord, matches, parse_key
from serve.tenants.principal import Principal

# half of the second that a revocation may take: the rest is for the read itself
MAX_AGE_S = 0.5
_NO_SECRET = "0" * 64


class KeyRing:
    """Reads the store's version when its copy is old, and all keys when the version moved."""

    def __init__(
        self,
        store: KeyStore,
        pepper: bytes,
        *,
        monotonic: Callable[[], float],
        clock: Callable[[], float],
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._store = store
        self._pepper = pepper
        self._monotonic = monotonic
        self._clock = clock
        self._max_age_s = max_age_s
        self._refreshing = threading.Lock()
        self._records: dict[str, KeyRecord] = {}
        # tenant to the adapters that it was granted
        self._shared: dict[str, frozenset[str]] = {}
        self._version: int | None = None
        # when the store was last asked; None: never
        self._asked_s: float | None = None

    @property
    def is_stale(self) -> bool:
        """Say whether `refresh` must come before the next `authenticate`."""
        return self._asked_s is None or self._monotonic() - self._asked_s >= self._max_age_s

    def refresh(self) -> None:
        """Catch up with the store; many callers at once cost one read. Blocks on the disk.

        Raises:
            Unavailable: the store cannot be read.
        """
        with self._refreshing:
            if not self.is_stale:
                return
            # before the read: the copy is as old as the moment at which the read began
            asked_s = self._monotonic()
            if self._store.version() != self._version:
                snapshot = self._store.snapshot()
                self._records = {record.key_id: record for record in snapshot.records}
                self._shared = _by_tenant(snapshot.grants)
                self._version = snapshot.version
            self._asked_s = asked_s

    def authenticate(self, text: str) -> Principal | None:
        """Return who calls with this key; None if it is unknown, wrong, expired or revoked, in one time for all."""
        assert self._asked_s is not None, "refresh comes before authenticate"
        parsed = parse_key(text)
        record = self._records.get(parsed.key_id) if parsed is not None else None
        is_right = matches(record, parsed.secret if parsed is not None else _NO_SECRET, self._pepper)
        if record is None or not is_right or not record.is_valid_at(self._clock()):
            return None
        return record.principal()

    def shared_with(self, tenant: str) -> frozenset[str]:
        """Return the adapters of others that a tenant may use."""
        shared = self._shared
        return shared.get(tenant, frozenset()) | shared.get(EVERYBODY, frozenset())


def _by_tenant(grants: Iterable[Grant]) -> dict[str, frozenset[str]]:
    shared: dict[str, set[str]] = {}
    for grant in grants:
        shared.setdefault(grant.tenant, set()).add(grant.adapter)
    return {tenant: frozenset(adapters) for tenant, adapters in shared.items()}
