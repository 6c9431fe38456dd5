"""What one process knows of a store's journal: it follows it, entry by entry, and answers from memory.

Owns the state and the place in the journal. Invariants: the state is what the entries up to `number` come to, each of
which holds the hash of the one before; readers wait for moments only, never for the disk.
"""

import hashlib
import threading
from collections.abc import Callable
from typing import TypeVar

from adapters_store.change_log import ChangeLog
from adapters_store.errors import StorageFailed, storage_errors
from adapters_store.journal import NOTHING_BEFORE
from adapters_store.registry_changes import Change, Entry, Everything, read_entry
from adapters_store.registry_state import RegistryState

Answer = TypeVar("Answer")


class JournalReader:
    """Follows one journal. For any thread: one at a time follows, and those that read do not wait for it."""

    def __init__(self, journal: ChangeLog) -> None:
        self._journal = journal
        self._following, self._reading = threading.Lock(), threading.Lock()
        self._state = RegistryState()
        self.number, self.last = -1, NOTHING_BEFORE

    def read(self, question: Callable[[RegistryState], Answer]) -> Answer:
        """Return what the state answers, as of one moment."""
        with self._reading:
            return question(self._state)

    def next_entry(self, decide: Callable[[RegistryState], Change | None]) -> Entry | None:
        """Return the entry of what `decide` says to the state, in the place behind all that it saw; None: nothing."""
        with self._reading:
            change = decide(self._state)
            return None if change is None else Entry(self.number + 1, self.last, change)

    def catch_up(self) -> None:
        """Follow the journal to its end; raises StorageFailed."""
        with self._following:
            while self._follow() or self._jump():
                continue

    def catch_up_wholly(self) -> None:
        """Follow it, and be sure that nothing is missing; raises StorageFailed."""
        # listed first: what others write meanwhile is no gap
        with storage_errors():
            newest = max(self._journal.numbers(), default=-1)
        self.catch_up()
        if newest > self.number:
            raise StorageFailed(
                f"change {self.number + 1} of the store's journal is missing, change {newest} is there; "
                "restore the journal folder from a backup"
            )

    def _follow(self) -> bool:
        payload = self._journal.read(self.number + 1)
        if payload is None:
            return False
        entry = read_entry(payload, self.number + 1)
        if entry.before != self.last:
            raise StorageFailed(
                f"change {entry.number} of the store's journal does not follow change {self.number}; "
                "restore the journal folder from a backup, then restart"
            )
        self._take(entry, payload)
        return True

    def _jump(self) -> bool:
        """Go on at a checkpoint, if the changes up to there are gone."""
        number = self._journal.checkpoint()
        if number <= self.number:
            return False
        payload = self._journal.read(number)
        entry = None if payload is None else read_entry(payload, number)
        if payload is None or entry is None or not isinstance(entry.change, Everything):
            raise StorageFailed(f"change {number} of the store's journal, its checkpoint, is missing")
        self._take(entry, payload)
        return True

    def _take(self, entry: Entry, payload: bytes) -> None:
        with self._reading:
            self._state.apply(entry.change)
            self.number, self.last = entry.number, hashlib.sha256(payload).hexdigest()
