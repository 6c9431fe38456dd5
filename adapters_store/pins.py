"""Which adapters the operator wants in memory always, in a small file of the store's folder: `pins.json`.

Owns that file. Invariants: a change is durable when the call returns, and no other process's is lost by it; the oldest
pin comes first; a file of another form is an error that names the way out, never an empty list.
"""

import json
import os
import re
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from adapters_store.errors import StorageFailed, storage_errors
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.locks import StoreLock

PINS_FILE = "pins.json"
_MAX_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")

Pins = tuple[str, ...]


class PinStore(Protocol):
    """The digests of a store's pins, wherever they lie. Thread-safe."""

    def read(self) -> Pins:
        """Return the pins, oldest first; raises StorageFailed."""
        ...

    def add(self, digest: str) -> None:
        """Keep a pin; raises StorageFailed, StoreFull."""
        ...

    def discard(self, digests: Collection[str]) -> None:
        """Forget pins, those that there are; raises StorageFailed, StoreFull."""
        ...


def is_digest(text: str) -> bool:
    """Say whether a text can be an adapter's digest."""
    return _DIGEST.match(text) is not None


class PinsFile:
    """The digests of a store's pins. Thread-safe; any number of servers may share the folder."""

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        self._path = root / PINS_FILE
        self._files = files or FileSystem()
        self._lock = StoreLock(root / f"{PINS_FILE}.lock")
        # what was read last, and of which file: every change makes a new one
        self._known: tuple[tuple[int, int, int], Pins] | None = None

    def read(self) -> Pins:
        """Return the pins, oldest first; costs one look at the file while nothing changes. Raises StorageFailed."""
        with storage_errors():
            try:
                facts = self._path.stat()
            except FileNotFoundError:
                return ()
            stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            known = self._known
            if known is None or known[0] != stamp:
                known = self._known = (stamp, self._parse())
            return known[1]

    def add(self, digest: str) -> None:
        """Keep a pin; raises StorageFailed, StoreFull."""
        self._change(lambda pins: pins if digest in pins else (*pins, digest))

    def discard(self, digests: Collection[str]) -> None:
        """Forget pins, those that there are; raises StorageFailed, StoreFull."""
        if any(digest in digests for digest in self.read()):
            self._change(lambda pins: tuple(digest for digest in pins if digest not in digests))

    def _change(self, change: Callable[[Pins], Pins]) -> None:
        with self._lock.held():
            pins = self.read()
            changed = change(pins)
            if changed == pins:
                return
            with storage_errors():
                self._write(json.dumps({"pins": changed}).encode())

    def _write(self, data: bytes) -> None:
        temporary = self._path.with_name(f".{PINS_FILE}.{uuid.uuid4().hex}")
        descriptor = self._files.create(temporary)
        try:
            self._files.write(descriptor, data)
        finally:
            os.close(descriptor)
        self._files.sync_file(temporary)
        self._files.rename(temporary, self._path)
        self._files.sync_dir(self._path.parent)

    def _parse(self) -> Pins:
        try:
            with open_regular(self._path) as file:
                facts = json.loads(file.read(_MAX_BYTES))
            pins = facts.pop("pins")
            if facts or not all(map(is_digest, pins)):
                raise ValueError("another form")
            return tuple(dict.fromkeys(pins))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageFailed(
                f"the store's {PINS_FILE} is damaged; remove it, then pin again what is to stay in memory"
            ) from error
