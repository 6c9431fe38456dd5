"""Scale a layer's input for the rows whose adapter asks for it, before the base's product: IA3's in_scale.

Owns the one launch that copies x with those rows scaled; launched only at sites where an adapter of the step scales.
Invariant: a row without in_scale is copied bit by bit, so the base's product of it keeps its bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.rank_rows import entry_pointer
from adapter_kernels.gpu.tables import IN_SCALE, DeviceTables

_BLOCK_COLUMNS = 1024
_IN_SCALE = tl.constexpr(IN_SCALE)


@triton.jit(do_not_specialize=["num_slots", "site"])
def _scale_input_kernel(
    x_ptr, out_ptr, slots_ptr, table_ptr, floats_ptr, num_slots, site, in_dim, BLOCK_COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < in_dim
    x = tl.load(x_ptr + row * in_dim + columns, mask=mask, other=0.0)
    slot = tl.load(slots_ptr + row)
    offset = tl.cast(-1, tl.int64)
    if slot >= 0:
        offset = tl.load(entry_pointer(table_ptr, num_slots, site, slot) + _IN_SCALE)
    if offset >= 0:
        scale = tl.load(floats_ptr + offset + columns, mask=mask, other=1.0)
        x = (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * in_dim + columns, x, mask=mask)


def scale_input(x: Tensor, tables: DeviceTables, site: int, slots: Tensor, out: Tensor) -> None:
    """Copy x to `out`: out[t] = in_scale * x[t] in fp32, rounded once, where the row's adapter has one; else x[t].

    Args:
        x, out: [T, D] contiguous. site: table index of one base-neutral site. slots: [T] int32, -1: no adapter.
    """
    num_rows, in_dim = x.shape
    assert x.is_contiguous() and out.is_contiguous() and x.shape == out.shape, "rows must lie side by side"
    if num_rows == 0:
        return
    _scale_input_kernel[(num_rows, triton.cdiv(in_dim, _BLOCK_COLUMNS))](
        x,
        out,
        slots,
        tables.rows,
        tables.floats,
        tables.num_slots,
        site,
        in_dim,
        BLOCK_COLUMNS=_BLOCK_COLUMNS,
    )
