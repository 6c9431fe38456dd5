"""Which adapters are in memory: one state per digest, slots and bytes within their budgets, pins, eviction.

Owns the decision to load, keep or drop; the bytes and the copying belong to the executor, which is told through
`AdapterLoader`. Users are live sequences that name an adapter, pins are the running ones among them; the operator's
pins are `operator_pins`'.
Invariants: ABSENT -> LOADING -> READY and back; a pinned adapter is never dropped; READY bytes never exceed the budget
once `finish_load` returned; no call waits for a load.
"""

from collections import Counter
from collections.abc import Iterable

from serve.engine.adapter_moves import AdapterMoves, KnownSizes
from serve.engine.eviction import EvictionPolicy, Lfu
from serve.engine.operator_pins import OperatorPins
from serve.engine.plan import LoadResult
from serve.engine.resident import AdapterLoader, Residency, Resident
from serve.messages import AdapterState

__all__ = ["AdapterTiers", "Residency"]


class AdapterTiers:
    """The adapters in memory and the room for more."""

    def __init__(
        self, loader: AdapterLoader, num_slots: int, max_bytes: int, policy: EvictionPolicy | None = None
    ) -> None:
        self._loader = loader
        self._num_slots = num_slots
        self._max_bytes = max_bytes
        self._policy = Lfu() if policy is None else policy
        self._residents: dict[str, Resident] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_users: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        # the operator's evictions that wait for running sequences
        self._leaving: set[str] = set()
        self._known = KnownSizes()
        self.operator_pins = OperatorPins(num_slots, max_bytes)
        self.moves = AdapterMoves()
        # digests that the last walk over the waiting line asked for, each with its place
        self._places: dict[str, int] = {}
        # false once a wish of this walk found no room: what becomes free is for that one first
        self._has_room = True
        self.num_loads_total = 0
        # also those that failed or are under way
        self.num_loads_begun = 0
        self.num_evictions_total = 0

    @property
    def num_pins(self) -> int:
        """Holds of running sequences over all adapters."""
        return sum(resident.num_pins for resident in self._residents.values())

    @property
    def is_loading(self) -> bool:
        """Say whether a load is under way."""
        return any(not resident.is_ready for resident in self._residents.values())

    @property
    def has_wish(self) -> bool:
        """Say whether the operator's pins want something that is not in memory."""
        return any(digest not in self._residents for digest in self.operator_pins.held())

    def residency(self, digest: str) -> Residency:
        """Tell where an adapter is, without asking for it."""
        resident = self._residents.get(digest)
        if resident is None:
            return Residency.ABSENT
        return Residency.READY if resident.is_ready else Residency.LOADING

    @property
    def num_slots(self) -> int:
        """Adapters that can be in memory at once."""
        return self._num_slots

    @property
    def max_bytes(self) -> int:
        """Bytes that they may take together."""
        return self._max_bytes

    def known_bytes(self, digest: str) -> int:
        """Return what an adapter takes in memory; 0 while that is not known."""
        return self._known.get(digest)

    def refusal(self, digest: str) -> str | None:
        """Return the reason why this adapter can never be served here, when one is known."""
        if self._num_slots == 0:
            return "this server holds no adapters (adapter slots: 0)"
        return self._too_large(digest, self._known.get(digest))

    def join(self, digest: str) -> None:
        """Count a live sequence that names this adapter; `leave` when it ends."""
        self._num_users[digest] += 1
        self.moves.count_use(is_hit=self.residency(digest) is Residency.READY)

    def leave(self, digest: str) -> None:
        """Give `join` back; an adapter that was unloaded meanwhile goes with its last user."""
        self._num_users[digest] -= 1
        if self._num_users[digest] == 0:
            del self._num_users[digest]
            self._drop_unwanted(digest)

    def begin_walk(self) -> None:
        """Forget the order of wishes before the waiting line is walked anew; the operator's come first."""
        self._places = {}
        self._has_room = True
        for digest in self.operator_pins.held():
            if digest not in self._residents:
                self.want(digest)

    def rank(self, digests: Iterable[str]) -> None:
        """Give several adapters their places in the line ahead of `want`: none is evicted for another of them."""
        for digest in sorted(digests, key=lambda digest: digest not in self._residents):
            self._places.setdefault(digest, len(self._places))

    def want(self, digest: str) -> Residency:
        """Ask for an adapter and start its load where there is room.

        Notes: wishes are ranked by the order of the calls since `begin_walk`. A later wish never evicts an earlier one,
        so two waiting sequences cannot push out each other's adapter for ever, and takes no room while an earlier one
        waits for some, so small adapters cannot starve a large one.
        """
        self._places.setdefault(digest, len(self._places))
        state = self.residency(digest)
        if state is not Residency.ABSENT:
            return state
        num_bytes = self._known.get(digest)
        self._has_room = self._has_room and self._make_room(digest, num_bytes, num_slots=1)
        if not self._has_room:
            return Residency.ABSENT
        slot = self._free_slots.pop()
        self._residents[digest] = Resident(slot, num_bytes=num_bytes)
        self._policy.enter(digest)
        self.num_loads_begun += 1
        self._loader.start_load(digest, slot)
        return Residency.LOADING

    def prefetch(self, digest: str) -> None:
        """Load an adapter ahead of its first request where there is room; a hint, never an error."""
        self._unwanted.discard(digest)
        self._leaving.discard(digest)
        if self.refusal(digest) is None:
            self.want(digest)

    def evict(self, digest: str) -> int | None:
        """Drop an adapter that the operator has not pinned, and return the bytes freed; see `unload` for deleted ones.

        Returns:
            None when running sequences hold it, or it is loading: it goes when the last of them lets go.
        """
        assert not self.operator_pins.holds(digest), f"adapter {digest} is pinned and cannot be evicted"
        resident = self._residents.get(digest)
        if resident is None:
            return 0
        self._leaving.add(digest)
        self._drop_leaving(digest)
        return None if digest in self._leaving else resident.num_bytes

    def pin(self, digest: str) -> int:
        """Hold a READY adapter for one running sequence and return its slot; `unpin` when it stops running."""
        resident = self._residents[digest]
        assert resident.is_ready, f"adapter {digest} is pinned before it is ready"
        resident.num_pins += 1
        self._policy.use(digest)
        return resident.slot

    def unpin(self, digest: str) -> None:
        """Give `pin` back."""
        resident = self._residents[digest]
        assert resident.num_pins > 0, f"adapter {digest} is unpinned more often than pinned"
        resident.num_pins -= 1
        self._drop_leaving(digest)

    def unload(self, digest: str) -> None:
        """Drop an adapter as soon as no live sequence names it, also one that the operator pinned."""
        self.operator_pins.discard(digest)
        self._unwanted.add(digest)
        self._drop_unwanted(digest)

    def finish_load(self, result: LoadResult) -> str | None:
        """Take a load's end; return the reason when the adapter cannot be served, else None.

        An image that proves too large for the bytes left is dropped and stays wanted: its load begins again, now with
        its size known, when there is room. So does one that the executor had no room for.
        """
        digest, resident = result.digest, self._residents[result.digest]
        assert resident.slot == result.slot, f"adapter {digest} was loaded into slot {result.slot}, not {resident.slot}"
        error = self._too_large(digest, result.num_bytes) or (None if result.is_out_of_room else result.error)
        resident.num_bytes = 0
        if result.num_bytes:
            self._known.remember(digest, result.num_bytes)
        if error is not None:
            self.operator_pins.fail(digest, error)
        elif result.num_bytes:
            self.operator_pins.weigh(digest, result.num_bytes)
        if result.error is not None:
            # a failed load left no bytes behind
            is_wanted = error is None and digest not in self._unwanted | self._leaving
            self._remove(digest)
            if is_wanted:
                self.want(digest)
        elif error is not None or not self._make_room(digest, result.num_bytes, num_slots=0):
            self._drop(digest, "no_fit")
        else:
            resident.num_bytes, resident.rank, resident.is_ready = result.num_bytes, result.rank, True
            self._policy.weigh(digest, result.num_bytes)
            self.num_loads_total += 1
            self.moves.came(digest, result.num_bytes, result.seconds)
        self._drop_unwanted(digest)
        self._drop_leaving(digest)
        return error

    def states(self) -> list[AdapterState]:
        """Describe every adapter in memory or under way, for the heartbeat."""
        return [
            AdapterState(
                digest, "device" if r.is_ready else "loading", r.num_pins, r.num_bytes, r.rank, digest in self._leaving
            )
            for digest, r in self._residents.items()
        ]

    def check_invariants(self, pinned: Counter[str], users: Counter[str]) -> None:
        """Compare pins, users, slots and bytes with what the live sequences say."""
        pins = Counter({digest: r.num_pins for digest, r in self._residents.items() if r.num_pins})
        assert pins == pinned, f"pins {pins} differ from the running sequences' {pinned}"
        assert self._num_users == users, f"users {self._num_users} differ from the live sequences' {users}"
        slots = [resident.slot for resident in self._residents.values()] + self._free_slots
        assert sorted(slots) == list(range(self._num_slots)), f"adapter slots {sorted(slots)} are lost or doubled"
        assert all(r.is_ready or r.num_pins == 0 for r in self._residents.values()), "a pinned adapter is not ready"
        assert self._num_bytes <= self._max_bytes, f"{self._num_bytes} adapter bytes exceed {self._max_bytes}"
        self.moves.check_balance(sum(r.num_bytes for r in self._residents.values() if r.is_ready))
        self.operator_pins.check_invariants()
        held_up = {digest for digest, r in self._residents.items() if r.num_pins or not r.is_ready}
        assert self._leaving <= held_up, "an adapter that nothing holds was not evicted as the operator asked"

    @property
    def _num_bytes(self) -> int:
        return sum(resident.num_bytes for resident in self._residents.values())

    def _make_room(self, digest: str, num_bytes: int, *, num_slots: int) -> bool:
        """Evict what the policy names until slots and bytes suffice; evict none when they cannot."""
        victims: list[str] = []
        free_slots, free_bytes = len(self._free_slots), self._max_bytes - self._num_bytes
        place = self._places.get(digest, len(self._places))
        for other in self._policy.victims():
            if free_slots >= num_slots and free_bytes >= num_bytes:
                break
            resident = self._residents[other]
            is_idle = resident.is_ready and resident.num_pins == 0 and not self.operator_pins.holds(other)
            if is_idle and self._places.get(other, len(self._places)) >= place:
                victims.append(other)
                free_slots += 1
                free_bytes += resident.num_bytes
        if free_slots < num_slots or free_bytes < num_bytes:
            return False
        for victim in victims:
            self._drop(victim, "room")
            self.num_evictions_total += 1
        return True

    def _too_large(self, digest: str, num_bytes: int) -> str | None:
        num_pinned = self.operator_pins.num_bytes_beside((digest,))
        if num_bytes <= self._max_bytes - num_pinned:
            return None
        others = f", {num_pinned} of them for other adapters that are pinned" if num_pinned else ""
        return (
            f"the adapter takes {num_bytes} bytes in memory; this server holds at most {self._max_bytes}{others} "
            "(--adapter-host-bytes, --adapter-device-bytes)"
        )

    def _drop_unwanted(self, digest: str) -> None:
        """Carry out an `unload` that nothing holds up any more; a load under way is dropped when it ends."""
        if digest not in self._unwanted or digest in self._num_users:
            return
        resident = self._residents.get(digest)
        if resident is None or resident.is_ready:
            self._unwanted.discard(digest)
        if resident is not None and resident.is_ready:
            self._drop(digest, "unload")

    def _drop_leaving(self, digest: str) -> None:
        """Carry out an `evict` that no running sequence holds up any more."""
        resident = self._residents.get(digest)
        if digest in self._leaving and resident is not None and resident.is_ready and resident.num_pins == 0:
            self._drop(digest, "operator")

    def _drop(self, digest: str, cause: str) -> None:
        resident = self._remove(digest)
        self.moves.went(digest, cause, resident.num_bytes)
        self._loader.drop(digest, resident.slot)

    def _remove(self, digest: str) -> Resident:
        resident = self._residents.pop(digest)
        self._policy.leave(digest)
        self._leaving.discard(digest)
        self._free_slots.append(resident.slot)
        return resident
