"""Canonical adapter and its base -> a plain Hugging Face model: the same files, with the adapter's changes added.

Owns which tensor each op changes, in fused checkpoints too, and the refusal of what no fixed weight can say.
Invariants: sums are made in float32 and rounded once to the base's own dtype; every tensor that the adapter leaves
alone keeps its bytes, and every file its name and layout.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapters_store.base import HEAD, SITE_PATHS, BaseDims, read_base_dims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.errors import WrongBase
from adapters_store.export.canonical_reader import CanonicalReader
from adapters_store.export.merged_weights import merge_module, replace_rows
from adapters_store.export.tensor_writer import CannotExport, make_empty
from adapters_store.file_system import FileSystem
from adapters_store.float_bits import Float32, decode, encode, is_finite
from adapters_store.manifest import Manifest
from adapters_store.model_ops import HEAD_NORMS, NormWeight
from adapters_store.ops import Module
from adapters_store.parts import is_model_part
from adapters_store.registry import base_facts, fits
from adapters_store.safetensors_header import CANONICAL_LIMITS, TensorSlot, read_header

Change = Callable[[Float32], Float32]

_KEPT = "serve the canonical files, which a Chorale server takes as they are"
_COPY_BYTES = 1 << 20
# besides the weights: what transformers reads with them
_COMPANIONS = (".json", ".jinja", ".model", ".txt")


def export_hf_model(adapter: CanonicalReader, target: Path, *, base_dir: Path) -> None:
    """Write the merged model into the new folder `target`.

    Raises:
        CannotExport: the adapter acts per token or per position, or in a place that the base's files lack.
        WrongBase: the adapter is not for this base. CorruptUpload: the base's files are damaged. OSError: the disk.
    """
    manifest = adapter.manifest
    _refuse_dynamic(manifest)
    _check_base(manifest, base_dir)
    is_tied = manifest.base.tie_word_embeddings
    with open_model(base_dir, CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied) as base:
        changes = {base.original(name): found for name, found in _changes(adapter, base).items()}
    make_empty(target)
    for entry in sorted(base_dir.iterdir()):
        if is_model_part(entry.name):
            _rewrite(entry, target / entry.name, changes)
        elif entry.name.endswith(_COMPANIONS) and entry.is_file():
            shutil.copyfile(entry, target / entry.name)


def _refuse_dynamic(manifest: Manifest) -> None:
    if manifest.activation:
        raise CannotExport(f"the adapter acts from its invocation tokens on, which no fixed weight can say; {_KEPT}")
    if manifest.num_virtual_tokens:
        raise CannotExport(
            f"the adapter puts {manifest.num_virtual_tokens} positions in front of every prompt, which no weight of "
            f"the base can say; {_KEPT}"
        )
    for module in manifest.modules:
        if module.experts is not None:
            raise CannotExport(f"{module.path} weighs its experts per token, which no fixed weight can say; {_KEPT}")


def _check_base(manifest: Manifest, base_dir: Path) -> None:
    try:
        dims = read_base_dims(base_dir)
    except (OSError, KeyError, ValueError) as error:
        raise WrongBase("the folder of the base holds no model that can be read", param="base") from error
    if not fits(base_facts(manifest.base, is_base_dependent=manifest.base_dependent), dims.to_dict()):
        raise WrongBase("the adapter is for a base of other dimensions or weights than this one", param="base")


def _changes(adapter: CanonicalReader, base: ModelFiles) -> dict[str, Change]:
    """Return what to do to each tensor, by its neutral name; raises CannotExport where it has no place."""
    changes: dict[str, Change] = {}

    def add(name: str, change: Change) -> None:
        if name not in base.names:
            raise CannotExport(f"the adapter changes {name}, which the base's files do not hold; {_KEPT}")
        before = changes.get(name)
        changes[name] = change if before is None else lambda values: change(before(values))

    manifest = adapter.manifest
    for module in manifest.modules:
        _refuse_tied_head(module, manifest.base)
        stem, rows = _place(module, base, manifest.base)
        add(f"{stem}.weight", partial(_within, rows, partial(merge_module, adapter, module)))
        if module.has_bias:
            add(f"{stem}.bias", partial(_within, rows, partial(_add, adapter, module.tensor("bias"))))
    for norm in manifest.model_ops.norms:
        add(f"{_norm_stem(norm)}.weight", partial(_replaced, adapter, norm.tensor))
    _change_tables(adapter, add)
    return changes


def _change_tables(adapter: CanonicalReader, add: Callable[[str, Change], None]) -> None:
    """Add the changes of embedding and output head, which tied bases share."""
    ops, is_tied = adapter.manifest.model_ops, adapter.manifest.base.tie_word_embeddings
    for rows in ops.token_rows:
        if is_tied and rows.target != "both":
            raise CannotExport(f"the base ties embedding and head, of which the adapter changes one; {_KEPT}")
        for target, name in (("embed", "embed_tokens.weight"), ("lm_head", "lm_head.weight")):
            if rows.target in (target, "both") and not (is_tied and target == "lm_head"):
                add(name, partial(replace_rows, adapter, rows))
    if ops.embed_lowrank is not None:
        if is_tied:
            raise CannotExport(f"the base ties embedding and head, of which the adapter changes one; {_KEPT}")
        add("embed_tokens.weight", lambda table: table + adapter.values("embed.AT") @ adapter.values("embed.BT"))


def _refuse_tied_head(module: Module, base: BaseDims) -> None:
    if module.is_head and base.tie_word_embeddings:
        raise CannotExport(f"the base ties embedding and head, of which the adapter changes one; {_KEPT}")


def _place(module: Module, base: ModelFiles, dims: BaseDims) -> tuple[str, slice]:
    """Return the module's stem in the base's files and its rows there: fused layers stack several modules."""
    if module.is_head:
        return HEAD, slice(0, dims.vocab_size)
    for fused, sites in FUSED_SITES.items():
        stem = f"layers.{module.layer}.{fused}"
        if module.site in sites and f"{stem}.weight" in base.names:
            begin = sum(dims.site_shape(site)[0] for site in sites[: sites.index(module.site)])
            return stem, slice(begin, begin + dims.site_shape(module.site)[0])
    return f"layers.{module.layer}.{SITE_PATHS[module.site]}", slice(0, dims.site_shape(module.site)[0])


def _norm_stem(norm: NormWeight) -> str:
    return f"layers.{norm.layer}.self_attn.{norm.norm}" if norm.norm in HEAD_NORMS else norm.path


def _within(rows: slice, change: Change, values: Float32) -> Float32:
    values[rows] = change(values[rows])
    return values


def _add(adapter: CanonicalReader, name: str, values: Float32) -> Float32:
    total: Float32 = values + adapter.values(name)
    return total


def _replaced(adapter: CanonicalReader, name: str, values: Float32) -> Float32:
    return adapter.values(name)


def _rewrite(source: Path, target: Path, changes: dict[str, Change]) -> None:
    """Copy one file of weights tensor by tensor, its header as it is, with the changes."""
    with source.open("rb") as file, os.fdopen(FileSystem().create(target), "wb") as out:
        header = read_header(file, os.fstat(file.fileno()).st_size, CANONICAL_LIMITS, what=source.name)
        file.seek(0)
        out.write(file.read(header.data_start))
        for slot in header.tensors:
            change = changes.get(slot.name)
            if change is None:
                _copy(file, out, slot.end - slot.begin)
            else:
                out.write(_changed(file.read(slot.end - slot.begin), slot, change))


def _changed(raw: bytes, slot: TensorSlot, change: Change) -> bytes:
    values = np.array(decode(raw, slot.dtype).reshape(slot.shape))
    merged = encode(np.ascontiguousarray(change(values)), slot.dtype)
    if not is_finite(merged, slot.dtype):
        raise CannotExport(f"{slot.name} overflows the base's dtype {slot.dtype} once the adapter is in it; {_KEPT}")
    return merged


def _copy(file: BinaryIO, out: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        chunk = file.read(min(num_bytes, _COPY_BYTES))
        num_bytes -= len(chunk)
        out.write(chunk)
