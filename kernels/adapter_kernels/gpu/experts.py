"""Device functions for mixtures: where a bridge holds the gate's logits, who chooses whom, and the weighed sum.

Owns the top-k and the softmax, which every tile of outputs computes anew for its rows: a few logits each. Launches
nothing. Invariants: of equal logits the lower expert; what a row did not choose is selected away, never multiplied by
zero; a row with a logit that is no number is no number.
"""

import triton
import triton.language as tl

from adapter_kernels.gpu import tables
from adapter_kernels.gpu.rank_rows import weigh_rank_tile

# columns of a table entry
_BT = tl.constexpr(tables.BT)
_EXPERT_OF_RANK = tl.constexpr(tables.EXPERT_OF_RANK)
_CHOICE = tl.constexpr(tables.CHOICE)
_SEGMENT = tl.constexpr(tables.SEGMENT)
# logits looked at at a time
_EXPERT_LANES = tl.constexpr(16)


@triton.jit
def segment(count):
    """Return the columns of a bridge's row that `count` values take."""
    return (count + _SEGMENT - 1) // _SEGMENT * _SEGMENT


@triton.jit
def sum_planes(pointers, mask, plane_stride, SPLITS: tl.constexpr):
    """Return fp32 values of the bridge at any columns: split-K planes summed in order; 0 where masked."""
    total = tl.load(pointers, mask=mask, other=0.0)
    # left rolled: unrolled here, addresses spill on sm_80 and gfx942
    for split in tl.range(1, SPLITS, num_stages=1):
        total += tl.load(pointers + split * plane_stride, mask=mask, other=0.0)
    return total


@triton.jit
def _choose(
    logit_rows, row_mask, num_experts, top_k, temperature, plane_stride, SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Return (logit and expert of each row's last choice, largest logit, sum of exp), [BLOCK_ROWS] each.

    The `top_k` largest logits, of equal ones the lower expert: one pass per choice looks for what comes next in that
    order. A logit that is no number comes nowhere in it, and `_weigh` makes its row no number either.
    """
    logit = tl.full([BLOCK_ROWS], float("inf"), dtype=tl.float32)
    expert = tl.full([BLOCK_ROWS], -1, dtype=tl.int32)
    largest = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for turn in range(top_k):
        best = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
        best_expert = tl.zeros([BLOCK_ROWS], dtype=tl.int32) + num_experts
        for begin in tl.range(0, num_experts, _EXPERT_LANES, num_stages=1):
            experts = begin + tl.arange(0, _EXPERT_LANES)
            is_real = (experts < num_experts)[None, :]
            g = sum_planes(logit_rows + experts[None, :], row_mask[:, None] & is_real, plane_stride, SPLITS)
            follows = (g < logit[:, None]) | ((g == logit[:, None]) & (experts[None, :] > expert[:, None]))
            g = tl.where(is_real & follows, g, float("-inf"))
            top = tl.max(g, axis=1)
            is_top = is_real & follows & (g == top[:, None])
            top_expert = tl.min(tl.where(is_top, experts[None, :], num_experts), axis=1)
            # of equal ones the earlier stays
            is_better = (top > best) | ((top == best) & (top_expert < best_expert))
            best = tl.where(is_better, top, best)
            best_expert = tl.where(is_better, top_expert, best_expert)
        logit, expert = best, best_expert
        largest = tl.where(turn == 0, best, largest)
        total += tl.exp((best - largest) / temperature)
    return logit, expert, largest, total


@triton.jit
def add_mixture(
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
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return acc + sum over a row's chosen e, w_e * c_e @ BT_e: the bridge's columns weighed, unchosen ones not read.

    A rank's rows are read where at least one row of the block chose its expert.
    """
    dtype: tl.constexpr = arena_ptr.dtype.element_ty
    choice = tl.load(entry + _CHOICE)
    temperature = (choice & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    logit_rows = c_rows + segment(rank)
    last_logit, last_expert, largest, total = _choose(
        logit_rows, row_mask, num_experts, (choice >> 32).to(tl.int32), temperature, plane_stride, SPLITS, BLOCK_ROWS
    )
    bt_offset = tl.multiple_of(tl.load(entry + _BT), 32)
    list_ptr = ints_ptr + tl.load(entry + _EXPERT_OF_RANK)
    for begin in range(0, rank, BLOCK_R):
        ranks = begin + tl.arange(0, BLOCK_R)
        is_rank = ranks < rank
        experts = tl.load(list_ptr + ranks, mask=is_rank, other=0)[None, :]
        is_real = row_mask[:, None] & is_rank[None, :]
        g = sum_planes(logit_rows + experts, is_real, plane_stride, SPLITS)
        comes_after = (g < last_logit[:, None]) | ((g == last_logit[:, None]) & (experts > last_expert[:, None]))
        is_chosen = is_real & (comes_after == 0)
        weight = tl.exp((g - largest[:, None]) / temperature) / total[:, None]
        c = sum_planes(c_rows + ranks[None, :], is_chosen, plane_stride, SPLITS)
        c = tl.where(is_chosen, c * weight, 0.0).to(dtype)
        is_read = tl.max(is_chosen.to(tl.int32), axis=0) > 0
        offsets = bt_offset + ranks[:, None].to(tl.int64) * width + columns[None, :]
        rank_rows = tl.load(arena_ptr + offsets, mask=is_read[:, None] & column_mask[None, :], other=0.0)
        acc = weigh_tile(acc, c, rank_rows, BLOCK_ROWS)
    return acc


@triton.jit
def weigh_tile(acc, c, rank_rows, BLOCK_ROWS: tl.constexpr):
    """Return acc + c @ rank rows, for c [BLOCK_ROWS, BLOCK_R] also where BLOCK_ROWS is 1."""
    if BLOCK_ROWS == 1:
        return weigh_rank_tile(acc, tl.sum(c, axis=0), rank_rows, BLOCK_ROWS)
    else:
        return weigh_rank_tile(acc, c, rank_rows, BLOCK_ROWS)
