"""Attention of decoding sequences over the paged KV cache: split over the context, then combined.

Owns two kernels and the workspace between them. Launches: one when the workspace has a single split, else two.
Invariant: where a sequence is split depends on its own context and the window only, so its result has the same bits
alone and beside any neighbours; the grid decides merely which program walks which split.
"""

from dataclasses import dataclass

import torch
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
from adapter_kernels.gpu.step import DecodePart

# programs that keep a large device busy; with more sequences than that each program walks several splits
_TARGET_PROGRAMS = 2048
# rows of the smallest `tl.dot`
_MIN_DOT_ROWS = 16


def default_decode(head_dim: int) -> LaunchConfig:
    """Tiles of 8192 elements (block_k positions of one head), at most 64 positions: no target spills or overflows."""
    block_k = min(64, 8192 // triton.next_power_of_2(head_dim))
    return LaunchConfig(block_k=block_k, num_warps=4, num_stages=3)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Partial results of the splits; made once, never cleared: the combine reads only what the step wrote."""

    # [S, H, num_splits] fp32: maximum of the exponents, sum of the weights
    tops: Tensor
    totals: Tensor
    # [S, H, num_splits, E] fp32
    partials: Tensor
    num_splits: int
    # a split covers at least so many positions: short contexts are not torn apart
    min_split_positions: int

    @classmethod
    def build(
        cls,
        max_seqs: int,
        num_heads: int,
        head_dim: int,
        device: torch.device,
        *,
        num_splits: int = 16,
        min_split_positions: int = 256,
    ) -> "DecodeWorkspace":
        """Allocate for up to `max_seqs` sequences; nothing is needed between kernels when there is one split."""
        shape = (max_seqs, num_heads, num_splits) if num_splits > 1 else (0, num_heads, 1)
        return cls(
            tops=torch.empty(shape, dtype=torch.float32, device=device),
            totals=torch.empty(shape, dtype=torch.float32, device=device),
            partials=torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
            num_splits=num_splits,
            min_split_positions=min_split_positions,
        )


@triton.jit
def _plan_splits(context, window, min_tiles, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Tiles of BLOCK_N positions that a sequence attends: first tile, end tile, tiles per split."""
    first_tile = tl.maximum(context - window, 0) // BLOCK_N
    end_tile = tl.cdiv(context, BLOCK_N)
    return first_tile, end_tile, tl.maximum(tl.cdiv(end_tile - first_tile, NUM_SPLITS), min_tiles)


@triton.jit
def _paged_decode_kernel(
    q,
    k_cache,
    v_cache,
    context_lens,
    block_begins,
    block_ids,
    out,
    tops,
    totals,
    partials,
    scale,
    soft_cap,
    window,
    min_tiles,
    HAS_SOFT_CAP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    context = tl.load(context_lens + seq)
    first_tile, end_tile, split_tiles = _plan_splits(context, window, min_tiles, BLOCK_N, NUM_SPLITS)
    num_splits = tl.cdiv(end_tile - first_tile, split_tiles)
    if NUM_SPLITS == 1:
        # a padding row has no tile, yet its output is written: zeros
        num_splits = 1
    heads = kv_head * GROUP + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    is_head = tl.arange(0, BLOCK_M) < GROUP
    in_tile = is_head[:, None] & (columns < HEAD_DIM)[None, :]
    head_rows = seq * (NUM_KV_HEADS * GROUP) + heads
    queries = tl.load(q + head_rows[:, None] * HEAD_DIM + columns[None, :], mask=in_tile, other=0.0)
    table = block_ids + tl.load(block_begins + seq)
    begin = tl.maximum(context - window, 0)
    for split in range(tl.program_id(2), num_splits, tl.num_programs(2)):
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        tile = first_tile + split * split_tiles
        for n in range(tile, tl.minimum(tile + split_tiles, end_tile)):
            positions = n * BLOCK_N + tl.arange(0, BLOCK_N)
            valid = within(positions, begin, context)
            rows = cache_rows(table, positions, valid, BLOCK_SIZE)
            k = load_rows(k_cache, rows, valid, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_E)
            v = load_rows(v_cache, rows, valid, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_E)
            scores = scores_log2(queries, k, scale, soft_cap, HAS_SOFT_CAP)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            top, total, acc = accumulate(scores, v, top, total, acc)
        if NUM_SPLITS == 1:
            result = acc / not_zero(total)[:, None]
            pointers = out + head_rows[:, None] * HEAD_DIM + columns[None, :]
            tl.store(pointers, result.to(out.dtype.element_ty), mask=in_tile)
        else:
            places = head_rows * NUM_SPLITS + split
            tl.store(tops + places, top, mask=is_head)
            tl.store(totals + places, total, mask=is_head)
            tl.store(partials + places[:, None] * HEAD_DIM + columns[None, :], acc, mask=in_tile)


@triton.jit
def _combine_kernel(
    tops,
    totals,
    partials,
    context_lens,
    out,
    window,
    min_tiles,
    NUM_SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head_row = seq * NUM_HEADS + tl.program_id(1)
    context = tl.load(context_lens + seq)
    first_tile, end_tile, split_tiles = _plan_splits(context, window, min_tiles, BLOCK_N, NUM_SPLITS)
    splits = tl.arange(0, BLOCK_SPLITS)
    columns = tl.arange(0, BLOCK_E)
    # splits beyond these hold what an earlier step left
    written = splits < tl.cdiv(end_tile - first_tile, split_tiles)
    places = head_row * NUM_SPLITS + splits
    top = tl.load(tops + places, mask=written, other=float("-inf"))
    total = tl.load(totals + places, mask=written, other=0.0)
    in_tile = written[:, None] & (columns < HEAD_DIM)[None, :]
    partial = tl.load(partials + places[:, None] * HEAD_DIM + columns[None, :], mask=in_tile, other=0.0)
    # context 0: no split was written, every weight is exp2(-inf) = 0
    largest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(largest == float("-inf"), 0.0, largest))
    result = tl.sum(partial * weight[:, None], 0) / not_zero(tl.sum(total * weight, 0))
    tl.store(out + head_row * HEAD_DIM + columns, result.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    part: DecodePart,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    workspace: DecodeWorkspace,
    config: LaunchConfig | None = None,
) -> None:
    """Attend one token of each sequence to the sequence's positions; rows of context 0 become zeros.

    out[s, h] = sum_p softmax_p(cap(scale * q[s, h] . k[p, h // (H / K)])) v[p, h // (H / K)],
    p in [max(0, context[s] - window), context[s]), cap(x) = soft_cap * tanh(x / soft_cap); fp32 inside.

    Args:
        q: [>= S, H, E] contiguous; rows from S on are not read.
        k_cache, v_cache: [num_blocks, block_size, K, E] contiguous, same dtype, the new tokens already written.
        out: as q, q's dtype; rows 0 .. S - 1 are written.
        window: positions a token sees, itself included; None: all. soft_cap: None: off.
        workspace: for at least S sequences unless it has one split.
        config: None: the default for this head dim.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_seqs, num_splits = part.num_seqs, workspace.num_splits
    assert q.is_contiguous() and out.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert num_heads % num_kv_heads == 0 and min(q.shape[0], out.shape[0]) >= num_seqs, "shapes of q, out and caches"
    assert num_splits == 1 or workspace.partials.shape[0] >= num_seqs, "the workspace is too small"
    config = config or default_decode(head_dim)
    group = num_heads // num_kv_heads
    block_e = triton.next_power_of_2(head_dim)
    visible = NO_WINDOW if window is None else window
    min_tiles = -(-workspace.min_split_positions // config.block_k)
    grid_splits = min(num_splits, max(1, _TARGET_PROGRAMS // max(1, num_seqs * num_kv_heads)))
    _paged_decode_kernel[(num_seqs, num_kv_heads, grid_splits)](
        q,
        k_cache,
        v_cache,
        part.context_lens,
        part.block_begins,
        part.block_ids,
        out,
        workspace.tops,
        workspace.totals,
        workspace.partials,
        scale,
        1.0 if soft_cap is None else soft_cap,
        visible,
        min_tiles,
        HAS_SOFT_CAP=soft_cap is not None,
        NUM_SPLITS=num_splits,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_N=config.block_k,
        BLOCK_E=block_e,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_splits == 1:
        return
    _combine_kernel[(num_seqs, num_heads)](
        workspace.tops,
        workspace.totals,
        workspace.partials,
        part.context_lens,
        out,
        visible,
        min_tiles,
        NUM_SPLITS=num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_N=config.block_k,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_E=block_e,
        num_warps=2,
    )
