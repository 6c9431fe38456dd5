"""The adapter arena of a device: what arrives, what fails and leaves nothing, and in which order bytes are reused."""

import time

import pytest
import torch

from adapter_kernels.gpu.copies import InlineCopies
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, DeviceTables
from adapter_kernels.image import AdapterImage
from serve.engine import extents
from serve.engine.device_arena import DeviceArena
from serve.engine.plan import LoadResult
from tests.engine.arena_adapters import NUM_LAYERS, Images, mismatch, small_image
from tests.engine.device_streams import QueuedLoader, StreamTables, TwoStreams
from tests.kernels.random_adapters import SHAPES, random_image

NUM_SLOTS = 4
UNIT = ALIGNMENT_BYTES


def sized(num_units: int, seed: int = 0) -> AdapterImage:
    """An image of exactly this many units (2, 3, 4 ...) in float32."""
    # k and v alike: rank 1 takes 2 units, rank 4 takes 3, rank 8 takes 6
    num_pairs = {0: 0, 1: 2, 2: 1}[num_units % 3]
    ranks = {(layer, "v_proj"): 1 for layer in range(num_pairs)}
    if num_units > 2 * num_pairs:
        ranks[0, "k_proj"] = (num_units - 2 * num_pairs) // 3 * 4
    image = random_image(ranks, torch.Generator().manual_seed(seed))
    assert image.data.numel() == num_units * UNIT
    return image


class Device:
    """An arena on streams that the test advances."""

    def __init__(
        self,
        images: dict[str, AdapterImage],
        num_units: int = 400,
        dtype: torch.dtype = torch.float32,
        num_slots: int = NUM_SLOTS,
    ) -> None:
        self.streams, self.loader, self.store = TwoStreams(), QueuedLoader(), Images(images)
        memory = torch.full((num_units * UNIT,), 255, dtype=torch.uint8).view(dtype)
        built = DeviceTables.build(NUM_LAYERS, num_slots, memory)
        self.tables = StreamTables(
            built.arena, built.ints, built.floats, built.rows, built._staging, built._lacking, self.streams
        )
        self.arena = DeviceArena(
            self.tables,
            SHAPES,
            NUM_LAYERS,
            dtype,
            self.store.open,
            self.streams,
            loader=self.loader,
            buffer_bytes=4 * UNIT,
        )

    def load(self, digest: str, slot: int) -> LoadResult:
        """Load to the end."""
        self.arena.start_load(digest, slot)
        results = self.settle()
        assert len(results) == 1
        return results[0]

    def settle(self) -> list[LoadResult]:
        """Let everything end; the arena's books are checked."""
        results: list[LoadResult] = []
        for _ in range(50):
            self.loader.run_all()
            self.streams.run_all()
            results += self.arena.poll()
        self.streams.run_all()
        self.arena.check_invariants()
        return results

    def mismatch(self, slot: int, digest: str | None) -> str | None:
        return mismatch(self.tables, slot, None if digest is None else self.store.images[digest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_is_read_back_through_the_tables_bit_by_bit(stored: torch.dtype, dtype: torch.dtype) -> None:
    device = Device({"a": small_image(13, stored), "b": small_image(27, stored)}, num_units=400, dtype=dtype)
    free = device.arena.num_bytes_free
    loaded = [device.load("a", 2), device.load("b", 0)]
    assert [result.error for result in loaded] == [None, None]
    assert sum(result.num_bytes for result in loaded) == free - device.arena.num_bytes_free
    assert loaded[0].rank == max(rows.rank for rows in device.store.images["a"].rows)
    assert [device.mismatch(slot, digest) for slot, digest in ((2, "a"), (0, "b"), (1, None), (3, None))] == [None] * 4


def test_a_slot_is_visible_only_after_its_last_byte_arrived() -> None:
    device = Device({"a": small_image(13)})
    device.arena.start_load("a", 1)
    device.loader.run_all()
    while device.streams.copy:
        assert device.arena.poll() == [] and not device.streams.main
        assert device.streams.run_next(device.streams.copy)
    assert [result.slot for result in device.arena.poll()] == [1]
    device.streams.run_all()
    assert device.mismatch(1, "a") is None


def _damaged(image: AdapterImage) -> AdapterImage:
    return AdapterImage(image.data[:UNIT], image.dtype, image.rows, image.shapes)


def _poisoned(image: AdapterImage, value: float) -> AdapterImage:
    image.site(image.rows[0]).bt[0, 0] = value
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "cannot be read; upload it again"),
        (_damaged(small_image(13)), "the canonical file is damaged, upload the adapter again"),
        (_poisoned(small_image(13), float("nan")), "is not finite in torch.float16, this server's dtype"),
        (_poisoned(small_image(13), 1e6), "is not finite in torch.float16, this server's dtype"),
    ],
    ids=["vanished", "damaged", "nan", "overflow"],
)
def test_a_failed_load_leaves_no_bytes_and_no_table_row(image: AdapterImage | None, message: str) -> None:
    device = Device({} if image is None else {"a": image}, num_units=400, dtype=torch.float16)
    result = device.load("a", 1)
    assert result.error is not None and message in result.error
    assert (result.num_bytes, result.rank, result.is_out_of_room) == (0, 0, False)
    assert device.arena.num_bytes_free == device.arena.largest_free_extent == device.arena.num_bytes
    assert device.mismatch(1, None) is None and "write" not in device.streams.log
    device.store.images["a"] = small_image(14)
    assert device.load("a", 1).error is None


def test_no_copy_is_under_way_any_more_when_a_load_failed() -> None:
    # the extent's next owner may be written on the main stream, which does not wait for the copy stream
    image = random_image({(0, "q_proj"): 20}, torch.Generator().manual_seed(0))
    image.site(image.rows[0]).bt[-1, -1] = float("nan")
    device = Device({"a": image})
    device.arena.start_load("a", 0)
    device.loader.run_all()
    assert device.streams.log.count("upload") > 2 and not device.streams.copy
    assert "not finite" in str(device.settle()[0].error)


def test_an_image_for_a_deeper_model_fails_alone() -> None:
    device = Device({"a": random_image({(NUM_LAYERS, "q_proj"): 1}, torch.Generator().manual_seed(0))})
    error = device.load("a", 1).error
    assert error is not None and f"this model has {NUM_LAYERS} layers" in error
    assert device.arena.num_bytes_free == device.arena.num_bytes


def test_an_unforeseen_error_fails_the_load_alone() -> None:
    device = Device({"a": small_image(13)})
    device.store.images["b"] = AdapterImage(torch.zeros(8, dtype=torch.uint8), torch.int32, (), SHAPES)
    error = device.load("b", 1).error
    assert error == "the adapter could not be loaded (KeyError); send the request again"
    assert device.load("a", 1).error is None


def test_an_adapter_larger_than_the_arena_says_so() -> None:
    device = Device({"a": sized(12)}, num_units=10)
    result = device.load("a", 0)
    assert result.error == (
        f"the adapter takes {result.num_bytes} bytes on the device; the arena has {10 * UNIT}, so it can never fit "
        "(--adapter-device-bytes)"
    )
    assert result.num_bytes > 10 * UNIT and not result.is_out_of_room


def test_a_load_without_room_says_what_it_needs_and_succeeds_when_there_is() -> None:
    device = Device({"a": sized(6, 1), "b": sized(6, 2)}, num_units=10)
    assert device.load("a", 0).error is None
    result = device.load("b", 1)
    assert result.is_out_of_room and result.error is not None
    assert f"the arena has {10 * UNIT}, of which {device.arena.num_bytes_free} are free now" in result.error
    device.arena.drop(0)
    assert device.load("b", 1).num_bytes == result.num_bytes
    assert device.mismatch(1, "b") is None and device.mismatch(0, None) is None


def test_a_reused_extent_is_written_only_behind_the_steps_that_read_it() -> None:
    device = Device({"a": sized(8, 1), "b": sized(8, 2)}, num_units=8)
    device.load("a", 0)
    read: list[str | None] = []
    device.streams.launch("step", lambda: read.append(device.mismatch(0, "a")))
    device.arena.drop(0)
    device.arena.start_load("b", 1)
    device.loader.run_all()
    device.streams.log.clear()
    # the copy stream alone gets nowhere: it waits for the main stream at the drop
    assert not device.streams.run_next(device.streams.copy) and device.streams.copy
    assert [result.error for result in device.settle()] == [None]
    assert read == [None] and device.mismatch(1, "b") is None
    assert device.streams.log.index("step") < device.streams.log.index("upload")


def test_a_load_that_is_dropped_before_it_opened_or_arrived_ends_without_a_result() -> None:
    device = Device({"a": sized(8, 1), "b": sized(8, 2)}, num_units=8)
    device.arena.start_load("a", 0)
    device.arena.drop(0)
    assert device.settle() == [] and device.arena.num_bytes_free == device.arena.num_bytes
    device.arena.start_load("a", 0)
    device.loader.run_all()
    device.arena.drop(0)
    # the slot may be used again at once; the bytes only when the dropped copy is through
    device.arena.start_load("b", 0)
    device.loader.run_all()
    assert device.arena.num_bytes_free < 8 * UNIT
    results = device.settle()
    assert [(result.digest, result.is_out_of_room) for result in results] == [("b", True)]
    assert device.load("b", 0).error is None and device.mismatch(0, "b") is None


def test_dropping_a_slot_that_holds_nothing_is_refused() -> None:
    with pytest.raises(KeyError):
        Device({}).arena.drop(0)


def test_a_poll_that_finds_all_table_buffers_under_way_comes_back_later() -> None:
    device = Device({"a": sized(2), "b": sized(2, 1)})
    # the main stream stands still: every row written stays under way
    for num_polls in range(100):
        device.arena.start_load("ab"[num_polls % 2], num_polls % 2)
        device.loader.run_all()
        while device.streams.run_next(device.streams.copy):
            pass
        if not device.arena.poll():
            break
        device.arena.drop(num_polls % 2)
        device.arena._room._freed = None
    assert 4 <= num_polls < 99
    assert [result.error for result in device.settle()] == [None]
    assert device.mismatch(num_polls % 2, "ab"[num_polls % 2]) is None


def test_closing_stops_the_thread_in_the_middle_of_a_load() -> None:
    images = Images({"a": small_image(13)})
    tables = DeviceTables.build(NUM_LAYERS, NUM_SLOTS, torch.zeros(1 << 14))
    arena = DeviceArena(tables, SHAPES, NUM_LAYERS, torch.float32, images.open, InlineCopies(), buffer_bytes=UNIT)
    for slot in range(NUM_SLOTS):
        arena.start_load("a", slot)
    arena.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        arena.start_load("a", 0)


def test_loads_run_on_a_thread_of_their_own() -> None:
    images = Images({str(seed): small_image(seed) for seed in range(NUM_SLOTS)})
    tables = DeviceTables.build(NUM_LAYERS, NUM_SLOTS, torch.zeros(1 << 16))
    arena = DeviceArena(tables, SHAPES, NUM_LAYERS, torch.float32, images.open, InlineCopies(), buffer_bytes=UNIT)
    try:
        for slot in range(NUM_SLOTS):
            arena.start_load(str(slot), slot)
        results: list[LoadResult] = []
        deadline = time.monotonic() + 120
        while len(results) < NUM_SLOTS and time.monotonic() < deadline:
            results += arena.poll()
        assert sorted(result.slot for result in results) == list(range(NUM_SLOTS))
        for slot in range(NUM_SLOTS):
            assert mismatch(tables, slot, images.images[str(slot)]) is None
        arena.check_invariants()
    finally:
        arena.close()


def test_extents_are_aligned_as_kernels_promise() -> None:
    assert extents.ALIGNMENT_BYTES == ALIGNMENT_BYTES
