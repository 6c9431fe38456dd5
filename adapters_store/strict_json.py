"""Strict JSON for bytes from strangers: bounded, no duplicate keys, no NaN or infinity, no deep nesting.

Owns the reading and the canonical writing of JSON; knows nothing of adapters. Invariant: whatever `read_json` returns
means the same to every JSON reader, and `canonical_json` gives equal bytes for equal values.
"""

import json
import math
from typing import NoReturn

from adapters_store.errors import CorruptUpload

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_MAX_DEPTH = 16
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def read_json(raw: bytes, what: str, *, max_bytes: int) -> dict[str, Json]:
    """Parse one JSON object.

    Raises:
        CorruptUpload: too long, not UTF-8, not JSON, not an object, duplicate keys, NaN, infinity, nested too deep.
    """
    if len(raw) > max_bytes:
        raise CorruptUpload(f"{what} has {len(raw)} bytes; the limit is {max_bytes}", param=what)
    try:
        value: Json = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise CorruptUpload(f"{what} is nested deeper than {_MAX_DEPTH} levels", param=what) from None
    except ValueError as error:
        raise CorruptUpload(f"{what} cannot be read: {_reason(error, raw)}", param=what) from None
    if not isinstance(value, dict):
        raise CorruptUpload(f"{what} must hold one JSON object", param=what)
    if _depth_exceeds(value, _MAX_DEPTH):
        raise CorruptUpload(f"{what} is nested deeper than {_MAX_DEPTH} levels", param=what)
    return value


def canonical_json(value: Json) -> bytes:
    """Return the one byte string for this value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


class _Refused(ValueError):
    """Valid for Python's parser, not for us; its text is ours."""


def _reason(error: ValueError, raw: bytes) -> str:
    """Return what is wrong in our words; they quote no content but a bounded key or number."""
    if isinstance(error, _Refused):
        return str(error)
    if raw.startswith(_BYTE_ORDER_MARKS):
        return "it begins with a byte order mark; save it as UTF-8 without one"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not valid JSON in UTF-8: byte {error.start + 1} is no text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON in UTF-8: {error.msg} at character {error.pos + 1}"
    return "it holds a number of too many digits"


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {ascii(key)[:80]} appears twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:20]} is out of range")
    return value


def _depth_exceeds(value: Json, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if limit == 0:
        return True
    children = value.values() if isinstance(value, dict) else value
    return any(_depth_exceeds(child, limit - 1) for child in children)
