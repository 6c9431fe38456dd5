"""PEFT's DELORA: `delta = B diag(lambda / (r |A_i| |B_i|)) A diag(w_norm)`, a low rank of bounded strength.

Owns DeLoRA's keys and formula. The norms of the base's columns, `w_norm`, are saved with the adapter, so the base is
not needed. Invariant: norms are at least 1e-4, as PEFT clamps them.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_rank_pattern, read_whole
from adapters_store.convert.peft_keys import common_rules, harmless, training_only, used
from adapters_store.convert.peft_patterns import Pattern
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served

_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAST_NORM = 1e-4


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [r, in], b [out, r], strength lambda, w_norm [in]."""

    a: Float64
    b: Float64
    strength: float
    w_norm: Float64

    def factors(self) -> Factors:
        norms = _norms(self.a, axis=1) * _norms(self.b, axis=0)
        return Factors(self.a * self.w_norm, self.b * (self.strength / len(self.a) / norms))

    def apply(self, x: Float64) -> Float64:
        y = np.zeros((len(x), len(self.b)))
        for row, column in zip(self.a, self.b.T, strict=True):
            bound = max(float(np.linalg.norm(row)), _LEAST_NORM) * max(float(np.linalg.norm(column)), _LEAST_NORM)
            y += np.outer((x * self.w_norm) @ row, column) * (self.strength / len(self.a) / bound)
        return y


def _norms(values: Float64, axis: int) -> Float64:
    norms: Float64 = np.maximum(np.sqrt(np.square(values).sum(axis=axis)), _LEAST_NORM)
    return norms


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    rank_pattern: Pattern[int]

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, in], B [out, r], lambda [1] and w_norm [in] of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.rank_pattern.unused(paths)

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        slots = module.take(*_NAMES)
        rank = self.rank_pattern.of(module.path, self.rank)
        num_out, num_in = module.dims(base)
        shapes = ((rank, num_in), (num_out, rank), (1,), (num_in,))

        def load(file: TensorFile) -> _Delta:
            a, b, strength, w_norm = (file.floats(slot).astype(np.float64) for slot in slots)
            return _Delta(a, b, float(strength[0]), w_norm)

        return PlannedModule(module, rank, False, tuple(zip(slots, shapes, strict=True)), load)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_whole(config, "r", 8), read_rank_pattern(config, "rank_pattern"))


_IN_FILE = "what lambda starts from; the trained one is in the file"

DELORA = Served(
    title="DeLoRA",
    served_as="low rank r: A diag(w_norm), B lambda / (r norms)",
    limits="none",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_weights"),
        used("r", "rank of every module that rank_pattern does not name"),
        used("rank_pattern", "rank per module; plain dotted names only, first match wins as in PEFT"),
        harmless("delora_lambda", _IN_FILE, 15),
        harmless("lambda_pattern", _IN_FILE),
        training_only("module_dropout", 0.0),
    ),
    parts=frozenset(_NAMES),
    read=_read,
    recorded=("r", "rank_pattern"),
)
