"""The process that opens pickles: `python -m adapters_store.convert.unpickle SOURCE TARGET MAX_BYTES CPU_SECONDS`.

Owns the one use of torch's restricted unpickler (`weights_only`) and the translation of what it finds, nested dicts of
tensors and plain values, into safetensors and JSON. Invariants: it runs behind `sandbox.py`'s walls, before which it
reads nothing foreign; it writes only TARGET; and what is not a tensor or a plain value is refused, never called.
"""

import json
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from adapters_store.convert.sandbox import Limits, confine
from adapters_store.errors import StoreError, UnsafePickle
from adapters_store.parts import TRANSLATED_PART, is_pickle, translated_name
from adapters_store.strict_json import Json

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WIDENED = {
    torch.float64: (torch.float32, "F32"),
    torch.bool: (torch.uint8, "U8"),
    torch.uint8: (torch.uint8, "U8"),
    torch.int8: (torch.int16, "I16"),
    torch.int16: (torch.int16, "I16"),
    torch.int32: (torch.int32, "I32"),
    torch.int64: (torch.int64, "I64"),
}
# torch itself and the mapped file; a storage is a slice of the file
_MEMORY_BYTES = 4 << 30
_MAX_DEPTH = 6
_MAX_NODES = 100_000
_MAX_TEXT = 4096
# a longer list of whole numbers becomes a tensor
_MAX_LIST = 16
_MAX_INTEGERS = 1 << 26
_MAX_ENTRIES = 200_000
_ZIP_START = b"PK\x03\x04"
# beside the weights, training leaves its own state, which no converter reads
_WEIGHTS_KEY = "state_dict"


@dataclass(slots=True)
class _Found:
    """What one pickle holds: tensors and plain values by dotted key, and what lay beside the weights unread."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    num_nodes: int = 0


def main(arguments: list[str]) -> int:
    """Translate the pickles of one folder behind the walls and print the outcome."""
    source, target, max_bytes, cpu_seconds = arguments
    size = sum(entry.stat().st_size for entry in os.scandir(source))
    limits = Limits(_MEMORY_BYTES + 3 * size, int(max_bytes), int(cpu_seconds))
    missing = confine(limits, readable=[Path(source)], writable=Path(target))
    outcome: dict[str, Json] = {"missing": [*missing]}
    try:
        translate(Path(source), Path(target), int(max_bytes))
    except StoreError as error:
        outcome |= {"code": error.code, "message": error.message, "param": error.param}
    except MemoryError:
        outcome |= {"code": UnsafePickle.default_code, "message": "the pickle needs too much memory", "param": "files"}
    json.dump(outcome, sys.stdout)
    return 0


def translate(source: Path, target: Path, max_bytes: int) -> None:
    """Write every pickle of `source` into `target` as safetensors, and their plain values as one JSON file.

    Args:
        max_bytes: of all files together: views may repeat what a pickle stores once.
    Raises:
        UnsafePickle: it names code, holds other things than tensors and plain values, or breaks a limit.
    """
    facts: dict[str, Json] = {}
    num_left = max_bytes
    for path in sorted(entry for entry in source.iterdir() if is_pickle(entry.name)):
        found = read_pickle(path)
        num_left -= sum(tensor.numel() * _stored_type(tensor).itemsize for tensor in found.tensors.values())
        if num_left < 0:
            raise UnsafePickle(f"{path.name} grows beyond its limit when it is read", param="files")
        _write(target / translated_name(path.name), found.tensors)
        facts[path.name] = {"values": found.values, "skipped": [*found.skipped]}
    (target / TRANSLATED_PART).write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")


def read_pickle(path: Path) -> _Found:
    """Load one pickle with torch's restricted unpickler and collect what it holds; raises UnsafePickle."""
    with path.open("rb") as file:
        # torch decides by these bytes too, so nothing that it takes for an archive goes unchecked
        is_zip = file.read(len(_ZIP_START)) == _ZIP_START
    if is_zip:
        _check_zip(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_names()):
            # torch advises its users about old files; what matters raises
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise _refused(path, "it needs too much memory") from None
    # torch raises whatever the bytes led it to; nothing was run but its own restricted reader
    except Exception as error:
        raise _refused(path, _reason(error)) from None
    if not isinstance(loaded, dict):
        raise _refused(path, f"it holds a {type(loaded).__name__[:40]} and no dict of tensors")
    found = _Found()
    if isinstance(loaded.get(_WEIGHTS_KEY), dict):
        found.skipped = sorted(str(key)[:80] for key in loaded if key != _WEIGHTS_KEY and not _is_plain(loaded[key]))
        loaded = {key: value for key, value in loaded.items() if key == _WEIGHTS_KEY or _is_plain(value)}
    _collect(path, loaded, "", found, depth=0)
    if not found.tensors:
        raise _refused(path, "it holds no tensor")
    return found


def _check_zip(path: Path) -> None:
    """Refuse an archive that is not torch's plain one: its members lie uncompressed and once each."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise _refused(path, "its archive is damaged") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _refused(path, "its archive is compressed, which torch never does")
    if len(members) > _MAX_ENTRIES or sum(member.file_size for member in members) > path.stat().st_size:
        raise _refused(path, "its archive claims more than the file holds")


def _numpy_names() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """Return what the restricted unpickler may build of numpy: plain numbers and arrays of them."""
    # the functions that numpy's own pickles name; its core moved in version 2, and files of either version name theirs
    scalar, array = np.float32(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    places = ("numpy.core.multiarray", "numpy._core.multiarray")
    kinds = ("Int8", "Int16", "Int32", "Int64", "UInt8", "Float16", "Float32", "Float64", "Bool")
    return [
        np.ndarray,
        np.dtype,
        *((scalar, f"{place}.scalar") for place in places),
        *((array, f"{place}._reconstruct") for place in places),
        *(getattr(np.dtypes, f"{kind}DType") for kind in kinds),
    ]


def _collect(path: Path, value: object, key: str, found: _Found, *, depth: int) -> None:
    found.num_nodes += 1
    if found.num_nodes > _MAX_NODES or depth > _MAX_DEPTH:
        raise _refused(path, f"it holds more than {_MAX_NODES} things, or more than {_MAX_DEPTH} dicts in each other")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str | int) or len(str(name)) > _MAX_TEXT:
                raise _refused(path, f"a key of {key[:80]!a} is no text")
            _collect(path, inner, f"{key}.{name}" if key else str(name), found, depth=depth + 1)
        return
    if key in found.tensors or key in found.values:
        raise _refused(path, f"two of its keys become {key[:80]!a}")
    tensor = _as_tensor(value)
    if tensor is not None:
        _check_tensor(path, key, tensor)
        found.tensors[key] = tensor
    elif _is_plain(value):
        found.values[key] = _plain(value)
    else:
        raise _refused(path, f"{key[:80]!a} is a {type(value).__name__[:40]}, no tensor and no plain value")


def _as_tensor(value: object) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.isnative:
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, list | tuple) and _MAX_LIST < len(value) <= _MAX_INTEGERS:
        numbers = [int(item) for item in value if isinstance(item, int | np.integer)]
        if len(numbers) == len(value) and all(-(1 << 63) <= number < 1 << 63 for number in numbers):
            return torch.tensor(numbers, dtype=torch.int64)
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_LIST and all(_is_plain(item) and not isinstance(item, list | tuple) for item in value)
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return value is None or (isinstance(value, int | np.integer) and abs(int(value)) < 1 << 63)


def _plain(value: object) -> Json:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        item: Json = value.item()
        return item
    assert value is None or isinstance(value, str | int | float), "only plain values come here"
    return value


def _check_tensor(path: Path, key: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in {**_DTYPES, **_WIDENED}:
        raise _refused(path, f"{key[:80]!a} is no plain tensor of numbers ({tensor.dtype}, {tensor.layout})")
    # a view may repeat a storage as often as it likes
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise _refused(path, f"{key[:80]!a} is larger than what is stored of it")


def _write(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file, a tensor at a time."""
    header: dict[str, Json] = {}
    position = 0
    for key, tensor in tensors.items():
        dtype = _DTYPES.get(tensor.dtype) or _WIDENED[tensor.dtype][1]
        num_bytes = tensor.numel() * _stored_type(tensor).itemsize
        header[key] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    raw = json.dumps(header).encode()
    with target.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.writelines(_pieces(tensors.values()))


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        whole = tensor.to(_stored_type(tensor)).contiguous().reshape(-1)
        yield whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def _stored_type(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype in _DTYPES else _WIDENED[tensor.dtype][0]


def _reason(error: Exception) -> str:
    """Return torch's own reason, shortened to the name that it refused."""
    text = str(error)
    begin = text.find("GLOBAL ")
    if begin >= 0:
        return f"it names {text[begin + 7 :].split()[0][:80]!a}, which is code"
    return f"torch cannot read it as weights ({type(error).__name__})"


def _refused(path: Path, reason: str) -> UnsafePickle:
    return UnsafePickle(
        f"{path.name} is a pickle that is not taken: {reason}; save it with safe_serialization=True, as safetensors",
        param="files",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
