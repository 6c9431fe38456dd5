"""Proof of a conversion, for every op: read the canonical file back and compare what it does with its source.

Owns the formula of ADAPTERS' execution model in float64, written for this purpose alone, and the comparison on random
rows for a few modules. Invariant: a canonical file whose modules act differently from their source beyond the rounding
of its dtype is never published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.canonical import layout
from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import FILE_DTYPES, ROUNDOFF, decode
from adapters_store.manifest import Module
from adapters_store.ops import INDEX_DTYPE
from adapters_store.safetensors_header import CANONICAL_LIMITS, TensorSlot, read_header

Float64 = npt.NDArray[np.float64]
# x [T, in] -> (what the source adds to the layer's output [T, out], the size of the terms it adds up)
Apply = Callable[[Float64], tuple[Float64, Float64]]

_NUM_ROWS = 4
_SEED = 20260901
# three roundings meet in a product of A and B; a difference in float32 adds one
_SLACK = 4.0
# of the float64 sums themselves, relative to their terms
_NOISE = 1e-12
_UNDERFLOW = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


@dataclass(frozen=True, slots=True)
class SourceEffect:
    """One module and what its source adds to the layer's output, by the source's own formula.

    `logits` are the source's gate, for mixtures: rows whose choice of experts hangs on rounding are left out.
    """

    module: Module
    apply: Apply
    logits: Callable[[Float64], Float64] | None = None


def measure_effect(path: Path, effects: list[SourceEffect], base: BaseDims, dtype: str) -> float:
    """Return the largest difference of any output over the first, middle and last module, to two digits.

    Raises:
        ConversionFailed: it is larger than the dtype's rounding explains.
    """
    modules = [effect.module for effect in effects]
    slots = {slot.name: slot for slot in layout(modules, base, dtype)}
    random = np.random.default_rng(_SEED)
    errors = []
    for index in sorted({0, len(effects) // 2, len(effects) - 1}):
        x = random.standard_normal((_NUM_ROWS, base.site_shape(modules[index].site)[1]))
        stored = _Stored(path, slots, modules[index], base.site_shape(modules[index].site)[0])
        errors.append(_error(stored, effects[index], x, FILE_DTYPES[dtype]))
    return max(errors)


def _error(stored: "_Stored", effect: SourceEffect, x: Float64, dtype: str) -> float:
    roundoff, tiny = ROUNDOFF[dtype], _UNDERFLOW[dtype]
    wanted, terms = effect.apply(x)
    found, size = stored.apply(x)
    bound = _SLACK * roundoff * size + tiny * stored.reach(x) + _NOISE * terms
    is_decided = np.ones(len(x), dtype=np.bool_)
    if effect.logits is not None:
        shift, is_decided = stored.gate_doubt(x, effect.logits(x), _SLACK * roundoff, tiny)
        bound = bound + shift[:, None] * size
    error = np.abs(wanted - found)[is_decided]
    if not np.all(error <= bound[is_decided]):
        raise ConversionFailed(
            f"the conversion of {effect.module.path} does not act as its source; this is a bug of the server"
        )
    largest = float(np.max(error, initial=0.0))
    # noise of the sums would make the manifest depend on the machine
    return float(f"{largest:.1e}") if largest > _NOISE * float(np.max(terms)) else 0.0


class _Stored:
    """One module as its canonical file holds it, everything in float64."""

    def __init__(self, path: Path, slots: dict[str, TensorSlot], module: Module, num_out: int) -> None:
        self._path = path
        self._num_out = num_out
        self._slots = slots
        self._module = module

    def apply(self, x: Float64) -> tuple[Float64, Float64]:
        """Return what the ops add to the output, and the sum of the absolute terms."""
        module = self._module
        y, size = (np.zeros((len(x), self._num_out)) for _ in range(2))
        if module.ranks:
            a, bt = self._read("A"), self._read("BT")
            weights = np.repeat(self._weights(x), module.ranks, axis=1)
            y = y + (x @ a.T * weights) @ bt
            size = size + (np.abs(x) @ np.abs(a).T * weights) @ np.abs(bt)
        if module.cols:
            chosen, d = x[:, self._read("cols.idx").astype(np.int64)], self._read("cols.D")
            y, size = y + chosen @ d, size + np.abs(chosen) @ np.abs(d)
        if module.rows:
            indices, d = self._read("rows.idx").astype(np.int64), self._read("rows.D")
            y[:, indices] += x @ d.T
            size[:, indices] += np.abs(x) @ np.abs(d).T
        return y, size

    def reach(self, x: Float64) -> Float64:
        """Return what one smallest step of every stored value can change at most, in steps."""
        total: Float64 = np.abs(x).sum(axis=1, keepdims=True)
        module = self._module
        if not module.ranks:
            return total
        a, bt = np.abs(self._read("A")), np.abs(self._read("BT"))
        return np.asarray(total * (1 + bt.sum() + a.sum()))

    def gate_doubt(
        self, x: Float64, wanted: Float64, roundoff: float, tiny: float
    ) -> tuple[Float64, npt.NDArray[np.bool_]]:
        """Compare the logits with the source's; return the share by which weights may move, and whose choice is sure.

        Raises:
            ConversionFailed: the logits differ by more than rounding.
        """
        experts = self._module.experts
        assert experts is not None, "only mixtures have a gate"
        gate = self._read("G")
        doubt = (np.abs(x) @ (roundoff * np.abs(gate) + tiny).T).max(axis=1) + _NOISE
        if not np.all(np.abs(x @ gate.T - wanted).max(axis=1) <= doubt):
            raise ConversionFailed(f"the gate of {self._module.path} does not act as its source's; a bug of the server")
        descending = -np.sort(-wanted, axis=1)
        gap: Float64 = np.full(len(x), np.inf)
        if experts.top_k < len(experts.ranks):
            gap = descending[:, experts.top_k - 1] - descending[:, experts.top_k]
        # logits that move by d change each softmax weight by a factor of at most exp(2 d / temperature)
        shift = np.expm1(np.minimum(2 * doubt / experts.temperature, 50.0))
        return shift, gap > 2 * doubt

    def _weights(self, x: Float64) -> Float64:
        """Return the weight of each expert for each row [T, experts], 0 for those not chosen."""
        experts = self._module.experts
        if experts is None:
            return np.ones((len(x), 1))
        logits = x @ self._read("G").T
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : experts.top_k]
        best = np.take_along_axis(logits, chosen, axis=1) / experts.temperature
        shares = np.exp(best - best.max(axis=1, keepdims=True))
        weights = np.zeros_like(logits)
        np.put_along_axis(weights, chosen, shares / shares.sum(axis=1, keepdims=True), axis=1)
        return weights

    def _read(self, kind: str) -> Float64:
        slot = self._slots[self._module.tensor(kind)]
        with self._path.open("rb") as file:
            header = read_header(file, self._path.stat().st_size, CANONICAL_LIMITS, what=self._path.name)
            file.seek(header.data_start + slot.begin)
            raw = file.read(slot.end - slot.begin)
        if slot.dtype == INDEX_DTYPE:
            return np.frombuffer(raw, dtype="<i4").astype(np.float64)
        return decode(raw, slot.dtype).reshape(slot.shape).astype(np.float64)
