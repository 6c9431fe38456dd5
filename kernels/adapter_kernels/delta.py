"""What the decoder knows of adapters: one object per step that runs a fused site with every row's own adapter.

Adapters that act outside the linear layers too have a second object, `ModelDelta`; a step without them has none, so
each of its places costs one look at None. Invariant: rows of other adapters and of the base keep their bits.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

# fused sites in the order of a layer, with the base-neutral sites they hold
FUSED_SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


BaseProduct = Callable[[Tensor], Tensor]
# the base's embeddings: [T] int64 within its vocabulary -> [T, D], fresh
BaseTable = Callable[[Tensor], Tensor]


class BaseLinear(Protocol):
    """The base's frozen layer: y [T, O] = x [T, D] @ W.T + bias, fresh and contiguous."""

    @property
    def bias(self) -> Tensor | None:
        """[O], or None."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


class BaseNorm(Protocol):
    """A norm of the base that can run with another weight."""

    def replaced(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run on x [.., D] with a weight [D] as a checkpoint holds it, in the family's own kind."""
        ...


class ModelDelta(Protocol):
    """What the adapters of one step do outside the linear layers of the decoder's layers."""

    def look_up(self, token_ids: Tensor, table: BaseTable) -> Tensor:
        """Embed tokens: x[t] = table(id) or the adapter's own row, + AT[id] @ BT; the family's factor comes later.

        Args:
            token_ids: [T] int64; virtual ids (below -1) get zeros.
        """
        ...

    def place_prompts(self, x: Tensor, scale: float) -> None:
        """Overwrite the rows of virtual tokens in x [T, D] by `scale` times their adapter's embeddings."""
        ...

    def norm(self, layer: int, name: str, x: Tensor, y: Tensor, base: BaseNorm) -> None:
        """Overwrite y, the base's norm of x, in the rows whose adapter has a weight of its own.

        Args:
            layer: decoder layer index, -1 for the final norm. name: `input_layernorm`, .., `q_norm`, `norm`.
            x, y: [T, .., D].
        """
        ...

    def write_prefix(self, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
        """Overwrite the cache slots of virtual tokens by their adapter's keys and values.

        Args:
            k_cache, v_cache: [num_blocks, block_size, K, E], this step's rows written.
        """
        ...

    def mlp(
        self, layer: int, x: Tensor, gate_up: Tensor, activation: Callable[[Tensor], Tensor], down: BaseProduct
    ) -> Tensor | None:
        """Run the rest of an MLP whose experts share one gate; None where no row's adapter has one in this layer.

        Args:
            x: [T, D] the MLP's input. gate_up: [T, 2 I] of the site, changed in place. down: the site behind.
        """
        ...

    def head(self, hidden: Tensor, rows: Sequence[int] | None, base: BaseLinear) -> Tensor:
        """Run the output head: [S, V].

        Args:
            hidden: [S, D]. rows: of the step, increasing, whose hidden states these are; None: all.
        """
        ...


class AdapterDelta(Protocol):
    """The adapters of one step; a step without adapters has none and pays nothing."""

    @property
    def model(self) -> ModelDelta | None:
        """What they do outside the linear layers; None: nothing."""
        ...

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        """Run a fused site: y[t] = out_scale * (W (in_scale * x[t])) + b + bias + sum_j c[t, j] R[j, :] (KERNELS 1).

        Args:
            layer: decoder layer index. site: key of `FUSED_SITES`.
            x: [T, D] the site's input, left as it is.
        Returns:
            [T, O], q|k|v or gate|up side by side. A row without adapter has the bits of `base(x)`.
        """
        ...
