"""The order of a step's rows: what the adapter route needs lies side by side."""

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.route import MAX_GROUPED_ROWS, Placement
from serve.engine.batch import StepBatch, build_batch
from serve.engine.plan import Row, StepPlan
from tests.kernels.test_route import SLABS

MANY = MAX_GROUPED_ROWS + 1


def batch_of(num_rows_by_slot: dict[int | None, int]) -> StepBatch:
    """One decode step; adapter slot i lies at position i of the first slab; rows of different adapters alternate."""
    rows = [
        Row(f"{slot}-{i}", [7], 3, [slot or 0], slot, sample=None)
        for i in range(max(num_rows_by_slot.values()))
        for slot, count in num_rows_by_slot.items()
        if i < count
    ]
    digests = {slot: str(slot) for slot in num_rows_by_slot if slot is not None}
    return build_batch(StepPlan(rows, digests), 16, lambda slot: Placement(0, SLABS[0], slot))


def test_rows_of_one_adapter_are_neighbours_and_the_base_comes_first() -> None:
    batch = batch_of({3: 2, None: 3, 1: 2})
    assert [row.adapter_slot for row in batch.rows] == [None, None, None, 1, 1, 3, 3]


def test_a_busy_adapter_does_not_cut_the_group_of_the_others_in_two() -> None:
    batch = batch_of({0: 2, 1: MANY, 2: 3, 3: 1})
    assert [row.adapter_slot for row in batch.rows] == [1] * MANY + [0] * 2 + [2] * 3 + [3]
    assert isinstance(batch.adapters, CpuDelta)
    route = batch.adapters.route
    assert [(group.begin, group.end) for group in route.groups] == [(0, MANY), (MANY, MANY + 6)]
