"""The device route: a step's rows grouped by adapter, built once per step and reused at every site.

Owns the grouping and its static buffers. Two forms, chosen by the number of rows alone: decode steps of few rows are
not grouped (block i IS row i, nothing is launched), others are counting-sorted on the device in one launch. Invariant:
every row, also one without adapter, is in exactly one block, and all rows of a block have the same adapter slot.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.gpu.route_forms import block_rows_for

# `block_slot` of a block that holds no rows (-1: its rows have no adapter; >= 0: their adapter slot)
UNUSED = -2
# rows and blocks that one program looks at at a time
_CHUNK = 1024
_BLOCK_CHUNK = 128


@dataclass(frozen=True, slots=True)
class DeviceRoute:
    """One step's row blocks.

    With `block_rows` 1, `block_slot` is `slots` itself and `perm`, `block_start`, `block_len` are never read.
    """

    # [T] int32: adapter slot per row, -1: none
    slots: Tensor
    # [T] int32: rows grouped by adapter, in their own order inside a group
    perm: Tensor
    # [C] int32 each; the block holds rows perm[start : start + len], 1 <= len <= block_rows (0 in an unused block)
    block_slot: Tensor
    block_start: Tensor
    block_len: Tensor
    # 1, 16 or 64
    block_rows: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks, unused ones included: what grids are sized by."""
        return self.block_slot.shape[0]


@dataclass(frozen=True, slots=True)
class RouteBuffers:
    """The static memory of routes; one step's route at a time lives in it."""

    # [max_rows] int32: filled per row by the caller (a part of the step's one host-to-device copy)
    slots: Tensor
    perm: Tensor
    block_slot: Tensor
    block_start: Tensor
    block_len: Tensor
    max_buckets: int

    @classmethod
    def build(cls, slots: Tensor, max_buckets: int) -> "RouteBuffers":
        """Allocate for steps of up to `slots.shape[0]` rows and `max_buckets` adapters, "no adapter" being one.

        Args:
            slots: [max_rows] int32 on the device, kept: the caller writes each row's adapter slot into it.
        """
        max_rows = slots.shape[0]
        num_blocks = max_rows + max_buckets
        perm, block_slot, block_start, block_len = (
            torch.zeros(size, dtype=torch.int32, device=slots.device)
            for size in (max_rows, num_blocks, num_blocks, num_blocks)
        )
        return cls(slots, perm, block_slot, block_start, block_len, max_buckets)


def block_capacity(num_rows: int, num_buckets: int, block_rows: int) -> int:
    """Return how many blocks suffice for any split of `num_rows` rows into `num_buckets` groups."""
    return num_rows if block_rows == 1 else -(-num_rows // block_rows) + min(num_rows, num_buckets)


@triton.jit(do_not_specialize=["num_rows", "num_buckets", "num_blocks"])
def _route_kernel(
    local_ptr,
    slot_of_ptr,
    perm_ptr,
    block_slot_ptr,
    block_start_ptr,
    block_len_ptr,
    num_rows,
    num_buckets,
    num_blocks,
    UNUSED_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
):
    bucket = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for begin in range(0, num_rows, CHUNK):
        rows = begin + lanes
        # lanes past the last row fall into the last bin, which no bucket uses
        counts += tl.histogram(tl.load(local_ptr + rows, mask=rows < num_rows, other=BINS - 1), BINS)
    counts = tl.where(bins < num_buckets, counts, 0)
    blocks = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    own_rows = tl.sum(tl.where(bins == bucket, counts, 0), axis=0)
    first_row = tl.sum(tl.where(bins < bucket, counts, 0), axis=0)
    own_blocks = tl.sum(tl.where(bins == bucket, blocks, 0), axis=0)
    first_block = tl.sum(tl.where(bins < bucket, blocks, 0), axis=0)

    if own_rows > 0:
        place = first_row
        for begin in range(0, num_rows, CHUNK):
            rows = begin + lanes
            is_own = tl.load(local_ptr + rows, mask=rows < num_rows, other=BINS - 1) == bucket
            own = is_own.to(tl.int32)
            tl.store(perm_ptr + place + tl.cumsum(own, axis=0) - 1, rows, mask=is_own)
            place += tl.sum(own, axis=0)
        slot = tl.load(slot_of_ptr + bucket)
        block_lanes = tl.arange(0, BLOCK_CHUNK)
        for begin in range(0, own_blocks, BLOCK_CHUNK):
            block = begin + block_lanes
            mask = block < own_blocks
            done = block * BLOCK_ROWS
            tl.store(block_slot_ptr + first_block + block, slot + tl.zeros_like(block), mask=mask)
            tl.store(block_start_ptr + first_block + block, first_row + done, mask=mask)
            tl.store(block_len_ptr + first_block + block, tl.minimum(own_rows - done, BLOCK_ROWS), mask=mask)

    if bucket == 0:
        used = tl.sum(blocks, axis=0)
        unused_lanes = tl.arange(0, BLOCK_CHUNK)
        for begin in range(0, num_blocks - used, BLOCK_CHUNK):
            block = used + begin + unused_lanes
            mask = block < num_blocks
            zero = tl.zeros_like(block)
            tl.store(block_slot_ptr + block, zero + UNUSED_BLOCK, mask=mask)
            tl.store(block_start_ptr + block, zero, mask=mask)
            tl.store(block_len_ptr + block, zero, mask=mask)


def build_route(local: Tensor, slot_of: Tensor, route: RouteBuffers, num_rows: int) -> DeviceRoute:
    """Group the step's rows by adapter: a stable counting sort in one launch, none for few rows.

    perm lists the rows with local == 0, then those with local == 1, ...; each group is cut into blocks of
    `block_rows_for(num_rows)` rows. One program per bucket of the step writes its own rows and blocks; no atomics.

    Args:
        local: [>= T] int32 on the device: 0 = no adapter, i = the i-th adapter of this step. Padding rows have 0.
        slot_of: [num_buckets] int32 on the device: adapter slot of each bucket, slot_of[0] = -1. Buckets may be empty;
            under a CUDA graph its length is that of the capture, never the number of resident adapters.
        route: static buffers; `route.slots[t]` is already slot_of[local[t]]. num_rows: T >= 1, padding rows included.
    Returns:
        Views of the buffers, valid until the next call. The ungrouped form reads `route.slots` only.
    """
    block_rows = block_rows_for(num_rows)
    slots = route.slots[:num_rows]
    if block_rows == 1:
        return DeviceRoute(slots, route.perm[:num_rows], slots, route.block_start, route.block_len, block_rows)
    num_buckets = slot_of.shape[0]
    assert num_buckets <= route.max_buckets, f"{num_buckets} buckets, made for {route.max_buckets}"
    num_blocks = block_capacity(num_rows, num_buckets, block_rows)
    _route_kernel[(num_buckets,)](
        local,
        slot_of,
        route.perm,
        route.block_slot,
        route.block_start,
        route.block_len,
        num_rows,
        num_buckets,
        num_blocks,
        UNUSED_BLOCK=UNUSED,
        BLOCK_ROWS=block_rows,
        # one more than the buckets: lanes past the last row need a bin
        BINS=max(16, triton.next_power_of_2(route.max_buckets + 1)),
        CHUNK=_CHUNK,
        BLOCK_CHUNK=_BLOCK_CHUNK,
    )
    return DeviceRoute(
        slots,
        route.perm[:num_rows],
        route.block_slot[:num_blocks],
        route.block_start[:num_blocks],
        route.block_len[:num_blocks],
        block_rows,
    )
