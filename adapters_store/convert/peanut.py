"""PEFT's PEANuT: `delta = (s B f(.. f(A W) ..))`, a small network over the columns of the base's weight.

Owns PEANuT's keys and formula. Invariant: the network's hidden values [r, in] are the low rank's A; they are computed
once, from the base's weights, and do not depend on the input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.config_values import Config, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter

_A, _B = "peanut_A.weight", "peanut_B.weight"
_MOST_LAYERS = 16
_BENDS: dict[str, Callable[[Float64], Float64]] = {
    "relu": lambda values: np.maximum(values, 0.0),
    "tanh": np.tanh,
    "sigmoid": lambda values: 0.5 * (1.0 + np.tanh(0.5 * values)),
    "silu": lambda values: values * 0.5 * (1.0 + np.tanh(0.5 * values)),
    "linear": lambda values: values,
}


def _middle(kind: str, depth: int) -> tuple[str, ...]:
    return tuple(f"peanut_{kind}.{at}.weight" for at in range(depth))


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [r, out], b [out, r], encoders and decoders [r, r]."""

    a: Float64
    b: Float64
    encoders: tuple[Float64, ...]
    decoders: tuple[Float64, ...]
    bend: str
    scaling: float
    num_in: int
    module: PeftModule
    weights: BaseWeights

    def factors(self) -> Factors:
        bend = _BENDS[self.bend]
        hidden = bend(self.a @ self._weight())
        kept = []
        for encoder in self.encoders:
            kept.append(hidden)
            hidden = bend(encoder @ hidden)
        for decoder in self.decoders:
            hidden = bend(decoder @ hidden) + kept.pop()
        return Factors(a=hidden, b=self.b * self.scaling)

    def apply(self, x: Float64) -> Float64:
        bend = _BENDS[self.bend]
        # PEFT's own order: one row per input
        levels = [bend(self._weight().T @ self.a.T)]
        for encoder in self.encoders:
            levels.append(bend(levels[-1] @ encoder.T))
        rows = levels.pop()
        for decoder in self.decoders:
            rows = bend(rows @ decoder.T) + levels.pop()
        delta: Float64 = (rows @ self.b.T) * self.scaling
        return x @ delta

    def _weight(self) -> Float64:
        weight = np.zeros((len(self.b), self.num_in))
        for rows, values in self.weights.rows(self.module.layer, self.module.sites):
            weight[rows] = values
        return weight


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    depth: int
    bend: str
    scaling: float

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, out], B [out, r] and the layers between of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, tensors, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, tensors: PeftTensors, base: BaseDims) -> PlannedModule:
        a, b, *middle = module.take(_A, _B, *_middle("encoders", self.depth), *_middle("decoders", self.depth))
        num_out, num_in = module.dims(base)

        def load(file: TensorFile) -> _Delta:
            first, last, *rest = (file.floats(slot).astype(np.float64) for slot in (a, b, *middle))
            encoders, decoders = tuple(rest[: self.depth]), tuple(rest[self.depth :])
            scaled = self.bend, self.scaling, num_in, module, tensors.weights
            return _Delta(first, last, encoders, decoders, *scaled)

        square = tuple((slot, (self.rank, self.rank)) for slot in middle)
        shapes = ((a, (self.rank, num_out)), (b, (num_out, self.rank)), *square)
        return PlannedModule(module, self.rank, False, shapes, load)


def _read(config: Config) -> _Tuner:
    depth, bend = read_whole(config, "depth", 0, least=0), config.get("act_fn", "relu")
    if depth > _MOST_LAYERS:
        raise UnsupportedAdapter(f"depth is {depth}; the limit is {_MOST_LAYERS}", param="depth")
    if not isinstance(bend, str) or bend not in _BENDS:
        raise UnsupportedAdapter(f"act_fn is {ascii(bend)[:40]}; read here: {', '.join(_BENDS)}", param="act_fn")
    return _Tuner(read_whole(config, "r", 32), depth, bend, read_scale(config, "scaling", 1.0))


PEANUT = Served(
    title="PEANuT",
    served_as="low rank r: A is the network's answer to the base's weights, B = s B",
    limits="needs the base's weights at hand; other activations than relu, tanh, sigmoid, silu, linear",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"),
        used("r", "width of the network"),
        used("depth", "encoders, and decoders, between its ends"),
        used("act_fn", "relu, tanh, sigmoid, silu or linear"),
        used("scaling", "factor of the delta"),
    ),
    parts=frozenset({_A, _B, *_middle("encoders", _MOST_LAYERS), *_middle("decoders", _MOST_LAYERS)}),
    read=_read,
    recorded=("r", "depth", "act_fn", "scaling"),
)
