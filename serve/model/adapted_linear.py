"""A base linear layer at a fused site, and the adapters' deltas on top of it.

Owns the order base first, then delta; knows nothing of ranks or slots. Invariant: without adapters in the step not
one operation more runs than the base alone needs.
"""

from torch import Tensor

from adapter_kernels.delta import AdapterDelta
from serve.model.layers import Linear


class AdaptedLinear:
    """One fused site of one layer."""

    def __init__(self, linear: Linear, layer: int, site: str) -> None:
        self._linear = linear
        self._layer = layer
        self._site = site

    def __call__(self, x: Tensor, adapters: AdapterDelta | None) -> Tensor:
        """y [T, O] = base(x [T, D]) + each token's own delta."""
        y = self._linear(x)
        if adapters is not None:
            adapters.add(self._layer, self._site, x, y)
        return y
