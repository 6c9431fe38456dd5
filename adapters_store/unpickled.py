"""Pickled parts of an upload on their way to safetensors: the server's side of `convert/unpickle.py`.

Owns the staging of the translation: hashes first, then the child, then its files in the place of the pickles. Nothing
of a pickle is parsed here. Invariant: when `translate_pickles` returns, the folder holds no pickle, and what the
manifest names as source are the hashes of the files that were uploaded.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from adapters_store.errors import REFUSALS, ConversionFailed, CorruptUpload, UnsafePickle, storage_errors
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.parts import TRANSLATED_PART, is_pickle, translated_name
from adapters_store.strict_json import Json, read_json

# runs one of the store's modules in a process of its own: module, arguments, working folder, seconds -> what it printed
RunChild = Callable[[str, list[str], Path, int], bytes]

MAX_TRANSLATED_BYTES = 16 << 20
_START_SECONDS = 60
_MIN_BYTES_PER_SECOND = 20 << 20
_SLACK_BYTES = 64 << 20
_HASH_CHUNK_BYTES = 1 << 20


def translate_pickles(source: Path, run_child: RunChild) -> None:
    """Replace every pickle in the staging folder `source` by a safetensors file and `translated.json`.

    Raises:
        UnsafePickle: a pickle names code, holds other things than tensors, or broke its process' limits.
        CorruptUpload: its safetensors twin was uploaded too.
    """
    pickles = sorted(entry.name for entry in source.iterdir() if is_pickle(entry.name))
    if not pickles:
        return
    for name in pickles:
        if (source / translated_name(name)).exists():
            raise CorruptUpload(f"the upload holds {name} and {translated_name(name)}; send one of them", param="files")
    hashes = {name: _hash(source / name) for name in pickles}
    target = source.parent / "unpickled"
    files = FileSystem()
    with storage_errors():
        files.make_dir(target)
    _run(source, target, run_child)
    with storage_errors():
        facts = _facts(target, hashes)
        for name in pickles:
            files.rename(target / translated_name(name), source / translated_name(name))
            files.unlink(source / name)
        descriptor = files.create(source / TRANSLATED_PART)
        files.write(descriptor, json.dumps(facts).encode())
        files.close(descriptor)
        files.remove_tree(target)


def _run(source: Path, target: Path, run_child: RunChild) -> None:
    num_bytes = sum(entry.stat().st_size for entry in os.scandir(source))
    timeout_s = _START_SECONDS + num_bytes // _MIN_BYTES_PER_SECOND
    # integers of one byte are widened, and views of one storage are written apart
    arguments = [str(source), str(target), str(4 * num_bytes + _SLACK_BYTES), str(timeout_s)]
    try:
        raw = run_child("adapters_store.convert.unpickle", arguments, target, timeout_s)
        outcome = json.loads(raw)
    except (ConversionFailed, ValueError):
        raise UnsafePickle(
            "reading the pickle took more than its limits of memory, time or files; save it as safetensors",
            param="files",
        ) from None
    if not isinstance(outcome, dict):
        raise ConversionFailed("the reader of pickles gave no answer; nothing was stored, see the server's log")
    if outcome.get("code") is not None:
        kind = REFUSALS.get(outcome["code"], UnsafePickle)
        raise kind(str(outcome.get("message"))[:1000], param="files")


def _facts(target: Path, hashes: dict[str, str]) -> dict[str, Json]:
    """Return what the child wrote about each pickle, with its hash; its bytes are trusted no more than an upload."""
    with open_regular(target / TRANSLATED_PART) as file:
        facts = read_json(file.read(MAX_TRANSLATED_BYTES + 1), TRANSLATED_PART, max_bytes=MAX_TRANSLATED_BYTES)
    return {name: {"sha256": hashes[name], "facts": facts.get(name)} for name in hashes}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
