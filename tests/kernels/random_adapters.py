"""Random adapter images for kernel tests: built here by hand, independent of the store's writer."""

import torch
from torch import Tensor

from adapter_kernels.image import AdapterImage, SiteRows

SHAPES = {
    "q_proj": (24, 16),
    "k_proj": (8, 16),
    "v_proj": (8, 16),
    "o_proj": (16, 24),
    "gate_proj": (40, 16),
    "up_proj": (40, 16),
    "down_proj": (16, 40),
}
ALL_SITES = tuple(SHAPES)
_ALIGNMENT = 128


def random_image(
    ranks: dict[tuple[int, str], int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    biased: frozenset[tuple[int, str]] = frozenset(),
) -> AdapterImage:
    """Build an image with the given rank per (layer, site); `biased` sites get a bias."""
    chunks: list[Tensor] = []
    rows = []
    offset = 0

    def put(tensor: Tensor) -> int:
        nonlocal offset
        begin = offset
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        padding = -raw.numel() % _ALIGNMENT
        chunks.extend([raw, torch.zeros(padding, dtype=torch.uint8)])
        offset += raw.numel() + padding
        return begin

    for (layer, site), rank in sorted(ranks.items(), key=lambda item: (item[0][0], ALL_SITES.index(item[0][1]))):
        out_dim, in_dim = SHAPES[site]
        a = put(torch.randn(rank, in_dim, generator=generator).to(dtype))
        bt = put(torch.randn(rank, out_dim, generator=generator).to(dtype))
        bias = put(torch.randn(out_dim, generator=generator).to(dtype)) if (layer, site) in biased else None
        rows.append(SiteRows(layer, site, rank, a, bt, bias))
    return AdapterImage(torch.cat(chunks), dtype, tuple(rows), SHAPES)


def uniform_ranks(rank: int, num_layers: int = 2) -> dict[tuple[int, str], int]:
    """The same rank at every site of every layer."""
    return {(layer, site): rank for layer in range(num_layers) for site in ALL_SITES}
