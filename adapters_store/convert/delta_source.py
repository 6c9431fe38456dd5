"""Single changed values of parameters as their own forward: the base's parameters, changed where the file says.

Owns nothing but the adding. Invariant: a parameter is changed as a whole before it acts, as the method's own code does
it; nothing here knows of sparse products.
"""

import numpy as np

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES
from adapters_store.convert.param_deltas import Deltas, ParamDelta
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.convert.tensor_files import Int64


class DeltaSource(SourceModel):
    """The deltas of an open file by neutral name."""

    def __init__(self, deltas: Deltas, base: BaseDims) -> None:
        self._deltas = deltas
        self._base = base

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the changed layer's output."""
        stem, begin = f"layers.{layer}.{SITE_PATHS[site]}", 0
        for fused, sites in FUSED_SITES.items():
            whole = f"layers.{layer}.{fused}"
            if site in sites and {f"{whole}.weight", f"{whole}.bias"} & self._deltas.keys():
                stem = whole
                begin = sum(self._base.site_shape(other)[0] for other in sites[: sites.index(site)])
        changed = self._changed(f"{stem}.weight", weight.astype(np.float64), begin)
        own = self._deltas.get(f"{stem}.bias")
        if own is not None:
            added = np.zeros(own.shape)
            added[own.places] = own.values
            bias = added[begin : begin + len(weight)] + (0 if bias is None else bias)
        return super().linear(layer, site, x, changed, bias)

    def embed(self, token_ids: Int64, rows: Floats) -> Floats:
        """Return the changed embeddings of these tokens."""
        return self._table_rows("embed_tokens.weight", token_ids, rows)

    def norm(self, layer: int, name: str, weight: Floats) -> Floats:
        """Return the changed weight of a norm."""
        inner = f"self_attn.{name}" if name in ("q_norm", "k_norm") else name
        return self._changed(f"{name}.weight" if layer < 0 else f"layers.{layer}.{inner}.weight", weight, 0)

    def head(self, x: Floats, weight: Floats, bias: Floats | None, first: int) -> Floats:
        """Return the logits of the changed output head, which a base may share with its embedding."""
        name = "embed_tokens.weight" if self._base.tie_word_embeddings else "lm_head.weight"
        numbers = np.arange(first, first + len(weight))
        return super().head(x, self._table_rows(name, numbers, weight), bias, first)

    def _table_rows(self, name: str, numbers: Int64, rows: Floats) -> Floats:
        own = self._deltas.get(name)
        if own is None:
            return rows
        changed = rows.astype(np.float64)
        for index, number in enumerate(numbers.tolist()):
            part = own.rows(int(number), int(number) + 1)
            changed[index, part.places] += part.values
        return changed

    def _changed(self, name: str, values: Floats, begin: int) -> Floats:
        """Return the parameter's part that begins at row `begin`, with its own changes added."""
        own = self._deltas.get(name)
        if own is None:
            return values
        part: ParamDelta = own if values.ndim == 1 else own.rows(begin, begin + len(values))
        changed = values.astype(np.float64).reshape(-1)
        changed[part.places] += part.values
        return changed.reshape(values.shape)
