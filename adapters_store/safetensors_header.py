"""Our own reader of safetensors headers: every limit is checked before anything is parsed or allocated.

Owns the header only, never the data. Invariant: a returned `Header` describes tensors that lie contiguously, without
hole or overlap, from the first data byte to the last byte of the file.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO

from adapters_store.errors import CorruptUpload
from adapters_store.float_bits import ITEM_BYTES
from adapters_store.strict_json import Json, read_json

_LENGTH_BYTES = 8
_MAX_DIMS = 4
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """What a header may cost: its bytes and its number of tensors. `allows_empty` lets a dimension be 0."""

    max_header_bytes: int
    max_tensors: int
    allows_empty: bool = False


# an 88.9 MB header costs the stock library 5 s and 1.2 GB (TRUST A04); real PEFT headers stay below 300 KB
EXTERNAL_LIMITS = HeaderLimits(max_header_bytes=1 << 20, max_tensors=4096)
CANONICAL_LIMITS = HeaderLimits(max_header_bytes=4 << 20, max_tensors=32768)


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a file; `begin` and `end` are byte offsets relative to the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, and where the data section starts in the file."""

    tensors: tuple[TensorSlot, ...]
    data_start: int


def read_header(file: BinaryIO, file_bytes: int, limits: HeaderLimits, *, what: str) -> Header:
    """Read and check the header of a safetensors file of `file_bytes` bytes, positioned at its start.

    Raises:
        CorruptUpload: any deviation from the format or its limits; `param` is `what`.
    """
    if file_bytes < _LENGTH_BYTES:
        raise CorruptUpload(f"{what} has {file_bytes} bytes; a safetensors file has at least 8", param=what)
    header_bytes = int.from_bytes(_read_exactly(file, _LENGTH_BYTES, what), "little")
    if header_bytes > limits.max_header_bytes:
        limit = limits.max_header_bytes
        raise CorruptUpload(f"{what} claims a header of {header_bytes} bytes; the limit is {limit}", param=what)
    data_start = _LENGTH_BYTES + header_bytes
    if data_start > file_bytes:
        raise CorruptUpload(f"{what} is cut off inside its header", param=what)
    raw = _read_exactly(file, header_bytes, what)
    if not raw.startswith(b"{"):
        raise CorruptUpload(f"{what} does not start with a safetensors header", param=what)
    entries = read_json(raw, what, max_bytes=limits.max_header_bytes)
    _check_metadata(entries.pop("__metadata__", {}), what)
    if not 1 <= len(entries) <= limits.max_tensors:
        raise CorruptUpload(f"{what} holds {len(entries)} tensors; 1 to {limits.max_tensors} are read", param=what)
    slots = sorted(
        (_slot(name, entry, limits, what) for name, entry in entries.items()), key=lambda slot: (slot.begin, slot.end)
    )
    _check_contiguous(slots, file_bytes - data_start, what)
    return Header(tensors=tuple(slots), data_start=data_start)


def _read_exactly(file: BinaryIO, num_bytes: int, what: str) -> bytes:
    raw = file.read(num_bytes)
    if len(raw) != num_bytes:
        raise CorruptUpload(f"{what} is cut off inside its header", param=what)
    return raw


def _check_metadata(metadata: Json, what: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptUpload(f"__metadata__ of {what} must map strings to strings", param=what)


def _slot(name: str, entry: Json, limits: HeaderLimits, what: str) -> TensorSlot:
    if not _NAME.match(name):
        raise CorruptUpload(f"{what} holds a tensor with the name {ascii(name)[:80]}, which is not allowed", param=what)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptUpload(f"{name} needs exactly dtype, shape and data_offsets", param=name)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        known = ", ".join(sorted(ITEM_BYTES))
        raise CorruptUpload(f"{name} has dtype {ascii(dtype)[:40]}; read here: {known}", param=name)
    shape = _naturals(entry["shape"])
    offsets = _naturals(entry["data_offsets"])
    if shape is None or len(shape) > _MAX_DIMS or (0 in shape and not limits.allows_empty):
        raise CorruptUpload(f"{name} has a shape that is not 0 to {_MAX_DIMS} positive whole numbers", param=name)
    if offsets is None or len(offsets) != 2:
        raise CorruptUpload(f"data_offsets of {name} are not two whole numbers", param=name)
    num_bytes = ITEM_BYTES[dtype]
    for dim in shape:
        num_bytes *= dim
    if offsets[1] - offsets[0] != num_bytes:
        claimed = offsets[1] - offsets[0]
        raise CorruptUpload(f"{name} needs {num_bytes} bytes for its shape but claims {claimed}", param=name)
    return TensorSlot(name=name, dtype=dtype, shape=shape, begin=offsets[0], end=offsets[1])


def _naturals(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    return numbers if len(numbers) == len(value) else None


def _check_contiguous(slots: list[TensorSlot], data_bytes: int, what: str) -> None:
    position = 0
    for slot in slots:
        if slot.begin != position:
            kind = "overlaps the tensor before it" if slot.begin < position else "leaves a hole before it"
            raise CorruptUpload(f"{slot.name} {kind}", param=slot.name)
        position = slot.end
    if position != data_bytes:
        raise CorruptUpload(f"{what} holds {data_bytes} data bytes but its header describes {position}", param=what)
