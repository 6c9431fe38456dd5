"""StepPlan to tensors: ids, positions, slot mapping and the adapter route, in the row order that the kernels want.

Owns the order: rows without adapter first, then adapters with many rows, then the others by where they lie, so that
each adapter's rows are neighbours and groups are slices that no long run cuts in two; composed rows come last.
Invariant: results are mapped back by row, so the plan never sees the order.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.composed import ComposedDelta, build_passes
from adapter_kernels.composed_model import ComposedModelDelta
from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import AdapterDelta
from adapter_kernels.model_delta import CpuModelDelta
from adapter_kernels.native_cpu import cpu_kernels
from adapter_kernels.route import MAX_GROUPED_ROWS, Placement, build_route
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
    Raises:
        NotComposable: a composition holds an adapter that has a prompt or a prefix.
    """
    places = {slot: placement(slot) for slot in plan.slot_digests}
    num_rows: Counter[int | None] = Counter()
    for row in plan.rows:
        num_rows[row.adapter_slot] += len(row.token_ids)
    rows = sorted(plan.rows, key=lambda row: _place_order(row, places, num_rows))
    counts = [len(row.token_ids) for row in rows]
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    token_ids = torch.tensor([token for row in rows for token in row.token_ids], dtype=torch.int64)
    attention = AttentionPlan.build([row.start for row in rows], counts, [row.block_table for row in rows], block_size)
    adapters = _adapters(rows, counts, places, token_ids, attention.slot_mapping)
    return StepBatch(rows, begins, token_ids, attention, adapters)


def _adapters(
    rows: list[Row], counts: list[int], places: dict[int, Placement], token_ids: Tensor, slot_mapping: Tensor
) -> AdapterDelta | None:
    own = [None if row.adapter_slot is None else places[row.adapter_slot] for row in rows]
    plain = None
    if any(place is not None for place in own):
        route = build_route(own, counts)
        plain = CpuDelta(route, CpuModelDelta.build(route, token_ids, slot_mapping), cpu_kernels())
    composed = [tuple((places[slot], weight) for slot, weight in row.composed) for row in rows if row.composed]
    if not composed:
        return plain
    own_counts = counts[-len(composed) :]
    begin = sum(counts) - sum(own_counts)
    passes = build_passes(composed, own_counts, token_ids[begin:])
    plain_model = None if plain is None else plain.model
    acts_outside = plain_model is not None or any(part.model is not None for part in passes)
    model = ComposedModelDelta(plain_model, begin, passes) if acts_outside else None
    return ComposedDelta(plain, begin, passes, model)


def _place_order(
    row: Row, places: dict[int, Placement], num_rows: Counter[int | None]
) -> tuple[int, tuple[float, ...]]:
    if row.composed:
        return (3, tuple(number for pair in row.composed for number in pair))
    if row.adapter_slot is None:
        return (0, ())
    place = places[row.adapter_slot]
    return (2 if num_rows[row.adapter_slot] <= MAX_GROUPED_ROWS else 1, (place.slab_id, place.position))
