"""What a journal promises, wherever it lies: in a shared folder or in an object store.

Owns the protocol only. Invariants: an entry appears whole, is durable before `append` returns and never changes;
exactly one of several writers gets a number.
"""

from contextlib import AbstractContextManager
from typing import Protocol


class WriteLock(Protocol):
    """Keeps writers apart where the place can do that; where it cannot, `append` alone decides."""

    def held(self) -> AbstractContextManager[None]:
        """Hold it; raises StorageFailed."""
        ...


class ChangeLog(Protocol):
    """Numbered entries, from 0 on. Any number of processes may append; nobody overwrites."""

    @property
    def lock(self) -> WriteLock:
        """Return what callers of `append` and `forget_before` hold."""
        ...

    def append(self, number: int, payload: bytes) -> bool:
        """Write entry `number` durably; False if somebody else has written it, or may have. Callers hold `lock`.

        Raises:
            StorageFailed, StoreFull: the entry may or may not be there.
        """
        ...

    def read(self, number: int) -> bytes | None:
        """Return the payload of an entry, None if there is none (yet, or any more); raises StorageFailed."""
        ...

    def checkpoint(self) -> int:
        """Return the number of the newest entry that holds everything before it; raises StorageFailed."""
        ...

    def forget_before(self, number: int) -> int:
        """Let readers begin at entry `number`, remove those between it and entry 0, and return how many went.

        Some may stay until the next call, lest a writer that slept takes a number that was taken.
        """
        ...

    def numbers(self) -> list[int]:
        """Return the numbers of all entries that readers may need, in order; raises OSError or StorageFailed.

        Whoever appends asks before, and decides on what it then reads.
        """
        ...
