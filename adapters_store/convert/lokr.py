"""PEFT's LOKR: `delta = alpha / r (W1 kron W2)`, each factor whole or itself a product of rank r.

Owns LoKr's keys and formula. Invariant: with W1 = L1 R1 and W2 = L2 R2 the delta is exactly (L1 kron L2)(R1 kron R2);
a whole factor is split as identity times itself or itself times identity, whichever is smaller. No value is a sum.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.loha import LYCORIS_RULES, LycorisScaling, read_lycoris_scaling
from adapters_store.convert.peft_keys import harmless, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_STEMS = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True, slots=True)
class _Factor:
    """One Kronecker factor in the file: [rows, columns], whole (one tensor) or as a product of rank r (two)."""

    slots: tuple[TensorSlot, ...]
    num_rows: int
    num_columns: int
    rank: int

    def load(self, file: TensorFile) -> list[Float64]:
        """Return the tensors' values."""
        return [file.floats(slot).astype(np.float64) for slot in self.slots]


@dataclass(frozen=True, slots=True)
class _Delta:
    """w1 [p, q] and w2 [m, n], each as one tensor or as two to be multiplied; the layer is [p m, q n]."""

    w1: list[Float64]
    w2: list[Float64]
    scaling: float

    def factors(self) -> Factors:
        (l1, r1), (l2, r2) = _split(self.w1), _split(self.w2)
        return Factors(np.kron(r1, r2), np.kron(l1, l2) * self.scaling)

    def apply(self, x: Float64) -> Float64:
        w1 = self.w1[0] if len(self.w1) == 1 else self.w1[0] @ self.w1[1]
        w2 = self.w2[0] if len(self.w2) == 1 else self.w2[0] @ self.w2[1]
        blocks = x.reshape(len(x), w1.shape[1], w2.shape[1])
        mixed = np.einsum("pq,tqn->tpn", w1, blocks) @ w2.T
        y: Float64 = mixed.reshape(len(x), -1) * self.scaling
        return y


def _split(values: list[Float64]) -> tuple[Float64, Float64]:
    """Return L and R with factor = L R and the smallest inner size; one may be the identity."""
    if len(values) == 2:
        return values[0], values[1]
    (whole,) = values
    num_rows, num_columns = whole.shape
    return (np.eye(num_rows), whole) if num_rows <= num_columns else (whole, np.eye(num_columns))


@dataclass(frozen=True, slots=True)
class _Tuner:
    scaling: LycorisScaling

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return both Kronecker factors of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.scaling.unused(paths)

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        names = [(stem,) if stem in module.parts else (f"{stem}_a", f"{stem}_b") for stem in _STEMS]
        slots = module.take(*names[0], *names[1])
        rank, scaling = self.scaling.of(module.path)
        w1 = _factor(slots[: len(names[0])], rank)
        w2 = _factor(slots[len(names[0]) :], rank)
        found = (w1.num_rows * w2.num_rows, w1.num_columns * w2.num_columns)
        if found != module.dims(base):
            raise UnsupportedAdapter(
                f"the Kronecker product for {module.path} has shape {list(found)}; this base needs "
                f"{list(module.dims(base))}. Was the adapter trained for another base?",
                param=slots[0].name,
            )

        def load(file: TensorFile) -> _Delta:
            return _Delta(w1.load(file), w2.load(file), scaling)

        return PlannedModule(module, w1.rank * w2.rank, False, (), load)


def _factor(slots: tuple[TensorSlot, ...], rank: int) -> _Factor:
    """Read the sizes of one Kronecker factor off its tensors."""
    for slot in slots:
        if len(slot.shape) != 2:
            raise UnsupportedAdapter(f"{slot.name} has {len(slot.shape)} dimensions instead of 2", param=slot.name)
    if len(slots) == 1:
        num_rows, num_columns = slots[0].shape
        return _Factor(slots, num_rows, num_columns, min(num_rows, num_columns))
    left, right = slots
    if (left.shape[1], right.shape[0]) != (rank, rank):
        raise UnsupportedAdapter(
            f"{left.name} and its partner have the ranks {left.shape[1]} and {right.shape[0]}; the config says {rank}",
            param=left.name,
        )
    return _Factor(slots, left.shape[0], right.shape[1], rank)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_lycoris_scaling(config))


LOKR = Served(
    title="LoKr",
    served_as="low rank: product of the ranks of both Kronecker factors; r times the smaller side of W1 as a rule",
    limits="a rank above the limit on products of ranks (W2 not factored, or r too large): train with a smaller r. "
    "Convolutions (`lokr_t2`) are not served",
    rules=(
        *LYCORIS_RULES,
        used("decompose_both", "whether W1 is factored; the tensors show it"),
        used("decompose_factor", "the sizes of W1 and W2; the tensors show them"),
        harmless("rank_dropout_scale", "acts only while training or initialising"),
    ),
    parts=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    read=_read,
    recorded=("r", "alpha", "rank_pattern", "alpha_pattern"),
    is_product=True,
)
