"""Adapter tiers: no room, bad loads, pins, eviction and unloading."""

from collections import Counter

import pytest

from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.eviction import POLICIES, EvictionPolicy
from serve.engine.plan import LoadResult

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


class Loader:
    """Records what the tiers ask for."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.dropped: list[str] = []

    def start_load(self, digest: str, slot: int) -> None:
        """Note the slot."""
        assert slot not in self.slots.values(), "a slot is loaded over"
        self.slots[digest] = slot

    def drop(self, digest: str, slot: int) -> None:
        """Note the drop."""
        assert self.slots.pop(digest) == slot, "a drop names the wrong slot"
        self.dropped.append(digest)


class Bench:
    """Tiers with a loader whose loads end when the test says so."""

    def __init__(self, num_slots: int = 2, max_bytes: int = 10, policy: EvictionPolicy | None = None) -> None:
        self.loader = Loader()
        self.tiers = AdapterTiers(self.loader, num_slots, max_bytes, policy)

    def finish(self, digest: str, num_bytes: int = 4, error: str | None = None) -> str | None:
        """End a load that is under way."""
        slot = self.loader.slots[digest] if error is None else self.loader.slots.pop(digest)
        return self.tiers.finish_load(LoadResult(digest, slot, num_bytes, 8, 0.1, error))

    def load(self, digest: str, num_bytes: int = 4) -> None:
        """Bring an adapter to READY."""
        self.tiers.begin_walk()
        assert self.tiers.want(digest) is Residency.LOADING
        assert self.finish(digest, num_bytes) is None


def test_a_failed_load_gives_its_slot_back_and_may_be_tried_again() -> None:
    bench = Bench(num_slots=1)
    assert bench.tiers.want(A) is Residency.LOADING
    assert bench.finish(A, error="the file is damaged") == "the file is damaged"
    assert bench.tiers.residency(A) is Residency.ABSENT
    assert bench.loader.dropped == []
    bench.load(A)
    assert bench.tiers.residency(A) is Residency.READY


def _out_of_room(bench: Bench, digest: str, num_bytes: int) -> str | None:
    slot = bench.loader.slots.pop(digest)
    return bench.tiers.finish_load(LoadResult(digest, slot, num_bytes, 0, 0.1, "no room", is_out_of_room=True))


def test_a_load_that_found_no_room_begins_again_at_once_with_its_size_known() -> None:
    bench = Bench(num_slots=3, max_bytes=10)
    bench.load(A, num_bytes=4)
    bench.load(B, num_bytes=4)
    bench.tiers.begin_walk()
    assert bench.tiers.want(C) is Residency.LOADING
    assert bench.loader.dropped == []
    assert _out_of_room(bench, C, 6) is None
    # now its bytes count before they are there
    assert bench.loader.dropped == [A] and bench.tiers.residency(C) is Residency.LOADING
    assert bench.finish(C, num_bytes=6) is None
    bench.tiers.check_invariants(Counter(), Counter())


def test_a_load_that_found_no_room_waits_while_nothing_can_be_evicted() -> None:
    bench = Bench(num_slots=2, max_bytes=10)
    bench.load(A, num_bytes=6)
    bench.tiers.pin(A)
    bench.tiers.begin_walk()
    bench.tiers.want(B)
    assert _out_of_room(bench, B, 6) is None
    assert bench.tiers.residency(B) is Residency.ABSENT
    assert bench.tiers.want(B) is Residency.ABSENT
    bench.tiers.unpin(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.LOADING and bench.loader.dropped == [A]


def test_a_load_that_can_never_find_room_is_refused() -> None:
    bench = Bench(max_bytes=10)
    bench.tiers.want(A)
    error = _out_of_room(bench, A, 11)
    assert error is not None and "11 bytes" in error
    assert bench.tiers.refusal(A) == error and bench.tiers.residency(A) is Residency.ABSENT


def test_an_unloaded_adapter_is_not_begun_again_for_want_of_room() -> None:
    bench = Bench(max_bytes=10)
    bench.tiers.prefetch(A)
    bench.tiers.unload(A)
    assert _out_of_room(bench, A, 4) is None
    assert bench.tiers.residency(A) is Residency.ABSENT and bench.loader.slots == {}


def test_an_adapter_larger_than_the_budget_is_refused_with_both_numbers() -> None:
    bench = Bench(max_bytes=10)
    bench.tiers.want(A)
    error = bench.finish(A, num_bytes=11)
    assert error is not None and "11 bytes" in error and "at most 10" in error
    assert bench.loader.dropped == [A]
    # known now: the next request is refused without a load
    assert bench.tiers.refusal(A) == error


def test_without_adapter_slots_every_adapter_is_refused() -> None:
    assert Bench(num_slots=0).tiers.refusal(A) is not None


def test_a_pinned_adapter_is_not_evicted() -> None:
    bench = Bench(num_slots=1)
    bench.load(A)
    bench.tiers.pin(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.ABSENT
    bench.tiers.unpin(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.LOADING
    assert bench.loader.dropped == [A]


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_says_who_is_evicted_first(name: str) -> None:
    bench = Bench(num_slots=3, max_bytes=12, policy=POLICIES[name]())
    for digest in (A, B, C):
        bench.load(digest)
        bench.tiers.pin(digest)
        bench.tiers.unpin(digest)
    # used again, so neither the least recent nor a newcomer that nobody came back for
    bench.tiers.pin(A)
    bench.tiers.unpin(A)
    bench.tiers.begin_walk()
    bench.tiers.want(D)
    assert bench.loader.dropped == ([C] if name == "w-tinylfu" else [B])


def test_a_later_wish_does_not_evict_an_earlier_one() -> None:
    bench = Bench(num_slots=1)
    bench.load(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(A) is Residency.READY
    assert bench.tiers.want(B) is Residency.ABSENT
    assert bench.loader.dropped == []


def test_a_small_adapter_does_not_take_the_room_that_a_large_one_waits_for() -> None:
    bench = Bench(num_slots=3, max_bytes=10)
    bench.load(B, num_bytes=9)
    bench.load(A, num_bytes=5)
    bench.tiers.pin(A)
    bench.load(C, num_bytes=2)
    bench.tiers.unload(C)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.ABSENT
    assert bench.tiers.want(C) is Residency.ABSENT


def test_an_image_that_proves_too_large_for_the_room_left_waits_for_room() -> None:
    bench = Bench(num_slots=2, max_bytes=10)
    bench.load(A, num_bytes=6)
    bench.tiers.pin(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.LOADING
    assert bench.finish(B, num_bytes=5) is None
    assert bench.tiers.residency(B) is Residency.ABSENT and bench.loader.dropped == [B]
    # its size is known now: no second load begins in vain
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.ABSENT
    bench.tiers.unpin(A)
    bench.tiers.begin_walk()
    assert bench.tiers.want(B) is Residency.LOADING
    assert bench.finish(B, num_bytes=5) is None
    assert bench.tiers.residency(B) is Residency.READY


def test_nothing_is_evicted_when_that_would_not_be_enough() -> None:
    bench = Bench(num_slots=3, max_bytes=10)
    bench.load(C, num_bytes=9)
    bench.load(A, num_bytes=6)
    bench.load(B, num_bytes=2)
    bench.tiers.pin(A)
    dropped = list(bench.loader.dropped)
    bench.tiers.begin_walk()
    assert bench.tiers.want(C) is Residency.ABSENT
    assert bench.loader.dropped == dropped


def test_unloading_waits_for_the_last_user() -> None:
    bench = Bench()
    bench.tiers.join(A)
    bench.tiers.join(A)
    bench.load(A)
    bench.tiers.pin(A)
    bench.tiers.unload(A)
    bench.tiers.unpin(A)
    bench.tiers.leave(A)
    assert bench.loader.dropped == []
    bench.tiers.leave(A)
    assert bench.loader.dropped == [A]


def test_unloading_an_adapter_that_is_loading_drops_it_when_it_arrives() -> None:
    bench = Bench()
    bench.tiers.want(A)
    bench.tiers.unload(A)
    assert bench.finish(A) is None
    assert bench.loader.dropped == [A]
    # and the wish is forgotten: a later load stays
    bench.load(A)
    assert bench.tiers.residency(A) is Residency.READY


def test_unloading_an_unknown_adapter_does_nothing() -> None:
    bench = Bench()
    bench.tiers.unload(A)
    bench.load(A)
    assert bench.tiers.residency(A) is Residency.READY


def test_prefetching_without_room_is_a_hint_that_is_dropped() -> None:
    bench = Bench(num_slots=1)
    bench.load(A)
    bench.tiers.pin(A)
    bench.tiers.prefetch(B)
    assert bench.tiers.residency(B) is Residency.ABSENT
    bench.tiers.check_invariants(Counter({A: 1}), Counter())


def test_pinning_before_ready_is_refused() -> None:
    bench = Bench()
    bench.tiers.want(A)
    with pytest.raises(AssertionError, match="before it is ready"):
        bench.tiers.pin(A)


def test_states_tell_tier_pins_bytes_and_rank() -> None:
    bench = Bench()
    bench.load(A, num_bytes=4)
    bench.tiers.pin(A)
    bench.tiers.want(B)
    states = {state.digest: state for state in bench.tiers.states()}
    assert (states[A].tier, states[A].num_pins, states[A].num_bytes, states[A].rank) == ("device", 1, 4, 8)
    assert states[B].tier == "loading"


def test_sizes_of_adapters_are_remembered_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.adapter_moves.MAX_KNOWN_SIZES", 2)
    bench = Bench(num_slots=1, max_bytes=10)
    for digest in (A, B, C):
        bench.tiers.begin_walk()
        bench.tiers.want(digest)
        bench.finish(digest, num_bytes=11)
    assert bench.tiers.refusal(A) is None
    assert bench.tiers.refusal(B) is not None and bench.tiers.refusal(C) is not None
