"""A trained adapter as a folder: the files of one upload, how to declare them, and where they came from.

Owns the folder's layout. Invariant: a folder under its final name is whole and on the disk.
"""

import shutil
from pathlib import Path

from adapters_store.strict_json import Json, canonical_json
from serve.trainer.checkpoints import publish
from serve.trainer.methods.method import Attached
from serve.trainer.provenance import PROVENANCE_NAME

UPLOAD_NAME = "upload.json"


def export_adapter(attached: Attached, target: Path, provenance: dict[str, Json]) -> Path:
    """Write the adapter as it is now into the folder `target`, in place of what was there; return `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    upload = attached.export(temporary)
    files: list[Json] = [*sorted(path.name for path in temporary.iterdir())]
    declared: dict[str, Json] = {"format": upload.format, "options": upload.options, "files": files}
    (temporary / UPLOAD_NAME).write_bytes(canonical_json(declared) + b"\n")
    (temporary / PROVENANCE_NAME).write_bytes(canonical_json(provenance) + b"\n")
    shutil.rmtree(target, ignore_errors=True)
    publish(temporary, target)
    return target
