"""The tables of jobs and data files as replicas and workers share them: a journal that all follow, wherever it lies.

Owns the order of a change: decided against all changes before it, written to the journal, kept; decided anew if
somebody else's came first, which a lock excludes in a folder and nothing does in an object store. The journal alone is
the truth, as for keys: no job passes through Redis, so whatever happens to Redis neither loses a job nor stops a
worker. Invariants: a change is durable before `write` returns, or there is none, or an error says that there may be
one; each change sees all that anybody changed before it; the copy that queries run on is private, and made anew from
the journal at each start.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapters_store.change_log import ChangeLog
from adapters_store.durable_sqlite import transaction
from adapters_store.errors import StoreAway, StoreError
from adapters_store.followed_journal import FollowedJournal
from adapters_store.jobs.database import SCHEMA, Answer, sqlite_errors
from adapters_store.jobs.row_changes import (
    RowChanges,
    RowEntry,
    all_rows,
    apply,
    count_rows,
    forget_changes,
    noted_changes,
    read_entry,
    watch_changes,
    write_entry,
)
from adapters_store.journal import NOTHING_BEFORE

logger = logging.getLogger("chorale.training")

# the journal is folded when it has so many entries, with a quarter as many rows in them as there are: that costs each
# row that changes the writing of four others at most
FOLD_ENTRIES, _FOLD_SHARE = 1000, 4
# a place that did not answer is not asked again for so long, or all who wait would wait for a time limit each
_AWAY_S = 1.0


class _OvertakenError(Exception):
    """Somebody else's change got the number."""


class SharedRows:
    """`TrainingRows` over a journal, on any number of machines."""

    def __init__(
        self,
        journal: ChangeLog,
        clock: Callable[[], float],
        *,
        begin: Callable[[], RowChanges] | None = None,
        fold_entries: int = FOLD_ENTRIES,
    ) -> None:
        """Read the journal, founding it if it is new.

        Args:
            begin: what a new journal begins with; called under the journal's lock.
        Raises:
            StorageFailed, StoreFull: it cannot be read or written, or is damaged.
        """
        self.clock = clock
        self._journal = journal
        self._fold_entries = fold_entries
        self._lock = threading.Lock()
        self._place = FollowedJournal(journal, what="the store's training jobs", read=self._parse, take=self._take)
        # the newest entry that holds everything
        self._checkpoint = 0
        self._away_until_s = 0.0
        # rows in the entries since the checkpoint
        self._num_changed = 0
        with sqlite_errors():
            # without a name: a file of SQLite's own that nobody else sees, and that is gone with the connection
            self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.executescript(SCHEMA)
            watch_changes(self._connection)
        try:
            self._found(begin)
            with self.read():
                pass
        except BaseException:
            self._connection.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Let the block see all that was changed before; raises StorageFailed."""
        with self._lock, sqlite_errors():
            with self._asking():
                self._place.catch_up()
            yield self._connection

    def write(self, change: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """Run a change as one transaction that is in the journal when this returns; again if another came first.

        Raises:
            StorageFailed, StoreFull: nothing was changed, or it may have been. What `change` raises: nothing was.
        """
        with self._lock, self._asking(), self._journal.lock.held(), sqlite_errors():
            while True:
                self._place.catch_up_wholly()
                try:
                    answer = self._try(change)
                except _OvertakenError:
                    continue
                self._fold_if_long()
                return answer

    def close(self) -> None:
        """Give back the connection."""
        with self._lock:
            self._connection.close()

    def _found(self, begin: Callable[[], RowChanges] | None) -> None:
        with self._journal.lock.held():
            if self._journal.read(0) is None:
                changes = RowChanges({}, is_everything=True) if begin is None else begin()
                self._journal.append(0, write_entry(RowEntry(0, NOTHING_BEFORE, changes), self._connection))

    def _try(self, change: Callable[[sqlite3.Connection], Answer]) -> Answer:
        payload = None
        with transaction(self._connection) as db:
            forget_changes(db)
            answer = change(db)
            changes = noted_changes(db)
            if changes.rows:
                # an error takes the transaction back; if the entry is there nevertheless, the next one finds it
                payload = self._append(changes)
        if payload is not None:
            self._place.advance(payload)
            self._num_changed += changes.num_rows
        return answer

    def _append(self, changes: RowChanges) -> bytes:
        """Return the payload that is in the journal now; raises _OvertakenError."""
        number = self._place.number + 1
        payload = write_entry(RowEntry(number, self._place.last, changes), self._connection)
        if not self._journal.append(number, payload):
            raise _OvertakenError
        return payload

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Refuse at once while the journal's place is known not to answer; callers hold `_lock`."""
        if time.monotonic() < self._away_until_s:
            raise StoreAway()
        try:
            yield
        except StoreAway:
            self._away_until_s = time.monotonic() + _AWAY_S
            raise

    def _parse(self, payload: bytes, number: int) -> RowEntry:
        return read_entry(payload, number, self._connection)

    def _take(self, entry: RowEntry) -> None:
        with transaction(self._connection) as db:
            apply(db, entry.changes)
            forget_changes(db)
        if entry.is_everything:
            self._checkpoint, self._num_changed = entry.number, 0
        else:
            self._num_changed += entry.changes.num_rows

    def _fold_if_long(self) -> None:
        """Write all rows as one entry, if they are many.

        What came before the last such entry goes, so that nobody who looks now and then lacks what comes next.
        """
        before = self._checkpoint
        if self._place.number - before < self._fold_entries:
            return
        if self._num_changed < count_rows(self._connection) // _FOLD_SHARE:
            return
        try:
            payload = self._append(all_rows(self._connection))
            self._place.advance(payload)
            self._checkpoint, self._num_changed = self._place.number, 0
            if before > self._journal.checkpoint():
                self._journal.forget_before(before)
        except _OvertakenError:
            # whoever came first folds
            return
        except StoreError as error:
            # what was asked for is durable; the next change tries again
            logger.warning("the journal of training jobs was not folded: %s", error.message)
