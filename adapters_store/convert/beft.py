"""PEFT's BEFT: a trained bias added to a linear layer's output.

Owns BEFT's keys and formula. Invariant: rank 0; the bias is stored as it is.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.peft_keys import common_rules
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.float_bits import Float32

_BIAS = "beft_bias"


@dataclass(frozen=True, slots=True)
class _Delta:
    """bias [1, out]."""

    bias: Float32
    num_in: int

    def factors(self) -> Factors:
        empty = np.zeros((0, self.num_in), np.float32)
        return Factors(empty, np.zeros((self.bias.size, 0), np.float32), self.bias.reshape(-1))

    def apply(self, x: Float64) -> Float64:
        return np.zeros((len(x), 1)) + self.bias.astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Tuner:
    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the bias [1, out] of every module."""
        tensors.take_shared()
        return {path: _plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()


def _plan_module(module: PeftModule, base: BaseDims) -> PlannedModule:
    (bias,) = module.take(_BIAS)
    num_out, num_in = module.dims(base)

    def load(file: TensorFile) -> _Delta:
        return _Delta(file.floats(bias), num_in)

    return PlannedModule(module, 0, True, ((bias, (1, num_out)),), load)


def _read(_config: Config) -> _Tuner:
    return _Tuner()


BEFT = Served(
    title="BEFT",
    served_as="bias alone",
    limits="none",
    rules=common_rules("init_weights"),
    parts=frozenset({_BIAS}),
    read=_read,
    recorded=(),
    default_targets=DefaultTargets(
        ("v_proj",), frozenset({"llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"})
    ),
)
