"""Compositions at one fused site on the device: host arrays to tensors, and the launches of serving, part by part.

Owns no expectation (those are `reference_composed`'s). Invariant: what no launch may read is NaN.
"""

from collections.abc import Sequence

import torch

from adapter_kernels.gpu.composed_rows import PairArrays, Weighted, spread
from adapter_kernels.gpu.route import DeviceRoute
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.step import ComposedPart


def part_of(arrays: PairArrays) -> ComposedPart:
    """Put one part's arrays where kernels read them."""
    slots, perm, block_slot, block_start, block_len = (
        torch.from_numpy(own)
        for own in (arrays.slots, arrays.perm, arrays.block_slot, arrays.block_start, arrays.block_len)
    )
    block_rows = block_rows_for(len(slots))
    route = DeviceRoute(slots, perm, slots if block_rows == 1 else block_slot, block_start, block_len, block_rows)
    return ComposedPart(
        route, torch.from_numpy(arrays.row_of), torch.from_numpy(arrays.weights), torch.from_numpy(arrays.blocks)
    )


def parts_of(rows: Sequence[Weighted], max_pairs: int) -> tuple[ComposedPart, ...]:
    """Spread a step's rows out, one sequence each; an empty one has no composition."""
    composed = [(row, 1, weighted) for row, weighted in enumerate(rows) if weighted]
    return tuple(part_of(arrays) for arrays in spread(composed, max_pairs))
