"""Proof of what a conversion stored outside the linear layers: read back, and compared with the source's own formula.

Owns the comparison of embeddings, prompts and prefixes, everything in float64; norms and rows of tokens are the file's
own values, compared one by one. Invariant: as in `self_test.py`.
"""

from pathlib import Path

import numpy as np

from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.self_test import UNDERFLOW, read_stored
from adapters_store.convert.tuner import Array, Float64
from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import ROUNDOFF
from adapters_store.model_ops import NormWeight
from adapters_store.safetensors_header import TensorSlot

_NUM_TOKENS = 16
_SLACK = 3.0
_NOISE = 1e-12


def measure_model_error(path: Path, slots: tuple[TensorSlot, ...], model: ModelFactors, dtype: str) -> float:
    """Return the largest difference of any value, to two digits; raises ConversionFailed where it is no rounding."""
    by_name = {slot.name: slot for slot in slots}

    def stored(name: str) -> Float64:
        return read_stored(path, by_name[name])

    errors = [0.0]
    for (layer, norm), weight in model.norms.items():
        errors.append(_difference(stored(NormWeight(layer, norm).tensor), weight, "F32"))
    for target, rows in model.token_rows.items():
        if not np.array_equal(stored(f"tokens.{target}.idx"), rows.ids):
            raise _failed(f"tokens.{target}")
        errors.append(_difference(stored(f"tokens.{target}.E"), rows.rows, dtype))
    if model.embedding is not None:
        at, bt = stored("embed.AT"), stored("embed.BT")
        ids = np.unique(np.linspace(0, len(at) - 1, _NUM_TOKENS).astype(np.int64))
        size = np.abs(at[ids]) @ np.abs(bt)
        errors.append(_difference(at[ids] @ bt, model.embedding.apply(ids), dtype, size))
    if model.prompt is not None:
        errors.append(_difference(stored("prompt.E"), model.prompt.apply(), dtype))
    if model.prefix is not None:
        keys, values = stored("prefix.K"), stored("prefix.V")
        for layer in sorted({0, len(keys) // 2, len(keys) - 1}):
            wanted = model.prefix.apply(layer)
            errors += [_difference(found[layer], own, dtype) for found, own in zip((keys, values), wanted, strict=True)]
    return float(f"{max(errors):.1e}")


def _difference(found: Float64, wanted: Array, dtype: str, size: Float64 | None = None) -> float:
    error = np.abs(found - wanted)
    terms = np.abs(found) if size is None else size
    reach = UNDERFLOW[dtype] * (1 + (0 if size is None else len(found.T)))
    if not np.all(error <= (_SLACK * ROUNDOFF[dtype] + _NOISE) * terms + reach):
        raise _failed("what it does outside the linear layers")
    return float(error.max(initial=0.0))


def _failed(what: str) -> ConversionFailed:
    return ConversionFailed(f"the conversion of {what} does not act as its source; this is a bug of the server")
