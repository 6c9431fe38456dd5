"""Canonical adapters of any ops, written with values that pass every check, some of them replaced by a test."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.canonical import check_adapter
from adapters_store.convert.adapter_writer import encode_indices, encode_values, write_image, write_manifest
from adapters_store.manifest import Manifest, Source
from adapters_store.model_ops import NO_MODEL_OPS, ModelOps
from adapters_store.ops import Module, TensorSpec
from tests.store.folders import TINY

SOURCE = Source("test", {}, {}, (), 0.0)


def manifest(
    *modules: Module, model_ops: ModelOps = NO_MODEL_OPS, activation: tuple[int, ...] = (), base: BaseDims = TINY
) -> Manifest:
    """Return a manifest of these ops, its file made up, its experts named by their numbers."""
    width = max((len(module.ranks) for module in modules if module.experts is not None), default=0)
    names = tuple(str(expert) for expert in range(width))
    made = Manifest("model", base, "float32", 1000, "0" * 64, modules, SOURCE, experts=names)
    return replace(made, model_ops=model_ops, activation=activation)


def write(folder: Path, made: Manifest, changes: dict[str, bytes] | None = None) -> Manifest:
    """Write an adapter; `changes` are of encoded tensors."""
    specs = {spec.name: spec for module in made.modules for spec in module.tensors(made.base)}
    specs |= {spec.name: spec for spec in made.model_ops.tensors(made.base)}
    own = changes or {}
    folder.mkdir()
    written = write_image(
        folder, made.modules, made.base, "float32", lambda name: own.get(name, sound_value(specs[name])), made.model_ops
    )
    assert own.keys() <= specs.keys(), "a change of a tensor that is not there"
    made = replace(made, file_bytes=written.num_bytes, file_sha256=written.sha256)
    write_manifest(folder, made)
    return made


def check(folder: Path, made: Manifest, changes: dict[str, bytes] | None = None, dense_budget_bytes: int = 0) -> None:
    """Write an adapter and read it as the store reads what a converter wrote."""
    written = write(folder, made, changes)
    assert check_adapter(folder, made.base, "float32", 16, dense_budget_bytes) == written


def floats(*values: float) -> bytes:
    """Return float32 values as the image holds them."""
    return np.array(values, dtype="<f4").tobytes()


def ints(*values: int) -> bytes:
    """Return int32 values as the image holds them."""
    return np.array(values, dtype="<i4").tobytes()


def quarter_turns(num_blocks: int, size: int) -> bytes:
    """Return blocks that move each input one place on: orthogonal, and not the identity."""
    return floats(*np.tile(np.roll(np.eye(size), 1, axis=1), (num_blocks, 1, 1)).ravel())


def sound_value(spec: TensorSpec) -> bytes:
    """Return a tensor that passes every check."""
    if spec.is_indptr:
        assert spec.index_limit is not None
        # as many in each row as there are rows for them, the rest in the last
        starts = np.minimum(np.arange(spec.shape[0]) * 2, spec.index_limit - 1)
        starts[-1] = spec.index_limit - 1
        return encode_indices(starts)
    if spec.is_col:
        return encode_indices(np.arange(spec.shape[0]) % 2)
    if spec.is_bits:
        return bytes(spec.shape[0])
    if spec.index_limit is not None:
        return encode_indices(np.arange(spec.shape[0]))
    if spec.name.endswith("in_blockdiag"):
        return quarter_turns(spec.shape[0], spec.shape[1])
    return encode_values(np.full(spec.shape, 0.5, dtype=np.float32), "float32", spec.name)
