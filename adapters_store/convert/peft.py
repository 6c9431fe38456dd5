"""PEFT LORA folder -> canonical adapter.

Owns the meaning of the conversion: which modules must be there, rank and scaling per module, splitting of fused
projections, B scaled and transposed. Runs in the converter process; numpy only. Invariant: the scaling is folded into
B (and the bias) in float32 exactly once, and each value is rounded once to the image's dtype.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.canonical import WrittenFile, layout, write_canonical
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoraConfig, read_config
from adapters_store.convert.peft_tensors import (
    FUSED_SITES,
    MODEL_NAME,
    LoraModule,
    LoraTensors,
    check_shapes,
    group_tensors,
    read_tensor,
)
from adapters_store.convert.self_test import SourceModule, measure_error
from adapters_store.errors import CorruptUpload, NonFiniteValues, UnsupportedAdapter, UnsupportedFormat
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.float_bits import FILE_DTYPES, Float32, encode, is_finite
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, Manifest, Module, Source
from adapters_store.safetensors_header import EXTERNAL_LIMITS, read_header

_ZIP_OR_PICKLE = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SPLIT_SITES = {fused: tuple(SITE_PATHS[site] for site in sites) for fused, sites in FUSED_SITES.items()}
_FUSED_TYPES = frozenset({"phi3"})
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's share of a PEFT module: rows `begin..end` of B, and the scaling."""

    source: LoraModule
    scaling: float
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Foreign:
    """The open PEFT file, and which part of it each canonical module is made of."""

    file: BinaryIO
    data_start: int
    parts: dict[Module, _Part]

    def values(self, module: Module, kind: str) -> Float32:
        """Read A `[rank, in]`, the module's rows of B `[out, rank]` (kind BT) or of the bias `[out]`, unscaled."""
        part = self.parts[module]
        slot = {"A": part.source.a, "BT": part.source.b, "bias": part.source.bias}[kind]
        assert slot is not None, "the layout asks for a bias only where the source has one"
        whole = read_tensor(self.file, self.data_start, slot)
        return whole if kind == "A" else whole[part.begin : part.end]

    def encoded(self, module: Module, kind: str, dtype: str) -> bytes:
        """Return one tensor of the image: scaled in float32, B transposed, rounded once."""
        part = self.parts[module]
        raw = encode(_folded(self.values(module, kind), kind, part.scaling), FILE_DTYPES[dtype])
        if not is_finite(raw, FILE_DTYPES[dtype]):
            slot = part.source.a if kind == "A" else part.source.b
            raise NonFiniteValues(f"{slot.name} overflows {dtype} once its scaling is folded in", param=slot.name)
        return raw


def convert_peft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Read the PEFT folder `source`, write `adapter.safetensors` and `adapter.json` into the folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    raw_config = _read_config_file(source / CONFIG_NAME)
    config = read_config(raw_config, model_type=options.base.model_type)
    with _open_part(source / MODEL_NAME) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        _refuse_pickle(file)
        header = read_header(file, file_bytes, EXTERNAL_LIMITS, what=MODEL_NAME)
        tensors = group_tensors(header, lora_bias=config.lora_bias)
        _check_complete(config, tensors, options.base)
        foreign = _Foreign(file, header.data_start, _parts(config, tensors, options))
        written, max_abs_error = _write_image(target / IMAGE_NAME, foreign, options)
        hashes = _hashes(raw_config, file)
    ignored = config.ignored + config.without_effect(tensors.modules)
    manifest = Manifest(
        family="lora",
        base=options.base,
        dtype=options.dtype,
        file_bytes=written.num_bytes,
        file_sha256=written.sha256,
        modules=tuple(foreign.parts),
        source=Source("peft/LORA", hashes, config.recorded, ignored, max_abs_error),
    )
    files = FileSystem()
    descriptor = files.create(target / MANIFEST_NAME)
    try:
        files.write(descriptor, manifest.to_bytes())
    finally:
        files.close(descriptor)


def _write_image(path: Path, foreign: _Foreign, options: ConvertOptions) -> tuple[WrittenFile, float]:
    """Write the image and compare it with its source; return its size and hash, and the largest error."""
    tensors = {module.tensor(kind): (module, kind) for module in foreign.parts for kind in ("A", "BT", "bias")}
    slots = layout(foreign.parts, options.base, options.dtype)
    with os.fdopen(FileSystem().create(path), "wb") as image:
        written = write_canonical(image, slots, lambda name: foreign.encoded(*tensors[name], options.dtype))
    sources = [SourceModule(module, part.scaling, foreign.values) for module, part in foreign.parts.items()]
    return written, measure_error(path, slots, sources, FILE_DTYPES[options.dtype])


def _check_complete(config: LoraConfig, tensors: LoraTensors, base: BaseDims) -> None:
    """Refuse a file that lacks a declared module, or holds one that the config does not declare."""
    for number in config.layers or ():
        if number >= base.num_hidden_layers:
            raise UnsupportedAdapter(
                f"layers_to_transform names layer {number}; this base has {base.num_hidden_layers} layers",
                param="layers_to_transform",
            )
    for path, module in tensors.modules.items():
        if module.layer >= base.num_hidden_layers:
            raise UnsupportedAdapter(
                f"{module.a.name} is for layer {module.layer}; this base has {base.num_hidden_layers} layers",
                param=module.a.name,
            )
        if not config.is_target(path, module.layer):
            raise UnsupportedAdapter(f"the file holds {path}, which the config does not target", param="target_modules")
    names = _spelling(tensors, base.model_type)
    for layer in range(base.num_hidden_layers):
        for name in names:
            path = f"{tensors.prefix}layers.{layer}.{name}"
            if config.is_target(path, layer) and path not in tensors.modules:
                raise CorruptUpload(f"the config targets {path}, but the file has no tensors for it", param=path)


def _spelling(tensors: LoraTensors, model_type: str) -> list[str]:
    """Return the linear layers of one decoder layer as the trained model names them: fused like Phi-3, or split."""
    used = {module.module for module in tensors.modules.values()}
    names = ["self_attn.o_proj", "mlp.down_proj"]
    for fused, split in _SPLIT_SITES.items():
        if fused in used and used & set(split):
            raise UnsupportedAdapter(f"the file holds both {fused} and its parts", param=MODEL_NAME)
        is_fused = fused in used or (model_type in _FUSED_TYPES and not used & set(split))
        names += [fused] if is_fused else split
    return names


def _parts(config: LoraConfig, tensors: LoraTensors, options: ConvertOptions) -> dict[Module, _Part]:
    """Return the adapter's modules in image order, each with its share of a PEFT module."""
    parts: dict[Module, _Part] = {}
    for path, source in tensors.modules.items():
        rank = config.rank_of(path)
        if rank > options.max_rank:
            raise UnsupportedAdapter(
                f"{path} has rank {rank}; this server accepts up to {options.max_rank} (--max-rank)", param="r"
            )
        check_shapes(source, rank, options.base)
        begin = 0
        for site in source.sites:
            end = begin + options.base.site_shape(site)[0]
            module = Module(source.layer, SITES.index(site), rank, has_bias=source.bias is not None)
            parts[module] = _Part(source, config.scaling_of(path), begin, end)
            begin = end
    return dict(sorted(parts.items()))


def _folded(values: Float32, kind: str, scaling: float) -> Float32:
    if kind == "A":
        return values
    with np.errstate(over="ignore"):
        scaled = values * np.float32(scaling)
    return scaled.T if kind == "BT" else scaled


def _read_config_file(path: Path) -> bytes:
    with _open_part(path) as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _open_part(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise CorruptUpload(f"the file {path.name} is missing", param=path.name) from None


def _refuse_pickle(file: BinaryIO) -> None:
    # a safetensors header always has its brace at byte 8: a pickle or zip archive never does
    start = file.read(9)
    file.seek(0)
    if start.startswith(_ZIP_OR_PICKLE) and start[8:] != b"{":
        raise UnsupportedFormat(
            f"{MODEL_NAME} holds a pickle or zip archive, not safetensors; pickles are never opened here: "
            "save the adapter with safe_serialization=True",
            param=MODEL_NAME,
        )


def _hashes(raw_config: bytes, file: BinaryIO) -> dict[str, str]:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return {CONFIG_NAME: hashlib.sha256(raw_config).hexdigest(), MODEL_NAME: digest.hexdigest()}
