"""Five simulated days of churn over the real engine on a virtual clock: at the end of each day nothing has leaked.

Tenants come and go, adapters are published, asked for, pinned, evicted and deleted, requests are cancelled, run out of
time or fail with their adapter, and the engine process is lost. What is counted as a leak: anything that the engine
says it holds at rest, and any growth of what it is made of from one day to the next.
"""

import gc
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType, ModuleType

import pytest

from serve.adapter_messages import AdapterDone, EvictAdapter, PinAdapter, UnpinAdapter
from serve.engine.adapter_moves import KnownSizes
from serve.engine.engine import Engine
from serve.engine.kv_blocks import KvBlocks
from serve.engine.lifecycle import LiveSequences
from serve.engine.sequence import Sequence
from serve.messages import Abort, Failed, Finished, LoadAdapter, SamplingParams, Submit, UnloadAdapter
from tests.engine.bench import LIMITS
from tests.engine.fake_executor import AdapterFile, FakeExecutor
from tests.engine.fake_fetcher import FakeFetcher, ImageFile
from tests.engine.toy_model import Toy

DAY_S = 86_400.0
NUM_DAYS = 5
SHORT_REQUESTS = 250
LONG_REQUESTS = 8_640
# what is remembered of adapters and tenants that are gone is bounded; low enough here to be full after a day
KEPT = 24
# of what the engine is made of, from its first two days to its last: some 300 objects then and now, 900 and more with
# any of the planted leaks
GROWTH = 1.5
# with 200 tenants what is remembered swings with whose it is; one object per request would be 40,000
MOST_OBJECTS = 3_000
NUM_ADAPTERS = 10_000
CHURN = replace(
    LIMITS, num_kv_blocks=24, max_num_seqs=6, adapter_device_bytes=60, adapter_host_bytes=120, max_host_images=12
)


@pytest.fixture(autouse=True)
def _quiet_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for bound in (
        "adapter_moves.MAX_KNOWN_SIZES",
        "virtual_tokens.MAX_IDLE_TENANTS",
        "virtual_tokens.MAX_IDLE_ADAPTERS",
    ):
        monkeypatch.setattr(f"serve.engine.{bound}", KEPT)
    # loads fail on purpose
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Files(dict[str, AdapterFile]):
    """Ten thousand adapters, each made when it is asked for: sizes follow from the digest, one load in 50 fails."""

    def __missing__(self, digest: str) -> AdapterFile:
        number = int(digest, 16)
        return AdapterFile(2 + number % 9, 1 + number % 3, num_failures=int(number % 50 == 0))


class ImageFiles(dict[str, ImageFile]):
    """Their images; one fetch in 50 fails."""

    def __missing__(self, digest: str) -> ImageFile:
        number = int(digest, 16)
        return ImageFile(2 + number % 7, 1 + number % 4, num_failures=int(number % 50 == 1))


class Churn:
    """One server's life, a request now and then."""

    def __init__(self, seed: int, num_tenants: int) -> None:
        self._rng = random.Random(seed)
        self._num_tenants = num_tenants
        self.now_s = 0.0
        self._number = 0
        self.num_ended = 0
        self.num_restarts = 0
        self._open: set[str] = set()
        self._start()

    def day(self, num_requests: int) -> None:
        """Let a day pass, and come to rest at its end."""
        for _ in range(num_requests):
            self.now_s += self._rng.expovariate(num_requests / DAY_S)
            self._event()
            for _ in range(self._rng.choice((0, 1, 3, 8))):
                self._step()
        self.rest()

    def rest(self) -> None:
        """Step until nothing is left to do, and check that nothing is held."""
        for digest in list(self.pinned):
            self.engine.handle(UnpinAdapter("operator", digest))
        self.pinned.clear()
        for _ in range(2_000):
            if not self.engine.has_work():
                break
            self._step()
        assert not self._open, f"{len(self._open)} requests never ended"
        stats = self.engine.stats()
        held = (stats.num_running, stats.num_waiting, stats.num_kv_blocks_in_use, stats.num_adapter_pins)
        assert held == (0, 0, 0, 0), f"the resting engine holds {held}"
        assert {s.digest for s in stats.adapters if s.num_host_bytes} == self.fetcher.here
        assert {s.digest for s in stats.adapters if s.tier == "device"} == self.executor.loaded
        assert self.fetcher.num_bytes <= CHURN.adapter_host_bytes and len(self.fetcher.here) <= CHURN.max_host_images
        # the memory of test doubles is no leak of the engine's
        self.executor.released.clear()
        self.executor.toys.clear()
        self.executor.salts.clear()

    def _start(self) -> None:
        """Start an engine, or start it anew: what was open ended with its process."""
        self.executor = FakeExecutor(CHURN.num_kv_blocks, CHURN.block_size, Files())
        self.fetcher = FakeFetcher(ImageFiles(), CHURN.max_host_images, CHURN.adapter_host_bytes)
        self.executor.images_here = self.fetcher.here
        self.engine = Engine(CHURN, self.executor, lambda: self.now_s, self.fetcher)
        self.pinned: set[str] = set()
        self._open.clear()

    def _event(self) -> None:
        choice, digest = self._rng.random(), self._digest()
        if choice < 0.7:
            for _ in range(self._rng.choice((1, 1, 2, 6))):
                self._submit(self._digest())
        elif choice < 0.8 and self._open:
            self.engine.handle(Abort(self._rng.choice(sorted(self._open))))
        elif choice < 0.87:
            self.engine.handle(UnloadAdapter(digest))
            self.pinned.discard(digest)
        elif choice < 0.91:
            self.engine.handle(LoadAdapter(digest))
        elif choice < 0.94:
            self.engine.handle(PinAdapter("operator", digest))
            self.pinned.add(digest)
        elif choice < 0.97:
            self.engine.handle(EvictAdapter("operator", digest))
        elif choice < 0.98:
            self.executor.num_lost_steps = 1
        elif choice < 0.985 and self.now_s < DAY_S:
            # a new engine has forgotten everything, so later days could not be compared
            self.num_restarts += 1
            self._start()

    def _submit(self, digest: str | None) -> None:
        self._number += 1
        request_id = f"r{self._number}"
        stem = [self._rng.randrange(1, 9)] * 6
        params = SamplingParams(max_tokens=self._rng.randint(1, 5), seed=1, ignore_eos=True)
        command = Submit(
            request_id,
            [*stem, self._rng.randrange(1, 9)],
            params,
            digest,
            tenant=f"t{self._rng.randrange(self._num_tenants)}",
            cold_start=self._rng.choice(("wait", "wait", "fail")),
        )
        self.executor.toys[request_id] = Toy.of(command)
        self._open.add(request_id)
        self.engine.handle(command)

    def _digest(self) -> str:
        # a few are hot, and the day's favourites change
        hot = int(self.now_s // DAY_S) * 7 + self._rng.randrange(8)
        number = hot if self._rng.random() < 0.6 else self._rng.randrange(NUM_ADAPTERS)
        return f"{number:064x}"

    def _step(self) -> None:
        self.now_s += 0.02
        for event in self.engine.step():
            if isinstance(event, Finished | Failed) and event.request_id in self._open:
                self._open.discard(event.request_id)
                self.num_ended += 1
            elif isinstance(event, Finished | Failed):
                assert event.request_id == "operator", f"{event.request_id} ended twice"
            else:
                assert isinstance(event, AdapterDone) or event.request_id in self._open  # type: ignore[union-attr]
        self.engine.check_invariants()


def reachable(root: object) -> int:
    """Count the objects that an object is made of, without code and the modules behind it."""
    seen: dict[int, object] = {}
    found = [root]
    while found:
        each = found.pop()
        if id(each) in seen or isinstance(each, type | FunctionType | ModuleType | Churn | FakeExecutor | FakeFetcher):
            continue
        seen[id(each)] = each
        found += gc.get_referents(each)
    return len(seen)


def _five_days(num_requests: int, seed: int, num_tenants: int = 6) -> list[int]:
    churn, sizes = Churn(seed, num_tenants), []
    for _ in range(NUM_DAYS):
        churn.day(num_requests)
        churn.engine.stats()
        sizes.append(reachable(churn.engine))
    assert churn.now_s > 0.8 * NUM_DAYS * DAY_S and churn.num_ended > NUM_DAYS * num_requests * 0.8
    assert churn.num_restarts > 0
    return sizes


def _leaks(sizes: list[int]) -> bool:
    return sizes[-1] > GROWTH * max(sizes[:2])


def test_five_days_of_churn_leak_nothing() -> None:
    sizes = _five_days(SHORT_REQUESTS, seed=5)
    assert not _leaks(sizes), sizes


def _every_sequence_kept(patch: pytest.MonkeyPatch) -> None:
    forget = LiveSequences._forget

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        forget(self, seq)
        # as a table that is never cleared would
        self.kv._block_of[seq.request_id.encode()] = 0

    patch.setattr(LiveSequences, "_forget", wrong)
    patch.setattr(KvBlocks, "check_invariants", lambda self, tables: None)


def _every_size_remembered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KnownSizes, "remember", lambda self, digest, size: self._num_bytes.__setitem__(digest, size))


def _blocks_of_aborted_ones_kept(patch: pytest.MonkeyPatch) -> None:
    release = KvBlocks.release
    patch.setattr(KvBlocks, "release", lambda self, table: release(self, table) if len(table) != 3 else None)
    patch.setattr(KvBlocks, "check_invariants", lambda self, tables: None)


@pytest.mark.parametrize("plant", [_every_sequence_kept, _every_size_remembered, _blocks_of_aborted_ones_kept])
def test_a_planted_leak_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    try:
        sizes = _five_days(SHORT_REQUESTS, seed=5)
    except AssertionError as error:
        assert "holds" in str(error) or "never ended" in str(error), error
    else:
        assert _leaks(sizes), sizes


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_five_busy_days_of_churn_leak_nothing(seed: int) -> None:
    sizes = _five_days(LONG_REQUESTS, seed)
    assert not _leaks(sizes), sizes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_busy_days_of_two_hundred_tenants_leak_nothing() -> None:
    sizes = _five_days(LONG_REQUESTS, seed=0, num_tenants=200)
    assert max(sizes) < MOST_OBJECTS, sizes
