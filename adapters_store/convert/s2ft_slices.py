"""S2FT slices (`peft_type` S2FT, our trainer's own file): chosen channels with values -> selected rows and columns.

Owns the names, `layers.L.PATH.idx [s]` and `.D`: [s, out] where inputs are selected (o_proj, down_proj), [s, in] where
outputs are (v_proj, up_proj); idx strictly increasing, in the base's own order. Invariant: values are added as they
are, scale 1; nothing of the base is in the file, so nothing of it is needed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.convert.foreign import Foreign, Site, Values, write_foreign
from adapters_store.convert.lora_mixtures import refuse_unread
from adapters_store.convert.moe_config import read_config_file
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.s2ft_delta import TRAINED_SITES
from adapters_store.convert.site_effect import Apply
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.convert.tensor_files import Int64, TensorFiles, open_tensors, tensor_paths
from adapters_store.errors import CorruptUpload, InvalidIndex, UnknownField, UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.op_limits import check_selected
from adapters_store.ops import Module

_NAME = re.compile(r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<path>[a-z_]+\.(?P<site>[a-z_]+))\.D\Z")
# how the channels were found, which the file's indices say better
_KEYS = frozenset({"peft_type", "target_modules", "selection", "base_model_name_or_path"})
_PREFIXES = ("base_model.model.model.", "model.")


@dataclass(frozen=True, slots=True)
class _Slice:
    """One module's channels [s], strictly increasing, and values [s, other dim]."""

    module: Module
    idx: Int64
    values: Float32

    def read(self, kind: str) -> Values:
        """Return one tensor of the image."""
        return self.idx if kind.endswith(".idx") else self.values

    def changed(self, weight: Floats) -> Floats:
        """Return the layer's whole weight [out, in] as training left it."""
        whole = weight.astype(np.float64)
        if self.module.cols:
            whole[:, self.idx] += self.values.T
        else:
            whole[self.idx] += self.values
        return whole

    def effect(self, base: BaseDims) -> Apply:
        """Return what the slice adds to the layer's output for x [T, in], and the size of its terms."""
        change = self.changed(np.zeros(base.site_shape(self.module.site)))
        return lambda x: (x @ change.T, np.abs(x) @ np.abs(change).T)


class SlicesSource(SourceModel):
    """The base with the slices added to its weights, by (layer, site)."""

    def __init__(self, slices: dict[tuple[int, str], _Slice]) -> None:
        self._slices = slices

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the changed layer's output."""
        own = self._slices.get((layer, site))
        return super().linear(layer, site, x, weight if own is None else own.changed(weight), bias)


def convert_s2ft_slices(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the folder `source`; raises AdapterRefused."""
    OptionValues("S2FT slices", options.declared.options, ())
    _check_config(source)
    with open_tensors(tensor_paths(source), _PREFIXES) as files:
        slices = _read(files, options.base)
        sites = tuple(Site(each.module, each.read, each.effect(options.base)) for each in slices.values())
        write_foreign(source, target, Foreign("s2ft", "s2ft/slices", sites), options)


@contextmanager
def open_s2ft_slices(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a folder that was converted before as its own forward."""
    with open_tensors(tensor_paths(source), _PREFIXES) as files:
        yield SlicesSource(_read(files, options.base))


def _read(files: TensorFiles, base: BaseDims) -> dict[tuple[int, str], _Slice]:
    """Read every module's slice; raises CorruptUpload, UnsupportedAdapter, InvalidIndex, LimitExceeded."""
    slices: dict[tuple[int, str], _Slice] = {}
    used: set[str] = set()
    for name in sorted(name for name in files.names if name.endswith(".D")):
        match = _NAME.match(name)
        site = "" if match is None else match["site"]
        if (
            match is None
            or site not in TRAINED_SITES
            or match["path"] != SITE_PATHS[site]
            or int(match["layer"]) >= base.num_hidden_layers
        ):
            raise UnsupportedAdapter(
                f"{name} is no slice of a layer of this base; S2FT trains {', '.join(sorted(TRAINED_SITES))}",
                param=name,
            )
        stem = name.removesuffix(".D")
        if f"{stem}.idx" not in files.names:
            raise CorruptUpload(f"the file lacks {stem}.idx", param=stem)
        used |= {name, f"{stem}.idx"}
        slice_ = _slice(files, stem, int(match["layer"]), site, base)
        if slice_ is not None:
            slices[int(match["layer"]), site] = slice_
    refuse_unread(files, used)
    return slices


def _slice(files: TensorFiles, stem: str, layer: int, site: str, base: BaseDims) -> _Slice | None:
    is_columns = TRAINED_SITES[site]
    num_out, num_in = base.site_shape(site)
    width, other = (num_in, num_out) if is_columns else (num_out, num_in)
    idx = files.integers(f"{stem}.idx")
    if idx.ndim != 1 or np.any(np.diff(idx) <= 0) or (len(idx) and not 0 <= idx[0] <= idx[-1] < width):
        raise InvalidIndex(f"{stem}.idx must increase strictly within 0 to {width - 1}", param=f"{stem}.idx")
    check_selected(len(idx), width, f"{stem}.idx", param=f"{stem}.idx")
    files.need_shape(f"{stem}.D", (len(idx), other))
    values = files.floats(f"{stem}.D")
    # NaN is no zero: it is kept, and refused by the writer
    kept = np.any(values != 0, axis=1)
    if not kept.any():
        return None
    count = int(kept.sum())
    cols, rows = (count, 0) if is_columns else (0, count)
    module = Module(layer, SITES.index(site), 0, has_bias=False, cols=cols, rows=rows)
    return _Slice(module, idx[kept], values[kept])


def _check_config(source: Path) -> None:
    config = read_config_file(source)
    if config.get("peft_type") != "S2FT":
        raise UnsupportedAdapter(
            f"peft_type is {ascii(config.get('peft_type'))[:40]}; this format has S2FT", param="peft_type"
        )
    unknown = sorted(config.keys() - _KEYS)
    if unknown:
        raise UnknownField(
            f"the config holds the key {unknown[0][:80]!a}, which this server does not know", param=unknown[0][:80]
        )
