"""Expand: weigh an adapter's rank rows by the bridge, for all members of a fused site in one launch.

Owns the kernel for sites whose delta has a buffer of its own, and the fallback that adds into y; sinks run the same
inner loop (`rank_rows.py`) on their own tiles. Invariant: only rows and members where an adapter acts are written.
"""

from collections.abc import Mapping
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.families import add_families, adds_anything
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.rank_rows import add_rank_rows, entry_pointer, load_block, load_entry
from adapter_kernels.gpu.route import DeviceRoute
from adapter_kernels.gpu.step import SiteInput
from adapter_kernels.gpu.tables import DeviceTables

# by the route's rows per block; a second stage of 64 rows would take more than 32 KB of shared memory, and a program
# must fit beside those of the base's GEMM
DEFAULT_EXPAND: Mapping[int, LaunchConfig] = {
    1: LaunchConfig(block_r=16, block_o=256, num_warps=4, num_stages=2),
    16: LaunchConfig(block_r=16, block_o=128, num_warps=4, num_stages=2),
    64: LaunchConfig(block_r=16, block_o=128, num_warps=4, num_stages=1),
}
MAX_MEMBERS = 3
_LARGE_BLOCK = 64


@triton.jit
def member_of(tile, width_0, width_1, width_2, BLOCK_O: tl.constexpr):
    """Return (member, tile inside it, its width, its first column): tiles lie member after member."""
    tiles_0 = tl.cdiv(width_0, BLOCK_O)
    tiles_1 = tl.cdiv(width_1, BLOCK_O)
    member = 0
    width = width_0
    out_begin = 0
    if tile >= tiles_0 + tiles_1:
        member = 2
        width = width_2
        out_begin = width_0 + width_1
        tile -= tiles_0 + tiles_1
    elif tile >= tiles_0:
        member = 1
        width = width_1
        out_begin = width_0
        tile -= tiles_0
    return member, tile, width, out_begin


@triton.jit(do_not_specialize=["first_site", "num_slots"])
def _expand_kernel(
    bridge_ptr,
    arena_ptr,
    ints_ptr,
    floats_ptr,
    x_ptr,
    base_bias_ptr,
    table_ptr,
    block_slot_ptr,
    block_start_ptr,
    block_len_ptr,
    perm_ptr,
    out_ptr,
    num_slots,
    first_site,
    width_0,
    width_1,
    width_2,
    in_dim,
    out_stride,
    plane_stride,
    row_stride,
    rank_capacity,
    ACCUMULATE: tl.constexpr,
    HAS_FAMILIES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    slot, rows, row_mask = load_block(
        tl.program_id(1), block_slot_ptr, block_start_ptr, block_len_ptr, perm_ptr, BLOCK_ROWS
    )
    if slot < 0:
        return
    member, tile, width, out_begin = member_of(tl.program_id(0), width_0, width_1, width_2, BLOCK_O)
    columns = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    column_mask = columns < width
    mask = row_mask[:, None] & column_mask[None, :]
    if HAS_FAMILIES:
        entry = entry_pointer(table_ptr, num_slots, first_site + member, slot)
        if adds_anything(entry, ACCUMULATE) == 0:
            return
        result = tl.zeros([BLOCK_ROWS, BLOCK_O], dtype=tl.float32)
        if ACCUMULATE:
            base = out_ptr + rows[:, None] * out_stride + out_begin + columns[None, :]
            result += tl.load(base, mask=mask, other=0.0).to(tl.float32)
        result = add_families(
            result,
            (x_ptr, in_dim, base_bias_ptr, out_begin),
            (bridge_ptr + member * rank_capacity, plane_stride, row_stride),
            (arena_ptr, ints_ptr, floats_ptr),
            entry,
            (rows, row_mask, columns, column_mask, width),
            ACCUMULATE,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
    else:
        _, bt_offset, bias_offset, rank = load_entry(table_ptr, num_slots, first_site + member, slot)
        if (rank == 0) & (bias_offset < 0):
            return
        result = add_rank_rows(
            tl.zeros([BLOCK_ROWS, BLOCK_O], dtype=tl.float32),
            bridge_ptr + member * rank_capacity,
            plane_stride,
            row_stride,
            arena_ptr,
            bt_offset,
            bias_offset,
            rank,
            rows,
            row_mask,
            columns,
            column_mask,
            width,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
    # after the sums, so that no registers hold them meanwhile
    out = out_ptr + rows[:, None] * out_stride + out_begin + columns[None, :]
    if ACCUMULATE and not HAS_FAMILIES:
        result += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)


def expand(
    bridge: Tensor,
    tables: DeviceTables,
    first_site: int,
    widths: tuple[int, ...],
    route: DeviceRoute,
    out: Tensor,
    *,
    accumulate: bool,
    families: SiteInput | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Weigh the rank rows of each row's adapter at every member of a fused site, in one launch.

    out[t, columns of m] (+)= sum_j c[t, m, j] BT_m[j, :] + bias_m, accumulated in fp32, with c the bridge's planes
    summed in order and rounded to the arena's dtype. Rows whose adapter lacks member m are neither read nor written.

    Args:
        bridge: [SPLITS, T, members, rank capacity] fp32, as `shrink` left it.
        first_site: table index of the fused site's first member; the others follow.
        widths: output columns of each member, at most three; they lie side by side in `out`.
        out: [T, >= sum of widths], the model's dtype, rows contiguous. accumulate: add to what it holds.
        families: given where some adapter of the step is more than low rank and bias: then the sum is over its
            mixture's chosen experts and its slices too, and an accumulating launch applies its out_scale to `out`
            before it adds.
        config: block_o, block_r (>= 16), num_warps, num_stages are used.
    """
    splits, num_rows, num_members, _ = bridge.shape
    assert len(widths) == num_members <= MAX_MEMBERS, f"{len(widths)} widths for a bridge of {num_members} members"
    assert out.stride(1) == 1 and out.shape[0] == num_rows and out.shape[1] >= sum(widths), "out holds all columns"
    config = config or DEFAULT_EXPAND[route.block_rows]
    if families is not None and route.block_rows == _LARGE_BLOCK:
        # the compiler finds no registers for tiles of 16 rank rows there, on sm_100
        config = replace(config, block_r=32)
    num_tiles = sum(-(-width // config.block_o) for width in widths)
    all_widths = widths + (0,) * (MAX_MEMBERS - num_members)
    _expand_kernel[(num_tiles, route.num_blocks)](
        bridge,
        tables.arena,
        None if families is None else tables.ints,
        None if families is None else tables.floats,
        None if families is None else families.x,
        None if families is None else families.base_bias,
        tables.rows,
        route.block_slot,
        route.block_start,
        route.block_len,
        route.perm,
        out,
        tables.num_slots,
        first_site,
        *all_widths,
        0 if families is None else families.x.shape[1],
        out.stride(0),
        bridge.stride(0),
        bridge.stride(1),
        bridge.stride(2),
        ACCUMULATE=accumulate,
        HAS_FAMILIES=families is not None,
        SPLITS=splits,
        BLOCK_ROWS=route.block_rows,
        BLOCK_O=config.block_o,
        # a tile wider than any rank would only be masked
        BLOCK_R=min(config.block_r, bridge.shape[3]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
