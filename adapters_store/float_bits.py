"""The three floating-point formats of adapter files as numpy arrays, without torch: bfloat16 is uint16 bit work.

Owns decoding, encoding (round to nearest, ties to even) and the finite test. Invariant: `decode(encode(x))` differs
from x by at most half a unit in the last place, and what overflows becomes infinity, never a wrong finite number.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

# serving dtypes -> the names that safetensors gives them
FILE_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# the dtypes of a header: floats, padding bytes, and the positions that some foreign formats hold
ITEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I16": 2, "I32": 4, "I64": 8}

# unit roundoff of each format
ROUNDOFF: Final = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

# (unsigned view, mask of the exponent): all exponent bits set means NaN or infinity
_EXPONENT: Final[dict[str, tuple[str, int]]] = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def decode(raw: bytes | memoryview, dtype: str) -> Float32:
    """Return the values of `raw` as a flat float32 array; exact for all three formats."""
    if dtype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    # signalling NaNs are allowed to pass: the finite test follows
    with np.errstate(invalid="ignore"):
        return np.frombuffer(raw, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32)


def encode(values: Float32, dtype: str) -> bytes:
    """Return `values` in C order as bytes of `dtype`, rounded to nearest even; NaN stays NaN, overflow is infinity."""
    flat = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "F32":
        return flat.astype("<f4", copy=False).tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return flat.astype("<f2").tobytes()
    bits = flat.view(np.uint32)
    # the lowest kept bit breaks ties towards even; a carry into the exponent is the right overflow to infinity
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # rounding could carry a NaN's payload away: keep it a quiet NaN
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(flat), quiet, rounded).astype("<u2").tobytes()


def is_finite(raw: bytes | memoryview, dtype: str) -> bool:
    """Return whether every value of `raw` is neither NaN nor infinity."""
    view, mask = _EXPONENT[dtype]
    bits = np.frombuffer(raw, dtype=view)
    return not bool(np.any((bits & mask) == mask))


def is_zero(raw: bytes | memoryview, dtype: str) -> bool:
    """Return whether every value of `raw` is +0 or -0."""
    view, _ = _EXPONENT[dtype]
    bits = np.frombuffer(raw, dtype=view)
    # shifting out the sign bit makes both zeros 0
    return not bool(np.any(bits << np.array(1, dtype=view)))
