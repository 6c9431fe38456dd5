"""A journal in an object store, for replicas that share no folder: one object per entry.

Owns the objects under two prefixes, the entries' and the checkpoints'. Who gets a number is decided by the store
itself, which creates a name once (`If-None-Match: *`); so there is no lock, and whoever loses decides anew. But a name
whose object is gone can be created once more: a writer that slept while others wrote and folded would get a number that
was taken. So entries outlive the fold that made them needless by an hour, and whoever looked at the journal longer ago
than half of that looks again. Invariants: those of `change_log`; each entry holds the SHA-256 of its payload; no object
is ever written twice.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

from adapters_store.errors import CorruptUpload, StorageFailed
from adapters_store.object_store import Listed, ObjectStore

# entries hold one version's facts; a fold holds all of them
_MAX_ENTRY_BYTES = 256 << 20
# a checkpoint matters to those that are far behind alone, and asking costs a request
_CHECKPOINT_AGE_S = 2.0
# entries that a fold made needless stay so long, by the store's own clock
_KEPT_S = 3600.0


class NoLock:
    """There is nothing that could hold writers apart between machines."""

    def held(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()


class ObjectJournal:
    """A `ChangeLog` of one store. Any number of processes on any number of machines."""

    def __init__(
        self, objects: ObjectStore, name: str, *, clock: Callable[[], float] = time.time, kept_s: float = _KEPT_S
    ) -> None:
        """Own the prefix `name`.

        Args:
            clock: seconds that pass while the machine sleeps, too.
            kept_s: how long entries outlive a fold; with 0 nobody may write beside whoever folds.
        """
        self._objects = objects
        self._name, self._checkpoints = name, f"{name}-checkpoints"
        self._clock, self._kept_s = clock, kept_s
        self._checkpoint = 0
        self._asked_s: float | None = None
        self._looked_s: float | None = None
        self.lock = NoLock()

    def append(self, number: int, payload: bytes) -> bool:
        """Write entry `number` durably; raises StoreAway.

        Returns:
            False if somebody else has written it, or may have: `numbers` was asked too long ago to tell.
        """
        # entry 0 stays for ever
        if number and self._kept_s and not self._is_fresh(self._looked_s, self._kept_s / 2):
            return False
        return self._objects.create(self._key(number), hashlib.sha256(payload).hexdigest().encode() + b" " + payload)

    def read(self, number: int) -> bytes | None:
        """Return the payload of an entry, None if there is none (yet, or any more); raises StoreAway, StorageFailed."""
        try:
            line = self._objects.read_created(self._key(number), max_bytes=_MAX_ENTRY_BYTES)
        except CorruptUpload as error:
            raise StorageFailed(error.message) from error
        if line is None:
            if number <= self._checkpoint:
                # folded away: there is a newer one
                self._asked_s = None
            return None
        claimed, _, payload = line.partition(b" ")
        if hashlib.sha256(payload).hexdigest().encode() != claimed:
            raise StorageFailed(
                f"change {number} of the store's journal is damaged; restore {self._key(number)} from a backup"
            )
        return payload

    def checkpoint(self) -> int:
        """Return the number of the newest entry that holds everything before it; 0: begin at the beginning."""
        if not self._is_fresh(self._asked_s, _CHECKPOINT_AGE_S):
            asked_s = self._clock()
            self._checkpoint = max((number for number, _ in self._numbered(self._checkpoints)), default=0)
            self._asked_s = asked_s
        return self._checkpoint

    def forget_before(self, number: int) -> int:
        """Let readers begin at entry `number`, remove what lies between it and entry 0, and return how much that was.

        What was written within the last hour stays; the next call finds it.
        """
        self._objects.create(f"{self._checkpoints}/{number:012d}", b"")
        marks = dict(self._numbered(self._checkpoints))
        newest = max(marks)
        self._asked_s = None
        until = marks[newest].modified - timedelta(seconds=self._kept_s)
        entries = self._numbered(self._name)
        old = [each for each, listed in entries if 0 < each < newest and listed.modified <= until]
        for each in old:
            self._objects.delete(self._key(each))
        for each, mark in marks.items():
            if each < newest:
                self._objects.delete(mark.key)
        return len(old)

    def numbers(self) -> list[int]:
        """Return the numbers of all entries from the checkpoint on, in order; raises StoreAway."""
        # whoever asks wants to be sure that nothing is missing, and a fold may have happened just now
        self._asked_s, looked_s = None, self._clock()
        checkpoint = self.checkpoint()
        after = self._key(checkpoint - 1) if checkpoint else None
        found = sorted(number for number, _ in self._numbered(self._name, after=after))
        self._looked_s = looked_s
        return found

    def _is_fresh(self, since_s: float | None, age_s: float) -> bool:
        # a clock that was put back says nothing
        return since_s is not None and 0 <= self._clock() - since_s < age_s

    def _numbered(self, folder: str, *, after: str | None = None) -> Iterator[tuple[int, Listed]]:
        for listed in self._objects.list(folder, after=after):
            name = listed.key.rpartition("/")[2]
            if name.isdecimal():
                yield int(name), listed

    def _key(self, number: int) -> str:
        return f"{self._name}/{number:012d}"
