"""Compose: add what several adapters do to one row, each with its weight, to the base's product, in one launch a site.

Owns the kernel that runs on the main stream between the base's GEMM and the op that reads it, in steps that hold
compositions and nowhere else; which rows meet which adapters is `composed_rows`'. Invariants: a program's rows share
one composition, so what an adapter breaks is lost for the rows that name it alone; every row is read and written by
one program, so it is rounded once, however many adapters it has; rows without composition are not touched.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.composed_rows import BLOCK_COLUMNS
from adapter_kernels.gpu.expand import MAX_MEMBERS, member_of
from adapter_kernels.gpu.families import add_families, scale_output
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.rank_rows import entry_pointer
from adapter_kernels.gpu.step import ComposedPart, SiteAdapters
from adapter_kernels.gpu.tables import IN_SCALE, OUT_SCALE

# by the route's rows per block; two tiles of sums are held at a time, the row's and one adapter's
DEFAULT_COMPOSE: Mapping[int, LaunchConfig] = {
    1: LaunchConfig(block_r=16, block_o=256, num_warps=4, num_stages=1),
    16: LaunchConfig(block_r=16, block_o=256, num_warps=4, num_stages=1),
    64: LaunchConfig(block_r=32, block_o=64, num_warps=4, num_stages=1),
}
_BLOCK_COLUMNS = tl.constexpr(BLOCK_COLUMNS)
_OUT_SCALE = tl.constexpr(OUT_SCALE)
_IN_SCALE = tl.constexpr(IN_SCALE)


@triton.jit
def _scaled_change(y, mask, base, product, floats_ptr, entry, columns, column_mask):
    """Return what an adapter's scales change of the base's output: zeros where it has none.

    b + out_scale * (product - b) - y, with the product of the scaled input, or y itself where the adapter scales none.
    """
    base_bias_ptr, base_begin = base
    product_ptr, products = product
    out_scale = tl.load(entry + _OUT_SCALE)
    in_scale = tl.load(entry + _IN_SCALE)
    # read again and not kept: a tile held through all adapters costs its registers
    before = tl.load(y, mask=mask & ((out_scale >= 0) | (in_scale >= 0)), other=0.0).to(tl.float32)
    after = before
    if product_ptr is not None:
        own = tl.load(product_ptr + products, mask=mask & (in_scale >= 0), other=0.0).to(tl.float32)
        after = tl.where(in_scale >= 0, own, before)
    after = scale_output(after, base_bias_ptr, base_begin, floats_ptr, out_scale, columns, column_mask)
    # zeros where nothing is scaled: `before` was not read, and `scale_output` left it as it was
    return after - before


@triton.jit(do_not_specialize=["first_site", "num_slots"])
def _compose_kernel(
    bridge_ptr,
    arena_ptr,
    ints_ptr,
    floats_ptr,
    x_ptr,
    base_bias_ptr,
    product_ptr,
    table_ptr,
    blocks_ptr,
    row_of_ptr,
    slots_ptr,
    weights_ptr,
    y_ptr,
    num_slots,
    first_site,
    width_0,
    width_1,
    width_2,
    in_dim,
    y_stride,
    plane_stride,
    row_stride,
    rank_capacity,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block = blocks_ptr + tl.program_id(1) * _BLOCK_COLUMNS
    first = tl.load(block)
    stride = tl.load(block + 2)
    num_adapters = tl.load(block + 3)
    lanes = tl.arange(0, BLOCK_ROWS)
    row_mask = lanes < tl.load(block + 1)
    member, tile, width, out_begin = member_of(tl.program_id(0), width_0, width_1, width_2, BLOCK_O)
    columns = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    column_mask = columns < width
    mask = row_mask[:, None] & column_mask[None, :]
    rows = tl.load(row_of_ptr + first + lanes, mask=row_mask, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_ROWS, BLOCK_O], dtype=tl.float32)
    for turn in tl.range(0, num_adapters, num_stages=1):
        begin = first + turn * stride
        pairs = (begin + lanes).to(tl.int64)
        entry = entry_pointer(table_ptr, num_slots, first_site + member, tl.load(slots_ptr + begin))
        products = pairs[:, None] * y_stride + out_begin + columns[None, :]
        change = _scaled_change(
            y_ptr + rows[:, None] * y_stride + out_begin + columns[None, :],
            mask,
            (base_bias_ptr, out_begin),
            (product_ptr, products),
            floats_ptr,
            entry,
            columns,
            column_mask,
        )
        change = add_families(
            change,
            (x_ptr, in_dim, base_bias_ptr, out_begin),
            (bridge_ptr + member * rank_capacity, plane_stride, row_stride),
            (arena_ptr, ints_ptr, floats_ptr),
            entry,
            (pairs, row_mask, columns, column_mask, width),
            False,
            SPLITS,
            BLOCK_ROWS,
            BLOCK_R,
        )
        total += tl.load(weights_ptr + begin) * change
    # addresses after the sums, so that no registers hold them meanwhile
    y = y_ptr + rows[:, None] * y_stride + out_begin + columns[None, :]
    total += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)


def compose(
    pairs: SiteAdapters,
    part: ComposedPart,
    widths: tuple[int, ...],
    products: Tensor | None,
    y: Tensor,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """Add to each composed row of y what its adapters do at every member of a fused site, in one launch.

    y[t] += sum_i w_i (y_i[t] - y[t]), y_i[t] the site's output with adapter i alone: the sum in fp32, rounded once.

    Args:
        pairs: the shrink's bridge over the part's pairs of a row and an adapter; `families` with their inputs.
        part: rows, weights and blocks of these pairs.
        widths: output columns of each member, at most three; they lie side by side in y.
        products: [P, sum of widths] contiguous, y's dtype: the base's product of each pair's scaled input, its bias in
            it, filled at least where the pair's adapter scales the input of a member; None: no adapter here does.
        y: [T, sum of widths] contiguous, the base's output; changed in place.
        config: block_o, block_r (>= 16), num_warps, num_stages are used.
    """
    assert pairs.families is not None, "compositions run in the form for all families"
    assert y.is_contiguous() and y.shape[1] == sum(widths), f"y has shape {tuple(y.shape)} for widths {widths}"
    assert products is None or (products.is_contiguous() and products.shape[1] == y.shape[1]), "products lie as y does"
    tables, bridge, families = pairs.tables, pairs.bridge, pairs.families
    config = config or DEFAULT_COMPOSE[part.route.block_rows]
    num_tiles = sum(-(-width // config.block_o) for width in widths)
    _compose_kernel[(num_tiles, part.blocks.shape[0])](
        bridge,
        tables.arena,
        tables.ints,
        tables.floats,
        families.x,
        families.base_bias,
        products,
        tables.rows,
        part.blocks,
        part.row_of,
        part.route.slots,
        part.weights,
        y,
        tables.num_slots,
        pairs.first_site,
        *widths,
        *(0,) * (MAX_MEMBERS - len(widths)),
        families.x.shape[1],
        y.stride(0),
        bridge.stride(0),
        bridge.stride(1),
        bridge.stride(2),
        SPLITS=pairs.num_splits,
        BLOCK_ROWS=part.route.block_rows,
        BLOCK_O=config.block_o,
        # a tile wider than any rank would only be masked
        BLOCK_R=min(config.block_r, bridge.shape[3]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
