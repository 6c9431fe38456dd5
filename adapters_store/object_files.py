"""The two files of a published adapter, opened for reading after proof: what a canonical download sends.

Owns proof and the names that exist; knows no registry. Invariant: the bytes that the returned descriptor gives are
those of the digest, also if the object is deleted or replaced while it is read.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from adapters_store.errors import AdapterCorrupt, AdapterNotFound
from adapters_store.file_system import open_regular
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest

OBJECT_FILES = (MANIFEST_NAME, IMAGE_NAME)
_CHUNK_BYTES = 1 << 20


def open_object_file(store_dir: Path, digest: str, name: str) -> tuple[BinaryIO, str]:
    """Open one file of an object and return it, at its beginning, with the SHA-256 of its bytes.

    Raises:
        AdapterNotFound: no such file name. AdapterCorrupt: the bytes do not match the digest.
    """
    if name not in OBJECT_FILES:
        raise AdapterNotFound(f"an adapter has no file {ascii(name)[:80]}; it has {' and '.join(OBJECT_FILES)}")
    folder = store_dir / "objects" / digest
    if name == MANIFEST_NAME:
        return _opened(folder / name, digest), digest
    with _opened(folder / MANIFEST_NAME, digest) as manifest_file:
        wanted = parse_manifest(manifest_file.read(MAX_MANIFEST_BYTES + 1)).file_sha256
    return _opened(folder / name, wanted), wanted


def _opened(path: Path, wanted: str) -> BinaryIO:
    try:
        file = open_regular(path)
    except OSError as error:
        raise AdapterCorrupt(f"the file {path.name} of the adapter cannot be read; upload it again") from error
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    if digest.hexdigest() != wanted:
        file.close()
        raise AdapterCorrupt(f"the file {path.name} of the adapter does not match its hash; upload it again")
    file.seek(0)
    return file
