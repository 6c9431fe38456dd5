"""The pure state machines under a million random operations, every short sequence of them, and planted bugs."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.extents import ALIGNMENT_BYTES, Extents
from serve.engine.host_tier import HostTier
from serve.engine.plan import LoadResult
from tests.engine.fake_fetcher import FakeFetcher, ImageFile
from tests.engine.planted_state_bugs import STATE_PLANTS, StatePlant
from tests.engine.state_walks import WALKS, run_walks

# a million in all; the shares follow what a step costs, 3 to 50 us on a 2-core machine, 2026-11
NUM_STEPS = {"kv blocks": 400_000, "tiers": 150_000, "extents": 250_000, "rates": 180_000, "waiting line": 20_000}
LONG_FACTOR = 10
# each planted bug was seen within 3,500 steps when this was written
MAX_STEPS_PER_BUG = 20_000
A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize("name", WALKS)
def test_a_million_random_steps_keep_the_books(name: str) -> None:
    assert sum(NUM_STEPS.values()) == 1_000_000
    run_walks(name, NUM_STEPS[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WALKS)
def test_ten_million_random_steps_keep_the_books(name: str) -> None:
    run_walks(name, LONG_FACTOR * NUM_STEPS[name], first_seed=1_000_000)


@pytest.mark.parametrize("planted", STATE_PLANTS.values(), ids=STATE_PLANTS.keys())
def test_the_walks_catch_a_planted_bug(planted: StatePlant, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.plant(monkeypatch)
    try:
        run_walks(planted.walk, MAX_STEPS_PER_BUG)
    # PlanViolation is no Exception, and a plant may break anything
    except BaseException as finding:
        assert not isinstance(finding, KeyboardInterrupt)
        return
    pytest.fail(f"{MAX_STEPS_PER_BUG} steps did not show the bug")


class SmallTiers:
    """Two adapters, one place on the host and one slot: every operation by name."""

    def __init__(self) -> None:
        self._fetcher = FakeFetcher({A: ImageFile(1), B: ImageFile(2, 2)}, max_images=1, max_bytes=2)
        self._tiers = AdapterTiers(self, 1, 2, host=HostTier(self._fetcher, 1, 2))
        self._loading: dict[str, int] = {}
        self._slots: dict[int, str] = {}
        self._num_pins = {A: 0, B: 0}
        self.operations: dict[str, Callable[[], None]] = {
            "want both": partial(self._want, A, B),
            "want b": partial(self._want, B),
            "fetches end": self._end_fetches,
            "loads end": self._end_loads,
            "pin a": partial(self._pin, A),
            "unpin a": partial(self._unpin, A),
            "evict a": partial(self._tiers.evict, A),  # type: ignore[dict-item]
            "unload a": partial(self._tiers.unload, A),
            "prefetch a": partial(self._tiers.prefetch, A),
        }

    def start_load(self, digest: str, slot: int) -> None:
        assert slot not in self._slots and digest in self._fetcher.here, "a load over another, or without its image"
        self._slots[slot] = digest
        self._loading[digest] = slot

    def drop(self, digest: str, slot: int) -> None:
        assert self._slots.pop(slot) == digest and not self._num_pins[digest], "what is in use is dropped"

    def play(self, names: tuple[str, ...]) -> None:
        """Do what is named, checking after each, then let everything go and check that nothing is left."""
        for name in names:
            self.operations[name]()
            self.check()
        for digest in (A, B):
            while self._num_pins[digest]:
                self._unpin(digest)
            self._tiers.unload(digest)
        while self._tiers.is_loading:
            self._end_fetches()
            self._end_loads()
        self.check()
        assert not self._slots and not self._fetcher.here, names

    def check(self) -> None:
        counts = {digest: number for digest, number in self._num_pins.items() if number}
        self._tiers.check_invariants(counts, counts)  # type: ignore[arg-type]

    def _want(self, *digests: str) -> None:
        self._tiers.begin_walk()
        for digest in digests:
            self._tiers.want(digest)

    def _end_fetches(self) -> None:
        for result in self._fetcher.poll():
            self._tiers.finish_fetch(result)

    def _end_loads(self) -> None:
        loads, self._loading = self._loading, {}
        for digest, slot in loads.items():
            self._tiers.finish_load(LoadResult(digest, slot, 1 if digest == A else 2, 8, 0.1))

    def _pin(self, digest: str) -> None:
        if self._tiers.residency(digest) is Residency.READY:
            self._tiers.join(digest)
            self._tiers.pin(digest)
            self._num_pins[digest] += 1

    def _unpin(self, digest: str) -> None:
        if self._num_pins[digest]:
            self._num_pins[digest] -= 1
            self._tiers.unpin(digest)
            self._tiers.leave(digest)


# what brings an adapter to the device and holds it there, before the short sequences begin
_STARTS: tuple[tuple[str, ...], ...] = ((), ("prefetch a", "fetches end", "loads end", "pin a"))


def _every_sequence_of_tier_operations(length: int) -> None:
    names = list(SmallTiers().operations)
    for start in _STARTS:
        for chosen in itertools.product(names, repeat=length):
            SmallTiers().play((*start, *chosen))


def test_every_sequence_of_four_operations_on_the_tiers_ends_well() -> None:
    _every_sequence_of_tier_operations(4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_sequence_of_six_operations_on_the_tiers_ends_well() -> None:
    _every_sequence_of_tier_operations(6)


class SmallExtents:
    """Four units of arena: every operation by name; one that cannot be done now does nothing."""

    NAMES = ("1", "2", "3", "first", "last", "open", "close")

    def __init__(self) -> None:
        self._extents = Extents(4 * ALIGNMENT_BYTES)
        self._held: list[int] = []
        self._target: int | None = None

    def play(self, names: tuple[str, ...]) -> None:
        """Do what is named, checking after each, then give everything back."""
        for name in names:
            self._do(name)
            self._extents.check_invariants()
            assert self._extents.begins == set(self._held), names
        for begin in self._held:
            self._extents.release(begin)
        assert self._extents.largest_hole == self._extents.num_bytes, names

    def _do(self, name: str) -> None:
        if name.isdigit():
            begin = self._extents.acquire(int(name) * ALIGNMENT_BYTES)
            self._held += [] if begin is None else [begin]
        elif name in ("first", "last") and self._held:
            begin = self._held.pop(0 if name == "first" else -1)
            self._extents.release(begin)
            self._target = None if begin == self._target else self._target
        elif name == "open" and self._target is None:
            move = self._extents.open_move(3 * ALIGNMENT_BYTES, ())
            if move is not None:
                self._held[self._held.index(move.source)] = self._target = move.target
        elif name == "close" and self._target is not None:
            self._extents.close_move()
            self._target = None


def _every_sequence_of_extent_operations(length: int) -> Iterator[tuple[str, ...]]:
    for names in itertools.product(SmallExtents.NAMES, repeat=length):
        SmallExtents().play(names)
        yield names


def test_every_sequence_of_five_operations_on_the_arena_ends_well() -> None:
    assert sum(1 for _ in _every_sequence_of_extent_operations(5)) == 7**5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_sequence_of_seven_operations_on_the_arena_ends_well() -> None:
    assert sum(1 for _ in _every_sequence_of_extent_operations(7)) == 7**7
