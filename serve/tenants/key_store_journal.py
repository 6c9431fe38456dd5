"""The key store that replicas share: a journal of its own beside the adapters', which each replica looks into.

Owns what its entries come to. The journal alone is the truth: no key, hash or grant passes through Redis, and a
revocation needs no Redis to be heard. Invariants: a change is durable before the call returns; `version` looks into the
journal and never answers from memory; a journal made with another pepper is refused when it is opened; folding never
takes away what a replica that looks every second was to read next.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from adapters_store.change_log import ChangeLog
from adapters_store.errors import StorageFailed, StoreError
from adapters_store.followed_journal import FollowedJournal
from adapters_store.journal import NOTHING_BEFORE
from serve.errors import Unavailable
from serve.tenants.key_changes import KeyChange, KeyEntry, read_entry, write_entry
from serve.tenants.key_store import Grant, KeySnapshot, ends_by, unknown_key
from serve.tenants.keys import KeyRecord
from serve.tenants.pepper import check_mark, pepper_mark

KEY_JOURNAL = "keys"
# the journal is folded after so many changes, or a quarter as many as there are keys and grants
FOLD_CHANGES, _FOLD_SHARE = 256, 4

Decide = Callable[[], KeyChange]


class JournalKeyStore:
    """A `KeyStore` over a journal. Thread-safe; any number of processes on any number of machines."""

    def __init__(
        self,
        journal: ChangeLog,
        pepper: bytes,
        *,
        begin: Callable[[], KeyChange] = KeyChange,
        fold_changes: int = FOLD_CHANGES,
    ) -> None:
        """Read the journal, founding it if it is new.

        Args:
            begin: what a new journal begins with; called under the journal's lock.
            fold_changes: after how many changes it is folded, at least.
        Raises:
            StartError: its keys were made with another pepper. Unavailable: it cannot be read or written.
        """
        self._journal = journal
        self._following = threading.Lock()
        self._fold_changes = fold_changes
        self._place = FollowedJournal(journal, what="the store's keys", read=read_entry, take=self._take)
        # the newest entry that holds everything before it
        self._fold = 0
        self._mark = ""
        self._records: dict[str, KeyRecord] = {}
        self._grants: set[Grant] = set()
        mark = pepper_mark(pepper).hex()
        with _storage_errors():
            if journal.read(0) is None:
                self._found(mark, begin)
        self.version()
        check_mark(mark.encode(), self._mark.encode())

    def version(self) -> int:
        """Return a number that every change raises; looks into the journal."""
        with _storage_errors(), self._following:
            self._place.catch_up()
            return self._place.number

    def snapshot(self) -> KeySnapshot:
        """Return all keys and grants, and the version they are of, read at once."""
        with _storage_errors(), self._following:
            self._place.catch_up()
            records = sorted(self._records.values(), key=lambda record: (record.created, record.key_id))
            grants = sorted(self._grants, key=lambda grant: (grant.adapter, grant.tenant))
            return KeySnapshot(self._place.number, tuple(records), tuple(grants))

    def add(self, record: KeyRecord) -> None:
        """Keep a new key."""
        self._change(lambda: KeyChange(records=(self._new(record),)))

    def revoke(self, key_id: str, *, now: int) -> KeyRecord:
        """Make a key invalid for ever; revoking twice keeps the first time. Raises KeyNotFound."""

        def decide() -> KeyChange:
            record = self._known(key_id)
            return KeyChange() if record.revoked is not None else KeyChange(records=(replace(record, revoked=now),))

        self._change(decide)
        return self._records[key_id]

    def rotate(self, key_id: str, successor: KeyRecord, *, until: int) -> KeyRecord:
        """Keep `successor` and let the old key end at `until` at the latest, both or neither. Raises KeyNotFound."""
        self._change(lambda: KeyChange(records=(ends_by(self._known(key_id), until), self._new(successor))))
        return self._records[key_id]

    def grant(self, grant: Grant) -> None:
        """Let a tenant use an adapter; twice is once."""
        self._change(lambda: KeyChange() if grant in self._grants else KeyChange(granted=(grant,)))

    def withdraw(self, adapter: str, tenant: str | None) -> int:
        """Take back one tenant's grant, or all of an adapter's; return how many there were."""

        def decide() -> KeyChange:
            given = (grant for grant in self._grants if grant.adapter == adapter and tenant in (None, grant.tenant))
            return KeyChange(withdrawn=tuple(sorted(given, key=lambda grant: grant.tenant)))

        return len(self._change(decide).withdrawn)

    def close(self) -> None:
        """Nothing is held between calls."""

    def _found(self, mark: str, begin: Callable[[], KeyChange]) -> None:
        with self._journal.lock.held():
            if self._journal.read(0) is None:
                change = replace(begin(), pepper_mark=mark)
                self._journal.append(0, write_entry(KeyEntry(0, NOTHING_BEFORE, change)))

    def _change(self, decide: Decide) -> KeyChange:
        """Let `decide` see everything, write down what it says and follow it; what changes nothing is not written."""
        with _storage_errors(), self._journal.lock.held(), self._following:
            while True:
                self._place.catch_up_wholly()
                entry = KeyEntry(self._place.number + 1, self._place.last, decide())
                if entry.change == KeyChange():
                    return entry.change
                if self._journal.append(entry.number, write_entry(entry)):
                    self._place.catch_up()
                    self._fold_if_long()
                    return entry.change

    def _fold_if_long(self) -> None:
        """Write everything as one entry; what came before the last such entry goes, so that nobody lacks the next."""
        before, place = self._fold, self._place
        least = max(self._fold_changes, (len(self._records) + len(self._grants)) // _FOLD_SHARE)
        if place.number - before < least:
            return
        everything = KeyChange(tuple(self._records.values()), tuple(self._grants), (), self._mark, is_everything=True)
        entry = KeyEntry(place.number + 1, place.last, everything)
        with suppress(StoreError):
            # the change itself is durable; the next one tries again
            if self._journal.append(entry.number, write_entry(entry)):
                place.catch_up()
                if before > self._journal.checkpoint():
                    self._journal.forget_before(before)

    def _take(self, entry: KeyEntry) -> None:
        change = entry.change
        changed = {record.key_id: record for record in change.records}
        if change.is_everything:
            # whoever reads one key meanwhile finds it in the one or in the other
            self._records, self._grants, self._fold = changed, set(change.granted), entry.number
        else:
            self._records.update(changed)
            self._grants = (self._grants | set(change.granted)) - set(change.withdrawn)
        self._mark = change.pepper_mark or self._mark

    def _known(self, key_id: str) -> KeyRecord:
        record = self._records.get(key_id)
        if record is None:
            raise unknown_key(key_id)
        return record

    def _new(self, record: KeyRecord) -> KeyRecord:
        if record.key_id in self._records:
            raise StorageFailed("a key of this id is there already; make another one")
        return record


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (StoreError, OSError) as error:
        raise Unavailable(
            "the store of API keys cannot be read or written; try again later", code="key_store_unavailable"
        ) from error
