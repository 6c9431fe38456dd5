"""From the qkv projection to attention: delta, norm of q and k, rotation, write to the paged cache, in one launch.

Owns the sink of the qkv site: the adapters' expand happens on the tile that is read anyway, so it costs no launch and
no round trip. One program finishes one head of one block of rows; a head lies in it as two halves side by side, each
beginning with the half that turns against the other. Invariant: rows without adapter, or whose adapter lacks the
head's projection, get the bits of a launch without adapters, in which no adapter code is compiled.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.families import add_member
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.norm import scale_normed
from adapter_kernels.gpu.rank_rows import load_block
from adapter_kernels.gpu.route import UNUSED
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.sink_arguments import adapter_arguments
from adapter_kernels.gpu.sink_inputs import QkNormWeights, QkvDims
from adapter_kernels.gpu.step import SiteAdapters

# by the route's rows per block, for heads of 128; ranks are few, so a pipeline would have nothing to do
DEFAULT_QKV_SINK: Mapping[int, LaunchConfig] = {
    1: LaunchConfig(block_r=32, num_warps=4, num_stages=1),
    16: LaunchConfig(block_r=32, num_warps=4, num_stages=1),
    64: LaunchConfig(block_r=16, num_warps=4, num_stages=1),
}
# elements of a tile of rank rows: 16 bytes for each of 256 threads (4 warps of an MI300)
_MIN_RANK_TILE = 2048
# lanes of a head that 4 warps have the registers for, with 64 rows
_MAX_LANES = 128


@triton.jit
def _head_dims(part, lanes, HALF: tl.constexpr, TURN: tl.constexpr):
    """Return the dim of each lane of a half (0 or 1): its TURN turning dims first, then those that pass."""
    if TURN == HALF:
        return part * HALF + lanes
    else:
        return tl.where(lanes < TURN, part * TURN, TURN + part * (HALF - TURN)) + lanes


@triton.jit
def _norm_head(
    tile,
    member,
    q_norm_ptr,
    k_norm_ptr,
    dims,
    dim_mask,
    eps,
    HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
    CASTS_FIRST: tl.constexpr,
):
    """Apply the RMSNorm of q or k to each row's head; v is returned as it is."""
    if member < 2:
        weight_ptr = tl.where(member == 0, q_norm_ptr, k_norm_ptr)
        weight = tl.load(weight_ptr + dims, mask=dim_mask, other=0.0).to(tl.float32)
        # in fp64, where the order of the sum does not show: the compiler lays the tile out otherwise beside adapters
        squares = tile.to(tl.float64) * tile.to(tl.float64)
        mean = tl.sum(squares, axis=1).to(tl.float32) / HEAD_DIM
        tile = scale_normed(tile, tl.rsqrt(mean + eps)[:, None], weight[None, :], dtype, CASTS_FIRST)
    return tile


@triton.jit
def _turn(low, high, member, cos_ptr, sin_ptr, rows, lanes, row_mask, TURN: tl.constexpr, dtype: tl.constexpr):
    """Rotate the turning dims of q and k: low * cos - high * sin, high * cos + low * sin; v is returned as it is.

    The halves of `cos` are equal and those of `sin` opposite, so only the second ones are read.
    """
    if member < 2:
        turns = (lanes < TURN)[None, :]
        cells = rows[:, None] * (2 * TURN) + (TURN + lanes)[None, :]
        cos = tl.load(cos_ptr + cells, mask=row_mask[:, None] & turns, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + cells, mask=row_mask[:, None] & turns, other=0.0).to(tl.float32)
        # the first product is rounded as torch's is
        turned_low = tl.fma(-high, sin, (low * cos).to(dtype).to(tl.float32))
        turned_high = tl.fma(low, sin, (high * cos).to(dtype).to(tl.float32))
        low, high = tl.where(turns, turned_low, low), tl.where(turns, turned_high, high)
    return low, high


@triton.jit(do_not_specialize=["num_slots", "first_site", "num_rows"])
def _qkv_sink_kernel(
    qkv_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    block_slot_ptr,
    block_start_ptr,
    block_len_ptr,
    perm_ptr,
    arena_ptr,
    ints_ptr,
    floats_ptr,
    x_ptr,
    base_bias_ptr,
    table_ptr,
    bridge_ptr,
    plane_stride,
    row_stride,
    rank_capacity,
    num_slots,
    first_site,
    in_dim,
    num_rows,
    num_heads,
    num_kv_heads,
    norm_eps,
    HEAD_DIM: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNUSED_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CASTS_FIRST: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    HAS_ADAPTERS: tl.constexpr,
    HAS_FAMILIES: tl.constexpr,
):
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    half: tl.constexpr = HEAD_DIM // 2
    block, head = tl.program_id(0), tl.program_id(1)
    if HAS_ADAPTERS:
        slot, rows, row_mask = load_block(block, block_slot_ptr, block_start_ptr, block_len_ptr, perm_ptr, BLOCK_ROWS)
        if slot == UNUSED_BLOCK:
            return
    else:
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < num_rows

    # q, k or v, and which of its heads
    member = (head >= num_heads).to(tl.int32) + (head >= num_heads + num_kv_heads).to(tl.int32)
    member_heads = tl.where(member == 0, num_heads, num_kv_heads)
    member_head = head - tl.where(member == 0, 0, num_heads + (member - 1) * num_kv_heads)

    half_lanes = tl.arange(0, BLOCK_HALF)
    lanes = tl.arange(0, 2 * BLOCK_HALF)
    dims = _head_dims(lanes // BLOCK_HALF, lanes % BLOCK_HALF, half, TURN)
    dim_mask = lanes % BLOCK_HALF < half
    cells = rows[:, None] * ((num_heads + 2 * num_kv_heads) * HEAD_DIM) + (head * HEAD_DIM + dims)[None, :]
    tile = tl.load(qkv_ptr + cells, mask=row_mask[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
    if HAS_ADAPTERS:
        tile = add_member(
            tile,
            (x_ptr, in_dim, base_bias_ptr, (head - member_head) * HEAD_DIM),
            (bridge_ptr, plane_stride, row_stride, rank_capacity),
            (arena_ptr, ints_ptr, floats_ptr),
            (table_ptr, num_slots, first_site),
            member,
            slot,
            (rows, row_mask, member_head * HEAD_DIM + dims, dim_mask, member_heads * HEAD_DIM),
            HAS_FAMILIES,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
        tile = tile.to(dtype).to(tl.float32)
    if HAS_NORM:
        tile = _norm_head(tile, member, q_norm_ptr, k_norm_ptr, dims, dim_mask, norm_eps, HEAD_DIM, dtype, CASTS_FIRST)
    low, high = tl.split(tl.permute(tl.reshape(tile, (BLOCK_ROWS, 2, BLOCK_HALF)), (0, 2, 1)))
    if HAS_ROTATION:
        low, high = _turn(low, high, member, cos_ptr, sin_ptr, rows, half_lanes, row_mask, TURN, dtype)

    out_ptr, out_rows = q_out_ptr, rows
    if member > 0:
        out_ptr = tl.where(member == 1, k_cache_ptr, v_cache_ptr)
        out_rows = tl.load(slot_mapping_ptr + rows, mask=row_mask, other=-1).to(tl.int64)
    out_mask = (row_mask & (out_rows >= 0))[:, None] & (half_lanes < half)[None, :]
    out_cells = (out_rows * member_heads + member_head)[:, None] * HEAD_DIM
    tl.store(out_ptr + out_cells + _head_dims(0, half_lanes, half, TURN)[None, :], low.to(dtype), mask=out_mask)
    tl.store(out_ptr + out_cells + _head_dims(1, half_lanes, half, TURN)[None, :], high.to(dtype), mask=out_mask)


def qkv_sink(
    qkv: Tensor,
    adapters: SiteAdapters | None,
    *,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: QkNormWeights | None,
    dims: QkvDims,
    config: LaunchConfig | None = None,
) -> None:
    """Finish a qkv projection: as `reference_sinks.qkv_sink`, the results where attention reads them.

    h[t] = qkv[t] + sum_j c[t, m, j] BT_m[j, :] + bias_m; q_out[t] = turn(norm(h_q)), and at cache row slot_mapping[t]:
    k_cache = turn(norm(h_k)), v_cache = h_v.

    Args:
        qkv: [T, (H + 2 K) * E] contiguous, E even. q_out: [T, H, E].
        k_cache, v_cache: [num_blocks, block_size, K, E]; slot_mapping: [T] int32, -1: the row is not written there.
        cos, sin: [T, rotary_dim] as `serve.model.rotary.Rotation` holds them, contiguous; None: no rotation.
        config: block_r (>= 16), num_warps, num_stages are used; narrow heads get more ranks, wide ones more warps.
    """
    num_rows, total_heads = qkv.shape[0], dims.num_heads + 2 * dims.num_kv_heads
    assert qkv.shape[1] == total_heads * dims.head_dim and dims.head_dim % 2 == 0, f"qkv of {qkv.shape} for {dims}"
    assert all(t.is_contiguous() for t in (qkv, q_out, k_cache, v_cache)), "heads must lie side by side"
    if num_rows == 0:
        return
    rotary_dim = dims.head_dim if cos is None else cos.shape[-1]
    route = None if adapters is None else adapters.route
    block_rows = block_rows_for(num_rows) if route is None else route.block_rows
    num_blocks = triton.cdiv(num_rows, block_rows) if route is None else route.num_blocks
    config = config or DEFAULT_QKV_SINK[block_rows]
    block_half = max(8, triton.next_power_of_2(dims.head_dim // 2))
    _qkv_sink_kernel[(num_blocks, total_heads)](
        qkv,
        q_out,
        k_cache,
        v_cache,
        slot_mapping,
        cos,
        sin,
        None if norm is None else norm.q_weight,
        None if norm is None else norm.k_weight,
        *adapter_arguments(adapters),
        num_rows,
        dims.num_heads,
        dims.num_kv_heads,
        0.0 if norm is None else norm.eps,
        HEAD_DIM=dims.head_dim,
        TURN=rotary_dim // 2,
        BLOCK_HALF=block_half,
        SPLITS=1 if adapters is None else adapters.num_splits,
        BLOCK_ROWS=block_rows,
        BLOCK_R=max(config.block_r, min(32, _MIN_RANK_TILE // (2 * block_half))),
        UNUSED_BLOCK=UNUSED,
        HAS_NORM=norm is not None,
        CASTS_FIRST=norm is not None and norm.cast_first,
        HAS_ROTATION=cos is not None,
        HAS_ADAPTERS=adapters is not None,
        HAS_FAMILIES=adapters is not None and adapters.families is not None,
        num_warps=config.num_warps * max(1, 2 * block_half // _MAX_LANES),
        num_stages=config.num_stages,
    )
