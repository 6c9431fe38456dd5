"""Proof of a conversion, for every op: read the canonical file back and compare what it does with its source.

Owns the formula of ADAPTERS' execution model in float64, written for this purpose alone, and the comparison on random
rows for a few modules. Invariant: a canonical file whose modules act differently from their source beyond the rounding
of its dtype is never published.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import FILE_DTYPES, ROUNDOFF, decode
from adapters_store.gates import GateOptions
from adapters_store.manifest import Module
from adapters_store.ops import BITS_DTYPE, INDEX_DTYPE
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
_INTEGERS = {INDEX_DTYPE: "<i4", BITS_DTYPE: "<u1"}
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
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, CANONICAL_LIMITS, what=path.name)
    slots = {slot.name: slot for slot in header.tensors}
    random = np.random.default_rng(_SEED)
    errors = []
    for index in sorted({0, len(effects) // 2, len(effects) - 1}):
        x = random.standard_normal((_NUM_ROWS, base.site_shape(modules[index].site)[1]))
        stored = _Stored(path, slots, modules[index], base.site_shape(modules[index].site))
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

    def __init__(self, path: Path, slots: dict[str, TensorSlot], module: Module, shape: tuple[int, int]) -> None:
        self._path = path
        self._num_out, self._num_in = shape
        self._slots = slots
        self._module = module

    def apply(self, x: Float64) -> tuple[Float64, Float64]:
        """Return what the ops add to the output, and the sum of the absolute terms."""
        module = self._module
        y, size = (np.zeros((len(x), self._num_out)) for _ in range(2))
        if module.ranks:
            a, bt = self._read("A"), self._read("BT")
            y = y + self._mixed(x, x @ a.T) @ bt
            size = size + self._mixed(x, np.abs(x) @ np.abs(a).T) @ np.abs(bt)
        if module.cols:
            chosen, d = x[:, self._read("cols.idx").astype(np.int64)], self._read("cols.D")
            y, size = y + chosen @ d, size + np.abs(chosen) @ np.abs(d)
        if module.rows:
            indices, d = self._read("rows.idx").astype(np.int64), self._read("rows.D")
            y[:, indices] += x @ d.T
            size[:, indices] += np.abs(x) @ np.abs(d).T
        for matrix in self._matrices():
            y, size = y + x @ matrix.T, size + np.abs(x) @ np.abs(matrix).T
        if module.has_bias:
            y, size = y + self._read("bias"), size + np.abs(self._read("bias"))
        return y, size

    def _mixed(self, x: Float64, shrunk: Float64) -> Float64:
        """Return the coefficients of the rank rows [T, sum r] by the gate's weights: of outputs, or of both factors."""
        weights = self._weights(x)
        experts = self._module.experts
        if experts is None or experts.gate.mix == "output":
            return np.asarray(shrunk * np.repeat(weights, self._module.ranks, axis=1))
        mixed = np.einsum("te,ter->tr", weights, shrunk.reshape(len(x), len(experts.ranks), -1))
        return np.asarray(weights[:, :, None] * mixed[:, None, :]).reshape(shrunk.shape)

    def _matrices(self) -> Iterator[Float64]:
        """Yield what is added to the weight itself [out, in]: sparse or dense."""
        module = self._module
        if module.has_dense:
            yield self._read("dense")
        if module.csr is None:
            return
        starts, columns = self._read("csr.indptr").astype(np.int64), self._read("csr.col").astype(np.int64)
        if module.csr.is_ternary:
            bits = np.unpackbits(self._read("csr.sign").astype(np.uint8), bitorder="little")[: module.csr.nnz]
            values = np.where(bits > 0, -1.0, 1.0) * self._read("csr.scale")
        else:
            values = self._read("csr.val")
        matrix = np.zeros((self._num_out, self._num_in))
        matrix[np.repeat(np.arange(self._num_out), np.diff(starts)), columns] = values
        yield matrix

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
        normed, found = self._logits(x, experts.gate)
        doubt = (np.abs(normed) @ (roundoff * np.abs(self._read("G")) + tiny).T).max(axis=1) + _NOISE
        if not np.all(np.abs(found - wanted).max(axis=1) <= doubt):
            raise ConversionFailed(f"the gate of {self._module.path} does not act as its source's; a bug of the server")
        descending = -np.sort(-wanted, axis=1)
        gap: Float64 = np.full(len(x), np.inf)
        if experts.top_k < len(experts.ranks):
            gap = descending[:, experts.top_k - 1] - descending[:, experts.top_k]
        # logits that move by d change each softmax weight by a factor of at most exp(2 d / temperature)
        shift = np.expm1(np.minimum(2 * doubt / experts.temperature, 50.0))
        # in rank space both factors are weighed
        shift = shift if experts.gate.mix == "output" else (1 + shift) ** 2 - 1
        return shift, gap > 2 * doubt

    def _logits(self, x: Float64, gate: GateOptions) -> tuple[Float64, Float64]:
        """Return what the gate reads [T, in] and its logits [T, experts]."""
        if gate.in_norm == "layernorm_noaffine":
            x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        elif gate.in_norm == "unit":
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        logits = x @ self._read("G").T
        if gate.has_bias:
            logits = logits + self._read("Gb")
        return x, np.abs(logits) if gate.logit == "abs" else logits

    def _weights(self, x: Float64) -> Float64:
        """Return the weight of each expert for each row [T, experts], 0 for those not chosen."""
        experts = self._module.experts
        if experts is None:
            return np.ones((len(x), 1))
        _, logits = self._logits(x, experts.gate)
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : experts.top_k]
        scaled = logits / experts.temperature
        of_selected = np.take_along_axis(scaled, chosen, axis=1)
        shares = {
            "one": np.ones_like(of_selected),
            "sigmoid": 1 / (1 + np.exp(-of_selected)),
            "softmax_all": np.take_along_axis(_softmax(scaled), chosen, axis=1),
        }.get(experts.gate.weight, _softmax(of_selected))
        weights = np.zeros_like(logits)
        np.put_along_axis(weights, chosen, shares, axis=1)
        return weights

    def _read(self, kind: str) -> Float64:
        slot = self._slots[self._module.tensor(kind)]
        with self._path.open("rb") as file:
            header = read_header(file, self._path.stat().st_size, CANONICAL_LIMITS, what=self._path.name)
            file.seek(header.data_start + slot.begin)
            raw = file.read(slot.end - slot.begin)
        if slot.dtype in _INTEGERS:
            return np.frombuffer(raw, dtype=_INTEGERS[slot.dtype]).astype(np.float64)
        return decode(raw, slot.dtype).reshape(slot.shape).astype(np.float64)


def _softmax(values: Float64) -> Float64:
    shares = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
