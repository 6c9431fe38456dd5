"""A whole model's safetensors files, in one piece or in shards, as tensors by base-neutral names.

Owns finding, opening and comparing them; one file is open and at most two tensors are in memory at a time. Invariant:
values are compared bit by bit, whatever float type each side is stored in, and nothing is written.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters_store.convert.tensor_files import translated
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.file_system import open_regular
from adapters_store.float_bits import ITEM_BYTES, Float32, decode
from adapters_store.formats import is_model_part
from adapters_store.json_values import text
from adapters_store.parts import TRANSLATED_PART, translated_name, uploaded_name
from adapters_store.safetensors_header import HeaderLimits, TensorSlot, read_header

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# where a text model's tensors hang: plain, in multimodal checkpoints of transformers 4 and 5, and in saved PEFT models
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "base_model.model.model.")
_LM_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "base_model.model.lm_head.weight")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_FLOATS = frozenset({"F32", "F16", "BF16"})
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    data_start: int
    slot: TensorSlot


class ModelFiles:
    """The tensors of one folder. Names are without the model's prefix: `layers.0.mlp.up_proj.weight`, `lm_head.weight`.

    Tensors outside the text model (a vision tower's) are in `others`. Where the model ties its head to its embedding
    and the files keep only the head, it goes by the embedding's name.
    """

    def __init__(self, places: dict[str, _Place], *, is_trusted: bool, is_tied: bool) -> None:
        self._is_trusted = is_trusted
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        prefix = _prefix(places)
        names = {name: _neutral(name, prefix) for name in places}
        self._places = {neutral: places[name] for name, neutral in names.items() if neutral is not None}
        if is_tied and _HEAD in self._places and _EMBEDDING not in self._places:
            self._places[_EMBEDDING] = self._places.pop(_HEAD)
        self.others = tuple(sorted(name for name, neutral in names.items() if neutral is None))

    @property
    def names(self) -> frozenset[str]:
        """Names of the text model's tensors."""
        return frozenset(self._places)

    def original(self, name: str) -> str:
        """Return a tensor's name as its file spells it."""
        return self._places[name].slot.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._places[name].slot.shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it; raises UnsupportedAdapter unless it is a float."""
        slot = self._places[name].slot
        if slot.dtype not in _FLOATS:
            raise UnsupportedAdapter(
                f"{slot.name} has dtype {slot.dtype}; quantised weights cannot be compared", param=slot.name
            )
        return slot.dtype

    def values(self, name: str) -> Float32:
        """Read a tensor as float32, exactly."""
        return decode(self._raw(name), self.dtype(name)).reshape(self.shape(name))

    def rows(self, name: str, begin: int, end: int) -> Float32:
        """Read rows `begin..end` of a tensor as float32, exactly."""
        width = self.shape(name)[1:]
        row_bytes = ITEM_BYTES[self.dtype(name)] * math.prod(width)
        raw = self._raw(name, begin * row_bytes, end * row_bytes)
        return decode(raw, self.dtype(name)).reshape(end - begin, *width)

    def bits(self, name: str, *, is_wide: bool) -> Bits:
        """Read a tensor's bits: its own if it has 16, or those of its values in float32."""
        if is_wide:
            return self.values(name).view(np.uint32)
        raw = np.frombuffer(self._raw(name), dtype="<u4" if self.dtype(name) == "F32" else "<u2")
        return raw.reshape(self.shape(name))

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _raw(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        place = self._places[name]
        if self._path != place.path or self._file is None:
            self.close()
            self._file, self._path = open_regular(place.path, is_trusted=self._is_trusted), place.path
        num_bytes = place.slot.end - place.slot.begin if end is None else end - begin
        self._file.seek(place.data_start + place.slot.begin + begin)
        return self._file.read(num_bytes)


@contextmanager
def open_model(folder: Path, limits: HeaderLimits, *, is_trusted: bool, is_tied: bool = False) -> Iterator[ModelFiles]:
    """Open the model files of a folder.

    Args:
        is_trusted: the folder is the operator's own: links are followed.
        is_tied: the model ties its head to its embedding, so the files may hold either of the two.
    Raises:
        CorruptUpload: a header is wrong, a tensor occurs twice, or there is no file.
    """
    places: dict[str, _Place] = {}
    for path in sorted(entry for entry in folder.iterdir() if is_model_part(entry.name)):
        with open_regular(path, is_trusted=is_trusted) as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, limits, what=path.name)
        for slot in header.tensors:
            if slot.name in places:
                raise CorruptUpload(f"the files hold {slot.name} twice", param=slot.name)
            places[slot.name] = _Place(path, header.data_start, slot)
    if not places:
        raise CorruptUpload("there is no model.safetensors", param="files")
    with closing(ModelFiles(places, is_trusted=is_trusted, is_tied=is_tied)) as files:
        yield files


@dataclass(frozen=True, slots=True)
class BitPair:
    """One tensor of the checkpoint and of the base in the same form, so that equal bits are equal values."""

    found: Bits
    base: Bits
    dtype: str

    @classmethod
    def read(cls, name: str, found: ModelFiles, base: ModelFiles, base_name: str | None = None) -> "BitPair":
        """Read both, the base's by its own name if that differs; their shapes are the caller's business."""
        base_name = base_name if base_name is not None else name
        own = found.dtype(name)
        is_wide = own != base.dtype(base_name)
        return cls(
            found=found.bits(name, is_wide=is_wide),
            base=base.bits(base_name, is_wide=is_wide),
            dtype="F32" if is_wide else own,
        )

    def values(self, bits: Bits) -> Float32:
        """Return some of the bits as float32 values of the same shape."""
        return decode(np.ascontiguousarray(bits).tobytes(), self.dtype).reshape(bits.shape)


def file_hashes(folder: Path) -> dict[str, str]:
    """Return SHA-256 of every file of an upload, by the name it was uploaded under."""
    pickles = translated(folder)
    hashes = {uploaded_name(name): text(facts["sha256"]) for name, facts in pickles.items()}
    written_here = {TRANSLATED_PART, *map(translated_name, pickles)}
    for path in sorted(path for path in folder.iterdir() if path.name not in written_here):
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        hashes[uploaded_name(path.name)] = digest.hexdigest()
    return dict(sorted(hashes.items()))


def num_rows(shape: tuple[int, ...], max_values: int) -> int:
    """Return how many rows of a tensor hold about `max_values` values."""
    return max(1, max_values // max(1, math.prod(shape[1:])))


def _prefix(places: dict[str, _Place]) -> str:
    found = [prefix for prefix in _PREFIXES if f"{prefix}norm.weight" in places]
    if found:
        return found[0]
    # a file of adapter tensors only
    return next((p for p in reversed(_PREFIXES) if any(name.startswith(f"{p}layers.") for name in places)), "model.")


def _neutral(name: str, prefix: str) -> str | None:
    if name in _LM_HEADS:
        return _HEAD
    return name.removeprefix(prefix) if name.startswith(prefix) else None
