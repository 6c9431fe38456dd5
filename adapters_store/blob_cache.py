"""Objects that lie in an object store, and the folder of a replica that holds copies of some of them.

Owns the way there (`share`), the way here (`bring`) and the copies' room on the disk. Invariants: a copy appears under
`objects` whole, after every byte of it was hashed, or not at all; a copy or an object that does not match its digest is
set aside or refused, and never served; the newest copies stay within `max_bytes`, and one that goes can come again.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapters_store.blobs import HashedBytes, ImageHeads, OpenAdapter, map_file, open_image
from adapters_store.errors import AdapterCorrupt, CorruptUpload, StoreError, storage_errors
from adapters_store.file_system import FileSystem, WrittenFile, write_pieces
from adapters_store.locks import StoreLock, lock_folder
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from adapters_store.object_store import ObjectStore
from adapters_store.staging import Staging

OBJECTS = "objects"
_FETCHES, _ASIDE = "fetches", "damaged"


class BlobCache:
    """The copies in one replica's folder. Thread-safe; its API and engine processes have one each."""

    def __init__(self, root: Path, objects: ObjectStore, *, max_bytes: int) -> None:
        """Use `root`, and remove what fetches of dead processes left there; raises StorageFailed."""
        self._objects = objects
        self._max_bytes = max_bytes
        self._files = FileSystem()
        self._heads = ImageHeads()
        self._copies, self._fetches, self._aside = root / OBJECTS, root / _FETCHES, root / _ASIDE
        self._lock = StoreLock(root / "lock")
        with storage_errors():
            for folder in (root, self._copies, self._fetches):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock.held(), storage_errors():
            Staging(self._fetches, self._files).sweep()

    def share(self, folder: Path, digest: str) -> None:
        """Write an object's two files to the object store; durable when this returns. Raises StoreAway, StorageFailed.

        The manifest comes last: an object without one is none.
        """
        # a store that is silent is found out by a small question, not by the time limit of a large answer
        self._objects.exists(f"{OBJECTS}/{digest}/{MANIFEST_NAME}")
        for name in (IMAGE_NAME, MANIFEST_NAME):
            self._objects.put_file(f"{OBJECTS}/{digest}/{name}", folder / name)

    def open(self, digest: str, bring: Callable[[BinaryIO, int], HashedBytes] = map_file) -> OpenAdapter:
        """Open an image as `blobs.open_image` does, fetched if it is not here, or not whole.

        Raises:
            AdapterCorrupt: the object store has none, or a damaged one. StoreAway: it does not answer.
        """
        if self.bring(digest):
            return open_image(self._copies, digest, bring, self._heads)
        try:
            return open_image(self._copies, digest, bring, self._heads)
        except AdapterCorrupt:
            self._set_aside(digest)
        self.bring(digest)
        return open_image(self._copies, digest, bring, self._heads)

    def bring(self, digest: str) -> bool:
        """See that a copy is here; return whether it had to be fetched. Raises as `open`."""
        try:
            # the copies that were used last stay longest
            os.utime(self._copies / digest)
        except FileNotFoundError:
            self._fetch(digest)
            return True
        return False

    def is_intact(self, digest: str) -> bool:
        """Read the object in the object store and say whether every byte matches its digest; raises StoreAway."""
        try:
            manifest, _ = self._manifest(digest)
            hashed = hashlib.sha256()
            for piece in self._objects.pieces(f"{OBJECTS}/{digest}/{IMAGE_NAME}"):
                hashed.update(piece)
        except AdapterCorrupt:
            return False
        return hashed.hexdigest() == manifest.file_sha256

    def _fetch(self, digest: str) -> None:
        manifest, raw = self._manifest(digest)
        with self._place() as folder, storage_errors():
            write_pieces(self._files, folder / MANIFEST_NAME, [raw], max_bytes=len(raw))
            pieces = self._objects.pieces(f"{OBJECTS}/{digest}/{IMAGE_NAME}")
            found = write_pieces(self._files, folder / IMAGE_NAME, pieces, max_bytes=manifest.file_bytes)
            if found != WrittenFile(manifest.file_bytes, manifest.file_sha256):
                raise _damaged(digest)
            # not synced: a copy that a power loss tears is set aside and fetched again
            try:
                self._files.rename(folder, self._copies / digest)
            except OSError:
                # somebody else was faster, unless it is the disk
                if not (self._copies / digest).is_dir():
                    raise
            self._make_room(digest)

    def _manifest(self, digest: str) -> tuple[Manifest, bytes]:
        try:
            raw = self._objects.get(f"{OBJECTS}/{digest}/{MANIFEST_NAME}", max_bytes=MAX_MANIFEST_BYTES)
            if raw is None:
                raise AdapterCorrupt(f"the object store has no adapter {digest[:12]}; upload it again")
            if hashlib.sha256(raw).hexdigest() != digest:
                raise _damaged(digest)
            return parse_manifest(raw), raw
        except CorruptUpload as error:
            raise _damaged(digest) from error

    @contextmanager
    def _place(self) -> Iterator[Path]:
        """Make a folder for one fetch, and remove what is left of it."""
        folder = self._fetches / uuid.uuid4().hex
        # under the lock that sweeps hold: a folder that nobody has locked yet would look like a dead process's
        with self._lock.held(), storage_errors():
            self._files.make_dir(folder)
            lock = lock_folder(folder)
        try:
            yield folder
        finally:
            with suppress(OSError):
                self._files.remove_tree(folder)
            if lock is not None:
                os.close(lock)

    def _set_aside(self, digest: str) -> None:
        """Keep a damaged copy where nobody opens it, for whoever wants to know what happened to the disk."""
        with storage_errors(), suppress(FileNotFoundError):
            self._aside.mkdir(mode=0o700, exist_ok=True)
            self._files.rename(self._copies / digest, self._aside / f"{digest}.{uuid.uuid4().hex[:8]}")

    def _make_room(self, newest: str) -> None:
        """Remove the copies that were used longest ago, but never the one that is here for a reader right now."""
        found = sorted((path.stat().st_mtime, _size_of(path), path) for path in self._copies.iterdir())
        num_bytes = sum(size for _, size, _ in found)
        for _, size, path in found:
            if num_bytes <= self._max_bytes:
                return
            if path.name != newest:
                with suppress(OSError):
                    self._files.remove_tree(path)
                num_bytes -= size


def _size_of(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def _damaged(digest: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"adapter {digest[:12]} is damaged in the object store; upload it again")


def damage_of(cache: BlobCache, digest: str) -> str:
    """Return what is wrong with an object in the object store, "" for nothing."""
    try:
        return "" if cache.is_intact(digest) else _damaged(digest).message
    except StoreError as error:
        return error.message
