"""PEFT's RANDLORA: a sum of n products of random bases with trained weights, of full rank as a rule.

Owns RandLoRA's keys and formula. PEFT saves the shared bases once for the model and once more for every module; they
must be equal. Invariant: products pair up as PEFT flattens them: row t of A is (t // n, t % n), column t of B is
(t // r, t % r).
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, harmless, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.convert.vera import refuse_unsaved
from adapters_store.errors import CorruptUpload
from adapters_store.safetensors_header import TensorSlot

_TRAINED = ("randlora_lambda", "randlora_gamma")
_BASES = ("randlora_A", "randlora_B")


@dataclass(frozen=True, slots=True)
class _Delta:
    """small [r, 1, least side], large [largest side, n, r], weights [r, n], gamma [n, least side].

    `is_wide` says that inputs are the smaller side, or as many as outputs.
    """

    small: Float64
    large: Float64
    weights: Float64
    gamma: Float64
    scaling: float
    is_wide: bool

    def factors(self) -> Factors:
        trained = self.small * self.weights[:, :, None] * self.gamma * self.scaling
        small = trained.reshape(-1, trained.shape[2])
        large = self.large.reshape(len(self.large), -1)
        return Factors(small, large) if self.is_wide else Factors(large.T, small.T)

    def apply(self, x: Float64) -> Float64:
        rank, num_bases = self.weights.shape
        y = np.zeros((len(x), len(self.large) if self.is_wide else self.gamma.shape[1]))
        for number in range(rank * num_bases):
            row, base = divmod(number, num_bases)
            inner = self.small[row, 0] * self.weights[row, base] * self.gamma[base]
            outer = self.large[:, number // rank, number % rank]
            y += np.outer(x @ inner, outer) if self.is_wide else np.outer(x @ outer, inner)
        return y * self.scaling


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    alpha: float

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return lambda [r, n] and gamma [n, least side] of every module, over the bases of the model."""
        bases = tensors.take_shared(*_BASES, way_out="; save it with save_projection=True")
        dims = [module.dims(base) for module in tensors.modules.values()]
        sides = sorted((max(num_out for num_out, _ in dims), max(num_in for _, num_in in dims)))
        check_shape(bases[0], (self.rank, 1, sides[0]))
        check_shape(bases[1], (sides[1], _num_bases(sides[0], self.rank), self.rank))
        return {path: self._plan_module(module, bases, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, bases: tuple[TensorSlot, ...], base: BaseDims) -> PlannedModule:
        copies = [name for name in _BASES if name in module.parts]
        weights, gamma, *copied = module.take(*_TRAINED, *copies)
        num_out, num_in = module.dims(base)
        least, largest = sorted((num_out, num_in))
        num_bases = _num_bases(least, self.rank)
        originals = [bases[_BASES.index(name)] for name in copies]
        shapes: list[tuple[TensorSlot, tuple[int, ...]]] = [
            (weights, (self.rank, num_bases)),
            (gamma, (num_bases, least)),
        ]
        shapes += [(copy, original.shape) for copy, original in zip(copied, originals, strict=True)]

        def load(file: TensorFile) -> _Delta:
            for copy, original in zip(copied, originals, strict=True):
                if not np.array_equal(file.floats(copy), file.shared(original)):
                    raise CorruptUpload(f"{copy.name} differs from {original.name}", param=copy.name)
            return _Delta(
                small=file.shared(bases[0])[:, :, :least].astype(np.float64),
                large=file.shared(bases[1])[:largest, :num_bases].astype(np.float64),
                weights=file.floats(weights).astype(np.float64),
                gamma=file.floats(gamma).astype(np.float64),
                scaling=self.alpha / self.rank,
                is_wide=num_in == least,
            )

        return PlannedModule(module, num_bases * self.rank, False, tuple(shapes), load)


def _num_bases(least: int, rank: int) -> int:
    return -(-least // rank)


def _read(config: Config) -> _Tuner:
    refuse_unsaved(config, "save_projection")
    return _Tuner(read_whole(config, "r", 32), read_scale(config, "randlora_alpha", 640))


RANDLORA = Served(
    title="RandLoRA",
    served_as="low rank n r, about the layer's smaller side, where `--max-rank` allows that",
    limits="a smaller side above `--max-rank`, so nearly every real base: train a LoRA. "
    "Bases that are not in the file: save with `save_projection=True`",
    rules=(
        *common_rules("layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"),
        used("r", "rank of each base"),
        used("randlora_alpha", "scaling is randlora_alpha / r"),
        used("save_projection", "must be true: the bases are read from the file"),
        harmless("projection_prng_key", "the bases are in the file", 0),
        harmless("sparse", "the bases are in the file"),
        harmless("very_sparse", "the bases are in the file"),
        training_only("randlora_dropout", 0.0),
    ),
    parts=frozenset({*_TRAINED, *_BASES}),
    shared=frozenset(_BASES),
    read=_read,
    recorded=("r", "randlora_alpha"),
)
