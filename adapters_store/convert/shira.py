"""PEFT's SHiRA: single entries of a weight change, by values and places that the file holds.

Owns SHiRA's keys and formula. Invariant: entries are added as they are; PEFT's scale is 1 in every saved file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_positions, check_shape
from adapters_store.convert.sparse_entries import entries_in_order
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.float_bits import Float32

_VALUES, _PLACES = "shira_weight", "shira_indices"


@dataclass(frozen=True, slots=True)
class _Delta:
    """values [n]; places [2, n]: rows, columns."""

    values: Float32
    places: npt.NDArray[np.int64]
    name: str
    dims: tuple[int, int]

    def factors(self) -> Factors:
        num_out, num_in = self.dims
        flat = self.places[0] * num_in + self.places[1]
        entries = entries_in_order(flat, self.values, num_in, self.name)
        return Factors(np.zeros((0, num_in)), np.zeros((num_out, 0)), sparse=entries)

    def apply(self, x: Float64) -> Float64:
        y = np.zeros((self.dims[0], len(x)))
        rows, cols = self.places
        np.add.at(y, rows, self.values.astype(np.float64)[:, None] * x.T[cols])
        return y.T


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return values [n] and places [2, n] of every module, n as many as a LoRA of that rank has numbers."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        values, places = module.take(_VALUES, _PLACES)
        num_out, num_in = module.dims(base)
        count = self.rank * (num_out + num_in)
        shapes = ((values, (count,)), (places, (2, count)))
        for slot, shape in shapes:
            check_shape(slot, shape)

        def load(file: TensorFile) -> _Delta:
            found = file.indices(places, max(num_out, num_in))
            for axis, limit in ((0, num_out), (1, num_in)):
                check_positions(found[axis], limit, places)
            return _Delta(file.floats(values), found, places.name, (num_out, num_in))

        return PlannedModule(module, 0, False, shapes, load, has_sparse=True)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_whole(config, "r", 32))


SHIRA = Served(
    title="SHiRA",
    served_as="sparse delta: the entries of the file",
    limits="more than a tenth of a weight's entries: train with a smaller r",
    rules=(
        *common_rules("fan_in_fan_out", "init_weights"),
        used("r", "entries per module: r (in + out)"),
        training_only("mask_type", "random"),
        training_only("random_seed"),
    ),
    parts=frozenset({_VALUES, _PLACES}),
    integers=frozenset({_PLACES}),
    read=_read,
    recorded=("r",),
)
