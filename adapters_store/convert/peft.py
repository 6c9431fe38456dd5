"""PEFT folder -> canonical adapter.

Owns what is the same for every kind of adapter: which modules must be there, the limits on ranks, splitting of fused
projections, rounding and writing, the manifest. Runs in the converter process; numpy only. Invariant: each value of
the tuner's factors is rounded to float32 at most once, and then once to the image's dtype.
"""

import hashlib
import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.canonical import WrittenFile, layout, write_canonical
from adapters_store.convert.base_weights import FUSED_SITES, BaseWeights
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, PeftConfig, read_config
from adapters_store.convert.peft_tensors import (
    MODEL_NAME,
    PeftTensors,
    TensorFile,
    TensorNames,
    check_shape,
    group_tensors,
)
from adapters_store.convert.self_test import SourceModule, measure_error
from adapters_store.convert.tuner import Array, Delta, Factors, PlannedModule
from adapters_store.errors import (
    AdapterWithoutEffect,
    CorruptUpload,
    NonFiniteValues,
    UnsupportedAdapter,
    UnsupportedFormat,
)
from adapters_store.file_system import FileSystem, open_regular
from adapters_store.float_bits import FILE_DTYPES, Float32, encode, is_finite
from adapters_store.image_check import NO_EFFECT, is_neutral
from adapters_store.manifest import IMAGE_NAME, MANIFEST_NAME, Manifest, Module, Source
from adapters_store.ops import SCALE_DTYPE
from adapters_store.safetensors_header import EXTERNAL_LIMITS, HeaderLimits, read_header

_ZIP_OR_PICKLE = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SPLIT_SITES = {fused: tuple(SITE_PATHS[site] for site in sites) for fused, sites in FUSED_SITES.items()}
_FUSED_TYPES = frozenset({"phi3"})
_HASH_CHUNK_BYTES = 1 << 20
_KINDS = ("A", "BT", "out_scale", "in_scale", "bias")


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's share of a PEFT module: outputs `begin..end`."""

    planned: PlannedModule
    begin: int
    end: int


class _Foreign:
    """The open PEFT file and which part of it each canonical module is made of; holds one module's values at a time."""

    def __init__(self, file: TensorFile, parts: dict[Module, _Part]) -> None:
        self._file = file
        self.parts = parts
        self.acts = False
        self._path: str | None = None
        self._factors: Factors | None = None

    def delta(self, module: Module) -> Delta:
        """Read the trained values of the PEFT module that this canonical one is part of."""
        return self.parts[module].planned.load(self._file)

    def encoded(self, module: Module, kind: str, dtype: str) -> bytes:
        """Return one tensor of the image: A [rank, in], in_scale [in], or this module's part of all others."""
        part = self.parts[module]
        factors = self._factors_of(part.planned)
        if kind == "A":
            values = _rounded(factors.a)
        elif kind == "BT":
            values = _rounded(factors.b[part.begin : part.end]).T
        else:
            vectors = {"bias": factors.bias, "out_scale": factors.out_scale, "in_scale": factors.in_scale}
            vector = vectors[kind]
            assert vector is not None, "the layout asks for a vector only where the plan has one"
            values = _rounded(vector if kind == "in_scale" else vector[part.begin : part.end])
        file_dtype = FILE_DTYPES[dtype] if kind in ("A", "BT", "bias") else SCALE_DTYPE
        raw = encode(values, file_dtype)
        if not is_finite(raw, file_dtype):
            path = part.planned.source.path
            raise NonFiniteValues(f"{kind} of {path} overflows {dtype} once its scaling is folded in", param=path)
        return raw

    def _factors_of(self, planned: PlannedModule) -> Factors:
        if self._path != planned.source.path or self._factors is None:
            self._factors = planned.load(self._file).factors()
            self._path = planned.source.path
            self.acts = self.acts or _acts(self._factors)
        return self._factors


def convert_peft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Read the PEFT folder `source`, write `adapter.safetensors` and `adapter.json` into the folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    raw_config = _read_config_file(source / CONFIG_NAME)
    config = read_config(raw_config, model_type=options.base.model_type)
    with _open_part(source / MODEL_NAME) as file, closing(BaseWeights(options.base_dir, options.base)) as weights:
        file_bytes = os.fstat(file.fileno()).st_size
        _refuse_pickle(file)
        header = read_header(file, file_bytes, _limits(config), what=MODEL_NAME)
        tensors = group_tensors(header, _names(config), weights)
        _check_complete(config, tensors, options.base)
        planned = config.tuner.plan(tensors, options.base)
        parts = _parts(config, planned, options)
        foreign = _Foreign(TensorFile(file, header.data_start), parts)
        written, max_abs_error = _write_image(target / IMAGE_NAME, foreign, options)
        hashes = _hashes(raw_config, file)
    manifest = Manifest(
        family="lora",
        base=options.base,
        dtype=options.dtype,
        file_bytes=written.num_bytes,
        file_sha256=written.sha256,
        modules=tuple(parts),
        source=Source(
            format=f"peft/{config.peft_type}",
            files=hashes,
            config=config.recorded,
            ignored=config.ignored + config.unused(list(tensors.modules)),
            max_abs_error=max_abs_error,
        ),
        base_dependent=weights.was_asked,
    )
    files = FileSystem()
    descriptor = files.create(target / MANIFEST_NAME)
    try:
        files.write(descriptor, manifest.to_bytes())
    finally:
        files.close(descriptor)


def _limits(config: PeftConfig) -> HeaderLimits:
    limits = EXTERNAL_LIMITS
    return HeaderLimits(limits.max_header_bytes, limits.max_tensors, allows_empty=config.kind.allows_empty)


def _names(config: PeftConfig) -> TensorNames:
    kind = config.kind
    return TensorNames(config.peft_type, kind.parts, kind.shared, kind.integers)


def _write_image(path: Path, foreign: _Foreign, options: ConvertOptions) -> tuple[WrittenFile, float]:
    """Write the image and compare it with its source; return its size and hash, and the largest error."""
    tensors = {module.tensor(kind): (module, kind) for module in foreign.parts for kind in _KINDS}
    slots = layout(foreign.parts, options.base, options.dtype)
    with os.fdopen(FileSystem().create(path), "wb") as image:
        written = write_canonical(image, slots, lambda name: foreign.encoded(*tensors[name], options.dtype))
    if not foreign.acts:
        raise AdapterWithoutEffect(NO_EFFECT, param=MODEL_NAME)
    sources = [
        SourceModule(module, part.begin, part.end, partial(foreign.delta, module))
        for module, part in foreign.parts.items()
    ]
    return written, measure_error(path, slots, sources, FILE_DTYPES[options.dtype], options.base)


def _check_complete(config: PeftConfig, tensors: PeftTensors, base: BaseDims) -> None:
    """Refuse a file that lacks a declared module, or holds one that the config does not declare."""
    targets = config.targets
    for number in targets.layers or ():
        if number >= base.num_hidden_layers:
            raise UnsupportedAdapter(
                f"layers_to_transform names layer {number}; this base has {base.num_hidden_layers} layers",
                param="layers_to_transform",
            )
    for path, module in tensors.modules.items():
        if module.layer >= base.num_hidden_layers:
            name = next(iter(module.parts.values())).name
            raise UnsupportedAdapter(
                f"{name} is for layer {module.layer}; this base has {base.num_hidden_layers} layers", param=name
            )
        if not targets.is_target(path, module.layer):
            raise UnsupportedAdapter(f"the file holds {path}, which the config does not target", param="target_modules")
    names = _spelling(tensors, base.model_type)
    for layer in range(base.num_hidden_layers):
        for name in names:
            path = f"{tensors.prefix}layers.{layer}.{name}"
            if targets.is_target(path, layer) and path not in tensors.modules:
                raise CorruptUpload(f"the config targets {path}, but the file has no tensors for it", param=path)


def _spelling(tensors: PeftTensors, model_type: str) -> list[str]:
    """Return the linear layers of one decoder layer as the trained model names them: fused like Phi-3, or split."""
    present = {module.module for module in tensors.modules.values()}
    names = ["self_attn.o_proj", "mlp.down_proj"]
    for fused, split in _SPLIT_SITES.items():
        if fused in present and present & set(split):
            raise UnsupportedAdapter(f"the file holds both {fused} and its parts", param=MODEL_NAME)
        is_fused = fused in present or (model_type in _FUSED_TYPES and not present & set(split))
        names += [fused] if is_fused else split
    return names


def _parts(config: PeftConfig, planned: dict[str, PlannedModule], options: ConvertOptions) -> dict[Module, _Part]:
    """Return the adapter's modules in image order, each with its share of a PEFT module; without those of no effect."""
    is_product = config.kind.is_product
    limit = options.largest_rank if is_product else options.max_rank
    parts: dict[Module, _Part] = {}
    for path, plan in planned.items():
        if plan.rank > limit:
            raise UnsupportedAdapter(
                f"{path} has rank {plan.rank}{' as one low-rank product' if is_product else ''}; "
                f"this server accepts up to {limit} (--max-rank)",
                param="r",
            )
        for slot, shape in plan.shapes:
            check_shape(slot, shape)
        begin = 0
        for site in plan.source.sites:
            end = begin + options.base.site_shape(site)[0]
            if plan.acts:
                parts[_module(plan, site)] = _Part(plan, begin, end)
            begin = end
    if not parts:
        raise AdapterWithoutEffect(NO_EFFECT, param=MODEL_NAME)
    return dict(sorted(parts.items()))


def _module(plan: PlannedModule, site: str) -> Module:
    return Module(
        layer=plan.source.layer,
        site_index=SITES.index(site),
        rank=plan.rank,
        has_bias=plan.has_bias,
        has_out_scale=plan.has_out_scale,
        has_in_scale=plan.has_in_scale,
    )


def _rounded(values: Array) -> Float32:
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _acts(factors: Factors) -> bool:
    """Return whether a rank has values in both factors, the bias has any, or a scale moves anything."""
    has_rank = np.any(_rounded(factors.a).any(axis=1) & _rounded(factors.b).any(axis=0))
    has_bias = factors.bias is not None and bool(factors.bias.any())
    scales = (factors.out_scale, factors.in_scale)
    return bool(has_rank) or has_bias or any(scale is not None and not is_neutral(scale) for scale in scales)


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
