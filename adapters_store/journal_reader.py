"""What one process knows of a store's journal: it follows it, entry by entry, and answers from memory.

Owns the state. Invariants: the state is what the entries up to `number` come to; readers wait for moments only, never
for the disk.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

from adapters_store.change_log import ChangeLog
from adapters_store.followed_journal import FollowedJournal
from adapters_store.registry_changes import Change, Entry, read_entry
from adapters_store.registry_state import RegistryState

Answer = TypeVar("Answer")


class JournalReader:
    """Follows one journal. For any thread: one at a time follows, and those that read do not wait for it."""

    def __init__(self, journal: ChangeLog) -> None:
        self._following = threading.Lock()
        self._state = RegistryState()
        self._place = FollowedJournal(journal, what="the store's journal", read=read_entry, take=self._take)

    @property
    def number(self) -> int:
        """Return the number of the newest entry that was followed."""
        return self._place.number

    def read(self, question: Callable[[RegistryState], Answer]) -> Answer:
        """Return what the state answers, as of one moment."""
        with self._place.reading:
            return question(self._state)

    def next_entry(self, decide: Callable[[RegistryState], Change | None]) -> Entry | None:
        """Return the entry of what `decide` says to the state, in the place behind all that it saw; None: nothing."""
        with self._place.reading:
            change = decide(self._state)
            return None if change is None else Entry(self._place.number + 1, self._place.last, change)

    def catch_up(self) -> None:
        """Follow the journal to its end; raises StorageFailed."""
        with self._following:
            self._place.catch_up()

    def catch_up_wholly(self) -> None:
        """Follow it, and be sure that nothing is missing; raises StorageFailed."""
        with self._following:
            self._place.catch_up_wholly()

    def _take(self, entry: Entry) -> None:
        self._state.apply(entry.change)
