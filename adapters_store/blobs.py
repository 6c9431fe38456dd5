"""Content-addressed objects in a local folder: `objects/<digest>/{adapter.json, adapter.safetensors}`.

Owns publishing by rename, opening with proof, and removal; knows no names. Invariant: a folder under `objects` appears
whole and durable or not at all, and `open_image` hands out only bytes that match the digest.
"""

import hashlib
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from adapters_store.base import BaseDims
from adapters_store.canonical import read_layout
from adapters_store.entries import NO_MODEL_ENTRIES, ModelEntries, SiteEntry, read_entries
from adapters_store.errors import AdapterCorrupt, StoreError
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    """A verified adapter image: `data` is a view of the data section in memory, not to be written to.

    `base_dependent`: only a base of the same weights may serve it. `model` is what it does outside linear layers,
    `num_virtual_tokens` the positions that it puts in front of every sequence; `activation` are the token ids from
    whose last occurrence on it acts, none: from the first.
    """

    digest: str
    dtype: str
    rank: int
    num_bytes: int
    base: BaseDims
    data: memoryview
    entries: tuple[SiteEntry, ...]
    base_dependent: bool = False
    model: ModelEntries = NO_MODEL_ENTRIES
    num_virtual_tokens: int = 0
    activation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HashedBytes:
    """A file's bytes in memory, with the SHA-256 of exactly these."""

    memory: mmap.mmap
    sha256: str


class Blobs:
    """The objects of one store. Callers serialise `publish` and `remove` by the store's lock."""

    def __init__(self, root: Path, files: FileSystem) -> None:
        self.root = root
        self._files = files

    def make_durable(self, staged: Path) -> None:
        """Flush a staged folder to the disk; slow, so before the store's lock is taken."""
        for name in (IMAGE_NAME, MANIFEST_NAME):
            self._files.sync_file(staged / name)
        self._files.sync_dir(staged)

    def publish(self, staged: Path, digest: str) -> None:
        """Move a durable staged folder to its place; returns when its name is durable too.

        An intact object of the same digest is kept; a damaged one is healed file by file.
        """
        target = self.root / digest
        if not target.is_dir():
            self._files.rename(staged, target)
        elif not self._is_intact(digest):
            for name in (IMAGE_NAME, MANIFEST_NAME):
                self._files.rename(staged / name, target / name)
            self._files.sync_dir(target)
        # also for a kept object: whoever renamed it may have died before this
        self._files.sync_dir(self.root)

    def digests(self) -> set[str]:
        """Return the digests of all objects on disk."""
        return {entry.name for entry in os.scandir(self.root)}

    def remove(self, digest: str) -> None:
        """Remove one object; images that are open keep their bytes."""
        self._files.remove_tree(self.root / digest)

    def _is_intact(self, digest: str) -> bool:
        try:
            open_image(self.root, digest)
        except AdapterCorrupt:
            return False
        return True


def map_file(file: BinaryIO, num_bytes: int) -> HashedBytes:
    """Map a file and hash the map; its pages are the page cache's."""
    memory = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    return HashedBytes(memory, hashlib.sha256(memory).hexdigest())


def open_image(objects: Path, digest: str, bring: Callable[[BinaryIO, int], HashedBytes] = map_file) -> OpenAdapter:
    """Bring an object's image into memory and hash every byte of it; needs no registry, so any process may call it.

    Args:
        bring: takes the open file and its size; what it raises that is neither OSError nor ValueError goes through.
    Raises:
        AdapterCorrupt: missing, or manifest, size, hash or header do not match the digest.
    """
    folder = objects / digest
    try:
        if not _DIGEST.match(digest):
            raise ValueError("not a digest")
        with open_regular(folder / MANIFEST_NAME) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
        if hashlib.sha256(raw).hexdigest() != digest:
            raise AdapterCorrupt(f"the manifest of adapter {digest[:12]} does not match its digest; upload it again")
        manifest = parse_manifest(raw)
        return _read_image(folder / IMAGE_NAME, manifest, digest, bring)
    except (OSError, ValueError) as error:
        raise AdapterCorrupt(f"the files of adapter {digest[:12]} cannot be read; upload it again") from error
    except AdapterCorrupt:
        raise
    except StoreError as error:
        raise AdapterCorrupt(f"adapter {digest[:12]} is damaged ({error.message}); upload it again") from error


def _read_image(
    path: Path, manifest: Manifest, digest: str, bring: Callable[[BinaryIO, int], HashedBytes]
) -> OpenAdapter:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != manifest.file_bytes:
            raise AdapterCorrupt(f"the file of adapter {digest[:12]} has lost or gained bytes; upload it again")
        brought = bring(file, manifest.file_bytes)
    if brought.sha256 != manifest.file_sha256:
        raise AdapterCorrupt(f"the weights of adapter {digest[:12]} do not match their hash; upload it again")
    # from the bytes that were hashed, not from the file again
    slots, data_start = read_layout(cast(BinaryIO, brought.memory), manifest.file_bytes, manifest)
    data = memoryview(brought.memory)[data_start:]
    entries = read_entries(manifest, slots)
    return OpenAdapter(
        digest=digest,
        dtype=manifest.dtype,
        rank=manifest.rank,
        num_bytes=len(data),
        base=manifest.base,
        data=data,
        entries=entries.sites,
        base_dependent=manifest.base_dependent,
        model=entries.model,
        num_virtual_tokens=manifest.num_virtual_tokens,
        activation=manifest.activation,
    )
