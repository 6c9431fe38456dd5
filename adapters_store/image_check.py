"""The values of a fresh canonical file, judged tensor by tensor as they are read.

Owns what a value may be: finite, positions strictly increasing and in range, blocks orthogonal, padding zero, and at
least one op that acts, as far as that can be told without the base. Invariant: no value of a file that `finish` lets
pass can poison a sum or name a place that the base lacks.
"""

import numpy as np
import numpy.typing as npt

from adapters_store.errors import (
    AdapterWithoutEffect,
    CorruptUpload,
    InvalidIndex,
    NonFiniteValues,
    UnsupportedAdapter,
)
from adapters_store.float_bits import decode, is_finite, is_zero
from adapters_store.manifest import Manifest
from adapters_store.ops import BITS_DTYPE, Module, TensorSpec
from adapters_store.safetensors_header import TensorSlot

NO_EFFECT = (
    "every low-rank product and bias of this adapter is zero and every scale is one, so it would answer like the base; "
    "was it saved before training?"
)
# per op, the tensors that must all be non-trivial for it to act; a rotation acts by either of its two
_FACTORS = (
    ("A", "BT"),
    ("cols.D",),
    ("rows.D",),
    ("csr.val",),
    ("csr.scale",),
    ("dense",),
    ("out_scale",),
    ("in_scale",),
    ("in_blockdiag",),
    ("rot2.c0",),
    ("rot2.c1",),
    ("bias",),
)
_SCALES = (".out_scale", ".in_scale", ".rot2.c0")
_BLOCKS = ".in_blockdiag"
# an untrained DoRA's quotients of lengths differ from 1 by their rounding
_NEUTRAL_WITHIN = 2.0**-20
_ORTHOGONAL_WITHIN = 1e-2

Int64 = npt.NDArray[np.int64]


class ImageCheck:
    """One pass over a file's tensors, in order."""

    def __init__(self, manifest: Manifest) -> None:
        specs = [spec for module in manifest.modules for spec in module.tensors(manifest.base)]
        specs += manifest.model_ops.tensors(manifest.base)
        self._specs = {spec.name: spec for spec in specs}
        self._modules = manifest.modules
        self._model_ops = manifest.model_ops
        self._non_trivial: set[str] = set()
        # of the sparse matrix that is being read
        self._indptr: Int64 = np.zeros(1, dtype=np.int64)

    def take_padding(self, slot: TensorSlot, raw: bytes) -> None:
        """Refuse padding that is not zero; raises CorruptUpload."""
        if any(raw):
            raise CorruptUpload("the adapter's file has padding that is not zero", param=slot.name)

    def take(self, slot: TensorSlot, raw: bytes) -> None:
        """Judge one tensor; raises NonFiniteValues, InvalidIndex, CorruptUpload, UnsupportedAdapter."""
        spec = self._specs[slot.name]
        if spec.index_limit is not None:
            self._take_positions(spec, spec.index_limit, raw)
            return
        if slot.dtype == BITS_DTYPE:
            check_unused_bits(raw, int(self._indptr[-1]), slot.name)
            return
        if not is_finite(raw, slot.dtype):
            raise NonFiniteValues(
                f"tensor {slot.name} holds NaN or infinity, in the file or after the scaling and the cast to "
                f"{slot.dtype}",
                param=slot.name,
            )
        if not self._is_trivial(slot, raw):
            self._non_trivial.add(slot.name)

    def finish(self) -> None:
        """Refuse an adapter of which nothing acts; raises AdapterWithoutEffect."""
        if not any(self._acts(module) for module in self._modules) and not self._model_acts():
            raise AdapterWithoutEffect(NO_EFFECT, param="adapter_model.safetensors")

    def _take_positions(self, spec: TensorSpec, limit: int, raw: bytes) -> None:
        if spec.is_indptr:
            self._indptr = np.frombuffer(raw, dtype="<i4").astype(np.int64)
            check_row_starts(self._indptr, limit - 1, spec.name)
        elif spec.is_col:
            check_columns(raw, self._indptr, limit, spec.name)
        else:
            check_indices(raw, limit, spec.name)

    def _is_trivial(self, slot: TensorSlot, raw: bytes) -> bool:
        if slot.name.endswith(_SCALES):
            return is_neutral(decode(raw, slot.dtype))
        if slot.name.endswith(_BLOCKS):
            blocks = decode(raw, slot.dtype).reshape(slot.shape)
            check_orthogonal(blocks, slot.name)
            return is_neutral(blocks - np.eye(slot.shape[1], dtype=np.float32) + 1)
        return is_zero(raw, slot.dtype)

    def _acts(self, module: Module) -> bool:
        return any(all(module.tensor(kind) in self._non_trivial for kind in factors) for factors in _FACTORS)

    def _model_acts(self) -> bool:
        """Prompts take attention whatever they hold; whether rows or norms differ from the base's, the base knows."""
        ops = self._model_ops
        if ops.norms or ops.token_rows or ops.num_virtual_tokens:
            return True
        return {"embed.AT", "embed.BT"} <= self._non_trivial


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


def check_row_starts(indptr: Int64, nnz: int, name: str) -> None:
    """Refuse row starts that do not lead from 0 to `nnz` without a step back; raises InvalidIndex."""
    if indptr[0] != 0 or indptr[-1] != nnz or bool(np.any(np.diff(indptr) < 0)):
        raise InvalidIndex(f"{name} does not lead from 0 to {nnz} without a step back", param=name)


def check_columns(raw: bytes, indptr: Int64, limit: int, name: str) -> None:
    """Refuse columns outside 0 to `limit` or not strictly increasing within a row; raises InvalidIndex."""
    columns = np.frombuffer(raw, dtype="<i4").astype(np.int64)
    if int(columns.min()) < 0 or int(columns.max()) >= limit:
        raise InvalidIndex(f"{name} holds a position outside 0 to {limit - 1}", param=name)
    begins_row = np.zeros(len(columns) + 1, dtype=np.bool_)
    begins_row[indptr] = True
    if bool(np.any((np.diff(columns) <= 0) & ~begins_row[1:-1])):
        raise InvalidIndex(f"the columns of {name} are not strictly increasing within a row", param=name)


def check_unused_bits(raw: bytes, num_bits: int, name: str) -> None:
    """Refuse bits behind the last sign; raises CorruptUpload."""
    if num_bits % 8 and raw[-1] >> (num_bits % 8):
        raise CorruptUpload(f"{name} has bits behind its {num_bits} signs", param=name)


def check_orthogonal(blocks: npt.NDArray[np.float32], name: str) -> None:
    """Refuse blocks that are no rotations; raises UnsupportedAdapter."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = blocks @ blocks.transpose(0, 2, 1)
        error = float(np.abs(products - np.eye(blocks.shape[1], dtype=np.float32)).max())
    # what overflowed is no number, and no rotation either
    if not error <= _ORTHOGONAL_WITHIN:
        raise UnsupportedAdapter(
            f"the blocks of {name} are no rotations: R R^T differs from 1 by {error:.2g}, the limit is "
            f"{_ORTHOGONAL_WITHIN:g}; train it with a Cayley transform that is exact",
            param=name,
        )
