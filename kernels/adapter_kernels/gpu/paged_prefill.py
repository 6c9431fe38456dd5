"""Attention of prefill chunks over the paged KV cache: tiles of query rows against tiles of positions.

Owns one kernel and its launcher. Launches: one. Invariant: a tile's result depends on its own chunk only; positions
after the tile's last row or before its first row's window are never loaded, and rows outside the chunks are not
written.
"""

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.attention_tiles import (
    NO_WINDOW,
    accumulate,
    cache_rows,
    load_rows,
    not_zero,
    scores_log2,
    within,
)
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.step import PrefillPart


def default_prefill(head_dim: int) -> LaunchConfig:
    """Tiles of 4096 elements (block_k positions of one head), at most 64 positions: next to nothing spills anywhere."""
    block_k = min(64, 4096 // triton.next_power_of_2(head_dim))
    return LaunchConfig(block_k=block_k, num_warps=8, num_stages=2)


# a window of 1 is no case of its own; `block_begins` begins behind those of the step's decodes, at any multiple of 4
# bytes, and must not be compiled anew in the middle of serving
@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["block_begins"])
def _paged_prefill_kernel(
    q,
    k_cache,
    v_cache,
    tile_seq,
    tile_row,
    row_begins,
    lengths,
    starts,
    block_begins,
    block_ids,
    out,
    scale,
    soft_cap,
    window,
    HAS_SOFT_CAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    head = tl.program_id(0)
    chunk = tl.load(tile_seq + tl.program_id(1))
    if chunk < 0:
        return
    first = tl.load(tile_row + tl.program_id(1))
    length = tl.load(lengths + chunk)
    start = tl.load(starts + chunk)
    table = block_ids + tl.load(block_begins + chunk)
    chunk_rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    in_tile = (chunk_rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    rows = tl.load(row_begins + chunk).to(tl.int64) + chunk_rows
    offsets = (rows * (NUM_KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + columns[None, :]
    queries = tl.load(q + offsets, mask=in_tile, other=0.0)
    own = start + chunk_rows
    begin = tl.maximum(start + first + 1 - window, 0)
    end = start + tl.minimum(first + BLOCK_M, length)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for n in range(begin // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        positions = n * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = within(positions, begin, end)
        cached = cache_rows(table, positions, valid, BLOCK_SIZE)
        k = load_rows(k_cache, cached, valid, head // GROUP, NUM_KV_HEADS, HEAD_DIM, BLOCK_E)
        v = load_rows(v_cache, cached, valid, head // GROUP, NUM_KV_HEADS, HEAD_DIM, BLOCK_E)
        scores = scores_log2(queries, k, scale, soft_cap, HAS_SOFT_CAP)
        # what a row sees is valid; rows behind the chunk's end see zeros and are not stored
        seen = within(own[:, None] - positions[None, :], 0, window)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, acc = accumulate(scores, v, top, total, acc)
    tl.store(out + offsets, (acc / not_zero(total)[:, None]).to(out.dtype.element_ty), mask=in_tile)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    part: PrefillPart,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: LaunchConfig | None = None,
) -> None:
    """Attend each row of the chunks to its own sequence's positions up to itself.

    out[t, h] = sum_p softmax_p(cap(scale * q[t, h] . k[p, h // (H / K)])) v[p, h // (H / K)], p in (pos - window, pos]
    for the row at position pos = start + row of its chunk, cap(x) = soft_cap * tanh(x / soft_cap); fp32 inside.

    Args:
        q: [T, H, E] contiguous: the whole step. out: as q; only rows of chunks are written.
        k_cache, v_cache: [num_blocks, block_size, K, E] contiguous, the chunks' own rows already written.
        window: positions a token sees, itself included; None: all. soft_cap: None: off.
        config: None: the default for this head dim.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    config = config or default_prefill(head_dim)
    assert q.is_contiguous() and out.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert num_heads % num_kv_heads == 0 and q.shape == out.shape, "shapes of q, out and caches"
    _paged_prefill_kernel[(num_heads, part.tile_seq.shape[0])](
        q,
        k_cache,
        v_cache,
        part.tile_seq,
        part.tile_row,
        part.row_begins,
        part.lengths,
        part.starts,
        part.block_begins,
        part.block_ids,
        out,
        scale,
        1.0 if soft_cap is None else soft_cap,
        NO_WINDOW if window is None else window,
        HAS_SOFT_CAP=soft_cap is not None,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=part.tile_rows,
        BLOCK_N=config.block_k,
        BLOCK_E=triton.next_power_of_2(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
