"""PEFT's UNILORA: every value of A and B is one value of a single trained vector, times a fixed scale.

Owns Uni-LoRA's keys and formula. Invariant: positions and scales come out of the file; without them they would have to
be drawn again from a seed, which other versions of NumPy may draw differently.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag, read_whole
from adapters_store.convert.peft_keys import common_rules, harmless, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_INDICES = ("unilora_indices_A", "unilora_indices_B")
_SCALES = ("unilora_scales_A", "unilora_scales_B")
_THETA = "unilora_theta_d"


@dataclass(frozen=True, slots=True)
class _Delta:
    """Positions and scales of A [r, in] and B [out, r] over theta [d]."""

    theta: Float64
    indices_a: npt.NDArray[np.int64]
    indices_b: npt.NDArray[np.int64]
    scales_a: Float64
    scales_b: Float64

    def factors(self) -> Factors:
        return Factors(self.theta[self.indices_a] * self.scales_a, self.theta[self.indices_b] * self.scales_b)

    def apply(self, x: Float64) -> Float64:
        y = np.zeros((len(x), len(self.indices_b)))
        for row in range(len(self.indices_a)):
            hidden = x @ (self.scales_a[row] * self.theta.take(self.indices_a[row]))
            y += np.outer(hidden, self.scales_b[:, row] * self.theta.take(self.indices_b[:, row]))
        return y


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    length: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return positions and scales of every module over theta [theta_d_length]."""
        (theta,) = tensors.take_shared(_THETA)
        check_shape(theta, (self.length,))
        return {path: self._plan_module(module, theta, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, theta: TensorSlot, base: BaseDims) -> PlannedModule:
        slots = module.take(*_INDICES, *_SCALES)
        num_out, num_in = module.dims(base)
        shapes = ((self.rank, num_in), (num_out, self.rank)) * 2

        def load(file: TensorFile) -> _Delta:
            return _Delta(
                theta=file.shared(theta).astype(np.float64),
                indices_a=file.indices(slots[0], self.length),
                indices_b=file.indices(slots[1], self.length),
                scales_a=file.floats(slots[2]).astype(np.float64),
                scales_b=file.floats(slots[3]).astype(np.float64),
            )

        return PlannedModule(module, self.rank, False, tuple(zip(slots, shapes, strict=True)), load)


def _read(config: Config) -> _Tuner:
    if not read_flag(config, "save_indices"):
        raise UnsupportedAdapter(
            "save_indices is false: the file leaves out the random positions, which other versions of NumPy may draw "
            "differently; save the adapter with save_indices=True",
            param="save_indices",
        )
    return _Tuner(read_whole(config, "r", 4), read_whole(config, "theta_d_length", 256))


UNILORA = Served(
    title="Uni-LoRA",
    served_as="low rank r, gathered from the vector",
    limits="positions that are not in the file (PEFT's default): save with `save_indices=True`",
    rules=(
        *common_rules(
            "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"
        ),
        used("r", "rank of every module"),
        used("theta_d_length", "length of the vector"),
        used("save_indices", "must be true: positions and scales are read from the file"),
        harmless("proj_seed", "the positions are in the file", 42),
        training_only("unilora_dropout", 0.0),
        training_only("init_theta_d_bound", 0.02),
    ),
    parts=frozenset({*_INDICES, *_SCALES}),
    shared=frozenset({_THETA}),
    integers=frozenset(_INDICES),
    read=_read,
    recorded=("r", "theta_d_length"),
)
