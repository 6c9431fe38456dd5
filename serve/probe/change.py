"""How much of each linear layer an adapter changes: ||dW|| / ||W||, seen through random inputs.

Owns the measure and the line above which it is worth a warning. For rows x of a standard normal the mean of
|dW x|^2 is ||dW||_F^2, so the ratio of both layers' outputs estimates that of the matrices, and says the same of
families that have no matrix (mixtures, gates). Invariant: it looks at the base's weights as they pass, once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.float_bits import Float32
from adapters_store.strict_json import Json

# an adapter that changes a layer by more than the layer itself is seldom one that was trained on it
LARGE_CHANGE = 1.0
_NUM_ROWS = 16
_SEED = 8


@dataclass(frozen=True, slots=True)
class SiteChange:
    """The layer that changes most; `ratio` is an estimate of ||dW||_F / ||W||_F, off by a few per cent."""

    layer: int
    site: str
    ratio: float


class ChangeWatch:
    """Sees every linear layer's weight once and keeps the largest change."""

    def __init__(self, source: SourceModel) -> None:
        self._source = source
        self._seen: set[tuple[int, str]] = set()
        self.largest: SiteChange | None = None

    def __call__(self, layer: int, site: str, weight: Float32) -> None:
        """Measure one site of the base, weight [out, in]."""
        if (layer, site) in self._seen:
            return
        self._seen.add((layer, site))
        x = np.random.default_rng(_SEED).standard_normal((_NUM_ROWS, weight.shape[1]), dtype=np.float32)
        base = x @ weight.T
        ratio = _norm(self._source.linear(layer, site, x, weight, None) - base) / max(_norm(base), 1e-30)
        if self.largest is None or ratio > self.largest.ratio:
            self.largest = SiteChange(layer, site, ratio)


# called with layer, site and the base's weight
Watch = Callable[[int, str, Float32], None]


def change_warnings(change: SiteChange | None) -> list[Json]:
    """Return what the owner of an adapter should hear about its size."""
    if change is None or change.ratio <= LARGE_CHANGE:
        return []
    return [
        f"at layers.{change.layer} {change.site} the adapter's change is {change.ratio:.3g} times as large as the "
        f"base's own weights (more than {LARGE_CHANGE:g}): was its scaling (lora_alpha, use_rslora) saved as it was "
        "trained?"
    ]


def _norm(values: Floats) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))
