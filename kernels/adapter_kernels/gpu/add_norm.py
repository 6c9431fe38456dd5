"""The end of a block and the start of the next: delta, norm after, residual add, norm before, in one pass over a row.

Owns the sink of o_proj and down_proj, and the first norm of the decoder. Invariant: a row whose adapter lacks the
site, or that has none, never reads the delta buffer and gets the bits of a launch without adapters.
"""

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu import tables
from adapter_kernels.gpu.families import scale_output
from adapter_kernels.gpu.norm import scale_normed
from adapter_kernels.gpu.rank_rows import ENTRY
from adapter_kernels.gpu.sink_inputs import DeltaInput, NormWeights

MAX_WIDTH = 16384
# one thread holds 8 values, a 16-byte vector in 16-bit dtypes
_VALUES_PER_WARP = 256
_MAX_WARPS = 16
# columns of a table entry
_BIAS = tl.constexpr(tables.BIAS)
_RANK = tl.constexpr(tables.RANK)
_NUM_COLS = tl.constexpr(tables.NUM_COLS)
_NUM_ROWS = tl.constexpr(tables.NUM_ROWS)
_OUT_SCALE = tl.constexpr(tables.OUT_SCALE)


@triton.jit
def _normed_row(x, weight_ptr, columns, is_column, num_columns, eps, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / num_columns + eps)
    return scale_normed(x, inverse_rms, weight, dtype, CAST_FIRST)


@triton.jit
def _add_delta(
    h,
    delta_ptr,
    rows_ptr,
    slots_ptr,
    floats_ptr,
    base_bias_ptr,
    site_row,
    row,
    columns,
    is_column,
    num_columns,
    dtype: tl.constexpr,
    HAS_FAMILIES: tl.constexpr,
):
    """Scale the row's `h` and add its delta, as far as its adapter does so at the site; else return `h` as it is."""
    slot = tl.load(slots_ptr + row).to(tl.int64)
    has_adapter = slot >= 0
    entry = rows_ptr + (site_row + slot) * ENTRY
    bias_offset = tl.load(entry + _BIAS, mask=has_adapter, other=-1)
    rank = tl.load(entry + _RANK, mask=has_adapter, other=0)
    acts = (rank > 0) | (bias_offset >= 0)
    changed = acts
    scaled = h
    if HAS_FAMILIES:
        acts |= tl.load(entry + _NUM_COLS, mask=has_adapter, other=0) > 0
        acts |= tl.load(entry + _NUM_ROWS, mask=has_adapter, other=0) > 0
        scale_offset = tl.load(entry + _OUT_SCALE, mask=has_adapter, other=-1)
        scaled = scale_output(h, base_bias_ptr, 0, floats_ptr, scale_offset, columns, is_column)
        changed = acts | (scale_offset >= 0)
    # where it does not act the buffer may hold NaN
    delta = tl.load(delta_ptr + row * num_columns + columns, mask=is_column & acts, other=0.0).to(tl.float32)
    return tl.where(changed, (scaled + delta).to(dtype).to(tl.float32), h)


@triton.jit(do_not_specialize=["site_row"])
def _add_norm_kernel(
    x_ptr,
    h_ptr,
    delta_ptr,
    rows_ptr,
    slots_ptr,
    floats_ptr,
    base_bias_ptr,
    after_ptr,
    before_ptr,
    x_out_ptr,
    normed_ptr,
    site_row,
    num_columns,
    residual_scale,
    after_eps,
    before_eps,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_BLOCK: tl.constexpr,
    HAS_ADAPTERS: tl.constexpr,
    HAS_FAMILIES: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    AFTER_CASTS_FIRST: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    BEFORE_CASTS_FIRST: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < num_columns
    cells = row * num_columns + columns
    x = tl.load(x_ptr + cells, mask=is_column, other=0.0).to(tl.float32)
    if HAS_BLOCK:
        h = tl.load(h_ptr + cells, mask=is_column, other=0.0).to(tl.float32)
        if HAS_ADAPTERS:
            h = _add_delta(
                h,
                delta_ptr,
                rows_ptr,
                slots_ptr,
                floats_ptr,
                base_bias_ptr,
                site_row,
                row,
                columns,
                is_column,
                num_columns,
                dtype,
                HAS_FAMILIES,
            )
        if HAS_AFTER:
            h = _normed_row(h, after_ptr, columns, is_column, num_columns, after_eps, dtype, AFTER_CASTS_FIRST)
        x = (x + residual_scale * h).to(dtype).to(tl.float32)
        tl.store(x_out_ptr + cells, x.to(dtype), mask=is_column)
    if HAS_BEFORE:
        normed = _normed_row(x, before_ptr, columns, is_column, num_columns, before_eps, dtype, BEFORE_CASTS_FIRST)
        tl.store(normed_ptr + cells, normed.to(dtype), mask=is_column)


def add_norm(
    x: Tensor,
    h: Tensor | None,
    *,
    delta: DeltaInput | None = None,
    residual_scale: float = 1.0,
    after: NormWeights | None = None,
    before: NormWeights | None = None,
    x_out: Tensor | None = None,
    normed: Tensor | None = None,
) -> None:
    """Add a block's output to the residual stream and norm the sum for the next block; as `reference_sinks.add_norm`.

    x_out[t] = x[t] + residual_scale * after(h[t] + delta[t]); normed[t] = before(x_out[t]). Without `h` only
    normed[t] = before(x[t]). The delta counts where the row's adapter adds something at the site; with families h[t] is
    b + out_scale * (h[t] - b) first, b the base's bias, where its adapter has that scale.

    Args:
        x, h: [T, D] contiguous, D <= 16384.
        x_out: [T, D], needed with `h`; may be `x` itself. normed: [T, D], needed with `before`.
    """
    num_rows, width = x.shape
    assert width <= MAX_WIDTH, f"hidden size {width} does not fit one program (up to {MAX_WIDTH})"
    assert (h is None) == (x_out is None) and (before is None) == (normed is None), "an output without its input"
    assert all(t is None or t.is_contiguous() for t in (x, h, x_out, normed)), "rows must lie side by side"
    if num_rows == 0:
        return
    block_columns = triton.next_power_of_2(width)
    families = None if delta is None else delta.families
    _add_norm_kernel[(num_rows,)](
        x,
        h,
        None if delta is None else delta.delta,
        None if delta is None else delta.tables.rows,
        None if delta is None else delta.slots,
        None if delta is None or families is None else delta.tables.floats,
        None if families is None else families.base_bias,
        None if after is None else after.weight,
        None if before is None else before.weight,
        x_out,
        normed,
        0 if delta is None else delta.site * delta.tables.rows.shape[1],
        width,
        residual_scale,
        0.0 if after is None else after.eps,
        0.0 if before is None else before.eps,
        BLOCK_COLUMNS=block_columns,
        HAS_BLOCK=h is not None,
        HAS_ADAPTERS=delta is not None,
        HAS_FAMILIES=families is not None,
        HAS_AFTER=after is not None,
        AFTER_CASTS_FIRST=after is not None and after.cast_first,
        HAS_BEFORE=before is not None,
        BEFORE_CASTS_FIRST=before is not None and before.cast_first,
        num_warps=min(_MAX_WARPS, max(1, block_columns // _VALUES_PER_WARP)),
    )
