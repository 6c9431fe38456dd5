"""Shrink: project each row down to its adapter's rank, for all members of a fused site in one launch.

Owns the kernel and how many split-K planes a site has. Invariant: a row's coefficients depend on the row and its
adapter alone; the number of planes is fixed by the input's width and the route's form, never by who is in the batch.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.experts import segment
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.rank_rows import entry_pointer, load_block, load_entry
from adapter_kernels.gpu.route import DeviceRoute
from adapter_kernels.gpu.tables import GATE, NUM_EXPERTS, NUM_ROWS, ROWS_D, SEGMENT, DeviceTables

# by the route's rows per block. One row: long vectors, since only bandwidth counts; more: tiles for the tensor cores,
# in at most 24 KB of shared memory, so that a program fits beside those of the base's GEMM
DEFAULT_SHRINK: Mapping[int, LaunchConfig] = {
    1: LaunchConfig(block_k=512, block_r=16, num_warps=4, num_stages=2),
    16: LaunchConfig(block_k=128, block_r=16, num_warps=4, num_stages=3),
    64: LaunchConfig(block_k=64, block_r=16, num_warps=4, num_stages=2),
}
# widths below the first are one plane; up to the second, four; wider ones eight
_ONE_PLANE_BELOW = 1024
_FOUR_PLANES_BELOW = 8192
_MAX_SPLIT_BLOCK_ROWS = 16
# columns of the bridge that one program fills where a mixture may have hundreds
_COLUMN_CHUNK = 64
# columns of a table entry
_ROWS_D = tl.constexpr(ROWS_D)
_NUM_ROWS = tl.constexpr(NUM_ROWS)
_GATE = tl.constexpr(GATE)
_NUM_EXPERTS = tl.constexpr(NUM_EXPERTS)


def num_splits(in_features: int) -> int:
    """Return how many split-K planes the bridge of a site with this input width has."""
    if in_features < _ONE_PLANE_BELOW:
        return 1
    return 4 if in_features < _FOUR_PLANES_BELOW else 8


def num_planes(splits: int, block_rows: int) -> int:
    """Return how many of a site's planes a route of this form needs: one for the large blocks of a prefill.

    Many blocks keep the device busy without more programs, and every reader would sum the planes again: 8k rows, 4
    planes and the tiles of three sinks are 470 MB of reads per layer of an 8 B model.
    """
    return 1 if block_rows > _MAX_SPLIT_BLOCK_ROWS else splits


@triton.jit
def _shrink_tile(
    x_rows,
    row_mask,
    arena_ptr,
    offset,
    begin,
    count,
    out_columns,
    in_dim,
    k_begin,
    k_end,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the products of x with rows begin .. of the `count` rows at `offset`, at `out_columns` of each row."""
    lanes = begin + tl.arange(0, BLOCK_R)
    rank_mask = lanes < count
    a_rows = arena_ptr + offset + lanes.to(tl.int64) * in_dim
    if BLOCK_ROWS == 1:
        # summed along K once, after the loop: no traffic between threads inside it
        products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
        for k in range(k_begin, k_end, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            k_mask = columns < k_end
            a = tl.load(a_rows[:, None] + columns[None, :], mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
            x = tl.load(x_rows[:, None] + columns[None, :], mask=k_mask[None, :], other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)
        tl.store(out_columns + tl.arange(0, BLOCK_R), tl.sum(products, axis=1), mask=rank_mask)
    else:
        acc = tl.zeros([BLOCK_ROWS, BLOCK_R], dtype=tl.float32)
        for k in range(k_begin, k_end, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            k_mask = columns < k_end
            a = tl.load(a_rows[None, :] + columns[:, None], mask=rank_mask[None, :] & k_mask[:, None], other=0.0)
            x = tl.load(x_rows[:, None] + columns[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        mask = row_mask[:, None] & rank_mask[None, :]
        tl.store(out_columns[:, None] + tl.arange(0, BLOCK_R)[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["first_site", "num_slots"])
def _shrink_kernel(
    x_ptr,
    arena_ptr,
    table_ptr,
    block_slot_ptr,
    block_start_ptr,
    block_len_ptr,
    perm_ptr,
    bridge_ptr,
    num_slots,
    first_site,
    in_dim,
    split_size,
    plane_stride,
    row_stride,
    rank_capacity,
    HAS_FAMILIES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMN_CHUNK: tl.constexpr,
):
    member = tl.program_id(1)
    split = (tl.program_id(2) % SPLITS).to(tl.int64)
    slot, rows, row_mask = load_block(
        tl.program_id(0), block_slot_ptr, block_start_ptr, block_len_ptr, perm_ptr, BLOCK_ROWS
    )
    if slot < 0:
        return
    a_offset, _, _, rank = load_entry(table_ptr, num_slots, first_site + member, slot)
    k_begin = split * split_size
    k_end = tl.minimum(k_begin + split_size, in_dim)
    x_rows = x_ptr + rows * in_dim
    out_rows = bridge_ptr + split * plane_stride + rows * row_stride + member * rank_capacity

    if HAS_FAMILIES:
        entry = entry_pointer(table_ptr, num_slots, first_site + member, slot)
        num_experts = tl.load(entry + _NUM_EXPERTS).to(tl.int32)
        num_rows = tl.load(entry + _NUM_ROWS).to(tl.int32)
        logits_begin = segment(rank)
        rows_begin = logits_begin + segment(num_experts)
        gate_offset = tl.multiple_of(tl.load(entry + _GATE), 32)
        d_offset = tl.multiple_of(tl.load(entry + _ROWS_D), 32)
        first = tl.program_id(2) // SPLITS * COLUMN_CHUNK
        for column in range(first, tl.minimum(first + COLUMN_CHUNK, rows_begin + num_rows), BLOCK_R):
            # chosen by select: what `if` merges is not known to be aligned, and loads would be 2 bytes wide
            is_logit, is_row = column >= logits_begin, column >= rows_begin
            offset = tl.where(is_row, d_offset, tl.where(is_logit, gate_offset, a_offset))
            begin = column - tl.where(is_row, rows_begin, tl.where(is_logit, logits_begin, 0))
            count = tl.where(is_row, num_rows, tl.where(is_logit, num_experts, rank))
            _shrink_tile(
                x_rows,
                row_mask,
                arena_ptr,
                offset,
                begin,
                count,
                out_rows + column,
                in_dim,
                k_begin,
                k_end,
                BLOCK_ROWS,
                BLOCK_K,
                BLOCK_R,
            )
    else:
        for begin in range(0, rank, BLOCK_R):
            _shrink_tile(
                x_rows,
                row_mask,
                arena_ptr,
                a_offset,
                begin,
                rank,
                out_rows + begin,
                in_dim,
                k_begin,
                k_end,
                BLOCK_ROWS,
                BLOCK_K,
                BLOCK_R,
            )


def shrink(
    x: Tensor,
    tables: DeviceTables,
    first_site: int,
    num_members: int,
    route: DeviceRoute,
    bridge: Tensor,
    *,
    has_families: bool = False,
    config: LaunchConfig | None = None,
) -> None:
    """Project each row down to its adapter's rank at every member of a fused site, in one launch.

    bridge[s, t, m, j] = sum over the columns d of split s of A_m[j, d] x[t, d], accumulated in fp32, for j < rank of
    row t's adapter at member m. Nothing else is written: readers select what is below the rank, and sum the planes.
    With families the same of a mixture's gate rows, from the next multiple of `SEGMENT` on, and behind them of the rows
    D of `rows`.

    Args:
        x: [T, D] contiguous, the arena's dtype.
        first_site: table index of the fused site's first member; the others follow.
        bridge: [SPLITS, T, members, rank capacity] fp32, SPLITS = `num_planes(num_splits(D), ..)`, capacity >= ranks.
        has_families: some adapter of the step is more than low rank and bias.
        config: block_k, block_r (>= 16; at most `SEGMENT` with families), num_warps, num_stages are used.
    """
    num_rows, in_dim = x.shape
    splits = bridge.shape[0]
    assert x.is_contiguous() and x.dtype == tables.arena.dtype, "x is contiguous and of the arena's dtype"
    assert bridge.shape[1:3] == (num_rows, num_members), f"a bridge of shape {tuple(bridge.shape)} is another step's"
    config = config or DEFAULT_SHRINK[route.block_rows]
    # splits begin at whole tiles; the last ones of a narrow input may be empty and write zeros
    split_size = -(-in_dim // (splits * config.block_k)) * config.block_k
    capacity = bridge.shape[3]
    chunks = -(-capacity // _COLUMN_CHUNK) if has_families else 1
    _shrink_kernel[(route.num_blocks, num_members, splits * chunks)](
        x,
        tables.arena,
        tables.rows,
        route.block_slot,
        route.block_start,
        route.block_len,
        route.perm,
        bridge,
        tables.num_slots,
        first_site,
        in_dim,
        split_size,
        bridge.stride(0),
        bridge.stride(1),
        bridge.stride(2),
        HAS_FAMILIES=has_families,
        SPLITS=splits,
        BLOCK_ROWS=route.block_rows,
        BLOCK_K=config.block_k,
        # a tile wider than any rank would only be masked; none reaches from one segment into the next
        BLOCK_R=min(config.block_r, SEGMENT if has_families else capacity),
        COLUMN_CHUNK=_COLUMN_CHUNK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
