"""Device functions for adapters that are more than low rank: mixtures, sparse slices, scales of the base's output.

Owns how a tile of outputs meets them; sinks and the expand call `add_families` in the place of `add_rank_rows` where
the step has such adapters, and are compiled without it where not. Launches nothing. Invariants: what a row did not
choose and what an adapter does not name is selected away and never multiplied by zero; a plain low rank gets the same
sums in the same order as from `add_rank_rows`.

A bridge's row holds, each from a multiple of `SEGMENT` on: the ranks, a gate's logits, the outputs that `rows` changes.
"""

import triton
import triton.language as tl

from adapter_kernels.gpu import tables
from adapter_kernels.gpu.experts import add_mixture, segment, sum_planes, weigh_tile
from adapter_kernels.gpu.rank_rows import add_bias, add_member_delta, entry_pointer, load_rank_tile, weigh_rank_tile

# columns of a table entry
_BT = tl.constexpr(tables.BT)
_BIAS = tl.constexpr(tables.BIAS)
_RANK = tl.constexpr(tables.RANK)
_COLS_IDX = tl.constexpr(tables.COLS_IDX)
_COLS_D = tl.constexpr(tables.COLS_D)
_NUM_COLS = tl.constexpr(tables.NUM_COLS)
_ROWS_IDX = tl.constexpr(tables.ROWS_IDX)
_NUM_ROWS = tl.constexpr(tables.NUM_ROWS)
_NUM_EXPERTS = tl.constexpr(tables.NUM_EXPERTS)
_OUT_SCALE = tl.constexpr(tables.OUT_SCALE)


@triton.jit
def _add_cols(
    acc,
    x_rows,
    arena_ptr,
    ints_ptr,
    entry,
    row_mask,
    columns,
    column_mask,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return acc + sum_j x[row, idx[j]] D[j, columns]: a gather in the shrink's place."""
    count = tl.load(entry + _NUM_COLS).to(tl.int32)
    idx_ptr = ints_ptr + tl.load(entry + _COLS_IDX)
    d_offset = tl.multiple_of(tl.load(entry + _COLS_D), 32)
    for begin in range(0, count, BLOCK_R):
        lanes = begin + tl.arange(0, BLOCK_R)
        is_real = lanes < count
        idx = tl.load(idx_ptr + lanes, mask=is_real, other=0)
        c = tl.load(x_rows + idx[None, :], mask=row_mask[:, None] & is_real[None, :], other=0.0)
        offsets = d_offset + lanes[:, None].to(tl.int64) * width + columns[None, :]
        d = tl.load(arena_ptr + offsets, mask=is_real[:, None] & column_mask[None, :], other=0.0)
        acc = weigh_tile(acc, c, d, BLOCK_ROWS)
    return acc


@triton.jit
def _add_rows(acc, value_rows, plane_stride, ints_ptr, entry, count, row_mask, columns, SPLITS: tl.constexpr):
    """Return acc + value[row, j] in the columns idx[j]: each column looks itself up among the increasing idx."""
    idx_ptr = ints_ptr + tl.load(entry + _ROWS_IDX)
    place = tl.zeros_like(columns)
    size = count
    while size > 1:
        half = size // 2
        place = tl.where(tl.load(idx_ptr + place + half - 1) < columns, place + half, place)
        size -= half
    is_named = tl.load(idx_ptr + place) == columns
    # nothing is loaded, and zero added, where the column is not named
    return acc + sum_planes(value_rows + place[None, :], row_mask[:, None] & is_named[None, :], plane_stride, SPLITS)


@triton.jit
def scale_output(acc, base_bias_ptr, base_begin, floats_ptr, scale_offset, columns, column_mask):
    """Return b + scale * (acc - b): the base's product scaled, its bias not; a pointer None: it has none.

    acc is [columns] or [any, columns].
    """
    if scale_offset >= 0:
        scale = tl.load(floats_ptr + scale_offset + columns, mask=column_mask, other=1.0)
        if base_bias_ptr is not None:
            bias = tl.load(base_bias_ptr + base_begin + columns, mask=column_mask, other=0.0).to(tl.float32)
            acc = (acc - bias) * scale + bias
        else:
            acc = acc * scale
    return acc


@triton.jit
def adds_anything(entry, HAS_BASE: tl.constexpr):
    """Tell whether an adapter adds to a site's output, or, where HAS_BASE, scales it."""
    adds = (tl.load(entry + _RANK) > 0) | (tl.load(entry + _BIAS) >= 0)
    adds |= (tl.load(entry + _NUM_COLS) > 0) | (tl.load(entry + _NUM_ROWS) > 0)
    if HAS_BASE:
        adds |= tl.load(entry + _OUT_SCALE) >= 0
    return adds


@triton.jit
def add_families(
    acc,
    layer,
    bridge,
    arena,
    entry,
    tile,
    HAS_BASE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return a tile of one member's output with all that the block's adapter does there, [BLOCK_ROWS, columns] fp32.

    `acc` is the base's output where HAS_BASE, and then out_scale is applied; else it is zeros that a delta is summed
    in. `entry` points at the adapter's entry at the site. The others are bundles:

    layer: x [T, in_dim] before any scale, in_dim, the base's bias or None, where the member's part of it begins.
    bridge: the member's first coefficient of row 0, strides of planes and rows. arena: as its dtype, int32, fp32.
    tile: rows and their mask, columns inside the member and their mask, the member's width.
    """
    x_ptr, in_dim, base_bias_ptr, base_begin = layer
    bridge_ptr, plane_stride, row_stride = bridge
    arena_ptr, ints_ptr, floats_ptr = arena
    rows, row_mask, columns, column_mask, width = tile
    if HAS_BASE:
        scale_offset = tl.load(entry + _OUT_SCALE)
        acc = scale_output(acc, base_bias_ptr, base_begin, floats_ptr, scale_offset, columns, column_mask)
    rank = tl.load(entry + _RANK).to(tl.int32)
    num_experts = tl.load(entry + _NUM_EXPERTS).to(tl.int32)
    plane_stride = tl.cast(plane_stride, tl.int64)
    c_rows = bridge_ptr + rows[:, None] * row_stride
    if num_experts > 0:
        acc = add_mixture(
            acc,
            c_rows,
            plane_stride,
            arena_ptr,
            ints_ptr,
            entry,
            rank,
            num_experts,
            row_mask,
            columns,
            column_mask,
            width,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
    else:
        bt_offset = tl.multiple_of(tl.load(entry + _BT), 32)
        for begin in range(0, rank, BLOCK_R):
            c, rank_rows = load_rank_tile(
                bridge_ptr,
                plane_stride,
                row_stride,
                arena_ptr,
                bt_offset,
                begin,
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
            acc = weigh_rank_tile(acc, c, rank_rows, BLOCK_ROWS)
    x_rows = x_ptr + rows[:, None] * in_dim
    acc = _add_cols(acc, x_rows, arena_ptr, ints_ptr, entry, row_mask, columns, column_mask, width, BLOCK_ROWS, BLOCK_R)
    num_rows = tl.load(entry + _NUM_ROWS).to(tl.int32)
    if num_rows > 0:
        value_rows = c_rows + segment(rank) + segment(num_experts)
        acc = _add_rows(acc, value_rows, plane_stride, ints_ptr, entry, num_rows, row_mask, columns, SPLITS)
    return add_bias(acc, arena_ptr, tl.load(entry + _BIAS), columns, column_mask)


@triton.jit
def add_member(
    acc,
    layer,
    bridge,
    arena,
    table,
    member,
    slot,
    tile,
    HAS_FAMILIES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return a tile of one member's output with what the block's adapter, if any, does there: what a sink calls.

    Without families it is `add_member_delta`. Bundles as `add_families` takes them, but `bridge` begins at the first
    member and ends with the members' stride; table: its pointer, slots, the fused site's first site.
    """
    bridge_ptr, plane_stride, row_stride, rank_capacity = bridge
    arena_ptr, _, _ = arena
    table_ptr, num_slots, first_site = table
    rows, row_mask, columns, column_mask, width = tile
    if HAS_FAMILIES:
        if slot >= 0:
            acc = add_families(
                acc,
                layer,
                (bridge_ptr + member * rank_capacity, plane_stride, row_stride),
                arena,
                entry_pointer(table_ptr, num_slots, first_site + member, slot),
                tile,
                True,
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
    else:
        acc = add_member_delta(
            acc,
            bridge_ptr,
            plane_stride,
            row_stride,
            rank_capacity,
            arena_ptr,
            table_ptr,
            num_slots,
            first_site,
            member,
            slot,
            rows,
            row_mask,
            columns,
            column_mask,
            width,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
    return acc
