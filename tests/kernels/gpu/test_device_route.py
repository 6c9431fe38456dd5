"""The device's counting sort: every row in one block, stable, for any split of the rows into buckets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_kernels import reference
from adapter_kernels.gpu.route import UNUSED, DeviceRoute, RouteBuffers, block_capacity, build_route
from adapter_kernels.gpu.route_forms import block_rows_for
from tests.kernels.gpu.batches import POPULARITIES, RAGGED_ROWS, Batch, batch_of, random_batch
from tests.kernels.gpu.launches import record_launches

_POISON = -77


def built(batch: Batch, max_rows: int | None = None, max_buckets: int | None = None) -> DeviceRoute:
    """Build the route in poisoned buffers, as the engine does."""
    slots = torch.full((max_rows or batch.num_rows,), _POISON, dtype=torch.int32)
    slots[: batch.num_rows] = batch.slots
    buffers = RouteBuffers.build(slots, max_buckets or batch.slot_of.shape[0])
    for tensor in (buffers.perm, buffers.block_slot, buffers.block_start, buffers.block_len):
        tensor.fill_(_POISON)
    return build_route(batch.local, batch.slot_of, buffers, batch.num_rows)


def check(route: DeviceRoute, batch: Batch) -> None:
    """Check the bookkeeping and compare with the reference, unused blocks included."""
    expected = reference.group_rows(batch.local, batch.slot_of, route.block_rows, route.num_blocks)
    assert torch.equal(route.slots, batch.slots)
    assert torch.equal(route.perm, expected.perm)
    assert torch.equal(route.block_slot, expected.block_slot)
    assert torch.equal(route.block_start, expected.block_start)
    assert torch.equal(route.block_len, expected.block_len)
    seen: list[int] = []
    for slot, begin, length in zip(route.block_slot.tolist(), route.block_start, route.block_len, strict=True):
        rows = route.perm[begin : begin + length].long()
        assert (length == 0) == (slot == UNUSED)
        assert bool((batch.slots[rows] == slot).all())
        seen.extend(rows.tolist())
    assert sorted(seen) == list(range(batch.num_rows))


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [rows for rows in RAGGED_ROWS if rows > 16])
def test_rows_are_grouped_as_the_reference_groups_them(num_rows: int, popularity: str) -> None:
    batch = random_batch(num_rows, num_slots=9, popularity=popularity, seed=num_rows, padding_rows=2)
    check(built(batch), batch)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=17, max_size=90), st.integers(0, 5))
def test_any_split_into_buckets_keeps_every_row_once(slots: list[int | None], spare_rows: int) -> None:
    batch = batch_of(slots)
    check(built(batch, max_rows=len(slots) + spare_rows), batch)


def test_a_long_step_has_large_blocks_and_several_chunks() -> None:
    batch = random_batch(2100, num_slots=40, popularity="zipf", seed=3)
    route = built(batch)
    assert route.block_rows == 64
    check(route, batch)


def test_more_blocks_than_one_program_writes_at_a_time() -> None:
    batch = batch_of([None] * 9000)
    check(built(batch), batch)


@pytest.mark.parametrize("slot", [None, 5])
def test_a_step_of_one_adapter_or_none_is_one_group(slot: int | None) -> None:
    batch = batch_of([slot] * 33)
    route = built(batch)
    assert route.perm.tolist() == list(range(33))
    check(route, batch)


def test_few_rows_launch_nothing_and_blocks_are_rows() -> None:
    batch = random_batch(13, num_slots=4, popularity="uniform")
    with record_launches() as launches:
        route = built(batch, max_rows=16)
    assert launches == []
    assert route.block_rows == 1
    assert route.num_blocks == 13
    assert torch.equal(route.block_slot, batch.slots)


@pytest.mark.parametrize("max_buckets", [None, 2001])
def test_one_launch_with_one_program_per_bucket_of_the_step(max_buckets: int | None) -> None:
    batch = random_batch(60, num_slots=5, popularity="uniform")
    with record_launches() as launches:
        check(built(batch, max_buckets=max_buckets), batch)
    assert [(launch.kernel, launch.grid) for launch in launches] == [("_route_kernel", (batch.slot_of.shape[0],))]


@pytest.mark.parametrize("block_rows", [16, 64])
def test_capacity_holds_the_worst_split(block_rows: int) -> None:
    for num_buckets in (1, 2, 5, 300):
        for num_rows in (1, 17, 64, 65, 257):
            singles = min(num_buckets, num_rows) - 1
            worst = singles + -(-(num_rows - singles) // block_rows)
            assert worst <= block_capacity(num_rows, num_buckets, block_rows)


def test_block_rows_grow_with_the_step_alone() -> None:
    assert [block_rows_for(rows) for rows in (1, 16, 17, 256, 257, 8192)] == [1, 1, 16, 16, 64, 64]
