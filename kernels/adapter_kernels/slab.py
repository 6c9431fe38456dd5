"""A slab: the site-major pack of up to 16 adapters that share one profile, as the CPU path reads it.

For each layer and fused site all rows that meet the input lie in one tensor `[capacity, R, in]` and the rank rows of
each member in `[capacity, R, out]`, so a step's shrink is one batched GEMM over positions. Owns the packed bytes, not
the decision who lies where. Invariant: a position is read only between `write` and the owner's reuse of it; memory of
positions never written is never touched (the allocation is lazy), so a slab of one adapter costs one adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gate import Mixture
from adapter_kernels.image import AdapterImage, SiteTensors, Sparse
from adapter_kernels.native_layouts import MAX_MEMBERS, LowRankMember, LowRankSite
from adapter_kernels.profile import Profile, SiteProfile

# more positions per slab mean fewer calls per step; fewer mean memory comes back sooner
CAPACITY = 16


@dataclass(frozen=True, slots=True)
class Member:
    """One site inside a fused site: its columns of the bridge and of the output, and what acts there.

    The bridge's columns are first those of A, then those of `rows.D`. None: the profile has no such tensor.
    """

    site: str
    out_begin: int
    out_end: int
    rank_begin: int
    rank_end: int
    rows_end: int
    mixture: Mixture | None
    # [capacity, E] fp32
    gate_bias: Tensor | None
    # [capacity, R, out]
    bt: Tensor | None
    # [capacity, s] int64 and [capacity, s, out]
    cols_idx: Tensor | None
    cols_d: Tensor | None
    # [capacity, s] int64
    rows_idx: Tensor | None
    # [capacity, out] fp32, [capacity, in] fp32: bf16 would round away what DoRA learnt
    out_scale: Tensor | None
    in_scale: Tensor | None
    # [capacity, out]
    bias: Tensor | None


@dataclass(frozen=True)
class FusedRows:
    """All rows of a fused site: `a [capacity, R, in]`, `gates [capacity, E, in]` fp32, and the members."""

    a: Tensor | None
    gates: Tensor | None
    members: tuple[Member, ...]

    @cached_property
    def is_plain(self) -> bool:
        """Is a low rank all that acts here, at each member?"""
        others = ("mixture", "cols_idx", "rows_idx", "bias")
        return (
            self.a is not None
            and self.gates is None
            and all(m.bt is not None and all(getattr(m, name) is None for name in others) for m in self.members)
        )

    @cached_property
    def low_rank(self) -> LowRankSite | None:
        """The site as the compiled kernel reads it; None: it cannot."""
        if not self.is_plain or self.a is None or self.a.dtype != torch.bfloat16 or len(self.members) > MAX_MEMBERS:
            return None
        return LowRankSite(
            self.a, [LowRankMember(m.bt, m.out_begin, m.rank_begin) for m in self.members if m.bt is not None]
        )

    @property
    def in_norms(self) -> set[str]:
        """The norms that the gates see the input through."""
        return {member.mixture.options.in_norm for member in self.members if member.mixture is not None}

    @property
    def is_mixture(self) -> bool:
        """Do all rows of `a` belong to experts?"""
        return all(
            member.rows_end == member.rank_begin or (member.mixture is not None and member.rows_end == member.rank_end)
            for member in self.members
        )


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
        sites = {(site.layer, site.site): site for site in profile.sites}
        for layer in sorted({site.layer for site in profile.sites}):
            for name, members in FUSED_SITES.items():
                own = {site: sites[layer, site] for site in members if (layer, site) in sites}
                if own:
                    self.fused[layer, name] = _allocate(members, own, shapes, dtype)
        self.bytes_per_position = sum(tensor[0].nbytes for _, _, tensor in self.tensors())
        self.has_scales = any(site.has_out_scale or site.has_in_scale for site in profile.sites)

    def tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """All tensors [capacity, ..] with their layer and fused site."""
        for (layer, name), rows in self.fused.items():
            packed = [rows.a, rows.gates]
            for m in rows.members:
                packed += [m.gate_bias, m.bt, m.cols_idx, m.cols_d, m.rows_idx, m.out_scale, m.in_scale, m.bias]
            yield from ((layer, name, tensor) for tensor in packed if tensor is not None)

    def write(self, position: int, image: AdapterImage) -> None:
        """Copy an image of this slab's profile into a position, casting to the slab's dtypes."""
        sources = {(rows.layer, rows.site): image.site(rows) for rows in image.rows}
        for (layer, _), fused in self.fused.items():
            for member in fused.members:
                _write(position, fused, member, sources[layer, member.site])


def _allocate(
    members: tuple[str, ...],
    profiles: dict[str, SiteProfile],
    shapes: dict[str, tuple[int, int]],
    dtype: torch.dtype,
) -> FusedRows:
    found = []
    in_dim = shapes[members[0]][1]
    rank_begin = out_begin = gate_begin = 0
    for site in members:
        out_dim = shapes[site][0]
        profile = profiles.get(site)
        if profile is not None:
            member = _member(profile, (out_dim, in_dim), dtype, (rank_begin, out_begin, gate_begin))
            found.append(member)
            rank_begin = member.rows_end
            gate_begin += 0 if member.mixture is None else member.mixture.num_experts
        out_begin += out_dim
    return FusedRows(
        a=torch.empty(CAPACITY, rank_begin, in_dim, dtype=dtype) if rank_begin else None,
        gates=torch.empty(CAPACITY, gate_begin, in_dim) if gate_begin else None,
        members=tuple(found),
    )


def _member(profile: SiteProfile, shape: tuple[int, int], dtype: torch.dtype, begins: tuple[int, int, int]) -> Member:
    (out_dim, in_dim), (rank_begin, out_begin, gate_begin) = shape, begins
    mixture = None
    if profile.top_k:
        mixture = Mixture.build(profile.ranks, profile.top_k, profile.temperature, gate_begin, profile.gate)
    rank_end = rank_begin + profile.rank
    return Member(
        site=profile.site,
        out_begin=out_begin,
        out_end=out_begin + out_dim,
        rank_begin=rank_begin,
        rank_end=rank_end,
        rows_end=rank_end + profile.num_rows,
        mixture=mixture,
        gate_bias=torch.empty(CAPACITY, len(profile.ranks)) if profile.has_gate_bias else None,
        bt=torch.empty(CAPACITY, profile.rank, out_dim, dtype=dtype) if profile.rank else None,
        cols_idx=torch.empty(CAPACITY, profile.num_cols, dtype=torch.int64) if profile.num_cols else None,
        cols_d=torch.empty(CAPACITY, profile.num_cols, out_dim, dtype=dtype) if profile.num_cols else None,
        rows_idx=torch.empty(CAPACITY, profile.num_rows, dtype=torch.int64) if profile.num_rows else None,
        out_scale=torch.empty(CAPACITY, out_dim) if profile.has_out_scale else None,
        in_scale=torch.empty(CAPACITY, in_dim) if profile.has_in_scale else None,
        bias=torch.empty(CAPACITY, out_dim, dtype=dtype) if profile.has_bias else None,
    )


def _write(position: int, fused: FusedRows, member: Member, source: SiteTensors) -> None:
    if fused.a is not None and member.bt is not None:
        fused.a[position, member.rank_begin : member.rank_end] = source.a
        member.bt[position] = source.bt
    if fused.gates is not None and member.mixture is not None and source.gate is not None:
        fused.gates[position, member.mixture.begin : member.mixture.end] = source.gate.weight
        if member.gate_bias is not None and source.gate.bias is not None:
            member.gate_bias[position] = source.gate.bias
    if member.cols_idx is not None and member.cols_d is not None and source.cols is not None:
        _write_sparse(member.cols_idx[position], member.cols_d[position], source.cols)
    if fused.a is not None and member.rows_idx is not None and source.rows is not None:
        _write_sparse(member.rows_idx[position], fused.a[position, member.rank_end : member.rows_end], source.rows)
    for target, vector in (
        (member.out_scale, source.out_scale),
        (member.in_scale, source.in_scale),
        (member.bias, source.bias),
    ):
        if target is not None and vector is not None:
            target[position] = vector


def _write_sparse(idx: Tensor, d: Tensor, source: Sparse) -> None:
    """Write a selection and pad it: zero rows at its own last channel, so that no other channel is ever read."""
    count = source.idx.numel()
    idx[:count] = source.idx
    idx[count:] = source.idx[-1]
    d[:count] = source.d
    d[count:] = 0.0
