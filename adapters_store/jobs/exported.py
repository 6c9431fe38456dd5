"""How a trained adapter's folder says what it holds: its `upload.json`, read as a stranger's.

Owns that file's form. Invariant: the format and the options go through the very checks of an upload's fields.
"""

from pathlib import Path

from adapters_store.errors import CorruptUpload
from adapters_store.file_system import open_regular
from adapters_store.formats import Declared
from adapters_store.strict_json import read_json

_UPLOAD_NAME, _MAX_UPLOAD_BYTES = "upload.json", 64 << 10


def declared_by(folder: Path) -> Declared:
    """Return what the trainer says of its export; raises CorruptUpload, InvalidOption."""
    try:
        with open_regular(folder / _UPLOAD_NAME) as file:
            said = read_json(file.read(_MAX_UPLOAD_BYTES + 1), _UPLOAD_NAME, max_bytes=_MAX_UPLOAD_BYTES)
    except OSError:
        raise CorruptUpload(f"the export has no {_UPLOAD_NAME}", param=_UPLOAD_NAME) from None
    declared, options = said.get("format"), said.get("options", {})
    if not isinstance(declared, str) or not isinstance(options, dict):
        raise CorruptUpload(f"{_UPLOAD_NAME} names no format", param=_UPLOAD_NAME)
    return Declared(Declared.parse(declared, None).format, options)
