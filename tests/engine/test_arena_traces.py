"""The device arena under random use: steps in flight always read the adapters that they were submitted with.

Owns the traces and the slow model of what each slot holds. Streams, loader and step thread take turns at random, so a
missing fence, an early table write or a torn move shows as bytes that differ from the image.
"""

import random
from collections import Counter
from functools import partial

import pytest

from adapter_kernels.gpu.tables import ALIGNMENT_BYTES
from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.plan import LoadResult
from tests.engine.arena_adapters import mismatch, small_image
from tests.engine.test_device_arena import Device, sized

UNIT = ALIGNMENT_BYTES
NUM_SLOTS = 6


@pytest.fixture
def short_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each poll move a tensor or two, so that steps run between the pieces of a move."""
    monkeypatch.setattr("serve.engine.device_arena.MOVE_BYTES_PER_POLL", 2 * UNIT)


class Trace:
    """A device, and what each slot must hold for the steps submitted next."""

    def __init__(self, seed: int, num_units: int, digests: list[str]) -> None:
        self.rng = random.Random(seed)
        images = {digest: small_image(7 * i + seed % 7) for i, digest in enumerate(digests)}
        self.device = Device(images, num_units, num_slots=NUM_SLOTS)
        self.ready: dict[int, str] = {}
        self.faults: list[str] = []
        self.results: list[LoadResult] = []
        self.num_reads = 0

    def step(self) -> None:
        """Submit a step that reads every slot when the main stream comes to it."""
        for slot in range(NUM_SLOTS):
            digest = self.ready.get(slot)
            self.device.streams.launch("step", partial(self._read, slot, digest))

    def poll(self) -> list[LoadResult]:
        results = self.device.arena.poll()
        for result in results:
            if result.error is None:
                self.ready[result.slot] = result.digest
        self.results += results
        return results

    def drop(self, slot: int) -> None:
        self.ready.pop(slot, None)
        self.device.arena.drop(slot)

    def background(self) -> None:
        """Let the loader and the device do some of what they have to do."""
        if self.rng.random() < 0.5:
            self.device.loader.run_one()
        for _ in range(self.rng.randrange(8)):
            self.device.streams.run_one()
        self.device.arena.check_invariants()

    def end(self) -> None:
        for _ in range(100):
            self.device.loader.run_all()
            self.device.streams.run_all()
            self.poll()
        self.step()
        self.device.streams.run_all()
        self.device.arena.check_invariants()
        assert self.faults == []
        assert self.num_reads > NUM_SLOTS

    def _read(self, slot: int, digest: str | None) -> None:
        self.num_reads += digest is not None
        image = None if digest is None else self.device.store.images[digest]
        if (fault := mismatch(self.device.tables, slot, image)) is not None:
            self.faults.append(fault)


@pytest.mark.usefixtures("short_moves")
@pytest.mark.parametrize("seed", range(6))
def test_steps_read_the_right_bytes_under_random_use(seed: int) -> None:
    digests = list("abcdefgh")
    trace = Trace(seed, num_units=240, digests=digests)
    arena, rng = trace.device.arena, trace.rng
    loading: dict[int, str] = {}
    for _ in range(200):
        free = [slot for slot in range(NUM_SLOTS) if slot not in loading and slot not in trace.ready]
        choice = rng.random()
        if choice < 0.3 and free:
            slot, digest = rng.choice(free), rng.choice([*digests, "vanished"])
            loading[slot] = digest
            arena.start_load(digest, slot)
        elif choice < 0.45 and trace.ready:
            trace.drop(rng.choice(sorted(trace.ready)))
        elif choice < 0.48 and loading:
            slot = rng.choice(sorted(loading))
            del loading[slot]
            trace.drop(slot)
        elif choice < 0.6:
            trace.step()
        else:
            for result in trace.poll():
                assert loading.pop(result.slot) == result.digest
                assert (result.error is not None) == (result.digest == "vanished" or result.is_out_of_room)
        trace.background()
    trace.end()
    assert any(result.error is None for result in trace.results)


def _fragmented(num_pairs: int) -> Device:
    """Four slots: two small adapters with holes below them, and a large one that fits only when both have moved."""
    images = {"s": sized(3, 1), "t": sized(num_pairs, 2), "u": sized(3, 3), "v": sized(num_pairs, 4), "large": sized(6)}
    device = Device(images, num_units=6 + 2 * num_pairs)
    for slot, digest in enumerate("stuv"):
        assert device.load(digest, slot).error is None
    device.arena.drop(0)
    device.arena.drop(2)
    assert device.arena.num_bytes_free == 6 * UNIT and device.arena.largest_free_extent == 3 * UNIT
    return device


# 5 units are moved by 3, over themselves; 2 units are moved beside themselves
@pytest.mark.parametrize("num_units", [2, 5])
def test_a_load_that_fits_only_in_pieces_waits_for_moves_between_steps(num_units: int) -> None:
    device = _fragmented(num_units)
    device.arena.start_load("large", 0)
    device.loader.run_all()
    read: list[str | None] = []

    def step() -> None:
        read.extend(device.mismatch(slot, digest) for slot, digest in ((1, "t"), (3, "v")))

    moved = []
    while (num_bytes := device.arena.compact_some(1)) > 0:
        moved.append(num_bytes)
        device.streams.launch("step", step)
    # a tensor at a time, and steps between them find every adapter whole
    assert len(moved) > 1 and max(moved) <= 3 * UNIT
    assert device.arena.poll() == []
    assert [result.error for result in device.settle()] == [None]
    assert read == [None] * 2 * len(moved)
    for slot, digest in ((0, "large"), (1, "t"), (3, "v")):
        assert device.mismatch(slot, digest) is None


def test_no_load_waits_no_byte_moves() -> None:
    assert _fragmented(2).arena.compact_some(1 << 30) == 0


def test_an_adapter_that_is_dropped_while_it_moves_frees_all_of_its_bytes() -> None:
    device = _fragmented(5)
    device.arena.start_load("large", 0)
    device.loader.run_all()
    assert device.arena.compact_some(1) > 0
    device.arena.drop(1)
    assert [result.error for result in device.settle()] == [None]
    assert (device.mismatch(0, "large"), device.mismatch(1, None), device.mismatch(3, "v")) == (None, None, None)


def test_a_smaller_load_does_not_pass_one_that_waits_for_room() -> None:
    device = _fragmented(5)
    device.store.images["small"] = sized(2, 9)
    device.arena.start_load("large", 0)
    device.arena.start_load("small", 2)
    results = {result.digest: result for result in device.settle()}
    assert results["large"].error is None and results["small"].is_out_of_room


def test_a_load_that_waits_for_room_can_be_dropped() -> None:
    device = _fragmented(5)
    device.arena.start_load("large", 0)
    device.loader.run_all()
    assert device.arena.compact_some(1) > 0
    device.arena.drop(0)
    # the adapter under way is brought to its place before anything else is moved
    assert device.settle() == []
    assert device.load("u", 0).error is None
    assert device.mismatch(1, "t") is None


@pytest.mark.usefixtures("short_moves")
@pytest.mark.parametrize("seed", range(4))
def test_the_arena_has_room_for_whatever_the_tiers_think_fits(seed: int) -> None:
    digests = [f"{i:064x}" for i in range(7)]
    trace = Trace(seed, num_units=140, digests=digests)
    tiers = AdapterTiers(_Loader(trace), NUM_SLOTS, trace.device.arena.num_bytes)
    rng, pinned = trace.rng, Counter[str]()
    known: set[str] = set()

    def poll() -> None:
        knows_all = len(known) == len(digests)
        for result in trace.poll():
            assert tiers.finish_load(result) is None
            assert not (result.is_out_of_room and knows_all)
            known.add(result.digest)

    # until every size is known, loads may find the arena full: they are begun again without being asked for
    while len(known) < len(digests):
        tiers.begin_walk()
        tiers.want(rng.choice(digests))
        trace.background()
        poll()
    for _ in range(300):
        choice = rng.random()
        if choice < 0.4:
            tiers.begin_walk()
            tiers.want(rng.choice(digests))
        elif choice < 0.5:
            ready = [digest for digest in digests if tiers.residency(digest) is Residency.READY]
            if ready and pinned.total() < 2:
                tiers.pin(ready[0])
                pinned[ready[0]] += 1
        elif choice < 0.7 and pinned:
            digest = rng.choice(sorted(pinned.elements()))
            tiers.unpin(digest)
            pinned -= Counter([digest])
        trace.step()
        trace.background()
        poll()
        tiers.check_invariants(pinned, Counter())
    trace.end()
    assert tiers.device.num_evictions_total > 20


class _Loader:
    """The executor's part of loading."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def start_load(self, digest: str, slot: int) -> None:
        self._trace.device.arena.start_load(digest, slot)

    def drop(self, digest: str, slot: int) -> None:
        assert self._trace.ready[slot] == digest
        self._trace.drop(slot)
