"""PEFT's Super-Tuning: single entries of a weight change; Supra adds a LoRA.

Owns its keys and formula. Invariant: places come from the file; they are never chosen again from the base's weights,
where equal magnitudes would leave the choice open.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.sparse_entries import entries_in_order
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.safetensors_header import TensorSlot

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_SAVED = "save_precomputed_indices"


@dataclass(frozen=True, slots=True)
class _Delta:
    """values and flat places [n]; a [r, in], b [out, r] unscaled, r 0 without a LoRA."""

    values: Float32
    places: npt.NDArray[np.int64]
    name: str
    a: Float32
    b: Float32
    scaling: float

    def factors(self) -> Factors:
        entries = entries_in_order(self.places, self.values, self.a.shape[1], self.name)
        return Factors(self.a, self.b.astype(np.float64) * self.scaling, sparse=entries)

    def apply(self, x: Float64) -> Float64:
        weight = np.zeros(len(self.b) * self.a.shape[1])
        weight[self.places] = self.values
        y = x @ weight.reshape(len(self.b), -1).T
        low: Float64 = (x @ self.a.T.astype(np.float64)) @ self.b.T.astype(np.float64)
        return y + self.scaling * low


@dataclass(frozen=True, slots=True)
class _Tuner:
    """rank 0: no LoRA."""

    rank: int
    alpha: float

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return values and places [n] of every module, and perhaps a LoRA."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        values, places, *factors = module.take(_VALUES, _PLACES, *((_A, _B) if self.rank else ()))
        num_out, num_in = module.dims(base)
        count = values.shape[0] if len(values.shape) == 1 else 0
        shapes: list[tuple[TensorSlot, tuple[int, ...]]] = [(values, (count,)), (places, (count,))]
        shapes += zip(factors, ((self.rank, num_in), (num_out, self.rank)), strict=False)
        for slot, shape in shapes:
            check_shape(slot, shape)

        def load(file: TensorFile) -> _Delta:
            empty = np.zeros((0, num_in), np.float32), np.zeros((num_out, 0), np.float32)
            a, b = (file.floats(slot) for slot in factors) if factors else empty
            scaling = self.alpha / self.rank if factors else 1.0
            found = file.indices(places, num_out * num_in)
            return _Delta(file.floats(values), found, places.name, a, b, scaling)

        return PlannedModule(module, self.rank, False, tuple(shapes), load, has_sparse=count > 0)


def _read(config: Config) -> _Tuner:
    if not read_flag(config, _SAVED, default=True):
        raise UnsupportedAdapter(
            f"{_SAVED} is false: the places would be chosen again from the base's magnitudes, where equal ones leave "
            "the choice open; save the adapter with true",
            param=_SAVED,
        )
    if config.get("r") is None:
        return _Tuner(0, 0.0)
    rank = read_whole(config, "r", 8)
    return _Tuner(rank, 2.0 * rank if config.get("lora_alpha") is None else read_scale(config, "lora_alpha", 1.0))


SUPERTUNING = Served(
    title="Super-Tuning, Supra",
    served_as="sparse delta: the entries of the file; low rank r for Supra",
    limits="more than a tenth of a weight's entries: train with a higher sparsity. Places that are not in the file: "
    "save with `save_precomputed_indices=True`",
    rules=(
        *common_rules("init_weights"),
        used("r", "rank of Supra's LoRA; null without one"),
        used("lora_alpha", "scaling of Supra's LoRA is lora_alpha / r; 2 where it is null"),
        used(_SAVED, "must be true"),
        training_only("sparsity", 0.99),
        training_only("select_top", True),
        training_only("lora_dropout", 0.0),
    ),
    parts=frozenset({_VALUES, _PLACES, _A, _B}),
    integers=frozenset({_PLACES}),
    read=_read,
    recorded=("r", "lora_alpha"),
)
