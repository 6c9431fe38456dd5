"""The values of a fresh canonical file, judged tensor by tensor as they are read.

Owns what a value may be: finite, positions strictly increasing and in range, padding zero, and at least one op that
acts. Invariant: a file that `finish` lets pass changes what the base answers, and no value of it can poison a sum.
"""

import numpy as np
import numpy.typing as npt

from adapters_store.errors import AdapterWithoutEffect, CorruptUpload, InvalidIndex, NonFiniteValues
from adapters_store.float_bits import decode, is_finite, is_zero
from adapters_store.manifest import Manifest
from adapters_store.ops import Module
from adapters_store.safetensors_header import TensorSlot

NO_EFFECT = (
    "every low-rank product and bias of this adapter is zero and every scale is one, so it would answer like the base; "
    "was it saved before training?"
)
# per op, the tensors that must all be non-trivial for it to act
_FACTORS = (("A", "BT"), ("cols.D",), ("rows.D",), ("out_scale",), ("in_scale",), ("bias",))
_SCALES = (".out_scale", ".in_scale")
# an untrained DoRA's quotients of lengths differ from 1 by their rounding
_NEUTRAL_WITHIN = 2.0**-20


class ImageCheck:
    """One pass over a file's tensors, in order."""

    def __init__(self, manifest: Manifest) -> None:
        specs = [spec for module in manifest.modules for spec in module.tensors(manifest.base)]
        self._index_limits = {spec.name: spec.index_limit for spec in specs if spec.index_limit is not None}
        self._modules = manifest.modules
        self._non_trivial: set[str] = set()

    def take_padding(self, slot: TensorSlot, raw: bytes) -> None:
        """Refuse padding that is not zero; raises CorruptUpload."""
        if any(raw):
            raise CorruptUpload("the adapter's file has padding that is not zero", param=slot.name)

    def take(self, slot: TensorSlot, raw: bytes) -> None:
        """Judge one tensor; raises NonFiniteValues, InvalidIndex."""
        limit = self._index_limits.get(slot.name)
        if limit is not None:
            check_indices(raw, limit, slot.name)
            return
        if not is_finite(raw, slot.dtype):
            raise NonFiniteValues(
                f"tensor {slot.name} holds NaN or infinity, in the file or after the scaling and the cast to "
                f"{slot.dtype}",
                param=slot.name,
            )
        is_scale = slot.name.endswith(_SCALES)
        if not (is_neutral(decode(raw, slot.dtype)) if is_scale else is_zero(raw, slot.dtype)):
            self._non_trivial.add(slot.name)

    def finish(self) -> None:
        """Refuse an adapter of which nothing acts; raises AdapterWithoutEffect."""
        if not any(self._acts(module) for module in self._modules):
            raise AdapterWithoutEffect(NO_EFFECT, param="adapter_model.safetensors")

    def _acts(self, module: Module) -> bool:
        return any(all(module.tensor(kind) in self._non_trivial for kind in factors) for factors in _FACTORS)


def is_neutral(scale: npt.NDArray[np.float32] | npt.NDArray[np.float64]) -> bool:
    """Return whether a scale leaves everything as it is, but for rounding."""
    return bool(np.all(np.abs(scale - 1) <= _NEUTRAL_WITHIN))


def check_indices(raw: bytes, limit: int, name: str) -> None:
    """Refuse positions that are not strictly increasing from 0 or more to below `limit`; raises InvalidIndex."""
    indices = np.frombuffer(raw, dtype="<i4").astype(np.int64)
    if indices[0] < 0 or indices[-1] >= limit:
        raise InvalidIndex(f"{name} holds a position outside 0 to {limit - 1}", param=name)
    if bool(np.any(np.diff(indices) <= 0)):
        raise InvalidIndex(f"the positions of {name} are not strictly increasing", param=name)
