"""The signatures of a store's adapters as the engine finds them: one small file per digest and signature, in `seals/`.

Owns these files. The engine knows no registry, so whoever checks signatures (the store, at the upload and at each use)
leaves here what it checked. Invariants: a file appears whole and never changes; what stands in it is believed by nobody
who does not verify it.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store.errors import CorruptUpload, storage_errors
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.json_values import text
from adapters_store.signatures import Facts, Status
from adapters_store.strict_json import canonical_json, read_json

_MAX_BYTES = 2 << 20
# what was left without its object by an upload that failed
_ORPHAN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Seal:
    """One signature that a version of this digest came with: whose it is, and over which files."""

    owner: str
    bundle: str
    files_digest: str


class Seals:
    """The seals of one store. Thread-safe, for any number of processes."""

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        self._root = root / "seals"
        self._files = files or FileSystem()

    def keep(self, digest: str, owner: str, facts: Facts | None) -> None:
        """Leave a verified signature for the engine; there is nothing to leave of others. Raises StorageFailed."""
        if facts is None or facts.get("status") != Status.VERIFIED.value:
            return
        seal = {"owner": owner, "bundle": facts["bundle"], "files_digest": facts["files_digest"]}
        data = canonical_json(seal)
        path = self._root / digest / f"{hashlib.sha256(data).hexdigest()}.json"
        # one that was changed is made good: the caller has verified this one
        with suppress(OSError):
            if path.read_bytes() == data:
                return
        with storage_errors():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            descriptor = self._files.create(temporary)
            try:
                self._files.write(descriptor, data)
            finally:
                self._files.close(descriptor)
            # nothing is synced: what a crash takes is left here again at the next use
            self._files.rename(temporary, path)

    def of(self, digest: str) -> list[Seal]:
        """Return what was left of a digest; what cannot be read is none. Raises StorageFailed."""
        found = []
        with storage_errors():
            folder = self._root / digest
            for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
                with suppress(CorruptUpload, KeyError, TypeError, OSError), open_regular(path) as file:
                    said = read_json(file.read(_MAX_BYTES + 1), "the seal", max_bytes=_MAX_BYTES)
                    found.append(Seal(text(said["owner"]), text(said["bundle"]), text(said["files_digest"])))
        return found

    def sweep(self, needed: Collection[str]) -> None:
        """Remove the old ones of digests that nothing needs; raises StorageFailed. Callers hold the store's lock."""
        if not self._root.is_dir():
            return
        with storage_errors():
            for entry in list(os.scandir(self._root)):
                if entry.name not in needed and time.time() - entry.stat().st_mtime > _ORPHAN_S:
                    self._files.remove_tree(Path(entry.path))
