"""A second opinion on files: JSON and safetensors, read slowly, simply, and without one line of the store's code.

Owns the form only; what an adapter may say is in `judge_ops.py`. Invariant: nothing here is imported from the product.
"""

import json
import math
import re
import struct
from typing import Any

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
Tensor = tuple[str, str, list[int], int, int]


class Fault(Exception):
    """What is wrong."""


def no(condition: object, what: str) -> None:
    """Raise Fault if the condition holds."""
    if condition:
        raise Fault(what)


def whole(value: Any, low: int = 0, high: int = 2**31) -> int:
    """Return a whole number within bounds."""
    no(type(value) is not int, f"{value!r} is no whole number")
    no(not low <= value <= high, f"{value} is not within {low} and {high}")
    return int(value)


def strict_json(raw: bytes, limit: int) -> Any:
    """Parse JSON without second meanings."""
    no(len(raw) > limit, "too long")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        no(len({key for key, _ in pairs}) != len(pairs), "a key twice")
        return dict(pairs)

    def refuse(text: str) -> None:
        raise Fault(text)

    def finite(text: str) -> float:
        no(not math.isfinite(float(text)), "a number out of range")
        return float(text)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise Fault("no JSON") from error
    no(type(value) is not dict, "no object")
    no(depth(value) > 16, "too deep")
    return value


def depth(value: Any) -> int:
    """Return how many lists and objects lie in each other."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + max((depth(each) for each in (value.values() if isinstance(value, dict) else value)), default=0)


def read_file(raw: bytes, max_header: int, max_tensors: int) -> tuple[list[Tensor], bytes]:
    """Return the tensors of a safetensors file by place, and its data."""
    no(len(raw) < 8, "short")
    (length,) = struct.unpack("<Q", raw[:8])
    no(length > max_header or 8 + length > len(raw), "header length")
    no(raw[8:9] != b"{", "no object")
    header = strict_json(raw[8 : 8 + length], max_header)
    metadata = header.pop("__metadata__", {})
    no(type(metadata) is not dict or any(type(text) is not str for text in metadata.values()), "metadata")
    no(not 1 <= len(header) <= max_tensors, "number of tensors")
    data = raw[8 + length :]
    tensors = [tensor(name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda each: (each[3], each[4]))
    at = 0
    for name, _, _, begin, end in tensors:
        no(begin != at, f"{name} does not follow")
        at = end
    no(at != len(data), "data left over")
    return tensors, data


def tensor(name: str, entry: Any) -> Tensor:
    """Read one entry of a header."""
    no(re.fullmatch(r"[-A-Za-z0-9_.]{1,256}", name) is None, "name")
    no(type(entry) is not dict or sorted(entry) != ["data_offsets", "dtype", "shape"], "keys of an entry")
    no(type(entry["dtype"]) is not str or entry["dtype"] not in SIZES, "dtype")
    no(type(entry["shape"]) is not list or type(entry["data_offsets"]) is not list, "lists")
    no(len(entry["shape"]) > 4 or len(entry["data_offsets"]) != 2, "dims")
    size = SIZES[entry["dtype"]]
    for dim in entry["shape"]:
        size *= whole(dim, 1, 2**64)
    begin, end = (whole(each, 0, 2**64) for each in entry["data_offsets"])
    no(end - begin != size, "size")
    return name, entry["dtype"], entry["shape"], begin, end


def floats(raw: bytes, dtype: str) -> list[float]:
    """Decode values one by one."""
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
    return list(struct.unpack(f"<{len(raw) // SIZES[dtype]}{'f' if dtype == 'F32' else 'e'}", raw))
