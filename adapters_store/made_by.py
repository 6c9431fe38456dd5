"""How an adapter was made, as its maker says: `provenance.json` beside an upload's files, kept in the manifest.

Owns the reading and the way into the manifest; what stands in it is the maker's word, our trainer's above all.
Invariant: the manifest holds the very object that was sent or the upload is refused, and so the digest covers it.
"""

import json
from dataclasses import replace
from pathlib import Path

from adapters_store.errors import CorruptUpload
from adapters_store.file_system import FileSystem
from adapters_store.manifest import MANIFEST_NAME, Manifest, parse_manifest
from adapters_store.strict_json import Json, canonical_json, read_json

PROVENANCE_PART = "provenance.json"
# a loss curve of 500 points and as many validations take half of it
MAX_PROVENANCE_PART_BYTES = 128 << 10
# of what a registry keeps of it: hyper-parameters fit, curves do not
_MAX_SUMMARY_BYTES = 4096


def read_provenance(path: Path) -> dict[str, Json]:
    """Return what an upload says of how it was made.

    Raises:
        CorruptUpload: not one strict JSON object of plain text, or an empty one.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_PROVENANCE_PART_BYTES + 1)
    said = read_json(raw, PROVENANCE_PART, max_bytes=MAX_PROVENANCE_PART_BYTES)
    if not said:
        raise CorruptUpload(f"{PROVENANCE_PART} is empty; leave it out", param=PROVENANCE_PART)
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CorruptUpload(f"{PROVENANCE_PART} holds half a surrogate pair", param=PROVENANCE_PART) from None
    return said


def keep_provenance(folder: Path, manifest: Manifest, said: dict[str, Json], files: FileSystem) -> Manifest:
    """Write the manifest in a converted adapter's folder again, with what its maker says; return it.

    Raises:
        CorruptUpload: it is nested too deep for a manifest. OSError: the disk.
    """
    told = replace(manifest, provenance=said)
    try:
        parse_manifest(told.to_bytes())
    except CorruptUpload:
        raise CorruptUpload(f"{PROVENANCE_PART} is nested too deep, or too long", param=PROVENANCE_PART) from None
    temporary = folder / f".{MANIFEST_NAME}.new"
    descriptor = files.create(temporary)
    try:
        files.write(descriptor, told.to_bytes())
    finally:
        files.close(descriptor)
    files.rename(temporary, folder / MANIFEST_NAME)
    return told


def summarised(said: dict[str, Json]) -> dict[str, Json] | None:
    """Return the provenance without what is longest in it, so that lists of adapters stay short; None without any."""
    kept: dict[str, Json] = {}
    room = _MAX_SUMMARY_BYTES
    for size, key in sorted((len(canonical_json([key, value])), key) for key, value in said.items()):
        room -= size
        if room < 0:
            break
        kept[key] = said[key]
    return kept or None
