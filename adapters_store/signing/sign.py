"""Signing an adapter's folder: `model.sig` beside its files, as OpenSSF model signing's tools verify it.

Owns which files are signed: those that an upload of the folder sends. Invariant: the signature appears whole or not at
all, and covers the bytes that were read here.
"""

import hashlib
import os
from pathlib import Path

from adapters_store.errors import InvalidOption, storage_errors
from adapters_store.formats import AUTO, EXPORT_PART, Declared, parts_in
from adapters_store.made_by import PROVENANCE_PART
from adapters_store.signing.bundle import (
    MAX_BUNDLE_BYTES,
    MAX_PROVENANCE_BYTES,
    SIGNATURE_PART,
    Statement,
    pre_authentication,
    root_digest,
    write_bundle,
    write_statement,
)
from adapters_store.signing.gate import sha256_of
from adapters_store.signing.keys import SigningKey
from adapters_store.strict_json import Json, read_json


def sign_export(folder: Path, key: SigningKey) -> None:
    """Sign what the trainer leaves: a folder with `upload.json` and `provenance.json`, which is signed along.

    A provenance that is too long for a signature is signed by its SHA-256.
    Raises:
        StoreError: the folder is not such a one, or the disk fails.
    """
    with storage_errors():
        upload = read_json((folder / EXPORT_PART).read_bytes(), EXPORT_PART, max_bytes=MAX_BUNDLE_BYTES)
    sign_folder(folder, key, declared=Declared(str(upload.get("format", AUTO))))


def _provenance_of(folder: Path) -> dict[str, Json]:
    """Return what is signed of a folder's provenance; nothing where it has none."""
    path = folder / PROVENANCE_PART
    if not path.is_file():
        return {}
    with storage_errors():
        raw = path.read_bytes()
    if len(raw) <= MAX_PROVENANCE_BYTES:
        return read_json(raw, PROVENANCE_PART, max_bytes=MAX_PROVENANCE_BYTES)
    return {"sha256": hashlib.sha256(raw).hexdigest()}


def sign_folder(
    folder: Path, key: SigningKey, *, declared: Declared | None = None, provenance: dict[str, Json] | None = None
) -> Path:
    """Write `model.sig` into a folder, over the files that an upload of it sends; return its path.

    Args:
        declared: the folder's format, where its files' names do not tell.
        provenance: how the adapter was made; signed with it and shown with the version. None: as the folder says.
    Raises:
        StoreError: the folder holds no adapter, or the disk fails.
    """
    with storage_errors():
        names = parts_in(folder, (declared or Declared()).format)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise InvalidOption(f"{folder}: {missing[0] if missing else 'an adapter'} is missing", param="folder")
    files = {name: sha256_of(folder / name) for name in sorted(names)}
    statement = Statement(
        folder.resolve().name,
        root_digest([*files.values()]),
        files,
        _provenance_of(folder) if provenance is None else provenance,
    )
    payload = write_statement(statement)
    bundle = write_bundle(payload, key.sign(pre_authentication(payload)), key.public.hint)
    target, temporary = folder / SIGNATURE_PART, folder / f".{SIGNATURE_PART}.new"
    with storage_errors():
        temporary.write_bytes(bundle)
        os.replace(temporary, target)
    return target
