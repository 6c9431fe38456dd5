"""An object store in memory behind the very client that talks to S3: what needs no server to be shown.

Owns nothing but the way in. Invariant: objects of one memory see each other's writes at once, as S3 promises.
"""

from obstore.store import MemoryStore

from adapters_store.object_journal import ObjectJournal
from adapters_store.object_store import ObjectStore


class MemoryObjects(ObjectStore):
    """One process's view of an object store."""

    def __init__(self, memory: MemoryStore) -> None:
        """Look into this memory, which others may look into as well."""
        self.url = "memory://"
        self._store = self._pieces = memory  # type: ignore[assignment]


class Moments:
    """A clock on which much time passes between any two looks."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        self._now_s += 100.0
        return self._now_s


def memory_journal(memory: MemoryStore, name: str, *, kept_s: float = 3600.0) -> ObjectJournal:
    """Return one process's view of a journal, which asks for its checkpoint each time."""
    return ObjectJournal(MemoryObjects(memory), name, clock=Moments(), kept_s=kept_s)
