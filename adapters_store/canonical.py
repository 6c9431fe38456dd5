"""The canonical adapter file: a safetensors file whose data section is the adapter image, byte for byte.

Owns the layout (layer by layer, site by site, the tensors of `Module.tensors`, then those of `ModelOps.tensors`, each
followed by explicit padding to 128 bytes), its writer and its checker. Invariant: the manifest alone determines every
name, shape and offset, so reading is comparing: whatever `layout` does not produce is refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters_store.base import BaseDims
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.file_system import open_regular
from adapters_store.float_bits import FILE_DTYPES, ITEM_BYTES
from adapters_store.image_check import ImageCheck
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from adapters_store.model_ops import NO_MODEL_OPS, ModelOps
from adapters_store.op_limits import check_dense_bytes
from adapters_store.ops import Module
from adapters_store.safetensors_header import CANONICAL_LIMITS, TensorSlot, read_header

ALIGNMENT = 128
_PADDING_DTYPE = "U8"
# no op's tensor is called so
_PADDING = "pad."


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What the writer wrote: size and SHA-256 of the whole file."""

    num_bytes: int
    sha256: str


def layout(
    modules: Iterable[Module], base: BaseDims, dtype: str, model_ops: ModelOps = NO_MODEL_OPS
) -> tuple[TensorSlot, ...]:
    """Return every tensor of the file in order, padding included; `dtype` is a serving dtype."""
    slots: list[TensorSlot] = []
    position = 0
    file_dtype = FILE_DTYPES[dtype]
    for spec in (*(spec for module in modules for spec in module.tensors(base)), *model_ops.tensors(base)):
        tensor_dtype = spec.dtype(file_dtype)
        end = position + ITEM_BYTES[tensor_dtype] * math.prod(spec.shape)
        slots.append(TensorSlot(spec.name, tensor_dtype, spec.shape, position, end))
        position = -(-end // ALIGNMENT) * ALIGNMENT
        if position > end:
            padding = (position - end,)
            slots.append(TensorSlot(f"{_PADDING}{len(slots)}", _PADDING_DTYPE, padding, end, position))
    return tuple(slots)


def is_padding(slot: TensorSlot) -> bool:
    """Return whether the slot only fills up to the next 128-byte boundary."""
    return slot.name.startswith(_PADDING)


def encode_header(slots: Iterable[TensorSlot]) -> bytes:
    """Return length and header, filled up with spaces so that the data section starts 128-byte aligned."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "chorale-adapter", "version": "1"}}
    for slot in slots:
        header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [slot.begin, slot.end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def write_canonical(file: BinaryIO, slots: Iterable[TensorSlot], encoded: Callable[[str], bytes]) -> WrittenFile:
    """Write the whole file; `encoded(name)` returns the bytes of one tensor, called once each, in order."""
    slots = tuple(slots)
    digest = hashlib.sha256()
    num_bytes = 0
    for piece in _pieces(slots, encoded):
        file.write(piece)
        digest.update(piece)
        num_bytes += len(piece)
    return WrittenFile(num_bytes, digest.hexdigest())


def read_layout(file: BinaryIO, file_bytes: int, manifest: Manifest) -> tuple[tuple[TensorSlot, ...], int]:
    """Return the file's slots and where its data section starts, after comparing them with the manifest's layout.

    Raises:
        CorruptUpload: the header is not exactly the one that the manifest demands.
    """
    header = read_header(file, file_bytes, CANONICAL_LIMITS, what=IMAGE_NAME)
    if header.tensors != layout(manifest.modules, manifest.base, manifest.dtype, manifest.model_ops):
        raise CorruptUpload(f"{IMAGE_NAME} does not hold the tensors of its manifest", param=IMAGE_NAME)
    return header.tensors, header.data_start


def check_adapter(folder: Path, base: BaseDims, dtype: str, max_rank: int, dense_budget_bytes: int = 0) -> Manifest:
    """Read what a converter wrote with our own parsers, trusting none of it, and return its manifest.

    Raises:
        AdapterRefused: it must not be published. OSError: a file is missing or unreadable.
    """
    with open_regular(folder / MANIFEST_NAME) as file:
        manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    if manifest.base != base or manifest.dtype != dtype:
        raise CorruptUpload("the converter wrote an adapter for another base or dtype")
    if manifest.largest_expert_rank > max_rank:
        raise UnsupportedAdapter(
            f"the adapter has rank {manifest.largest_expert_rank}; this server accepts up to {max_rank}"
        )
    check_dense_bytes(manifest.modules, base, dtype, dense_budget_bytes)
    check_file(folder / IMAGE_NAME, manifest)
    return manifest


def check_file(path: Path, manifest: Manifest) -> None:
    """Read a fresh canonical file once and check all of it: size, header, hash, padding, values, effect.

    Raises:
        CorruptUpload, NonFiniteValues, InvalidIndex, AdapterWithoutEffect: the file must not be published.
    """
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        slots, data_start = read_layout(file, file_bytes, manifest)
        file.seek(0)
        digest = hashlib.sha256(file.read(data_start))
        check = ImageCheck(manifest)
        for slot in slots:
            raw = file.read(slot.end - slot.begin)
            digest.update(raw)
            if is_padding(slot):
                check.take_padding(slot, raw)
            else:
                check.take(slot, raw)
    if file_bytes != manifest.file_bytes or digest.hexdigest() != manifest.file_sha256:
        raise CorruptUpload(f"{IMAGE_NAME} does not match the hash in its manifest", param=IMAGE_NAME)
    check.finish()


def _pieces(slots: tuple[TensorSlot, ...], encoded: Callable[[str], bytes]) -> Iterable[bytes]:
    yield encode_header(slots)
    for slot in slots:
        num_bytes = slot.end - slot.begin
        piece = bytes(num_bytes) if is_padding(slot) else encoded(slot.name)
        assert len(piece) == num_bytes, f"{slot.name} has {len(piece)} bytes instead of {num_bytes}"
        yield piece
