"""A base linear layer at a fused site, with the step's adapters.

Owns which layer and site this is; knows nothing of ranks, scales or slots. Invariant: without adapters in the step not
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
        """y [T, O] of x [T, D], each token by its own adapter."""
        if adapters is None:
            return self._linear(x)
        return adapters.apply(self._layer, self._site, x, self._linear)
