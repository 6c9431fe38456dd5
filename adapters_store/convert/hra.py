"""PEFT's HRA: `W' = W H_1 .. H_r`, reflections `H = I - 2 u u^T` of the inputs; a low rank once the base is known.

Owns HRA's keys and formula. Invariant: `H_1 .. H_r = I - V U^T` with U the unit vectors, so `A = U^T` and `B = -W V`.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.config_values import Config, read_flag, read_whole
from adapters_store.convert.peft_keys import common_rules, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_VECTORS = "hra_u"
# a vector this near to those before it is their rounding
_LEAST_LENGTH = 2.0**-20


@dataclass(frozen=True, slots=True)
class _Delta:
    """vectors [in, r], in the order of the reflections."""

    vectors: Float32
    is_orthonormal: bool
    module: PeftModule
    weights: BaseWeights
    num_out: int

    def factors(self) -> Factors:
        unit = self._unit_vectors()
        turned = 2 * unit if self.is_orthonormal else _accumulated(unit)
        b, terms = (np.zeros((self.num_out, unit.shape[1])) for _ in range(2))
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            b[rows] = -(weight.astype(np.float64) @ turned)
            terms[rows] = np.abs(weight).astype(np.float64) @ np.abs(turned)
        return Factors(a=unit.T, b=b, b_terms=terms)

    def apply(self, x: Float64) -> Float64:
        moved = x.copy()
        for u in reversed(self._unit_vectors().T):
            # x (H_1 .. H_r)^T: the last reflection meets x first
            moved -= 2 * np.outer(moved @ u, u)
        y = np.zeros((len(x), self.num_out))
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            y[:, rows] = (moved - x) @ weight.astype(np.float64).T
        return y

    def _unit_vectors(self) -> Float64:
        """Return unit vectors [in, r], orthogonal to each other where the config demands it."""
        made: list[Float64] = []
        for column in self.vectors.astype(np.float64).T:
            vector = column
            for earlier in made if self.is_orthonormal else ():
                vector = vector - (earlier @ vector) * earlier
            length = float(np.linalg.norm(vector))
            if not length > _LEAST_LENGTH * float(np.linalg.norm(column)):
                raise UnsupportedAdapter(
                    f"a vector of {self.module.path}.{_VECTORS} is zero or lies among those before it; it has no "
                    "direction to reflect along",
                    param=self.module.path,
                )
            made.append(vector / length)
        return np.stack(made, axis=1)


def _accumulated(unit: Float64) -> Float64:
    """Return V [in, r] of `H_1 .. H_r = I - V U^T`."""
    turned = np.zeros_like(unit)
    for k in range(unit.shape[1]):
        overlap = unit[:, :k].T @ unit[:, k]
        turned[:, k] = 2 * (unit[:, k] - turned[:, :k] @ overlap)
    return turned


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    is_orthonormal: bool

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the vectors [in, r] of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, tensors, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, tensors: PeftTensors, base: BaseDims) -> PlannedModule:
        (slot,) = module.take(_VECTORS)
        num_out, num_in = module.dims(base)

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(slot), self.is_orthonormal, module, tensors.weights, num_out)

        return PlannedModule(module, self.rank, False, ((slot, (num_in, self.rank)),), load)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_whole(config, "r", 8), read_flag(config, "apply_GS"))


HRA = Served(
    title="HRA",
    served_as="low rank r: A of unit vectors, B = -W V computed from the base's weights",
    limits="needs the base's weights at hand",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_weights"),
        used("r", "number of reflections"),
        used("apply_GS", "the vectors are made orthogonal, first to last"),
    ),
    parts=frozenset({_VECTORS}),
    read=_read,
    recorded=("r", "apply_GS"),
)
