"""Random walks over the engine's pure state machines: one operation per step, the books checked after each.

Owns what a walk may do, and what it keeps itself to compare with: everything else is the machines' own
`check_invariants`. Scopes are small, so that a walk meets every corner often. Invariant: a walk depends on its seed
alone; one that `ends` holds nothing.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.extents import ALIGNMENT_BYTES, Extents, Move
from serve.engine.host_tier import HostTier
from serve.engine.kv_blocks import KvBlocks
from serve.engine.plan import LoadResult
from serve.tenants.gcra import Bucket, Rate
from tests.engine.fake_executor import PlanViolation
from tests.engine.fake_fetcher import FakeFetcher, ImageFile
from tests.engine.line_walk import LineWalk

DIGESTS = tuple(f"{number:064x}" for number in range(5))
# long enough for budgets to fill and to empty many times
STEPS_PER_WALK = 500


class Walk(Protocol):
    """One machine under random operations."""

    def step(self) -> None:
        """Do one operation and check the books."""
        ...

    def end(self) -> None:
        """Give everything back and check that nothing is left."""
        ...


class KvWalk:
    """Block tables that are taken, grown, published, suspected and given back; equal prefixes often meet."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._kv = KvBlocks(self._rng.choice((2, 4, 7)), 4)
        # each with the chain that its content stands for
        self._tables: list[tuple[list[int], int]] = []

    def step(self) -> None:
        """Do one operation."""
        choice, rng = self._rng.random(), self._rng
        if choice < 0.3 or not self._tables:
            self._acquire()
        elif choice < 0.5:
            table, _ = rng.choice(self._tables)
            before = list(table)
            has_grown = self._kv.extend(table, len(table) + rng.randint(0, 2))
            assert table[: len(before)] == before and (has_grown or table == before), "growing changed a table"
        elif choice < 0.7:
            self._publish(*rng.choice(self._tables))
        elif choice < 0.75:
            # whatever a suspect wrote and nobody else holds is unpublished before it is given back
            table, _ = rng.choice(self._tables)
            for block_id in self._kv.retract(table):
                assert not self._kv.is_published(block_id), "a suspect block can still be found"
        else:
            table, _ = self._tables.pop(rng.randrange(len(self._tables)))
            self._kv.release(table)
        self._check()

    def end(self) -> None:
        """Give every table back."""
        for table, _ in self._tables:
            self._kv.release(table)
        self._tables = []
        self._check()
        assert self._kv.num_in_use == 0, "blocks are held by nobody"

    def _acquire(self) -> None:
        chain, num_blocks = self._rng.randrange(3), self._rng.randint(1, 3)
        shared = self._kv.match(_hashes(chain, num_blocks))
        available = self._kv.num_available
        table = self._kv.acquire(shared, num_blocks)
        if table is None:
            assert self._kv.num_available == available, "a refused table took blocks"
        else:
            assert table[: len(shared)] == shared, "a table does not begin with its shared blocks"
            self._tables.append((table, chain))

    def _publish(self, table: list[int], chain: int) -> None:
        for block_id, block_hash in zip(table, _hashes(chain, len(table)), strict=True):
            self._kv.publish(block_id, block_hash)

    def _check(self) -> None:
        self._kv.check_invariants(table for table, _ in self._tables)


class TierWalk:
    """Adapters between disk, host and device: wishes, users, pins, the operator's hands, loads that end or fail."""

    def __init__(self, seed: int) -> None:
        rng = self._rng = random.Random(seed)
        max_images, host_bytes = rng.choice((1, 2, 4)), rng.choice((3, 5, 9))
        files = {digest: ImageFile(rng.randint(1, 4), rng.randint(1, 2)) for digest in DIGESTS}
        self._files = files
        self.fetcher = FakeFetcher(files, max_images, host_bytes)
        self._device_bytes = {digest: rng.randint(1, 4) for digest in DIGESTS}
        self._max_bytes = rng.choice((3, 5, 9))
        self.slots: dict[int, str] = {}
        self._loading: dict[str, int] = {}
        host = HostTier(self.fetcher, max_images, host_bytes) if rng.random() < 0.8 else None
        self.tiers = AdapterTiers(self, rng.randint(1, 3), self._max_bytes, host=host)
        self._users: Counter[str] = Counter()
        self._pinned: Counter[str] = Counter()
        # by tier, as heartbeats tell
        self._moved: Counter[str] = Counter()
        self._steps = (self._walk, self._walk, self._use, self._use, self._pin, self._unpin, self._operate, self._poll)

    def start_load(self, digest: str, slot: int) -> None:
        """Be the executor."""
        if slot in self.slots or (self.tiers.host is not None and digest not in self.fetcher.here):
            raise PlanViolation(f"{digest} is loaded over slot {slot}, or without its image")
        self.slots[slot] = digest
        self._loading[digest] = slot

    def drop(self, digest: str, slot: int) -> None:
        """Be the executor."""
        if self._pinned[digest] or self.slots.pop(slot, None) != digest:
            raise PlanViolation(f"{digest} is dropped from slot {slot}, where it is not, or is in use")

    def step(self) -> None:
        """Do one operation."""
        self._rng.choice(self._steps)()
        self.check()

    def end(self) -> None:
        """Let every sequence go, unpin, evict and unload everything, and let what is under way end."""
        for digest in DIGESTS:
            self.tiers.operator_pins.discard(digest)
            for _ in range(self._pinned.pop(digest, 0)):
                self.tiers.unpin(digest)
            for _ in range(self._users.pop(digest, 0)):
                self.tiers.leave(digest)
            self.tiers.unload(digest)
        while self.tiers.is_loading:
            self._poll()
        self.check()
        assert not self.slots and not self.fetcher.here, "something is held that nobody wants"
        assert not any(self._moved.values()), f"bytes came and did not go: {self._moved}"

    def check(self) -> None:
        """Compare the tiers with what the walk holds, with the memory itself, and with what heartbeats told."""
        self.tiers.check_invariants(+self._pinned, self._users)
        for move in self.tiers.take_moves():
            self._moved[move.tier] += move.num_bytes if move.kind == "load" else -move.num_bytes
        ready = [digest for digest in self.slots.values() if digest not in self._loading]
        num_bytes = sum(self._device_bytes[digest] for digest in ready)
        assert num_bytes == self._moved["device"] and num_bytes <= self._max_bytes, "the device's bytes are wrong"
        assert self.fetcher.num_bytes == self._moved["host"], "the host's bytes are wrong"

    def _walk(self) -> None:
        self.tiers.begin_walk()
        for digest in self._rng.sample(DIGESTS, self._rng.randint(1, 3)):
            if self.tiers.refusal(digest) is None:
                self.tiers.want(digest)

    def _use(self) -> None:
        digest = self._rng.choice(DIGESTS)
        if self._users[digest] > self._pinned[digest] and self._rng.random() < 0.5:
            self._users -= Counter([digest])
            self.tiers.leave(digest)
        elif self._users.total() < 6:
            self._users[digest] += 1
            self.tiers.join(digest)
        self._users = +self._users

    def _pin(self) -> None:
        digest = self._rng.choice(DIGESTS)
        if self._users[digest] > self._pinned[digest] and self.tiers.residency(digest) is Residency.READY:
            assert self.slots[self.tiers.pin(digest)] == digest, "a pin names another adapter's slot"
            self._pinned[digest] += 1

    def _unpin(self) -> None:
        pinned = +self._pinned
        if pinned:
            digest = self._rng.choice(list(pinned))
            self._pinned[digest] -= 1
            self.tiers.unpin(digest)

    def _operate(self) -> None:
        digest, choice, pins = self._rng.choice(DIGESTS), self._rng.randrange(5), self.tiers.operator_pins
        if choice == 0:
            pins.add(digest, self.tiers.known_bytes(digest))
        elif choice == 1:
            pins.discard(digest)
        elif choice == 2 and digest not in pins:
            self.tiers.evict(digest)
        elif choice == 3:
            self.tiers.prefetch(digest)
        elif choice == 4:
            self.tiers.unload(digest)

    def _poll(self) -> None:
        digest = self._rng.choice(DIGESTS)
        self._files[digest].num_failures = self._rng.random() < 0.05
        for fetch in self.fetcher.poll():
            self.tiers.finish_fetch(fetch)
        for digest, slot in list(self._loading.items()):
            del self._loading[digest]
            num_bytes, error = self._device_bytes[digest], None
            if self._rng.random() < 0.1:
                del self.slots[slot]
                num_bytes, error = 0, "not finite"
            self.tiers.finish_load(LoadResult(digest, slot, num_bytes, 8, 0.1, error))


class ExtentWalk:
    """The arena's books: extents that come, go, and slide down while others wait."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._num_units = self._rng.choice((6, 12, 20))
        self._extents = Extents(self._num_units * ALIGNMENT_BYTES)
        self._held: dict[int, int] = {}
        self._move: Move | None = None

    def step(self) -> None:
        """Do one operation."""
        choice, rng = self._rng.random(), self._rng
        if choice < 0.45:
            units = rng.randint(1, 5)
            begin = self._extents.acquire(units * ALIGNMENT_BYTES - rng.randint(0, ALIGNMENT_BYTES - 1))
            if begin is not None:
                assert begin not in self._held, "an extent is handed out twice"
                self._held[begin] = units
        elif choice < 0.8 and self._held:
            begin = rng.choice(sorted(self._held))
            del self._held[begin]
            self._extents.release(begin)
            if self._move is not None and self._move.target == begin:
                self._move = None
        elif self._move is not None:
            self._extents.close_move()
            self._move = None
        else:
            self._open(rng.randint(2, 6))
        self._check()

    def end(self) -> None:
        """Give every extent back."""
        for begin in self._held:
            self._extents.release(begin)
        self._held, self._move = {}, None
        self._check()
        assert self._extents.largest_hole == self._extents.num_bytes, "the empty arena is in pieces"

    def _open(self, num_units: int) -> None:
        fixed = set(self._rng.sample(sorted(self._held), len(self._held) // 3))
        self._move = move = self._extents.open_move(num_units * ALIGNMENT_BYTES, fixed)
        if move is not None:
            assert move.source not in fixed and move.target < move.source, "a fixed extent moves, or one moves up"
            self._held[move.target] = self._held.pop(move.source)

    def _check(self) -> None:
        self._extents.check_invariants()
        assert self._extents.begins == self._held.keys(), "extents are lost or strange"
        used = self._extents.num_bytes - self._extents.num_bytes_free
        assert used == sum(self._held.values()) * ALIGNMENT_BYTES, "bytes are lost or counted twice"


class RateWalk:
    """One caller's bucket against the sum of what it was given: never more than the burst and the rate's share."""

    def __init__(self, seed: int) -> None:
        rng = self._rng = random.Random(seed)
        self._rate = Rate(rng.randint(1, 5), rng.choice((7, 1000)), rng.randint(1, 9))
        self._bucket = Bucket(self._rate)
        self._now_us = rng.randrange(10**6)
        # when, and how much less what came back
        self._taken: list[tuple[int, int]] = []

    def step(self) -> None:
        """Do one operation."""
        rng, rate = self._rng, self._rate
        self._now_us += rng.choice((0, 0, 1, rate.period_us // 3, 3 * rate.period_us))
        cost = rng.randint(0, rate.burst)
        wait_us = self._bucket.take(cost, self._now_us)
        if wait_us == 0:
            self._taken = [*self._taken[-8:], (self._now_us, cost)]
        else:
            self._refused(cost, wait_us)
        self._check()

    def end(self) -> None:
        """Wait until everything is back."""
        self._now_us += self._bucket.standing(self._now_us).reset_us + 1
        assert self._bucket.is_full(self._now_us), "a rested bucket is not full"

    def _refused(self, cost: int, wait_us: int) -> None:
        before = self._bucket.standing(self._now_us)
        assert before.remaining < cost, "what is there was refused"
        # it is there when it was promised, and not before
        assert self._bucket.take(cost, self._now_us + wait_us - 1) > 0, "it could have come earlier"
        assert self._bucket.standing(self._now_us) == before, "a refusal was charged"

    def _check(self) -> None:
        total = 0
        for taken_us, cost in reversed(self._taken):
            total += cost
            span_us = self._now_us - taken_us
            # in whole units of the account, so that nothing is rounded
            assert (
                total * self._rate.period_us <= self._rate.burst * self._rate.period_us + span_us * self._rate.amount
            ), f"{total} units came within {span_us} us"


WALKS: dict[str, Callable[[int], Walk]] = {
    "kv blocks": KvWalk,
    "tiers": TierWalk,
    "extents": ExtentWalk,
    "rates": RateWalk,
    "waiting line": LineWalk,
}


def run_walks(name: str, num_steps: int, first_seed: int = 0) -> None:
    """Walk so many steps in all, `STEPS_PER_WALK` by each seed.

    Raises:
        AssertionError: the books of a machine are wrong.
    """
    for seed in range(first_seed, first_seed + -(-num_steps // STEPS_PER_WALK)):
        walk = WALKS[name](seed)
        try:
            for _ in range(STEPS_PER_WALK):
                walk.step()
            walk.end()
        except AssertionError as error:
            error.add_note(f"{name}, seed {seed}")
            raise


def _hashes(chain: int, num_blocks: int) -> list[bytes]:
    return [b"%d/%d" % (chain, index) for index in range(num_blocks)]
