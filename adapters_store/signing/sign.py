"""Signing an adapter's folder: `model.sig` beside its files, as OpenSSF model signing's tools verify it.

Owns which files are signed: those that an upload of the folder sends. Invariant: the signature appears whole or not at
all, and covers the bytes that were read here.
"""

import os
from pathlib import Path

from adapters_store.errors import InvalidOption, storage_errors
from adapters_store.formats import Declared, parts_in
from adapters_store.signing.bundle import (
    SIGNATURE_PART,
    Statement,
    pre_authentication,
    root_digest,
    write_bundle,
    write_statement,
)
from adapters_store.signing.gate import sha256_of
from adapters_store.signing.keys import SigningKey
from adapters_store.strict_json import Json


def sign_folder(
    folder: Path, key: SigningKey, *, declared: Declared | None = None, provenance: dict[str, Json] | None = None
) -> Path:
    """Write `model.sig` into a folder, over the files that an upload of it sends; return its path.

    Args:
        declared: the folder's format, where its files' names do not tell.
        provenance: how the adapter was made; signed with it and shown with the version.
    Raises:
        StoreError: the folder holds no adapter, or the disk fails.
    """
    with storage_errors():
        names = parts_in(folder, (declared or Declared()).format)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise InvalidOption(f"{folder}: {missing[0] if missing else 'an adapter'} is missing", param="folder")
    files = {name: sha256_of(folder / name) for name in sorted(names)}
    statement = Statement(folder.resolve().name, root_digest([*files.values()]), files, provenance or {})
    payload = write_statement(statement)
    bundle = write_bundle(payload, key.sign(pre_authentication(payload)), key.public.hint)
    target, temporary = folder / SIGNATURE_PART, folder / f".{SIGNATURE_PART}.new"
    with storage_errors():
        temporary.write_bytes(bundle)
        os.replace(temporary, target)
    return target
