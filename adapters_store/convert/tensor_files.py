"""The tensors of a foreign adapter, by their own names, and the plain values that a pickle held beside them.

Owns opening the files and reading one tensor at a time. Invariants: every header is checked by our own parser before a
tensor is read, floats become float32 exactly, whole numbers int64, and every tensor that nothing asked for is named.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.errors import CorruptUpload, UnsafePickle, UnsupportedAdapter, UnsupportedFormat
from adapters_store.file_system import open_regular
from adapters_store.float_bits import Float32, decode
from adapters_store.json_values import json_object
from adapters_store.parts import TRANSLATED_PART, is_pickle, translated_name
from adapters_store.safetensors_header import EXTERNAL_LIMITS, HeaderLimits, TensorSlot, read_header
from adapters_store.strict_json import Json, read_json

Int64 = npt.NDArray[np.int64]

_INTEGERS = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_FLOATS = frozenset({"F32", "F16", "BF16"})
_MAX_TRANSLATED_BYTES = 64 << 20
_ZIP_OR_PICKLE = (b"PK", b"\x80")
# names of a report
_MAX_UNREAD, _MAX_SHOWN = 64, 80
# single entries may be none
LIMITS = HeaderLimits(EXTERNAL_LIMITS.max_header_bytes, 1 << 14, allows_empty=True)


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    data_start: int
    slot: TensorSlot


class TensorFiles:
    """The tensors of some files; none is open between two reads, so that any number of them may lie side by side."""

    def __init__(self, places: dict[str, _Place]) -> None:
        self._places = places

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, as the files spell them."""
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; raises CorruptUpload where there is none of this name."""
        return self._place(name).slot.shape

    def need_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape; raises CorruptUpload, UnsupportedAdapter."""
        found = self.shape(name)
        if found != shape:
            raise UnsupportedAdapter(
                f"{name} has shape {list(found)}; this base and the config need {list(shape)}", param=name
            )

    def floats(self, name: str) -> Float32:
        """Read a tensor as float32, exactly; raises CorruptUpload unless it holds floats."""
        slot = self._place(name).slot
        if slot.dtype not in _FLOATS:
            raise CorruptUpload(f"{name} has dtype {slot.dtype}; it must hold floats", param=name)
        return decode(self._raw(name), slot.dtype).reshape(slot.shape)

    def integers(self, name: str) -> Int64:
        """Read a tensor of whole numbers; raises CorruptUpload unless it holds such."""
        slot = self._place(name).slot
        if slot.dtype not in _INTEGERS:
            raise CorruptUpload(f"{name} has dtype {slot.dtype}; it must hold whole numbers", param=name)
        return np.frombuffer(self._raw(name), dtype=_INTEGERS[slot.dtype]).astype(np.int64).reshape(slot.shape)

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise CorruptUpload(f"the file lacks {name[:200]}", param=name[:200])
        return place

    def _raw(self, name: str) -> bytes:
        place = self._place(name)
        with open_regular(place.path) as file:
            file.seek(place.data_start + place.slot.begin)
            return file.read(place.slot.end - place.slot.begin)


@contextmanager
def open_tensors(paths: Iterable[Path], prefixes: Iterable[str] = ()) -> Iterator[TensorFiles]:
    """Open safetensors files; the first of the prefixes that a name begins with is taken off it.

    Raises:
        CorruptUpload: a header is wrong, a name occurs twice, or there is no file.
        UnsupportedFormat: a file is a pickle, which only its own process opens.
    """
    places: dict[str, _Place] = {}
    prefixes = tuple(prefixes)
    for path in paths:
        refuse_pickle(path)
        with open_regular(path) as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, LIMITS, what=path.name)
        for slot in header.tensors:
            name = next((slot.name.removeprefix(p) for p in prefixes if slot.name.startswith(p)), slot.name)
            if name in places:
                raise CorruptUpload(f"the files hold {name} twice", param=slot.name)
            places[name] = _Place(path, header.data_start, slot)
    if not places:
        raise CorruptUpload("the upload holds no file of tensors", param="files")
    yield TensorFiles(places)


def tensor_paths(source: Path) -> list[Path]:
    """Return the files of tensors of an upload, those of its experts left out."""
    return sorted(
        path for path in source.iterdir() if path.suffix == ".safetensors" and not path.name.startswith("experts:")
    )


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle or archive, by name or by its first bytes: a safetensors header has its brace at byte 8."""
    with open_regular(path) as file:
        start = file.read(9)
    if is_pickle(path.name) or (start.startswith(_ZIP_OR_PICKLE) and start[8:] != b"{"):
        raise UnsupportedFormat(
            f"{path.name} holds a pickle or zip archive, not safetensors; save it with safe_serialization=True",
            param="files",
        )


def plain_values(source: Path) -> dict[str, Json]:
    """Return the plain values beside the tensors of an upload's pickles; nothing without any; raises UnsafePickle."""
    return {key: value for held in values_by_file(source).values() for key, value in held.items()}


def values_by_file(source: Path) -> dict[str, dict[str, Json]]:
    """Return the plain values beside the tensors by the name of the safetensors file that took the pickle's place.

    Raises:
        UnsafePickle: the translation's own file is damaged.
    """
    values: dict[str, dict[str, Json]] = {}
    for name, facts in translated(source).items():
        own = facts.get("facts")
        found = own.get("values") if isinstance(own, dict) else None
        if not isinstance(found, dict):
            raise UnsafePickle("the pickle's values were not translated", param="files")
        values[translated_name(name)] = found
    return values


def unread_keys(source: Path, read: Collection[str] = ()) -> tuple[str, ...]:
    """Return what lay in an upload's pickles beside the tensors and decided nothing, for the report.

    An optimiser's state and the like, which nothing opened, and plain values but those whose keys are in `read`; of
    nested ones the outermost name, as `name.*`.
    """
    names = {name for keys in _skipped(source) for name in keys}
    for key in plain_values(source).keys() - set(read):
        outer, dot, _ = key.partition(".")
        names.add(f"{outer[:_MAX_SHOWN]}.*" if dot else outer[:_MAX_SHOWN])
    shown = sorted(names)[:_MAX_UNREAD]
    return (*shown, *((f"{len(names) - len(shown)} more",) if len(names) > len(shown) else ()))


def _skipped(source: Path) -> Iterator[list[str]]:
    for facts in translated(source).values():
        own = facts.get("facts")
        skipped = own.get("skipped") if isinstance(own, dict) else None
        yield [key for key in skipped if isinstance(key, str)] if isinstance(skipped, list) else []


def translated(source: Path) -> dict[str, dict[str, Json]]:
    """Return what is known of each pickle that a safetensors file took the place of, by its uploaded name."""
    path = source / TRANSLATED_PART
    if not path.exists():
        return {}
    with open_regular(path) as file:
        facts = read_json(file.read(_MAX_TRANSLATED_BYTES + 1), TRANSLATED_PART, max_bytes=_MAX_TRANSLATED_BYTES)
    return {name: json_object(value) for name, value in facts.items()}
