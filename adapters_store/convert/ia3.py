"""PEFT's IA3: `y = l * (W x + b)`, or `y = W (l * x) + b` for feedforward modules.

Owns IA3's keys and formula. Invariant: the vector is stored as it is; where it scales outputs it scales the base's
bias too, which the server does by a bias of `(l - 1) * b` of its own.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_patterns import read_names
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.float_bits import Float32

_VECTOR = "ia3_l"
_FEEDFORWARD = "feedforward_modules"
# PEFT's own choice for every architecture here
_DEFAULT_FEEDFORWARD = ("down_proj",)


@dataclass(frozen=True, slots=True)
class _Delta:
    """vector [out], or [in] where `is_input`; bias [out] is the base's."""

    vector: Float32
    is_input: bool
    bias: Float32 | None
    dims: tuple[int, int]

    def factors(self) -> Factors:
        num_out, num_in = self.dims
        return Factors(
            a=np.zeros((0, num_in), np.float32),
            b=np.zeros((num_out, 0), np.float32),
            bias=None if self.bias is None else (self.vector.astype(np.float64) - 1) * self.bias,
            out_scale=None if self.is_input else self.vector,
            in_scale=self.vector if self.is_input else None,
        )

    def apply(self, x: Float64) -> Float64:
        added = np.zeros((len(x), self.dims[0]))
        if self.bias is None:
            return added
        bias = self.bias.astype(np.float64)
        return added + (bias * self.vector - bias)

    def scales(self) -> tuple[Float64 | None, Float64 | None]:
        """Return the vector in its place."""
        vector = self.vector.astype(np.float64)
        return (None, vector) if self.is_input else (vector, None)


@dataclass(frozen=True, slots=True)
class _Tuner:
    """`feedforward` ends the paths of the modules whose inputs are scaled; `is_default`: the config does not say it."""

    feedforward: tuple[str, ...]
    is_default: bool

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the vector of every module: [1, in] of feedforward modules, [out, 1] of the others."""
        tensors.take_shared()
        return {path: self._plan_module(module, tensors, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the feedforward modules that name none of these."""
        names = () if self.is_default else self.feedforward
        return tuple(f"{_FEEDFORWARD}[{name}]" for name in names if not any(path.endswith(name) for path in paths))

    def _plan_module(self, module: PeftModule, tensors: PeftTensors, base: BaseDims) -> PlannedModule:
        (slot,) = module.take(_VECTOR)
        num_out, num_in = module.dims(base)
        # as PEFT: the end of the path, whatever stands before it
        is_input = any(module.path.endswith(name) for name in self.feedforward)
        bias = None if is_input else tensors.weights.bias(module.layer, module.sites)

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(slot).reshape(-1), is_input, bias, (num_out, num_in))

        return PlannedModule(
            source=module,
            rank=0,
            has_bias=bias is not None,
            shapes=((slot, (1, num_in) if is_input else (num_out, 1)),),
            load=load,
            has_out_scale=not is_input,
            has_in_scale=is_input,
        )


def _read(config: Config) -> _Tuner:
    value = config.get(_FEEDFORWARD)
    if value is None:
        return _Tuner(_DEFAULT_FEEDFORWARD, is_default=True)
    return _Tuner(read_names(value, _FEEDFORWARD), is_default=False)


IA3 = Served(
    title="(IA)³",
    served_as="scales of inputs (feedforward modules) and outputs, kept in fp32; a bias (l - 1) b where the base has "
    "one that is scaled too",
    limits="needs the base's weights at hand",
    rules=(
        *common_rules("exclude_modules", "fan_in_fan_out"),
        used(_FEEDFORWARD, "list of plain names: the modules whose inputs are scaled"),
        training_only("init_ia3_weights", True),
    ),
    parts=frozenset({_VECTOR}),
    read=_read,
    recorded=(_FEEDFORWARD,),
    default_targets=DefaultTargets(("k_proj", "v_proj", "down_proj"), frozenset({"llama", "mistral"})),
)
