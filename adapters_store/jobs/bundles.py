"""Folders of files in an object store: a few objects, and last an index with the hash of each.

Owns the index's form. Invariants: a bundle without index is none; what is fetched matches its index byte by byte, or is
not there; a bundle that is written again under its key holds the same bytes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from adapters_store.errors import CorruptUpload, StorageFailed, storage_errors
from adapters_store.file_system import FileSystem, WrittenFile, write_pieces
from adapters_store.json_values import integer, json_object, text
from adapters_store.object_store import ObjectStore
from adapters_store.strict_json import Json, canonical_json, read_json

INDEX = "index.json"
_MAX_INDEX_BYTES = 1 << 20


Index = Mapping[str, WrittenFile]


class Bundles:
    """The bundles under one prefix of an object store. Thread-safe."""

    def __init__(self, objects: ObjectStore, files: FileSystem) -> None:
        self._objects = objects
        self._files = files

    def write(self, key: str, folder: Path) -> None:
        """Write a folder that nobody else changes; durable when this returns. Raises StoreAway, StorageFailed."""
        index: dict[str, WrittenFile] = {}
        with storage_errors():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths:
            name = path.relative_to(folder).as_posix()
            index[name] = _facts_of(path)
            self._objects.put_file(f"{key}/{name}", path)
        self.close(key, index)

    def close(self, key: str, index: Index) -> None:
        """Write the index of files that are there; raises StoreAway."""
        facts: dict[str, Json] = {name: [file.num_bytes, file.sha256] for name, file in index.items()}
        self._objects.put(f"{key}/{INDEX}", canonical_json({"files": facts}))

    def index(self, key: str) -> Index | None:
        """Return what a bundle holds, None if there is no such bundle; raises StoreAway, StorageFailed."""
        try:
            raw = self._objects.get(f"{key}/{INDEX}", max_bytes=_MAX_INDEX_BYTES)
            return None if raw is None else _read_index(raw)
        except CorruptUpload as error:
            raise StorageFailed(f"{key}/{INDEX} is damaged; restore it from a backup") from error

    def copy_file(self, source: str, target: str) -> None:
        """Copy an object inside the store; raises FileNotFoundError, StoreAway."""
        self._objects.copy(source, target)

    def fetch(self, key: str, target: Path) -> None:
        """Make a new folder with a bundle's files; what is left of a failed fetch is the caller's to remove.

        Raises:
            FileNotFoundError: there is no such bundle. StorageFailed: it is damaged, or the disk fails. StoreAway.
        """
        index = self.index(key)
        if index is None:
            raise FileNotFoundError(key)
        with storage_errors():
            target.mkdir(mode=0o700, parents=True)
            for name, facts in index.items():
                path = target / name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                pieces = self._objects.pieces(f"{key}/{name}")
                if write_pieces(self._files, path, pieces, max_bytes=facts.num_bytes) != facts:
                    raise StorageFailed(f"{key}/{name} is damaged in the object store; restore it from a backup")

    def remove(self, key: str) -> None:
        """Remove a bundle, and all below its key; the index goes first. Raises StoreAway."""
        found = [listed.key for listed in self._objects.list(key)]
        for name in sorted(found, key=lambda name: not name.endswith(f"/{INDEX}")):
            self._objects.delete(name)


def _read_index(raw: bytes) -> Index:
    """Read an index; raises CorruptUpload."""
    said = read_json(raw, INDEX, max_bytes=_MAX_INDEX_BYTES)
    try:
        return {name: _read_facts(value) for name, value in json_object(said["files"]).items() if _is_inside(name)}
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptUpload(f"{INDEX} is of another form") from error


def _facts_of(path: Path) -> WrittenFile:
    with storage_errors(), path.open("rb") as file:
        return WrittenFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _read_facts(value: Json) -> WrittenFile:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("not two facts")
    return WrittenFile(integer(value[0]), text(value[1]))


def _is_inside(name: str) -> bool:
    """Say whether a name stays inside its folder; raises ValueError, since no bundle of ours has another."""
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("a name outside of the bundle")
    return True
