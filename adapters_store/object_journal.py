"""A journal in an object store, for replicas that share no folder: one object per entry.

Owns the objects under two prefixes, the entries' and the checkpoints'. Who gets a number is decided by the store
itself, which creates a name once (`If-None-Match: *`); so there is no lock, and whoever loses decides anew. Invariants:
those of `change_log`; each entry holds the SHA-256 of its payload; no object is ever written twice.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from adapters_store.errors import CorruptUpload, StorageFailed
from adapters_store.object_store import ObjectStore

# entries hold one version's facts; a fold holds all of them
_MAX_ENTRY_BYTES = 256 << 20
# a checkpoint matters to those that are far behind alone, and asking costs a request
_CHECKPOINT_AGE_S = 2.0


class NoLock:
    """There is nothing that could hold writers apart between machines."""

    def held(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()


class ObjectJournal:
    """A `ChangeLog` of one store. Any number of processes on any number of machines."""

    def __init__(self, objects: ObjectStore, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._objects = objects
        self._name, self._checkpoints = name, f"{name}-checkpoints"
        self._clock = clock
        self._checkpoint = 0
        self._asked_s: float | None = None
        self.lock = NoLock()

    def append(self, number: int, payload: bytes) -> bool:
        """Write entry `number` durably; False if somebody else has written it; raises StoreAway."""
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
        if self._asked_s is None or self._clock() - self._asked_s >= _CHECKPOINT_AGE_S:
            asked_s = self._clock()
            self._checkpoint = max(self._numbers_in(self._checkpoints), default=0)
            self._asked_s = asked_s
        return self._checkpoint

    def forget_before(self, number: int) -> int:
        """Let readers begin at entry `number`, remove those between it and entry 0, and return how many those were."""
        self._objects.create(f"{self._checkpoints}/{number:012d}", b"")
        self._asked_s = None
        newest = self.checkpoint()
        old = [each for each in self.numbers() if 0 < each < newest]
        for each in old:
            self._objects.delete(self._key(each))
        for each in self._numbers_in(self._checkpoints):
            if each < newest:
                self._objects.delete(f"{self._checkpoints}/{each:012d}")
        return len(old)

    def numbers(self) -> list[int]:
        """Return the numbers of all entries, in order; raises StoreAway."""
        # whoever asks wants to be sure that nothing is missing, and a fold may have happened just now
        self._asked_s = None
        return sorted(self._numbers_in(self._name))

    def _numbers_in(self, folder: str) -> list[int]:
        names = (listed.key.rpartition("/")[2] for listed in self._objects.list(folder))
        return [int(name) for name in names if name.isdecimal()]

    def _key(self, number: int) -> str:
        return f"{self._name}/{number:012d}"
