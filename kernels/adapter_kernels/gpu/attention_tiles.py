"""Pieces that both attention kernels are made of: where a position lies in the cache, and one turn of the softmax.

Owns device functions only, no launch. Invariant: a position that is not `valid` is neither loaded nor summed: its key
and value are read as 0 and its score is minus infinity, whatever the memory holds.
"""

import triton
import triton.language as tl

# window of a layer that sees everything: larger than any context, small enough for int32 differences
NO_WINDOW = 1 << 30
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def within(x, begin, end):
    """begin <= x < end for int32 with begin <= end, as one comparison: what is below wraps round to above."""
    return (x - begin).to(tl.uint32, bitcast=True) < (end - begin).to(tl.uint32, bitcast=True)


@triton.jit
def cache_rows(block_ids, positions, valid, BLOCK_SIZE: tl.constexpr):
    """Flat cache row of each position: block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE, int64."""
    ids = tl.load(block_ids + positions // BLOCK_SIZE, mask=valid, other=0)
    return ids.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_rows(cache, rows, valid, kv_head, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load cache[rows, kv_head, :] as [BLOCK_N, BLOCK_E], zero where not valid."""
    columns = tl.arange(0, BLOCK_E)
    pointers = cache + rows[:, None] * (NUM_KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + columns[None, :]
    if HEAD_DIM == BLOCK_E:
        # one predicate less per vector
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def scores_log2(q, k, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """Exponents of 2 in fp32: log2(e) * s with s = scale * (q . k), or with soft_cap * tanh(s / soft_cap).

    tanh(x) = sign(x) * (1 - e) / (1 + e) with e = exp(-2 |x|), which never overflows.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_SOFT_CAP:
        e = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / soft_cap))
        scores = tl.where(scores < 0, -soft_cap, soft_cap) * ((1.0 - e) / (1.0 + e))
    return scores * LOG2_E


@triton.jit
def accumulate(scores, v, top, total, acc):
    """One turn of the online softmax over a tile of scores: the new (top, total, acc), all fp32.

    A row that has seen no valid position yet keeps top = -inf, total = 0, acc = 0.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # -inf minus -inf is NaN
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc=acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def not_zero(total):
    """A sum of weights to divide by: 1 where nothing was summed, so that 0 / 0 becomes 0; NaN stays NaN."""
    return tl.where(total == 0.0, 1.0, total)
