"""The host tier: what is fetched, kept and dropped between disk and device, one adapter at a time."""

from collections import Counter

import pytest

from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.host_tier import HostTier
from serve.engine.plan import FetchResult, LoadResult

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


class Memory:
    """Records what the tiers ask for, and checks that a load finds its image."""

    def __init__(self) -> None:
        self.fetching: list[str] = []
        self.images: set[str] = set()
        self.slots: dict[str, int] = {}
        self.num_fetches: Counter[str] = Counter()
        self.dropped: list[tuple[str, str]] = []

    def start_fetch(self, digest: str) -> None:
        assert digest not in self.fetching and digest not in self.images, "an image is fetched twice"
        self.fetching.append(digest)
        self.num_fetches[digest] += 1

    def poll(self) -> list[FetchResult]:
        return []

    def start_load(self, digest: str, slot: int) -> None:
        assert digest in self.images, "a load finds no image"
        self.slots[digest] = slot


class Images:
    """The host tier's side of `Memory`: both sides call their ends `drop`."""

    def __init__(self, memory: Memory) -> None:
        self.start_fetch = memory.start_fetch
        self.poll = memory.poll
        self._memory = memory

    def drop(self, digest: str) -> None:
        self._memory.images.remove(digest)
        self._memory.dropped.append(("host", digest))


class Slots:
    """The device's side of `Memory`."""

    def __init__(self, memory: Memory) -> None:
        self.start_load = memory.start_load
        self._memory = memory

    def drop(self, digest: str, slot: int) -> None:
        assert self._memory.slots.pop(digest) == slot
        self._memory.dropped.append(("device", digest))


class Bench:
    """Tiers whose fetches and loads end when the test says so."""

    def __init__(
        self,
        *,
        num_images: int = 4,
        host_bytes: int = 100,
        num_slots: int = 2,
        device_bytes: int = 100,
        is_device_memory: bool = False,
    ):
        self.memory = Memory()
        self.host = HostTier(Images(self.memory), num_images, host_bytes, is_device_memory=is_device_memory)
        self.tiers = AdapterTiers(Slots(self.memory), num_slots, device_bytes, host=self.host)

    def walk(self, *digests: str) -> list[Residency]:
        """Ask for adapters in the order of a waiting line."""
        self.tiers.begin_walk()
        return [self.tiers.want(digest) for digest in digests]

    def fetched(
        self, digest: str, num_bytes: int = 10, error: str | None = None, *, has_room: bool = True
    ) -> str | None:
        """End a fetch."""
        self.memory.fetching.remove(digest)
        if error is None and has_room:
            self.memory.images.add(digest)
        why = error if has_room else "no room"
        return self.tiers.finish_fetch(FetchResult(digest, num_bytes, 8, 0.1, why, is_out_of_room=not has_room))

    def loaded(self, digest: str, num_bytes: int = 10, error: str | None = None) -> str | None:
        """End a load."""
        slot = self.memory.slots[digest] if error is None else self.memory.slots.pop(digest)
        return self.tiers.finish_load(LoadResult(digest, slot, num_bytes, 8, 0.1, error))

    def bring(self, *digests: str) -> None:
        """Bring adapters to the device, one after the other."""
        for digest in digests:
            if self.walk(digest) == [Residency.LOADING] and digest in self.memory.fetching:
                self.fetched(digest)
                self.walk(digest)
            self.loaded(digest)
            self.check()

    def check(self, **pinned: int) -> None:
        """Check the books."""
        self.tiers.check_invariants(Counter({letter * 64: number for letter, number in pinned.items()}), Counter())

    def place(self, digest: str) -> str:
        """Return where the heartbeat says the adapter is."""
        return next((state.tier for state in self.tiers.states() if state.digest == digest), "disk")


def test_an_adapter_goes_from_disk_over_the_host_to_the_device_and_says_where_it_is() -> None:
    bench = Bench()
    places = [bench.place(A)]
    assert bench.walk(A) == [Residency.LOADING]
    places.append(bench.place(A))
    bench.fetched(A)
    places.append(bench.place(A))
    assert bench.walk(A) == [Residency.LOADING]
    places.append(bench.place(A))
    bench.loaded(A)
    places.append(bench.place(A))
    assert places == ["disk", "fetching", "host", "loading", "device"]
    assert bench.walk(A) == [Residency.READY]
    (state,) = bench.tiers.states()
    assert (state.num_bytes, state.num_host_bytes, state.rank) == (10, 10, 8)


def test_an_adapter_evicted_from_the_device_stays_on_the_host_and_comes_back_without_a_fetch() -> None:
    bench = Bench(num_slots=1)
    bench.bring(A, B)
    assert bench.memory.dropped == [("device", A)] and bench.place(A) == "host"
    bench.bring(A)
    assert bench.memory.num_fetches == {A: 1, B: 1}
    assert [(move.digest, move.tier, move.source) for move in bench.tiers.take_moves() if move.kind == "load"] == [
        (A, "host", "disk"),
        (B, "host", "disk"),
        (A, "device", "host"),
        (B, "device", "host"),
        (A, "device", "host"),
    ]


def test_images_leave_the_host_when_their_number_or_their_bytes_exceed_the_budget() -> None:
    for bench in (Bench(num_images=2), Bench(host_bytes=25)):
        bench.bring(A, B, C)
        assert bench.memory.images == {B, C}, "the least used image goes"
        assert bench.host.num_bytes == 20
        bench.bring(A)
        assert bench.memory.num_fetches[A] == 2


def test_an_image_that_a_load_reads_is_not_dropped() -> None:
    bench = Bench(num_images=1)
    bench.walk(A)
    bench.fetched(A)
    bench.walk(A)
    assert bench.place(A) == "loading"
    assert bench.walk(B) == [Residency.ABSENT] and bench.memory.images == {A}
    bench.loaded(A)
    assert bench.walk(B) == [Residency.LOADING] and bench.memory.images == set()
    bench.check()


def test_a_later_wish_neither_pushes_out_an_earlier_image_nor_takes_the_room_it_waits_for() -> None:
    bench = Bench(num_images=1, num_slots=1)
    bench.bring(D)
    bench.tiers.pin(D)
    # A is here and waits for a slot; B may not take its place on the host
    bench.walk(A)
    bench.fetched(A)
    assert bench.walk(A, B) == [Residency.ABSENT, Residency.ABSENT]
    assert bench.memory.images == {A}
    # asked for in the other order, B comes first
    assert bench.walk(B, A) == [Residency.LOADING, Residency.ABSENT]
    bench.check(d=1)


def test_an_adapter_on_the_device_gives_its_image_away_however_early_it_was_asked_for() -> None:
    bench = Bench(num_images=1)
    bench.bring(A)
    assert bench.walk(A, B) == [Residency.READY, Residency.LOADING]
    assert bench.memory.images == set() and bench.place(A) == "device"


def test_a_fetch_without_room_begins_again_with_its_size_known() -> None:
    bench = Bench(host_bytes=25, num_slots=4)
    bench.bring(A, B)
    assert bench.walk(C) == [Residency.LOADING] and bench.memory.images == {A, B}
    assert bench.fetched(C, num_bytes=15, has_room=False) is None
    assert bench.place(C) == "disk"
    assert bench.walk(C) == [Residency.LOADING] and bench.memory.images == {B}
    assert bench.fetched(C, num_bytes=15) is None and bench.place(C) == "host"
    bench.check()


def test_an_image_larger_than_the_host_is_refused_with_both_numbers() -> None:
    bench = Bench(host_bytes=25)
    bench.walk(A)
    error = bench.fetched(A, num_bytes=26, has_room=False)
    assert error is not None and "26 bytes" in error and "at most 25" in error and "--adapter-host-bytes" in error
    assert bench.tiers.refusal(A) == error
    assert Bench(num_images=0).tiers.refusal(A) is not None


def test_a_fetch_that_fails_says_why_and_may_be_tried_again() -> None:
    bench = Bench()
    bench.walk(A)
    assert bench.fetched(A, 0, "the image is damaged") == "the image is damaged"
    assert bench.place(A) == "disk" and bench.walk(A) == [Residency.LOADING]


def test_an_image_that_could_not_be_loaded_is_read_anew() -> None:
    bench = Bench()
    bench.walk(A)
    bench.fetched(A)
    bench.walk(A)
    assert bench.loaded(A, error="not finite") == "not finite"
    assert bench.memory.images == set() and bench.place(A) == "disk"
    bench.check()


def test_a_prefetch_goes_on_to_the_device_where_there_is_room_and_stops_on_the_host_where_not() -> None:
    bench = Bench(num_slots=1)
    bench.tiers.prefetch(A)
    bench.fetched(A)
    assert bench.place(A) == "loading"
    bench.loaded(A)
    bench.tiers.pin(A)
    bench.tiers.prefetch(B)
    bench.fetched(B)
    assert bench.place(B) == "host"
    # the hint is forgotten: nothing comes of it later
    bench.tiers.unpin(A)
    bench.tiers.begin_walk()
    assert bench.place(B) == "host"


def test_an_operators_pin_brings_the_adapter_to_the_device() -> None:
    bench = Bench()
    bench.tiers.operator_pins.add(A, 0)
    bench.tiers.begin_walk()
    bench.fetched(A)
    assert bench.tiers.has_wish
    bench.tiers.begin_walk()
    bench.loaded(A)
    assert bench.place(A) == "device" and not bench.tiers.has_wish


def test_evicting_frees_both_tiers_and_counts_the_bytes_of_both() -> None:
    bench = Bench()
    bench.bring(A)
    assert bench.tiers.evict(A) == 20 and bench.place(A) == "disk"
    assert bench.tiers.evict(A) == 0
    bench.bring(B)
    bench.tiers.pin(B)
    # the image goes at once, the device's bytes with the last running sequence
    assert bench.tiers.evict(B) is None and bench.memory.images == set()
    bench.tiers.unpin(B)
    assert bench.place(B) == "disk"


@pytest.mark.parametrize("stage", ["fetching", "host", "loading"])
def test_unloading_at_any_stage_leaves_nothing_behind(stage: str) -> None:
    bench = Bench()
    bench.walk(A)
    if stage != "fetching":
        bench.fetched(A)
    if stage == "loading":
        bench.walk(A)
    assert bench.place(A) == stage
    bench.tiers.unload(A)
    if stage == "fetching":
        bench.fetched(A)
    if stage == "loading":
        bench.loaded(A)
    assert bench.place(A) == "disk" and bench.memory.images == set() and bench.memory.slots == {}
    bench.check()
    # and the wish is forgotten: a later one stays
    bench.bring(A)
    assert bench.place(A) == "device"


def test_where_adapters_were_when_they_were_named_is_counted() -> None:
    bench = Bench(num_slots=1)
    bench.tiers.join(A)
    bench.tiers.leave(A)
    bench.bring(A, B)
    bench.tiers.join(A)
    bench.tiers.join(B)
    hits = bench.tiers.hits
    assert (hits.num_on_device, hits.num_on_host, hits.num_missed) == (1, 1, 1)


def test_an_image_is_given_up_once_the_same_memory_holds_the_adapter_for_the_steps() -> None:
    bench = Bench(num_slots=18, device_bytes=1000, is_device_memory=True)
    assert bench.walk(A, B) == [Residency.LOADING, Residency.LOADING]
    bench.fetched(A)
    bench.walk(A, B)
    assert bench.host.residency(A) is Residency.READY, "a load reads it"
    bench.loaded(A)
    assert bench.memory.dropped == [("host", A)] and bench.place(A) == "device"
    (state,) = (state for state in bench.tiers.states() if state.digest == A)
    assert (state.num_bytes, state.num_host_bytes) == (10, 0)
    assert [(move.kind, move.num_bytes) for move in bench.tiers.take_moves() if move.tier == "host"][1:] == [
        ("on_device", 10)
    ]
    # one that is evicted comes from the disk once more
    assert bench.tiers.evict(A) == 10 and bench.place(A) == "disk"
    bench.fetched(B)
    bench.bring(A)
    assert bench.memory.num_fetches[A] == 2 and bench.place(A) == "device"
    bench.check()


@pytest.mark.parametrize(
    ("num_slots", "device_bytes", "is_device_memory", "is_kept"),
    [
        (17, 170, True, False),
        # no more than 15 slots, or bytes for 15, are left beside it
        (16, 170, True, True),
        (17, 169, True, True),
        # a GPU
        (17, 170, False, True),
    ],
)
def test_an_image_stays_where_its_adapter_may_have_to_leave_the_device(
    num_slots: int, device_bytes: int, is_device_memory: bool, is_kept: bool
) -> None:
    bench = Bench(num_slots=num_slots, device_bytes=device_bytes, is_device_memory=is_device_memory)
    bench.bring(A)
    assert bench.memory.images == ({A} if is_kept else set())


def test_an_image_whose_load_failed_or_did_not_fit_goes_as_it_did() -> None:
    bench = Bench(num_slots=18, device_bytes=1000, is_device_memory=True)
    bench.walk(A)
    bench.fetched(A)
    bench.walk(A)
    assert bench.loaded(A, error="not finite") == "not finite"
    bench.check()
    assert bench.memory.dropped == [("host", A)] and bench.place(A) == "disk"
