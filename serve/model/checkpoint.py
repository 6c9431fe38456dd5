"""The safetensors files of a model folder: which tensors there are, and their bytes read straight to their place.

Owns headers, shards and the reads; knows no architecture. The files are read, not mapped: mapped pages count as this
process's memory and doubled the peak. Invariant: nothing is executed or unpickled, and a read never leaves its file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serve.errors import StartError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_MAX_HEADER_BYTES = 100 << 20
_INDEX_NAME = "model.safetensors.index.json"
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies; `begin` and `end` are byte offsets in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """All tensors of a model folder by name."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self.tensors = tensors

    @classmethod
    def open(cls, model_dir: Path) -> "Checkpoint":
        """Read the headers of `model.safetensors`, else of the shards the index names, else of all safetensors files.

        Raises:
            StartError: there are none, one is missing or damaged, or a tensor lies in two files.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in _shards(model_dir):
            for name, stored in _read_header(path).items():
                if name in tensors:
                    raise StartError(f"tensor {name} lies in {tensors[name].path.name} and in {path.name}")
                tensors[name] = stored
        return cls(tensors)

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor into `target` of the same shape, casting to its dtype; CPU rows need no second buffer."""
        stored = self.tensors[name]
        dtype = _dtype(name, stored)
        if dtype == target.dtype and target.is_contiguous() and target.device.type == "cpu":
            _read(stored, target)
            return
        buffer = torch.empty(stored.shape, dtype=dtype)
        _read(stored, buffer)
        target.copy_(buffer)

    def are_equal(self, first: str, second: str) -> bool:
        """Do two tensors hold the same bytes?"""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.path.open("rb") as file_a, b.path.open("rb") as file_b:
            file_a.seek(a.begin)
            file_b.seek(b.begin)
            for begin in range(a.begin, a.end, _COMPARED_BYTES):
                count = min(_COMPARED_BYTES, a.end - begin)
                if file_a.read(count) != file_b.read(count):
                    return False
        return True


def _shards(model_dir: Path) -> list[Path]:
    whole, index = model_dir / "model.safetensors", model_dir / _INDEX_NAME
    if whole.is_file():
        # the order transformers looks in; other files beside it are other layouts of the same weights
        return [whole]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StartError(f"{_INDEX_NAME} of {model_dir.name}/ is damaged: {error}") from error
        outside = sorted(str(name) for name in names if Path(str(name)).name != name)
        if outside:
            raise StartError(f"{_INDEX_NAME} names {outside[0]!r}, which is not a file of the model folder")
        paths = [model_dir / str(name) for name in sorted(names)]
    else:
        paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in model_dir.glob(pattern))
        found = f" (it has {', '.join(others[:3])})" if others else ""
        raise StartError(f"{model_dir.name}/ has no safetensors files{found}; only safetensors weights are read")
    return paths


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise StartError(f"{path.name} is damaged: its header claims {num_bytes} bytes of a {size} byte file")
            header = json.loads(file.read(num_bytes))
        start = 8 + num_bytes
        return {
            name: _stored_tensor(path, name, entry, start, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise StartError(f"{path.parent.name}/ lacks {path.name}, which the index names") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(f"{path.name} is damaged: {error}") from error


def _stored_tensor(path: Path, name: str, entry: dict[str, object], start: int, size: int) -> StoredTensor:
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise StartError(f"{path.name} is damaged: tensor {name} has no offsets or no shape")
    begin, end = int(offsets[0]), int(offsets[1])
    if not 0 <= begin <= end <= size - start:
        raise StartError(f"{path.name} is cut short: tensor {name} ends at byte {start + end} of {size}")
    return StoredTensor(path, str(entry["dtype"]), tuple(int(n) for n in shape), start + begin, start + end)


def _dtype(name: str, stored: StoredTensor) -> torch.dtype:
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise StartError(
            f"tensor {name} is stored as {stored.dtype}; quantised checkpoints are not supported, only "
            f"{', '.join(_DTYPES)}"
        )
    return dtype


def _read(stored: StoredTensor, target: Tensor) -> None:
    if tuple(target.shape) != stored.shape or target.numel() * target.itemsize != stored.end - stored.begin:
        raise StartError(
            f"a tensor in {stored.path.name} has shape {list(stored.shape)} and {stored.end - stored.begin} bytes; "
            f"{list(target.shape)} of {target.dtype} was expected"
        )
    view = memoryview(target.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        done = 0
        while done < len(view):
            # one read may return less than asked, 2 GiB at most on Linux
            count = file.readinto(view[done:])
            if not count:
                raise StartError(f"{stored.path.name} ended early; download it again")
            done += count
