"""An adapter's canonical files as tensors by name, for the exporters.

Owns opening with proof and decoding. Invariant: no tensor is handed out before every byte of the file has been compared
with the hash in its manifest; tensors are read one at a time.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters_store.canonical import read_layout
from adapters_store.errors import AdapterCorrupt, CorruptUpload
from adapters_store.file_system import open_regular
from adapters_store.float_bits import FILE_DTYPES, Float32, decode
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from adapters_store.safetensors_header import TensorSlot

# stored bits, without a meaning: what is only moved keeps every bit, NaN payloads included
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Int32 = npt.NDArray[np.int32]

_CHUNK_BYTES = 1 << 20


class CanonicalReader:
    """The tensors of one verified adapter. `dtype` is that of its image, as safetensors spells it."""

    def __init__(self, manifest: Manifest, file: BinaryIO, slots: dict[str, TensorSlot], data_start: int) -> None:
        self.manifest = manifest
        self.dtype = FILE_DTYPES[manifest.dtype]
        self._file = file
        self._slots = slots
        self._data_start = data_start

    def raw(self, name: str) -> bytes:
        """Return a tensor's bytes."""
        slot = self._slots[name]
        self._file.seek(self._data_start + slot.begin)
        return self._file.read(slot.end - slot.begin)

    def bits(self, name: str) -> Bits:
        """Return a tensor of the image's dtype as its bits."""
        wide = self._slots[name].dtype == "F32"
        return np.frombuffer(self.raw(name), dtype="<u4" if wide else "<u2").reshape(self._slots[name].shape)

    def values(self, name: str) -> Float32:
        """Return a tensor's values, exactly."""
        slot = self._slots[name]
        return decode(self.raw(name), slot.dtype).reshape(slot.shape)

    def positions(self, name: str) -> Int32:
        """Return a tensor of positions."""
        return np.frombuffer(self.raw(name), dtype="<i4")


@contextmanager
def open_canonical(folder: Path) -> Iterator[CanonicalReader]:
    """Open the folder that holds `adapter.json` and `adapter.safetensors`.

    Raises:
        CorruptUpload: a file is missing or no canonical one. AdapterCorrupt: the weights do not match their hash.
    """
    try:
        with open_regular(folder / MANIFEST_NAME) as file:
            manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
        image = open_regular(folder / IMAGE_NAME)
    except OSError as error:
        raise CorruptUpload(f"the folder holds no {MANIFEST_NAME} with its {IMAGE_NAME}", param="files") from error
    with image:
        num_bytes = os.fstat(image.fileno()).st_size
        digest = hashlib.sha256()
        while chunk := image.read(_CHUNK_BYTES):
            digest.update(chunk)
        if num_bytes != manifest.file_bytes or digest.hexdigest() != manifest.file_sha256:
            raise AdapterCorrupt(f"{IMAGE_NAME} does not match the hash in {MANIFEST_NAME}; fetch it again")
        image.seek(0)
        slots, data_start = read_layout(image, num_bytes, manifest)
        yield CanonicalReader(manifest, image, {slot.name: slot for slot in slots}, data_start)
