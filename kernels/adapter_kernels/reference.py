"""Every adapter op in plain fp32 torch: the definition that the fast paths are tested against.

One token at a time, no grouping, no layout tricks. Invariant: a token's result depends on its own row and its own
adapter only (select, never multiply by a mask).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import AdapterImage, SiteTensors


def shrink(x: Tensor, a: Tensor) -> Tensor:
    """Project rows down to the adapter's rank: c[t, j] = A[j] . x[t], in fp32.

    Args:
        x: [T, D]. a: [R, D].
    Returns:
        [T, R] fp32.
    """
    return x.float() @ a.float().T


def expand(c: Tensor, bt: Tensor) -> Tensor:
    """Weigh the rank rows: y[t] = sum_j c[t, j] * R[j, :], in fp32.

    Args:
        c: [T, R] fp32. bt: [R, O] rank rows, the scaling folded in.
    Returns:
        [T, O] fp32.
    """
    return c @ bt.float()


def site_delta(x: Tensor, site: SiteTensors) -> Tensor:
    """Delta of one adapter at one site: expand(shrink(x, A), BT) + bias, [T, O] fp32."""
    delta = expand(shrink(x, site.a), site.bt)
    return delta if site.bias is None else delta + site.bias.float()


def fused_delta(
    x: Tensor, layer: int, fused_site: str, adapters: Sequence[AdapterImage | None], shapes: dict[str, tuple[int, int]]
) -> Tensor:
    """Delta of a whole step at a fused site, token by token.

    out[t] = concat over the fused site's members of site_delta(x[t], adapter of t); zero where the adapter has no
    rows there or the token has no adapter.

    Args:
        x: [T, D]. adapters: T entries. shapes: (out, in) per base-neutral site.
    Returns:
        [T, O_fused] fp32.
    """
    members = FUSED_SITES[fused_site]
    out = torch.zeros(x.shape[0], sum(shapes[site][0] for site in members))
    for token, adapter in enumerate(adapters):
        if adapter is None:
            continue
        begin = 0
        for site in members:
            end = begin + shapes[site][0]
            for rows in adapter.rows:
                if rows.layer == layer and rows.site == site:
                    out[token, begin:end] = site_delta(x[token : token + 1], adapter.site(rows))[0]
            begin = end
    return out
