"""What the decoder knows of adapters: one object per step that adds every row's delta at a fused site."""

from typing import Protocol

from torch import Tensor

# fused sites in the order of a layer, with the base-neutral sites they hold
FUSED_SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class AdapterDelta(Protocol):
    """The deltas of one step's adapters; a step without adapters has none and pays nothing."""

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Add into `y` the delta of each token's adapter: y[t] += sum_j c[t, j] R[j, :] (KERNELS 1).

        Args:
            layer: decoder layer index. site: key of `FUSED_SITES`.
            x: [T, D] the site's input. y: [T, O] the base's output, q|k|v or gate|up side by side; changed in place.
                Rows without adapter are not touched.
        """
        ...
