"""A base norm at its place in the decoder, with the step's adapters.

Owns which layer and norm this is; knows nothing of weights that adapters bring. Invariant: a step whose adapters have
no norms runs the base's norm alone.
"""

from torch import Tensor

from adapter_kernels.delta import ModelDelta
from serve.model.layers import Norm


class AdaptedNorm:
    """One norm of one layer; layer -1 is what stands behind the last."""

    def __init__(self, norm: Norm, layer: int, name: str) -> None:
        self._norm = norm
        self._layer = layer
        self._name = name

    def __call__(self, x: Tensor, model: ModelDelta | None) -> Tensor:
        """x [T, D] -> [T, D], each token with its own adapter's weight."""
        y = self._norm(x)
        if model is not None:
            model.norm(self._layer, self._name, x, y, self._norm)
        return y
