"""The two locks of a store: one that serialises changes across processes, one that says a staging folder is in use.

Owns nothing on disk but the lock file; the kernel frees both kinds when their process dies, however it dies.
Invariant: no lock outlives its holder, so nothing ever has to be unlocked by hand.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.errors import storage_errors


class StoreLock:
    """Mutual exclusion of all threads and processes that change one store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; raises StorageFailed if the lock file cannot be used."""
        with self._threads:
            with storage_errors():
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with storage_errors():
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Take the folder's lock and return the descriptor that holds it; None if somebody alive holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
