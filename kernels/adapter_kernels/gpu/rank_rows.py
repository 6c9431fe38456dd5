"""Device functions that every adapter kernel is made of: find a block's rows, read a table entry, add a delta's tile.

Owns the inner loop of the expand, which sinks call on a tile that they already hold; launches nothing. Invariant: what
an adapter does not own is never read, and a tile whose adapter does not act comes back as the same bits.

Kernels that call these mark their scalars `do_not_specialize` where the value is only a position (site, rows of the
step), so that no other value of it means another compilation; widths and strides stay specialised: vector loads.
"""

import triton
import triton.language as tl

from adapter_kernels.gpu.tables import COLUMNS

# int64 columns of a table entry
ENTRY = tl.constexpr(COLUMNS)


@triton.jit
def load_block(block, slots_ptr, start_ptr, len_ptr, perm_ptr, BLOCK_ROWS: tl.constexpr):
    """Return (slot, rows, row_mask) of a block: its adapter slot and its rows, [BLOCK_ROWS] int64 with their mask.

    slot -1: rows without adapter; -2: an unused block, whose mask is all False. `slots_ptr` is the route's
    `block_slot`. With BLOCK_ROWS 1 the block's number is its row, and the other three pointers are not read.
    """
    slot = tl.load(slots_ptr + block)
    lanes = tl.arange(0, BLOCK_ROWS)
    if BLOCK_ROWS == 1:
        rows = (block + lanes).to(tl.int64)
        row_mask = lanes == 0
    else:
        row_mask = lanes < tl.load(len_ptr + block)
        rows = tl.load(perm_ptr + tl.load(start_ptr + block) + lanes, mask=row_mask, other=0).to(tl.int64)
    return slot, rows, row_mask


@triton.jit
def entry_pointer(table_ptr, num_slots, site, slot):
    """Return where an adapter slot's entry at a site begins."""
    return table_ptr + (tl.cast(site, tl.int64) * num_slots + slot) * ENTRY


@triton.jit
def load_entry(table_ptr, num_slots, site, slot):
    """Return (a offset, rank rows' offset, bias offset or -1, rank) of an adapter slot >= 0 at a site.

    The tables promise offsets at multiples of 128 bytes; 8 elements are 16 bytes of a 2-byte dtype.
    """
    entry = entry_pointer(table_ptr, num_slots, site, slot)
    a_offset = tl.multiple_of(tl.load(entry), 32)
    bt_offset = tl.multiple_of(tl.load(entry + 1), 32)
    bias_offset = tl.load(entry + 2)
    rank = tl.load(entry + 3).to(tl.int32)
    return a_offset, bt_offset, bias_offset, rank


@triton.jit
def load_bridge(row_ptr, ranks, rank, row_mask, plane_stride, SPLITS: tl.constexpr):
    """Return the coefficients at `row_ptr + ranks`, fp32: split-K planes summed in order; 0 from `rank` on.

    What lies from `rank` on is selected away and not multiplied: it may be NaN. It is loaded up to the next multiple
    of 16, which a bridge's row always has: a mask at `rank` itself would turn 16-byte loads into 4-byte ones.
    """
    mask = row_mask & (ranks < (rank + 15) // 16 * 16)
    total = tl.load(row_ptr + ranks, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(row_ptr + split * plane_stride + ranks, mask=mask, other=0.0)
    return tl.where(ranks < rank, total, 0.0)


@triton.jit
def load_rank_tile(
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
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return (c, rank rows) of ranks begin .. begin + BLOCK_R - 1: coefficients rounded to the arena's dtype, BT tile.

    c is [BLOCK_ROWS, BLOCK_R], with BLOCK_ROWS 1 only [BLOCK_R]; both are 0 from `rank` on.
    """
    dtype: tl.constexpr = arena_ptr.dtype.element_ty
    ranks = begin + tl.arange(0, BLOCK_R)
    offsets = bt_offset + ranks[:, None].to(tl.int64) * width + columns[None, :]
    mask = (ranks < rank)[:, None] & column_mask[None, :]
    rank_rows = tl.load(arena_ptr + offsets, mask=mask, other=0.0)
    plane_stride = tl.cast(plane_stride, tl.int64)
    if BLOCK_ROWS == 1:
        c = load_bridge(bridge_ptr + tl.sum(rows, axis=0) * row_stride, ranks, rank, True, plane_stride, SPLITS)
    else:
        c_rows = bridge_ptr + rows[:, None] * row_stride
        c = load_bridge(c_rows, ranks[None, :], rank, row_mask[:, None], plane_stride, SPLITS)
    return c.to(dtype), rank_rows


@triton.jit
def weigh_rank_tile(acc, c, rank_rows, BLOCK_ROWS: tl.constexpr):
    """Return acc + c @ rank rows for a tile of `load_rank_tile`, in fp32."""
    if BLOCK_ROWS == 1:
        return acc + tl.sum(c.to(tl.float32)[:, None] * rank_rows.to(tl.float32), axis=0)[None, :]
    else:
        return tl.dot(c, rank_rows, acc, input_precision="ieee")


@triton.jit
def add_bias(acc, arena_ptr, bias_offset, columns, column_mask):
    """Return acc plus an adapter's bias, or acc itself where the offset says that there is none (-1)."""
    if bias_offset >= 0:
        bias_ptr = arena_ptr + bias_offset
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def add_rank_rows(
    acc,
    bridge_ptr,
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
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return acc + sum_j c[row, j] BT[j, columns] + bias[columns] for one adapter's rows: [BLOCK_ROWS, columns] fp32.

    `bridge_ptr` points at the member's first coefficient of row 0 (bridge + member * rank capacity); c is rounded to
    the arena's dtype. Columns count inside the member, `width` is the member's. Tensor cores need BLOCK_ROWS >= 16
    and BLOCK_R >= 16; with BLOCK_ROWS 1 it is a multiply and a sum.
    """
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
    return add_bias(acc, arena_ptr, bias_offset, columns, column_mask)


@triton.jit
def add_member_delta(
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
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return acc plus the tile of one member's delta, or acc itself where the block's adapter lacks the member.

    What a sink calls: acc [BLOCK_ROWS, columns] fp32 is the base's output; slot, rows and row_mask are `load_block`'s;
    bridge [SPLITS, T, members, rank_capacity] comes with its strides. Columns count inside the member.
    """
    if slot >= 0:
        _, bt_offset, bias_offset, rank = load_entry(table_ptr, num_slots, first_site + member, slot)
        acc = add_rank_rows(
            acc,
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
    return acc
