"""A converted adapter's two files: the image from encoded tensors, then the manifest.

Owns the writing and the rounding to the image's dtype. Invariant: each value is rounded once, and a value that
overflows is refused, never written.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.canonical import WrittenFile, layout, write_canonical
from adapters_store.errors import NonFiniteValues, ValueOverflow
from adapters_store.file_system import FileSystem
from adapters_store.float_bits import FILE_DTYPES, Float32, encode, is_finite
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, Manifest
from adapters_store.model_ops import NO_MODEL_OPS, ModelOps
from adapters_store.ops import Module

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}


def encode_values(values: Float32, dtype: str, what: str) -> bytes:
    """Round values to a serving dtype; raises NonFiniteValues when one is not finite then, naming `what`."""
    raw = encode(values, FILE_DTYPES[dtype])
    if not is_finite(raw, FILE_DTYPES[dtype]):
        if not bool(np.all(np.isfinite(values))):
            raise NonFiniteValues(f"{what} holds NaN or infinity; train or save the adapter again", param=what)
        raise overflow(values, dtype, what, param=what)
    return raw


def overflow(values: npt.NDArray[np.floating], dtype: str, what: str, *, param: str) -> ValueOverflow:
    """Return the refusal of values that were finite in the file and are not in `dtype`."""
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(values).max())
    return ValueOverflow(
        f"{what} reaches {largest:.6g} once its scaling is folded in, beyond {_LARGEST[dtype]:.6g}, the largest value "
        f"of this server's dtype {dtype}; serve the base with --dtype bfloat16 or float32",
        param=param,
    )


def encode_signs(negative: npt.NDArray[np.bool_]) -> bytes:
    """Return the signs of a ternary matrix as the image holds them: one bit each, 1 for negative, lowest bit first."""
    return np.packbits(negative, bitorder="little").tobytes()


def encode_indices(indices: npt.NDArray[np.int64]) -> bytes:
    """Return positions as the image holds them."""
    return indices.astype("<i4").tobytes()


def write_image(
    target: Path,
    modules: tuple[Module, ...],
    base: BaseDims,
    dtype: str,
    encoded: Callable[[str], bytes],
    model_ops: ModelOps = NO_MODEL_OPS,
) -> WrittenFile:
    """Write the image of sorted modules and model ops; `encoded(name)` is called once per tensor, in order."""
    with os.fdopen(FileSystem().create(target / IMAGE_NAME), "wb") as image:
        return write_canonical(image, layout(modules, base, dtype, model_ops), encoded)


def write_manifest(target: Path, manifest: Manifest) -> None:
    """Write the manifest."""
    files = FileSystem()
    descriptor = files.create(target / MANIFEST_NAME)
    try:
        files.write(descriptor, manifest.to_bytes())
    finally:
        files.close(descriptor)
