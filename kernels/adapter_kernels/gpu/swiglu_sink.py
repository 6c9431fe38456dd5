"""The gate of the MLP: act(gate) * up with the adapters' deltas of both added on the way, in one launch.

Owns the sink of the gate_up site: the expand happens on tiles that are read anyway, so it costs no launch and no
round trip. One program finishes one block of rows over one tile of columns. Invariant: rows without adapter get the
bits of a launch without adapters, in which no adapter code is compiled.
"""

from collections.abc import Mapping
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.activations import ACTIVATIONS, activate
from adapter_kernels.gpu.families import add_families
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.rank_rows import (
    add_bias,
    entry_pointer,
    load_block,
    load_entry,
    load_rank_tile,
    weigh_rank_tile,
)
from adapter_kernels.gpu.route import UNUSED
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.sink_arguments import adapter_arguments
from adapter_kernels.gpu.step import SiteAdapters

# by the route's rows per block; block_r * block_o is 16 bytes for each of 256 threads (4 warps of an MI300)
DEFAULT_SWIGLU_SINK: Mapping[int, LaunchConfig] = {
    1: LaunchConfig(block_r=16, block_o=128, num_warps=4, num_stages=2),
    16: LaunchConfig(block_r=16, block_o=128, num_warps=4, num_stages=2),
    # one stage: a second one costs 80 KiB of shared memory and hides nothing that other blocks do not
    64: LaunchConfig(block_r=16, block_o=128, num_warps=4, num_stages=1),
}
_LARGE_BLOCK = 64


@triton.jit
def _add_deltas(
    gate,
    up,
    bridge,
    arena_ptr,
    table,
    slot,
    tile,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return gate and up plus their deltas, or themselves where the block has no adapter.

    Both members' tiles are loaded before either is weighed, one wait on memory and not two; with 64 rows, where the
    registers do not suffice for that and more blocks than one wait at a time, one after the other.
    bridge: its pointer, strides of planes, rows and members. table: its pointer, slots, the site of gate. tile: rows
    and their mask, columns and their mask, width.
    """
    bridge_ptr, plane_stride, row_stride, rank_capacity = bridge
    table_ptr, num_slots, first_site = table
    rows, row_mask, columns, column_mask, width = tile
    if slot >= 0:
        _, gate_bt, gate_bias, gate_rank = load_entry(table_ptr, num_slots, first_site, slot)
        _, up_bt, up_bias, up_rank = load_entry(table_ptr, num_slots, first_site + 1, slot)
        for begin in range(0, tl.maximum(gate_rank, up_rank), BLOCK_R):
            gate_c, gate_rows = load_rank_tile(
                bridge_ptr,
                plane_stride,
                row_stride,
                arena_ptr,
                gate_bt,
                begin,
                gate_rank,
                rows,
                row_mask,
                columns,
                column_mask,
                width,
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
            if BLOCK_ROWS == 64:
                gate = weigh_rank_tile(gate, gate_c, gate_rows, BLOCK_ROWS)
            up_c, up_rows = load_rank_tile(
                bridge_ptr + rank_capacity,
                plane_stride,
                row_stride,
                arena_ptr,
                up_bt,
                begin,
                up_rank,
                rows,
                row_mask,
                columns,
                column_mask,
                width,
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
            if BLOCK_ROWS < 64:
                gate = weigh_rank_tile(gate, gate_c, gate_rows, BLOCK_ROWS)
            up = weigh_rank_tile(up, up_c, up_rows, BLOCK_ROWS)
        gate = add_bias(gate, arena_ptr, gate_bias, columns, column_mask)
        up = add_bias(up, arena_ptr, up_bias, columns, column_mask)
    return gate, up


@triton.jit(do_not_specialize=["num_slots", "first_site", "num_rows"])
def _swiglu_sink_kernel(
    gate_up_ptr,
    out_ptr,
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
    width,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    UNUSED_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ADAPTERS: tl.constexpr,
    HAS_FAMILIES: tl.constexpr,
):
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    block = tl.program_id(1)
    if HAS_ADAPTERS:
        slot, rows, row_mask = load_block(block, block_slot_ptr, block_start_ptr, block_len_ptr, perm_ptr, BLOCK_ROWS)
        if slot == UNUSED_BLOCK:
            return
    else:
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < num_rows
    columns = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column_mask = columns < width
    mask = row_mask[:, None] & column_mask[None, :]
    cells = rows[:, None] * (2 * width) + columns[None, :]
    gate = tl.load(gate_up_ptr + cells, mask=mask, other=0.0).to(tl.float32)
    if HAS_FAMILIES:
        if slot >= 0:
            gate = add_families(
                gate,
                (x_ptr, in_dim, base_bias_ptr, 0),
                (bridge_ptr, plane_stride, row_stride),
                (arena_ptr, ints_ptr, floats_ptr),
                entry_pointer(table_ptr, num_slots, first_site, slot),
                (rows, row_mask, columns, column_mask, width),
                True,
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
        # finished before the other is loaded: registers do not suffice for both in fp32
        gated = gate.to(dtype)
        up = tl.load(gate_up_ptr + width + cells, mask=mask, other=0.0).to(tl.float32)
        if slot >= 0:
            up = add_families(
                up,
                (x_ptr, in_dim, base_bias_ptr, width),
                (bridge_ptr + rank_capacity, plane_stride, row_stride),
                (arena_ptr, ints_ptr, floats_ptr),
                entry_pointer(table_ptr, num_slots, first_site + 1, slot),
                (rows, row_mask, columns, column_mask, width),
                True,
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
        gate, up = gated.to(tl.float32), up.to(dtype).to(tl.float32)
    else:
        up = tl.load(gate_up_ptr + width + cells, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADAPTERS:
            gate, up = _add_deltas(
                gate,
                up,
                (bridge_ptr, plane_stride, row_stride, rank_capacity),
                arena_ptr,
                (table_ptr, num_slots, first_site),
                slot,
                (rows, row_mask, columns, column_mask, width),
                SPLITS,
                BLOCK_ROWS,
                BLOCK_R,
            )
            gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    # the activation is rounded before the product, as the CPU path does
    gated = activate(gate, ACTIVATION).to(dtype).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], (gated * up).to(dtype), mask=mask)


def swiglu_sink(
    gate_up: Tensor,
    adapters: SiteAdapters | None,
    *,
    activation: str,
    out: Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """Gate the up projection, as `reference_sinks.swiglu_sink`.

    out[t] = act(g[t]) * u[t], where g, u = gate_up[t] + sum_j c[t, m, j] BT_m[j, :] + bias_m, m = 0 and 1.

    Args:
        gate_up: [T, 2 F] contiguous, gate | up side by side. out: [T, F].
        activation: one of `ACTIVATIONS`.
        config: block_o, block_r (>= 16), num_warps, num_stages are used.
    """
    num_rows, width = out.shape
    assert activation in ACTIVATIONS, f"activation is {activation!r}; there are {ACTIVATIONS}"
    assert gate_up.shape == (num_rows, 2 * width), f"gate_up of {tuple(gate_up.shape)} for out of {tuple(out.shape)}"
    assert gate_up.is_contiguous() and out.is_contiguous(), "rows must lie side by side"
    if num_rows == 0:
        return
    route = None if adapters is None else adapters.route
    block_rows = block_rows_for(num_rows) if route is None else route.block_rows
    num_blocks = triton.cdiv(num_rows, block_rows) if route is None else route.num_blocks
    config = config or DEFAULT_SWIGLU_SINK[block_rows]
    has_families = adapters is not None and adapters.families is not None
    if has_families and block_rows == _LARGE_BLOCK:
        # registers do not suffice for more
        config = replace(config, block_o=64, block_r=32)
    _swiglu_sink_kernel[(triton.cdiv(width, config.block_o), num_blocks)](
        gate_up,
        out,
        *adapter_arguments(adapters),
        num_rows,
        width,
        SPLITS=1 if adapters is None else adapters.num_splits,
        BLOCK_ROWS=block_rows,
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        UNUSED_BLOCK=UNUSED,
        ACTIVATION=activation,
        HAS_ADAPTERS=adapters is not None,
        HAS_FAMILIES=has_families,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
