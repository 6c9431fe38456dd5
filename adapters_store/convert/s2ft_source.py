"""An S2FT checkpoint as its own forward: the checkpoint is a whole model, and runs as it is.

Owns nothing but the choice of weights. Invariant: no order is recovered and nothing subtracted here: heads and
channels lie permuted on both sides of every pair of layers, so the checkpoint's model needs no order to run, and
comparing with it proves the one that the conversion found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.convert.s2ft_delta import TRAINED_SITES
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.safetensors_header import EXTERNAL_LIMITS


class S2ftSource(SourceModel):
    """The open checkpoint; everything but the linear layers is the base's, bit by bit."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the checkpoint's own layer, in the checkpoint's own order."""
        stem = f"layers.{layer}.{SITE_PATHS[site]}"
        own: Floats = self._files.values(f"{stem}.weight")
        if f"{stem}.s2" in self._files.names:
            own = _fused(own, self._files.values(f"{stem}.s2"), is_columns=TRAINED_SITES[site])
        has_bias = f"{stem}.bias" in self._files.names
        return super().linear(layer, site, x, own, self._files.values(f"{stem}.bias") if has_bias else bias)


@contextmanager
def open_s2ft(folder: Path) -> Iterator[S2ftSource]:
    """Open a checkpoint that was converted before."""
    with open_model(folder, EXTERNAL_LIMITS, is_trusted=False) as files:
        yield S2ftSource(files)


def _fused(weight: Floats, s2: Floats, *, is_columns: bool) -> Floats:
    """Add what was trained to the leading rows or columns, where S2FT keeps it."""
    fused = weight.astype(np.float64)
    if is_columns:
        fused[:, : s2.shape[1]] += s2
    else:
        fused[: len(s2)] += s2
    return fused
