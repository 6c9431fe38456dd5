"""A fine-tuned model's checkpoint as its own forward: the checkpoint runs as it is.

Owns finding a site's part in checkpoints whose linear layers are fused or split. Invariant: no difference is taken
here; every tensor is the checkpoint's own.
"""

import numpy as np

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.model_files import ModelFiles
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.convert.tensor_files import Int64
from adapters_store.errors import CorruptUpload, UnsupportedAdapter, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.model_ops import HEAD_NORMS

_TABLES = ("embed_tokens.weight", "lm_head.weight")


class HfSource(SourceModel):
    """The open checkpoint."""

    def __init__(self, files: ModelFiles, base: BaseDims) -> None:
        self._files = files
        self._base = base

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the checkpoint's own layer."""
        own = site_values(self._files, layer, site, self._base)
        own_bias = site_values(self._files, layer, site, self._base, "bias")
        return super().linear(layer, site, x, own, own_bias if np.any(own_bias) else None)

    def embed(self, token_ids: Int64, rows: Floats) -> Floats:
        """Return the checkpoint's own embeddings."""
        return np.stack([self._files.rows("embed_tokens.weight", int(i), int(i) + 1)[0] for i in token_ids])

    def norm(self, layer: int, name: str, weight: Floats) -> Floats:
        """Return the checkpoint's own norm."""
        return self._files.values(norm_name(layer, name))

    def head(self, x: Floats, weight: Floats, bias: Floats | None, first: int) -> Floats:
        """Return the logits of the checkpoint's own output head."""
        name = "lm_head.weight" if "lm_head.weight" in self._files.names else "embed_tokens.weight"
        return super().head(x, self._files.rows(name, first, first + len(weight)), bias, first)


def norm_name(layer: int, name: str) -> str:
    """Return the name of a norm's weight in a checkpoint; layer -1: the last norm."""
    inner = f"self_attn.{name}" if name in HEAD_NORMS else name
    return f"{name}.weight" if layer < 0 else f"layers.{layer}.{inner}.weight"


def site_stem(files: ModelFiles, layer: int, site: str, base: BaseDims) -> tuple[str, int]:
    """Return the linear layer that holds a site, and the row at which the site begins in it; raises CorruptUpload."""
    stem = f"layers.{layer}.{SITE_PATHS[site]}"
    if f"{stem}.weight" in files.names:
        return stem, 0
    for fused, sites in FUSED_SITES.items():
        if site in sites and f"layers.{layer}.{fused}.weight" in files.names:
            return f"layers.{layer}.{fused}", sum(base.site_shape(other)[0] for other in sites[: sites.index(site)])
    raise CorruptUpload(f"the checkpoint lacks {stem}.weight", param=f"{stem}.weight")


def site_values(files: ModelFiles, layer: int, site: str, base: BaseDims, kind: str = "weight") -> Float32:
    """Return a site's weight [out, in], or its bias [out], zeros where it has none."""
    stem, begin = site_stem(files, layer, site, base)
    num_out = base.site_shape(site)[0]
    name = f"{stem}.{kind}"
    if kind == "bias" and name not in files.names:
        return np.zeros(num_out, dtype=np.float32)
    return files.rows(name, begin, begin + num_out)


def check_tensors(found: ModelFiles, base: ModelFiles, dims: BaseDims) -> None:
    """Refuse a checkpoint that lacks a tensor of the base or holds one that the base has no place for.

    Raises:
        CorruptUpload, UnsupportedAdapter: which it is. WrongBase: shapes differ.
    """
    linear: set[str] = set()
    for layer in range(dims.num_hidden_layers):
        for site in SITES:
            own, others = (site_stem(files, layer, site, dims)[0] for files in (found, base))
            linear |= {f"{stem}.{kind}" for stem in (own, others) for kind in ("weight", "bias")}
            _check_shape(found, own, layer, site, dims)
    tied = {"lm_head.weight"} if dims.tie_word_embeddings else set()
    extra = sorted(found.names - base.names - linear - tied)
    if extra or found.others:
        name = found.original(extra[0]) if extra else found.others[0]
        raise UnsupportedAdapter(f"the checkpoint holds {name}, which the base does not have", param=name)
    lacking = sorted(base.names - found.names - linear - tied)
    if lacking:
        raise CorruptUpload(f"the checkpoint lacks {lacking[0]}", param=lacking[0])
    for name in sorted(base.names - linear - set(_TABLES)):
        if found.shape(name) != base.shape(name):
            raise WrongBase(f"{found.original(name)} has shape {list(found.shape(name))}; the base's has another")


def _check_shape(found: ModelFiles, stem: str, layer: int, site: str, dims: BaseDims) -> None:
    shape, num_in = found.shape(f"{stem}.weight"), dims.site_shape(site)[1]
    sites = next((sites for fused, sites in FUSED_SITES.items() if stem.endswith(fused)), (site,))
    wanted = (sum(dims.site_shape(each)[0] for each in sites), num_in)
    if shape != wanted:
        raise WrongBase(
            f"{found.original(f'{stem}.weight')} has shape {list(shape)}; the base's has {list(wanted)}",
            param=found.original(f"{stem}.weight"),
        )
