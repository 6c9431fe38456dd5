"""What the decoder knows of adapters: one object per step that runs a fused site with every row's own adapter."""

from typing import Protocol

from torch import Tensor

# fused sites in the order of a layer, with the base-neutral sites they hold
FUSED_SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class BaseLinear(Protocol):
    """The base's frozen layer: y [T, O] = x [T, D] @ W.T + bias, fresh and contiguous."""

    @property
    def bias(self) -> Tensor | None:
        """[O], or None."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


class AdapterDelta(Protocol):
    """The adapters of one step; a step without adapters has none and pays nothing."""

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        """Run a fused site: y[t] = out_scale * (W (in_scale * x[t])) + b + bias + sum_j c[t, j] R[j, :] (KERNELS 1).

        Args:
            layer: decoder layer index. site: key of `FUSED_SITES`.
            x: [T, D] the site's input, left as it is.
        Returns:
            [T, O], q|k|v or gate|up side by side. A row without adapter has the bits of `base(x)`.
        """
        ...
