"""Shrink: project each row down to its adapter's rank, for all members of a fused site in one launch.

Owns the kernel and how many split-K planes a site has. Invariant: a row's coefficients depend on the row and its
adapter alone; the number of planes is fixed by the input's width and the route's form, never by who is in the batch.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.rank_rows import load_block, load_entry
from adapter_kernels.gpu.route import DeviceRoute
from adapter_kernels.gpu.tables import DeviceTables

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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    member = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
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

    for rank_begin in range(0, rank, BLOCK_R):
        ranks = rank_begin + tl.arange(0, BLOCK_R)
        rank_mask = ranks < rank
        a_rows = arena_ptr + a_offset + ranks.to(tl.int64) * in_dim
        if BLOCK_ROWS == 1:
            # summed along K once, after the loop: no traffic between threads inside it
            products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
            for k in range(k_begin, k_end, BLOCK_K):
                columns = k + tl.arange(0, BLOCK_K)
                k_mask = columns < k_end
                a = tl.load(a_rows[:, None] + columns[None, :], mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
                x = tl.load(x_rows[:, None] + columns[None, :], mask=k_mask[None, :], other=0.0)
                products += a.to(tl.float32) * x.to(tl.float32)
            tl.store(out_rows + ranks, tl.sum(products, axis=1), mask=rank_mask)
        else:
            acc = tl.zeros([BLOCK_ROWS, BLOCK_R], dtype=tl.float32)
            for k in range(k_begin, k_end, BLOCK_K):
                columns = k + tl.arange(0, BLOCK_K)
                k_mask = columns < k_end
                a = tl.load(a_rows[None, :] + columns[:, None], mask=rank_mask[None, :] & k_mask[:, None], other=0.0)
                x = tl.load(x_rows[:, None] + columns[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            mask = row_mask[:, None] & rank_mask[None, :]
            tl.store(out_rows[:, None] + ranks[None, :], acc, mask=mask)


def shrink(
    x: Tensor,
    tables: DeviceTables,
    first_site: int,
    num_members: int,
    route: DeviceRoute,
    bridge: Tensor,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """Project each row down to its adapter's rank at every member of a fused site, in one launch.

    bridge[s, t, m, j] = sum over the columns d of split s of A_m[j, d] x[t, d], accumulated in fp32, for j < rank of
    row t's adapter at member m. Nothing else is written: readers select what is below the rank, and sum the planes.

    Args:
        x: [T, D] contiguous, the arena's dtype.
        first_site: table index of the fused site's first member; the others follow.
        bridge: [SPLITS, T, members, rank capacity] fp32, SPLITS = `num_planes(num_splits(D), ..)`, capacity >= ranks.
        config: block_k, block_r (>= 16), num_warps, num_stages are used.
    """
    num_rows, in_dim = x.shape
    splits = bridge.shape[0]
    assert x.is_contiguous() and x.dtype == tables.arena.dtype, "x is contiguous and of the arena's dtype"
    assert bridge.shape[1:3] == (num_rows, num_members), f"a bridge of shape {tuple(bridge.shape)} is another step's"
    config = config or DEFAULT_SHRINK[route.block_rows]
    # splits begin at whole tiles; the last ones of a narrow input may be empty and write zeros
    split_size = -(-in_dim // (splits * config.block_k)) * config.block_k
    _shrink_kernel[(route.num_blocks, num_members, splits)](
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
        BLOCK_ROWS=route.block_rows,
        BLOCK_K=config.block_k,
        # a tile wider than any rank would only be masked
        BLOCK_R=min(config.block_r, bridge.shape[3]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
