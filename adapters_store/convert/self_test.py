"""Proof of a conversion: read the canonical file back and compare what it does with what the source does.

Owns the comparison only: `y = (x A^T) B^T * scaling + bias * scaling` of source and canonical matrices on random rows,
in float64, for a few modules. Invariant: a canonical file whose modules act differently from their source beyond the
rounding of its dtype is never published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import ROUNDOFF, Float32, decode
from adapters_store.manifest import Module
from adapters_store.safetensors_header import CANONICAL_LIMITS, TensorSlot, read_header

Float64 = npt.NDArray[np.float64]

_NUM_ROWS = 4
_SEED = 20260901
# three roundings meet in a product of A and B; float32 keeps the promise of 1e-5 with room
_SLACK = 3.0
# the smallest subnormal: what a value may lose to underflow
_UNDERFLOW = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


@dataclass(frozen=True, slots=True)
class SourceModule:
    """One module with its scaling and a reader of its unscaled source values: A, BT (as B `[out, rank]`) or bias."""

    module: Module
    scaling: float
    values: Callable[[Module, str], Float32]


def measure_error(path: Path, slots: tuple[TensorSlot, ...], sources: list[SourceModule], dtype: str) -> float:
    """Return the largest difference of any output over the first, middle and last module, to two digits.

    Raises:
        ConversionFailed: it is larger than the dtype's rounding explains.
    """
    chosen = {0, len(sources) // 2, len(sources) - 1}
    random = np.random.default_rng(_SEED)
    by_name = {slot.name: slot for slot in slots}
    return max(_module_error(path, by_name, sources[index], dtype, random) for index in sorted(chosen))


def _module_error(
    path: Path, slots: dict[str, TensorSlot], source: SourceModule, dtype: str, random: np.random.Generator
) -> float:
    module = source.module
    a, b = source.values(module, "A").astype(np.float64), source.values(module, "BT").astype(np.float64)
    x = random.standard_normal((_NUM_ROWS, a.shape[1]))
    canonical_a = _read(path, slots[module.tensor("A")])
    canonical_bt = _read(path, slots[module.tensor("BT")])
    wanted = (x @ a.T) @ b.T * source.scaling
    found = (x @ canonical_a.T) @ canonical_bt
    tiny = _UNDERFLOW[dtype]
    exact = (np.abs(x) @ np.abs(a).T) @ np.abs(b * source.scaling).T
    widened = (np.abs(x) @ (np.abs(a) + tiny).T) @ (np.abs(b * source.scaling) + tiny).T
    if module.has_bias:
        bias = source.values(module, "bias").astype(np.float64) * source.scaling
        wanted, exact, widened = wanted + bias, exact + np.abs(bias), widened + np.abs(bias) + tiny
        found = found + _read(path, slots[module.tensor("bias")])
    error = np.abs(wanted - found)
    if np.any(error > _SLACK * ROUNDOFF[dtype] * widened + (widened - exact) + np.finfo(np.float64).tiny):
        raise ConversionFailed(
            f"the conversion of {module.path} does not act as its source; this is a bug of the server"
        )
    # noise of the float64 sums themselves would make the manifest depend on the machine
    noise = 1e-12 * float(np.max(widened))
    largest = float(np.max(error))
    return float(f"{largest:.1e}") if largest > noise else 0.0


def _read(path: Path, slot: TensorSlot) -> Float64:
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, CANONICAL_LIMITS, what=path.name)
        file.seek(header.data_start + slot.begin)
        return decode(file.read(slot.end - slot.begin), slot.dtype).reshape(slot.shape).astype(np.float64)
