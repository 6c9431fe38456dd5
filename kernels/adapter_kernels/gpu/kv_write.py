"""The write of new keys and values into the paged cache where no sink does it.

Owns one kernel and its launcher. Launches: one. Invariant: a row of slot -1 is neither read nor written.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 4
_MAX_COLUMNS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _kv_write_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    num_rows,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    slots = tl.load(slot_mapping + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    mask = (slots >= 0)[:, None] & (columns < WIDTH)[None, :]
    places = slots[:, None] * WIDTH + columns[None, :]
    keys = tl.load(k + rows[:, None] * k_stride + columns[None, :], mask=mask, other=0.0)
    tl.store(k_cache + places, keys, mask=mask)
    values = tl.load(v + rows[:, None] * v_stride + columns[None, :], mask=mask, other=0.0)
    tl.store(v_cache + places, values, mask=mask)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys and values into their cache rows, in place.

    k_cache.view(-1, K, E)[slot_mapping[t]] = k[t] where slot_mapping[t] >= 0, the same for v.

    Args:
        k, v: [T, K, E]; a row's K * E elements are contiguous, rows may lie apart (slices of the fused projection).
        k_cache, v_cache: [num_blocks, block_size, K, E] contiguous, dtype of k.
        slot_mapping: [T] int32; -1: padding; no other value twice.
    """
    num_rows, num_heads, head_dim = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), "heads of a row must be contiguous"
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and v.shape == k.shape
    width = num_heads * head_dim
    block_columns = min(_MAX_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(num_rows, _BLOCK_ROWS), triton.cdiv(width, block_columns))
    _kv_write_kernel[grid](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        num_rows,
        k.stride(0),
        v.stride(0),
        WIDTH=width,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )
