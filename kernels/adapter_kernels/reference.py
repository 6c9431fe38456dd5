"""Every adapter op in plain fp32 torch: the definition that the fast paths are tested against.

One token at a time, no grouping, no layout tricks. Invariant: a token's result depends on its own row and its own
adapter only (select, never multiply by a mask).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.tables import DeviceTables
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


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Rows grouped by adapter and cut into blocks: the int32 tensors of a device route."""

    # [T]
    perm: Tensor
    # [C] each
    block_slot: Tensor
    block_start: Tensor
    block_len: Tensor


def group_rows(local: Tensor, slot_of: Tensor, block_rows: int, capacity: int) -> RowBlocks:
    """Sort rows stably by bucket and cut each bucket's rows into blocks; unused blocks have slot -2 and no rows.

    Args:
        local: [T] int32 bucket per row. slot_of: [num_buckets] int32 adapter slot per bucket, -1: none.
    """
    perm = torch.sort(local, stable=True).indices
    blocks = []
    begin = 0
    for bucket, slot in enumerate(slot_of.tolist()):
        end = begin + int((local == bucket).sum())
        blocks += [(slot, place, min(block_rows, end - place)) for place in range(begin, end, block_rows)]
        begin = end
    blocks += [(-2, 0, 0)] * (capacity - len(blocks))
    table = torch.tensor(blocks, dtype=torch.int32)
    return RowBlocks(perm.int(), table[:, 0].contiguous(), table[:, 1].contiguous(), table[:, 2].contiguous())


def table_site(tables: DeviceTables, site: int, slot: int, in_dim: int, out_dim: int) -> SiteTensors | None:
    """Read one adapter's tensors at one site out of the arena; None where it has neither rank nor bias there."""
    a, bt, bias, rank = tables.rows[site, slot].tolist()
    if rank == 0 and bias < 0:
        return None
    return SiteTensors(
        a=tables.arena[a : a + rank * in_dim].view(rank, in_dim),
        bt=tables.arena[bt : bt + rank * out_dim].view(rank, out_dim),
        bias=tables.arena[bias : bias + out_dim] if bias >= 0 else None,
    )


def table_acts(tables: DeviceTables, first_site: int, num_members: int, slots: Tensor) -> Tensor:
    """Tell at which members of a fused site each row's adapter acts: [T, members] bool."""
    entries = tables.rows[first_site : first_site + num_members, slots.clamp(min=0).long()]
    return ((entries[..., 3] > 0) | (entries[..., 2] >= 0)).T & (slots >= 0)[:, None]


def table_bridge(
    x: Tensor, tables: DeviceTables, first_site: int, num_members: int, slots: Tensor
) -> list[list[Tensor]]:
    """Shrink each row with its own adapter: c[t][m] = A_m . x[t], [rank] fp32; no columns where nothing acts.

    Args:
        x: [T, D]. slots: [T] adapter slot per row, -1: none.
    """
    in_dim = x.shape[1]
    bridge = []
    for token, slot in enumerate(slots.tolist()):
        row = []
        for site in range(first_site, first_site + num_members):
            rows = table_site(tables, site, slot, in_dim, 0) if slot >= 0 else None
            row.append(torch.empty(0) if rows is None else shrink(x[token : token + 1], rows.a)[0])
        bridge.append(row)
    return bridge


def table_delta(x: Tensor, tables: DeviceTables, first_site: int, widths: tuple[int, ...], slots: Tensor) -> Tensor:
    """Delta of a step at a fused site, read from the device tables: [T, sum of widths] fp32.

    out[t, columns of m] = sum_j c[t, m, j] BT_m[j, :] + bias_m with c as `table_bridge`, rounded to the arena's dtype
    as every fast path rounds it; zero where the row's adapter does not act.
    """
    bridge = table_bridge(x, tables, first_site, len(widths), slots)
    out = torch.zeros(x.shape[0], sum(widths))
    for token, slot in enumerate(slots.tolist()):
        begin = 0
        for member, width in enumerate(widths):
            rows = table_site(tables, first_site + member, slot, x.shape[1], width) if slot >= 0 else None
            if rows is not None:
                c = bridge[token][member].to(tables.arena.dtype).float()
                out[token, begin : begin + width] = expand(c[None], rows.bt)[0]
                if rows.bias is not None:
                    out[token, begin : begin + width] += rows.bias.float()
            begin += width
    return out
