"""Compositions in plain fp32 torch: the definition that the fast paths are tested against.

Invariant: what a row gets depends on its own adapters and weights alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_kernels.image import AdapterImage
from adapter_kernels.reference import fused_output


def composed_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: int,
    fused_site: str,
    compositions: Sequence[Sequence[tuple[AdapterImage, float]]],
) -> Tensor:
    """Output of a step at a fused site where row t has its own adapters: y = y_base + sum_i w_i (y_i - y_base).

    Args:
        x, weight, bias: as `reference.fused_output`. compositions: T entries of (adapter, weight).
    Returns:
        [T, O_fused] fp32.
    """
    rows = []
    for token, composition in enumerate(compositions):
        own = x[token : token + 1]
        base = fused_output(own, weight, bias, layer, fused_site, [None])
        changes = [
            amount * (fused_output(own, weight, bias, layer, fused_site, [adapter]) - base)
            for adapter, amount in composition
        ]
        rows.append(sum(changes, base))
    return torch.cat(rows)
