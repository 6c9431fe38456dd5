"""The tables of jobs and data files as replicas and workers share them: a journal in the shared folder that all follow.

Owns the order of a change: decided against all changes before it, written to the journal, kept. The journal alone is
the truth, as for keys: no job passes through Redis, so whatever happens to Redis neither loses a job nor stops a
worker. Invariants: a change is durable before the block that made it is left, or there is none; each block sees all
that anybody changed before it; the copy that queries run on is private, and made anew from the journal at each start.
"""

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapters_store.change_log import ChangeLog
from adapters_store.durable_sqlite import transaction
from adapters_store.errors import StorageFailed, StoreError, storage_errors
from adapters_store.jobs.database import SCHEMA, sqlite_errors
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
        self._number, self._last, self._checkpoint = -1, NOTHING_BEFORE, 0
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
            self._catch_up()
            yield self._connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction that is in the journal at its end; raises StorageFailed, StoreFull."""
        with self._lock, self._journal.lock.held(), sqlite_errors():
            self._catch_up_wholly()
            payload = None
            with transaction(self._connection) as db:
                forget_changes(db)
                yield db
                changes = noted_changes(db)
                if changes.rows:
                    # an error takes the transaction back; if the entry is there nevertheless, the next block finds it
                    payload = self._append(changes)
            if payload is not None:
                self._go_to(self._number + 1, payload)
                self._num_changed += changes.num_rows
                self._fold_if_long()

    def close(self) -> None:
        """Give back the connection."""
        with self._lock:
            self._connection.close()

    def _found(self, begin: Callable[[], RowChanges] | None) -> None:
        with self._journal.lock.held():
            if self._journal.read(0) is None:
                changes = RowChanges({}, is_everything=True) if begin is None else begin()
                self._journal.append(0, write_entry(RowEntry(0, NOTHING_BEFORE, changes), self._connection))

    def _append(self, changes: RowChanges) -> bytes:
        number = self._number + 1
        payload = write_entry(RowEntry(number, self._last, changes), self._connection)
        if not self._journal.append(number, payload):
            raise StorageFailed(
                "the store's training jobs were changed at the same moment, in spite of the lock; the shared folder "
                "must have a working flock"
            )
        return payload

    def _catch_up(self) -> None:
        while self._follow() or self._jump():
            continue

    def _catch_up_wholly(self) -> None:
        # listed first: what others write meanwhile is no gap
        with storage_errors():
            newest = max(self._journal.numbers(), default=-1)
        self._catch_up()
        if newest > self._number:
            raise StorageFailed(
                f"change {self._number + 1} of the store's training jobs is missing, change {newest} is there; "
                "restore the folder from a backup"
            )

    def _follow(self) -> bool:
        payload = self._journal.read(self._number + 1)
        if payload is None:
            return False
        entry = read_entry(payload, self._number + 1, self._connection)
        if entry.before != self._last:
            raise StorageFailed(
                f"change {entry.number} of the store's training jobs does not follow change {self._number}; "
                "restore the folder from a backup, then restart"
            )
        self._take(entry, payload)
        return True

    def _jump(self) -> bool:
        """Go on at a checkpoint, if the changes up to there are gone."""
        number = self._journal.checkpoint()
        if number <= self._number:
            return False
        payload = self._journal.read(number)
        if payload is None and self._journal.checkpoint() > number:
            # folded once more in between
            return True
        entry = None if payload is None else read_entry(payload, number, self._connection)
        if payload is None or entry is None or not entry.changes.is_everything:
            raise StorageFailed(f"change {number} of the store's training jobs, their checkpoint, is missing")
        self._take(entry, payload)
        return True

    def _take(self, entry: RowEntry, payload: bytes) -> None:
        with transaction(self._connection) as db:
            apply(db, entry.changes)
            forget_changes(db)
        if entry.changes.is_everything:
            self._checkpoint, self._num_changed = entry.number, 0
        else:
            self._num_changed += entry.changes.num_rows
        self._go_to(entry.number, payload)

    def _go_to(self, number: int, payload: bytes) -> None:
        self._number, self._last = number, hashlib.sha256(payload).hexdigest()

    def _fold_if_long(self) -> None:
        """Write all rows as one entry and forget those before, if they are many; callers hold the journal's lock."""
        if self._number - self._checkpoint < self._fold_entries:
            return
        if self._num_changed < count_rows(self._connection) // _FOLD_SHARE:
            return
        try:
            payload = self._append(all_rows(self._connection))
            self._go_to(self._number + 1, payload)
            self._checkpoint, self._num_changed = self._number, 0
            self._journal.forget_before(self._number)
        except StoreError as error:
            # what was asked for is durable; the next change tries again
            logger.warning("the journal of training jobs was not folded: %s", error.message)
