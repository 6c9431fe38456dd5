"""A foreign adapter on its way into the canonical file: what a format's reader found, and the one way it is written.

Owns the order of the work, the rounding and the proof. Invariants: each value is rounded once; what was written is read
back and compared with the source's own forward, module by module; and nothing is written that breaks a limit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.convert.adapter_writer import (
    encode_indices,
    encode_signs,
    encode_values,
    write_image,
    write_manifest,
)
from adapters_store.convert.model_files import file_hashes
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.site_effect import Apply, Float64, SourceEffect, measure_effect
from adapters_store.convert.tensor_files import unread_keys
from adapters_store.errors import AdapterWithoutEffect, UnsupportedAdapter
from adapters_store.manifest import IMAGE_NAME, Manifest, Source, check_expert_names
from adapters_store.model_ops import NO_MODEL_OPS, ModelOps, check_model_ops
from adapters_store.op_limits import check_module
from adapters_store.ops import INDEX_DTYPE, SCALE_DTYPE, Module, TensorSpec
from adapters_store.strict_json import Json

# floats, positions, or the signs of a ternary matrix (True: negative)
Values = npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer as it will be served.

    `read(kind)` returns one tensor by its kind in `Module.tensors`. `apply` is what the source itself adds to the
    layer's output, None where its experts are mixed outside the layer; `logits` the source's own gate.
    """

    module: Module
    read: Callable[[str], Values]
    apply: Apply | None = None
    logits: Callable[[Float64], Float64] | None = None


@dataclass(frozen=True, slots=True)
class Foreign:
    """All that a reader found. `model_values` returns a model op's tensor by its name in the file.

    `values_read` are the keys of the plain values that it took from pickles; others are reported as ignored.
    """

    family: str
    source_format: str
    sites: tuple[Site, ...]
    model_ops: ModelOps = NO_MODEL_OPS
    model_values: dict[str, Callable[[], Values]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    recorded: dict[str, Json] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    values_read: tuple[str, ...] = ()
    is_base_dependent: bool = False


def write_foreign(source: Path, target: Path, foreign: Foreign, options: ConvertOptions) -> None:
    """Check the limits, write image and manifest into `target`, and prove the modules; raises AdapterRefused."""
    sites = {site.module: site for site in sorted(foreign.sites, key=lambda site: site.module)}
    modules = tuple(sites)
    _check(modules, foreign, options)
    readers: dict[str, tuple[TensorSpec, Callable[[], Values]]] = {}
    for module, site in sites.items():
        for spec in module.tensors(options.base):
            kind = spec.name.removeprefix(module.tensor(""))
            readers[spec.name] = (spec, partial(site.read, kind))
    for spec in foreign.model_ops.tensors(options.base):
        readers[spec.name] = (spec, foreign.model_values[spec.name])
    written = write_image(
        target,
        modules,
        options.base,
        options.dtype,
        lambda name: _encoded(*readers[name], options.dtype),
        foreign.model_ops,
    )
    effects = [SourceEffect(m, site.apply, site.logits) for m, site in sites.items() if site.apply is not None]
    error = measure_effect(target / IMAGE_NAME, effects, options.base, options.dtype) if effects else 0.0
    ignored = (*foreign.ignored, *unread_keys(source, foreign.values_read))
    write_manifest(
        target,
        Manifest(
            family=foreign.family,
            base=options.base,
            dtype=options.dtype,
            file_bytes=written.num_bytes,
            file_sha256=written.sha256,
            modules=modules,
            source=Source(foreign.source_format, file_hashes(source), foreign.recorded, ignored, error),
            base_dependent=foreign.is_base_dependent,
            experts=foreign.experts,
            model_ops=foreign.model_ops,
        ),
    )


def _check(modules: tuple[Module, ...], foreign: Foreign, options: ConvertOptions) -> None:
    if not modules and not foreign.model_ops.acts:
        raise AdapterWithoutEffect("the file changes nothing of the base", param="files")
    for module in modules:
        check_module(module, options.base)
        largest = max(module.ranks, default=0)
        if largest > options.max_rank:
            raise UnsupportedAdapter(
                f"{module.path} has rank {largest}; this server accepts up to {options.max_rank} (--max-rank)",
                param=module.path,
            )
    check_expert_names(foreign.experts, modules)
    check_model_ops(foreign.model_ops, modules, options.base)


def _encoded(spec: TensorSpec, read: Callable[[], Values], dtype: str) -> bytes:
    values = read()
    if spec.dtype("") == INDEX_DTYPE:
        return encode_indices(values.astype(np.int64))
    if spec.is_bits:
        return encode_signs(values.astype(np.bool_))
    is_wide = spec.dtype("") == SCALE_DTYPE
    return encode_values(values.astype(np.float32), "float32" if is_wide else dtype, spec.name)
