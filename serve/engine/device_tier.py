"""The adapters that steps can use: slots and bytes within their budgets, pins of running sequences, eviction.

Owns who is in which slot; what is wanted, and what leaves for other reasons than room, is `adapter_tiers`' business,
the bytes are the loader's. Invariants: a pinned adapter is never dropped; READY bytes never exceed the budget once
`settle` returned.
"""

from collections import Counter
from collections.abc import Callable

from serve.engine.adapter_moves import AdapterMoves
from serve.engine.eviction import EvictionPolicy, Lfu
from serve.engine.plan import LoadResult
from serve.engine.resident import AdapterLoader, Residency, Resident
from serve.engine.wish_order import Room, WishOrder, find_victims

# how many more adapters must fit before none is thought to leave soon
_SPARE_ADAPTERS = 16


class DeviceTier:
    """The adapters in slots and the room for more."""

    def __init__(
        self,
        loader: AdapterLoader,
        num_slots: int,
        max_bytes: int,
        policy: EvictionPolicy | None,
        order: WishOrder,
        is_kept: Callable[[str], bool],
        *,
        source: str,
    ) -> None:
        """Prepare.

        Args:
            order: whose wish came first. is_kept: says of an adapter that the operator does not let it go.
            source: the tier that loads come from.
        """
        self.num_slots = num_slots
        self.max_bytes = max_bytes
        self.moves = AdapterMoves("device", source)
        self.residents: dict[str, Resident] = {}
        # loads that began, also those that failed; those that ended READY; adapters dropped for others
        self.num_loads_begun = 0
        self.num_loads_total = 0
        self.num_evictions_total = 0
        self._loader = loader
        self._policy = Lfu() if policy is None else policy
        self._order = order
        self._is_kept = is_kept
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters, those under way as far as they are known."""
        return sum(resident.num_bytes for resident in self.residents.values())

    def residency(self, digest: str) -> Residency:
        """Tell where an adapter is in this tier."""
        resident = self.residents.get(digest)
        if resident is None:
            return Residency.ABSENT
        return Residency.READY if resident.is_ready else Residency.LOADING

    def begin(self, digest: str, num_bytes: int) -> bool:
        """Start the load of an absent adapter; False, with nothing changed, when there is no room for so many bytes."""
        if not self._make_room(digest, Room(1, num_bytes)):
            return False
        slot = self._free_slots.pop()
        self.residents[digest] = Resident(slot, num_bytes=num_bytes)
        self._policy.enter(digest)
        self.num_loads_begun += 1
        self._loader.start_load(digest, slot)
        return True

    def settle(self, result: LoadResult) -> bool:
        """Make a loaded adapter READY; False when its true size has no room, and the caller drops it."""
        resident = self.residents[result.digest]
        if not self._make_room(result.digest, Room(0, result.num_bytes)):
            return False
        resident.num_bytes, resident.rank, resident.is_ready = result.num_bytes, result.rank, True
        self._policy.weigh(result.digest, result.num_bytes)
        self.num_loads_total += 1
        self.moves.came(result.digest, result.num_bytes, result.seconds)
        return True

    def has_room_to_spare(self, digest: str) -> bool:
        """Say whether so many more adapters like this one would fit that its eviction is far away."""
        num_bytes = self.num_bytes + _SPARE_ADAPTERS * self.residents[digest].num_bytes
        return len(self._free_slots) >= _SPARE_ADAPTERS and num_bytes <= self.max_bytes

    def pin(self, digest: str) -> int:
        """Hold a READY adapter for one running sequence and return its slot."""
        resident = self.residents[digest]
        assert resident.is_ready, f"adapter {digest} is pinned before it is ready"
        resident.num_pins += 1
        self._policy.use(digest)
        return resident.slot

    def unpin(self, digest: str) -> None:
        """Give `pin` back."""
        resident = self.residents[digest]
        assert resident.num_pins > 0, f"adapter {digest} is unpinned more often than pinned"
        resident.num_pins -= 1

    def drop(self, digest: str, cause: str) -> None:
        """Free an adapter's slot and bytes."""
        resident = self.remove(digest)
        self.moves.went(digest, cause, resident.num_bytes)
        self._loader.drop(digest, resident.slot)

    def remove(self, digest: str) -> Resident:
        """Take out an adapter of which the loader holds nothing."""
        resident = self.residents.pop(digest)
        assert resident.num_pins == 0, f"adapter {digest} is dropped while running sequences hold it"
        self._policy.leave(digest)
        self._free_slots.append(resident.slot)
        return resident

    def check_invariants(self, pinned: Counter[str]) -> None:
        """Compare pins, slots and bytes with what the running sequences say."""
        pins = Counter({digest: r.num_pins for digest, r in self.residents.items() if r.num_pins})
        assert pins == pinned, f"pins {pins} differ from the running sequences' {pinned}"
        slots = [resident.slot for resident in self.residents.values()] + self._free_slots
        assert sorted(slots) == list(range(self.num_slots)), f"adapter slots {sorted(slots)} are lost or doubled"
        assert all(r.is_ready or r.num_pins == 0 for r in self.residents.values()), "a pinned adapter is not ready"
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} adapter bytes exceed {self.max_bytes}"
        self.moves.check_balance(sum(r.num_bytes for r in self.residents.values() if r.is_ready))

    def _make_room(self, digest: str, needed: Room) -> bool:
        """Evict what the policy names until slots and bytes suffice; evict none when they cannot."""

        def freed_by(other: str) -> int | None:
            resident = self.residents[other]
            is_idle = resident.is_ready and resident.num_pins == 0 and not self._is_kept(other)
            return resident.num_bytes if is_idle and not self._order.is_before(other, digest) else None

        free = Room(len(self._free_slots), self.max_bytes - self.num_bytes)
        victims = find_victims(self._policy.victims(), free, needed, freed_by)
        for victim in victims or ():
            self.drop(victim, "room")
            self.num_evictions_total += 1
        return victims is not None
