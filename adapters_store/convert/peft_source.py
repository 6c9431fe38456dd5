"""A PEFT folder as its own forward: every module's `Delta.apply` and scales around the base's product.

Owns which part of a module of the trained model a site of the base is. Invariant: only the tuner's own formula is
used, never what was stored of it; the values of one module are in memory at a time.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, PeftConfig, read_config
from adapters_store.convert.peft_tensors import MODEL_NAME, TensorFile, TensorNames, group_tensors
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.convert.tuner import Delta, PlannedModule, ScaledDelta
from adapters_store.file_system import open_regular
from adapters_store.safetensors_header import EXTERNAL_LIMITS, HeaderLimits, read_header


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's share of a module of the file: its outputs `begin..end`."""

    planned: PlannedModule
    begin: int
    end: int


class PeftSource(SourceModel):
    """The open file and, by layer and site, which part of which module acts there."""

    def __init__(self, file: TensorFile, parts: dict[tuple[int, str], _Part]) -> None:
        self._file = file
        self._parts = parts
        self._path: str | None = None
        self._delta: Delta | None = None

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return `out_scale * (W (in_scale * x)) + b` plus what PEFT adds."""
        part = self._parts.get((layer, site))
        if part is None:
            return super().linear(layer, site, x, weight, bias)
        delta = self._delta_of(part.planned)
        own = slice(part.begin, part.end)
        out_scale, in_scale = delta.scales() if isinstance(delta, ScaledDelta) else (None, None)
        y: Floats = (x if in_scale is None else x * in_scale) @ weight.T
        y = y if out_scale is None else y * out_scale[own]
        y = y if bias is None else y + bias
        return y + delta.apply(x.astype(np.float64))[:, own]

    def _delta_of(self, planned: PlannedModule) -> Delta:
        if self._path != planned.source.path or self._delta is None:
            self._delta = planned.load(self._file)
            self._path = planned.source.path
        return self._delta


@contextmanager
def open_peft(folder: Path, options: ConvertOptions) -> Iterator[PeftSource]:
    """Open a folder that was converted before; raises AdapterRefused as the conversion does."""
    with open_regular(folder / CONFIG_NAME) as file:
        config = read_config(file.read(MAX_CONFIG_BYTES + 1), model_type=options.base.model_type)
    with (
        open_regular(folder / MODEL_NAME) as file,
        closing(BaseWeights(options.base_dir, options.base)) as weights,
    ):
        header = read_header(file, os.fstat(file.fileno()).st_size, _limits(config), what=MODEL_NAME)
        kind = config.kind
        names = TensorNames(config.peft_type, kind.parts, kind.shared, kind.integers)
        planned = config.tuner.plan(group_tensors(header, names, weights), options.base)
        yield PeftSource(TensorFile(file, header.data_start), _parts(planned, options))


def _limits(config: PeftConfig) -> HeaderLimits:
    limits = EXTERNAL_LIMITS
    return HeaderLimits(limits.max_header_bytes, limits.max_tensors, allows_empty=config.kind.allows_empty)


def _parts(planned: dict[str, PlannedModule], options: ConvertOptions) -> dict[tuple[int, str], _Part]:
    parts = {}
    for plan in planned.values():
        begin = 0
        for site in plan.source.sites:
            end = begin + options.base.site_shape(site)[0]
            parts[plan.source.layer, site] = _Part(plan, begin, end)
            begin = end
    return parts
