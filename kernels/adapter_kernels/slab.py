"""A slab: the site-major pack of up to 16 adapters that share one rank profile, as the CPU path reads it.

For each layer and fused site the A rows of all positions lie in one tensor `[capacity, R, in]` and the rank rows of
each member in `[capacity, R, out]`, so a step's shrink is one batched GEMM over positions. Owns the packed bytes, not
the decision who lies where. Invariant: a position is read only between `write` and the owner's reuse of it; memory of
positions never written is never touched (the allocation is lazy), so a slab of one adapter costs one adapter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import AdapterImage

# more positions per slab mean fewer calls per step; fewer mean memory comes back sooner
CAPACITY = 16


@dataclass(frozen=True, slots=True)
class Profile:
    """What adapters must share to lie in one slab: rank and bias of every (layer, site) they act on."""

    # (layer, site, rank, has_bias), sorted as in the image
    entries: tuple[tuple[int, str, int, bool], ...]

    @classmethod
    def of(cls, image: AdapterImage) -> "Profile":
        """Read the profile of an image."""
        return cls(tuple((row.layer, row.site, row.rank, row.bias_offset is not None) for row in image.rows))


@dataclass(frozen=True, slots=True)
class Member:
    """One site inside a fused site: its columns of the bridge and of the output, and its rank rows."""

    site: str
    rank_begin: int
    rank_end: int
    out_begin: int
    out_end: int
    # [capacity, R, out]; None when only a bias acts here
    bt: Tensor | None
    # [capacity, out]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class FusedRows:
    """All rows of a fused site: `a [capacity, sum of ranks, in]` and its members."""

    a: Tensor | None
    members: tuple[Member, ...]


class Slab:
    """The packed weights of adapters of one profile."""

    def __init__(self, profile: Profile, shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
        """Allocate lazily for `CAPACITY` adapters.

        Args:
            shapes: (out, in) per base-neutral site. dtype: the dtype the model computes in.
        """
        self.profile = profile
        self.dtype = dtype
        self.fused: dict[tuple[int, str], FusedRows] = {}
        ranks = {(layer, site): (rank, has_bias) for layer, site, rank, has_bias in profile.entries}
        for layer in sorted({layer for layer, _, _, _ in profile.entries}):
            for name in FUSED_SITES:
                rows = _allocate(layer, name, ranks, shapes, dtype)
                if rows is not None:
                    self.fused[layer, name] = rows
        self.bytes_per_position = dtype.itemsize * sum(
            rank * sum(shapes[site]) + (shapes[site][0] if has_bias else 0)
            for _, site, rank, has_bias in profile.entries
        )

    def write(self, position: int, image: AdapterImage) -> None:
        """Copy an image of this slab's profile into a position, casting to the slab's dtype."""
        tensors = {(row.layer, row.site): image.site(row) for row in image.rows}
        for (layer, _), rows in self.fused.items():
            for member in rows.members:
                source = tensors[layer, member.site]
                if rows.a is not None and member.bt is not None:
                    rows.a[position, member.rank_begin : member.rank_end] = source.a
                    member.bt[position] = source.bt
                if member.bias is not None and source.bias is not None:
                    member.bias[position] = source.bias


def _allocate(
    layer: int,
    fused_site: str,
    ranks: dict[tuple[int, str], tuple[int, bool]],
    shapes: dict[str, tuple[int, int]],
    dtype: torch.dtype,
) -> FusedRows | None:
    members = []
    rank_begin = out_begin = 0
    for site in FUSED_SITES[fused_site]:
        out_dim = shapes[site][0]
        rank, has_bias = ranks.get((layer, site), (0, False))
        if rank or has_bias:
            members.append(
                Member(
                    site=site,
                    rank_begin=rank_begin,
                    rank_end=rank_begin + rank,
                    out_begin=out_begin,
                    out_end=out_begin + out_dim,
                    bt=torch.empty(CAPACITY, rank, out_dim, dtype=dtype) if rank else None,
                    bias=torch.empty(CAPACITY, out_dim, dtype=dtype) if has_bias else None,
                )
            )
        rank_begin += rank
        out_begin += out_dim
    if not members:
        return None
    in_dim = shapes[FUSED_SITES[fused_site][0]][1]
    return FusedRows(torch.empty(CAPACITY, rank_begin, in_dim, dtype=dtype) if rank_begin else None, tuple(members))
