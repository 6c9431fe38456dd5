"""Safetensors files as the exporters write them: names, dtypes, shapes and bytes, in the order given.

Owns the foreign side's file form. Invariant: an existing file is never overwritten, and every tensor's bytes fill its
shape exactly.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.errors import StorageFailed, StoreError
from adapters_store.file_system import FileSystem
from adapters_store.float_bits import ITEM_BYTES


class CannotExport(StoreError):
    """400 `cannot_export`: the target format cannot say what this adapter does; the message names a way out."""

    http_status = 400
    type = "invalid_request_error"
    default_code = "cannot_export"


@dataclass(frozen=True, slots=True)
class NewTensor:
    """One tensor of a new file; `read` is called once, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]


def write_tensors(path: Path, tensors: Iterable[NewTensor]) -> None:
    """Write a new safetensors file; raises OSError."""
    tensors = tuple(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": [*tensor.shape], "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    # the format's own writer aligns the data to 8 bytes
    raw += b" " * (-len(raw) % 8)
    with os.fdopen(FileSystem().create(path), "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            piece = tensor.read()
            assert len(piece) == ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape), f"{tensor.name}: wrong size"
            file.write(piece)


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write a new JSON file; raises OSError."""
    with os.fdopen(FileSystem().create(path), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")


def make_empty(folder: Path) -> None:
    """Create the folder of an export; raises CannotExport if something is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir() or any(folder.iterdir()):
            raise CannotExport(f"{folder.name!a} is not an empty folder; choose another for the export") from None
    except OSError as error:
        raise StorageFailed(f"the folder {folder.name!a} cannot be made: {error.strerror}") from error
