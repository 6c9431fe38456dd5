"""StepPlan to tensors: ids, positions, slot mapping and the adapter route, in the row order that the kernels want.

Owns the order: rows without adapter first, then by where their adapter lies, so that each adapter's rows are
neighbours and groups are slices. Invariant: results are mapped back by row, so the plan never sees the order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import AdapterDelta
from adapter_kernels.route import Placement, build_route
from serve.engine.plan import Row, StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tensors. `rows[i]` runs at token rows `begins[i] .. begins[i + 1]`."""

    rows: list[Row]
    begins: list[int]
    token_ids: Tensor
    attention: AttentionPlan
    adapters: AdapterDelta | None


def build_batch(plan: StepPlan, block_size: int, placement: Callable[[int], Placement]) -> StepBatch:
    """Build the tensors of a step.

    Args:
        placement: where a loaded adapter slot lies.
    """
    places = {slot: placement(slot) for slot in plan.slot_digests}
    rows = sorted(plan.rows, key=lambda row: _place_order(row, places))
    counts = [len(row.token_ids) for row in rows]
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    own = [None if row.adapter_slot is None else places[row.adapter_slot] for row in rows]
    route = build_route(own, counts)
    return StepBatch(
        rows=rows,
        begins=begins,
        token_ids=torch.tensor([token for row in rows for token in row.token_ids], dtype=torch.int64),
        attention=AttentionPlan.build(
            [row.start for row in rows], counts, [row.block_table for row in rows], block_size
        ),
        adapters=CpuDelta(route) if any(place is not None for place in own) else None,
    )


def _place_order(row: Row, places: dict[int, Placement]) -> tuple[int, int]:
    if row.adapter_slot is None:
        return (-1, 0)
    place = places[row.adapter_slot]
    return (place.slab_id, place.position)
