"""How far one process has followed a journal: entry by entry, each known to follow the one before.

Owns the place in the journal; what an entry means is the business of whoever is given it. Invariants: `take` gets every
entry once, in order, or one that holds everything before it; each holds the hash of the one before, so a missing,
altered or exchanged one is an error that names it, and nothing is built on top of it.
"""

import hashlib
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from adapters_store.change_log import ChangeLog
from adapters_store.errors import StorageFailed, storage_errors
from adapters_store.journal import NOTHING_BEFORE


class PlacedEntry(Protocol):
    """An entry in its place: `before` is the SHA-256 of the payload of the entry before it."""

    @property
    def number(self) -> int:
        """Return its number."""
        ...

    @property
    def before(self) -> str:
        """Return what it follows."""
        ...

    @property
    def is_everything(self) -> bool:
        """Return whether it holds everything before it, so that readers may begin here."""
        ...


Entry = TypeVar("Entry", bound=PlacedEntry)


class FollowedJournal(Generic[Entry]):
    """One process's place in a journal. The caller lets one thread at a time follow."""

    def __init__(
        self,
        journal: ChangeLog,
        *,
        what: str,
        read: Callable[[bytes, int], Entry],
        take: Callable[[Entry], None],
    ) -> None:
        """Begin before the first entry.

        Args:
            what: what the journal is of, for messages: "the store's keys".
            read: returns the entry of a payload and a number; raises StorageFailed.
            take: is given each entry, under `reading`.
        """
        self._journal = journal
        self._what = what
        self._read, self._take = read, take
        # held while an entry is taken: whoever holds it sees the state and the place as of one moment
        self.reading = threading.Lock()
        self.number, self.last = -1, NOTHING_BEFORE

    def catch_up(self) -> None:
        """Follow the journal to its end; raises StorageFailed."""
        if self.number < 0:
            self._follow()
        # entries that a fold made needless may still be there: they are passed over
        while self._jump() or self._follow():
            continue

    def catch_up_wholly(self) -> None:
        """Follow it, and be sure that nothing is missing; raises StorageFailed."""
        # listed first: what others write meanwhile is no gap
        with storage_errors():
            newest = max(self._journal.numbers(), default=-1)
        self.catch_up()
        if newest > self.number:
            raise StorageFailed(
                f"change {self.number + 1} of {self._what} is missing, change {newest} is there; "
                "restore the journal from a backup"
            )

    def advance(self, payload: bytes) -> None:
        """Go behind the next entry, which the caller has appended and taken itself."""
        self.number, self.last = self.number + 1, hashlib.sha256(payload).hexdigest()

    def _follow(self) -> bool:
        payload = self._journal.read(self.number + 1)
        if payload is None:
            return False
        entry = self._read(payload, self.number + 1)
        if entry.before != self.last:
            raise StorageFailed(
                f"change {entry.number} of {self._what} does not follow change {self.number}; "
                "restore the journal from a backup, then restart"
            )
        self._go_to(entry, payload)
        return True

    def _jump(self) -> bool:
        """Go on at a checkpoint, if the changes up to there are gone."""
        number = self._journal.checkpoint()
        if number <= self.number:
            return False
        payload = self._journal.read(number)
        if payload is None and self._journal.checkpoint() > number:
            # folded once more in between
            return True
        entry = None if payload is None else self._read(payload, number)
        if payload is None or entry is None or not entry.is_everything:
            raise StorageFailed(
                f"change {number} of {self._what}, their checkpoint, is missing; restore the journal from a backup"
            )
        self._go_to(entry, payload)
        return True

    def _go_to(self, entry: Entry, payload: bytes) -> None:
        with self.reading:
            self._take(entry)
            self.number, self.last = entry.number, hashlib.sha256(payload).hexdigest()
