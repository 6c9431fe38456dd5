"""A second opinion on adapter files: slow, simple, and without one line of the store's code.

Owns its own reading of the canonical format's rules (docs/adapters.md): `header_fault` of any safetensors file,
`canonical_fault` of an adapter. Each returns what is wrong, or None. Invariant: nothing here, nor in the two files that
it is made of, is imported from the product.
"""

import hashlib
import json
import math
from typing import Any

from tests.store.judge_files import SIZES, Fault, floats, no, read_file, strict_json
from tests.store.judge_ops import check_values, expected_tensors

FILE_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def header_fault(raw: bytes) -> str | None:
    """Judge any small safetensors file as an upload's."""
    try:
        read_file(raw, 1 << 20, 4096)
    except Fault as fault:
        return str(fault)
    return None


def canonical_fault(manifest_raw: bytes, image: bytes, base: dict[str, Any], dtype: str, max_rank: int) -> str | None:
    """Judge an adapter's two files."""
    try:
        _canonical(manifest_raw, image, base, dtype, max_rank)
    except (Fault, KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return None


def _canonical(manifest_raw: bytes, image: bytes, base: dict[str, Any], dtype: str, max_rank: int) -> None:
    manifest = strict_json(manifest_raw, 8 << 20)
    no(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode() != manifest_raw, "not canonical")
    needed = {"format", "version", "family", "base", "dtype", "files", "modules", "source"}
    no(not needed <= manifest.keys() <= needed | {"experts", "activation", "gates", "model_ops"}, "keys")
    no(manifest["format"] != "chorale-adapter" or manifest["version"] != 1 or manifest["version"] is True, "version")
    no({k: v for k, v in manifest["base"].items() if k != "base_dependent"} != base, "base")
    no(type(manifest["base"]["base_dependent"]) is not bool, "base_dependent")
    no(manifest["dtype"] != dtype, "dtype")
    (file,) = manifest["files"]
    no(
        file != {"name": "adapter.safetensors", "bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()},
        "file",
    )
    tensors, data = read_file(image, 4 << 20, 32768)
    wanted = expected_tensors(manifest, base, FILE_DTYPE[dtype], max_rank)
    at, number = 0, 0
    values: dict[str, Any] = {}
    for name, kind, shape in wanted:
        no(number >= len(tensors) or tensors[number][:3] != (name, kind, shape), f"{name} is not where it belongs")
        end = at + SIZES[kind] * math.prod(shape)
        values[name] = (kind, data[at:end])
        at, number = -(-end // 128) * 128, number + 1
        if at > end:
            no(number >= len(tensors) or tensors[number][:3] != (f"pad.{number}", "U8", [at - end]), "padding")
            no(any(data[end:at]), "padding holds something")
            number += 1
    no(number != len(tensors), "more tensors")
    for name, (kind, raw) in values.items():
        if kind in ("F32", "F16", "BF16"):
            no(not all(map(math.isfinite, floats(raw, kind))), f"{name} is not finite")
    check_values(manifest, values, base)
