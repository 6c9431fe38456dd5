"""Where each adapter is, and what is wanted of it: the one state machine over the tiers of memory.

Owns users, wishes, the operator's pins and evictions, and the way disk -> host -> device; room and victims are the
tiers' own. Without a host tier, loads come from the disk. Users are live sequences that name an adapter, pins are the
running ones among them. An adapter is ABSENT (on disk), FETCHING, on the HOST, LOADING (host to device) or READY, and
goes back from READY to HOST or ABSENT. Where both tiers are one memory an image goes once it is READY, while the device
has room to spare. Invariants: what runs is READY and never dropped; a load from the host reads no disk; no call waits.
"""

from collections import Counter
from collections.abc import Iterable

from serve.adapter_messages import AdapterMove
from serve.engine.adapter_moves import AdapterHits, KnownSizes
from serve.engine.device_tier import DeviceTier
from serve.engine.eviction import EvictionPolicy
from serve.engine.host_tier import HostTier
from serve.engine.operator_pins import OperatorPins
from serve.engine.plan import FetchResult, LoadResult
from serve.engine.resident import AdapterLoader, Residency
from serve.engine.tier_states import describe
from serve.engine.wish_order import WishOrder
from serve.messages import AdapterState

__all__ = ["AdapterTiers", "Residency"]


class AdapterTiers:
    """The adapters of one engine over its tiers."""

    def __init__(
        self,
        loader: AdapterLoader,
        num_slots: int,
        max_bytes: int,
        policy: EvictionPolicy | None = None,
        *,
        host: HostTier | None = None,
    ) -> None:
        self.host = host
        self.operator_pins = OperatorPins(num_slots, max_bytes)
        self._order = WishOrder() if host is None else host.order
        source = "disk" if host is None else "host"
        self.device = DeviceTier(
            loader, num_slots, max_bytes, policy, self._order, self.operator_pins.holds, source=source
        )
        self.hits = AdapterHits()
        self._num_users: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        # the operator's evictions that wait for running sequences
        self._leaving: set[str] = set()
        # prefetches whose images are on their way to the host
        self._hinted: set[str] = set()
        self._known = KnownSizes()
        # false once a wish of this walk found no room: what becomes free is for that one first
        self._has_room = True

    @property
    def num_pins(self) -> int:
        """Holds of running sequences over all adapters."""
        return sum(resident.num_pins for resident in self.device.residents.values())

    @property
    def is_loading(self) -> bool:
        """Say whether a load or a fetch is under way."""
        is_fetching = self.host is not None and self.host.is_fetching
        return is_fetching or any(not resident.is_ready for resident in self.device.residents.values())

    @property
    def has_wish(self) -> bool:
        """Say whether the operator's pins want something that is not on the device."""
        return any(digest not in self.device.residents for digest in self.operator_pins.held())

    def residency(self, digest: str) -> Residency:
        """Tell how far an adapter is on its way to the device, without asking for it; LOADING: it moves now."""
        state = self.device.residency(digest)
        is_fetching = self.host is not None and self.host.residency(digest) is Residency.LOADING
        return Residency.LOADING if state is Residency.ABSENT and is_fetching else state

    @property
    def num_moves_begun(self) -> int:
        """Fetches and loads since the start, also those that failed or are under way: what tenants are charged for."""
        return self.device.num_loads_begun + (0 if self.host is None else self.host.num_fetches_begun)

    def known_bytes(self, digest: str) -> int:
        """Return what an adapter takes on the device; 0 while that is not known."""
        return self._known.get(digest)

    def refusal(self, digest: str) -> str | None:
        """Return the reason why this adapter can never be served here, when one is known."""
        if self.device.num_slots == 0:
            return "this server holds no adapters (adapter slots: 0)"
        reason = None if self.host is None else self.host.refusal(digest)
        return reason or self._too_large(digest, self._known.get(digest))

    def join(self, digest: str) -> None:
        """Count a live sequence that names this adapter; `leave` when it ends."""
        self._num_users[digest] += 1
        is_on_host = self.host is not None and self.host.residency(digest) is Residency.READY
        if self.device.residency(digest) is Residency.READY:
            self.hits.num_on_device += 1
        elif is_on_host:
            self.hits.num_on_host += 1
        else:
            self.hits.num_missed += 1

    def leave(self, digest: str) -> None:
        """Give `join` back; an adapter that was unloaded meanwhile goes with its last user."""
        self._num_users[digest] -= 1
        if self._num_users[digest] == 0:
            del self._num_users[digest]
            self._drop_unwanted(digest)

    def begin_walk(self) -> None:
        """Forget the order of wishes before the waiting line is walked anew; the operator's come first."""
        self._order.begin_walk()
        self._has_room = True
        if self.host is not None:
            self.host.begin_walk()
        for digest in self.operator_pins.held():
            if digest not in self.device.residents:
                self.want(digest)

    def rank(self, digests: Iterable[str]) -> None:
        """Give several adapters their places in the line ahead of `want`: none is evicted for another of them."""
        self._order.rank(sorted(digests, key=lambda digest: digest not in self.device.residents))

    def want(self, digest: str) -> Residency:
        """Ask for an adapter and start its fetch or its load where there is room.

        Notes: wishes are ranked by the order of the calls since `begin_walk`. A later wish never evicts an earlier one,
        so two waiting sequences cannot push out each other's adapter for ever, and takes no room while an earlier one
        waits for some, so small adapters cannot starve a large one. Both hold in each tier.
        """
        self._order.ask(digest)
        state = self.device.residency(digest)
        if state is not Residency.ABSENT:
            return state
        on_host = Residency.READY if self.host is None else self.host.want(digest, self._is_ready)
        if on_host is not Residency.READY:
            return on_host
        self._has_room = self._has_room and self.device.begin(digest, self._known.get(digest))
        if not self._has_room:
            return Residency.ABSENT
        if self.host is not None:
            self.host.hold(digest)
        return Residency.LOADING

    def prefetch(self, digest: str) -> None:
        """Bring an adapter as far as there is room ahead of its first request; a hint, never an error."""
        self._unwanted.discard(digest)
        self._leaving.discard(digest)
        if self.refusal(digest) is None and self.want(digest) is Residency.LOADING:
            self._hint(digest)

    def evict(self, digest: str) -> int | None:
        """Free an adapter that the operator has not pinned, in every tier; see `unload` for deleted ones.

        Returns:
            Bytes freed; None when running sequences hold it, or it is under way: it goes when the last of them ends.
        """
        assert not self.operator_pins.holds(digest), f"adapter {digest} is pinned and cannot be evicted"
        self._hinted.discard(digest)
        resident = self.device.residents.get(digest)
        on_device = 0
        if resident is not None:
            self._leaving.add(digest)
            self._drop_leaving(digest)
            on_device = resident.num_bytes
        on_host = 0 if self.host is None else self.host.discard(digest, "operator")
        return None if digest in self._leaving or on_host is None else on_device + on_host

    def pin(self, digest: str) -> int:
        """Hold a READY adapter for one running sequence and return its slot; `unpin` when it stops running."""
        if self.host is not None:
            self.host.use(digest)
        return self.device.pin(digest)

    def unpin(self, digest: str) -> None:
        """Give `pin` back."""
        self.device.unpin(digest)
        self._drop_leaving(digest)

    def unload(self, digest: str) -> None:
        """Drop an adapter as soon as no live sequence names it, also one that the operator pinned."""
        self.operator_pins.discard(digest)
        self._hinted.discard(digest)
        self._unwanted.add(digest)
        self._drop_unwanted(digest)

    def finish_fetch(self, result: FetchResult) -> str | None:
        """Take the end of a fetch; return the reason when the adapter cannot be served, else None."""
        assert self.host is not None, "a fetch ended and there is no host tier"
        error = self.host.finish_fetch(result, self._is_ready)
        is_hinted = result.digest in self._hinted
        self._hinted.discard(result.digest)
        if error is not None:
            self.operator_pins.fail(result.digest, error)
        elif is_hinted and self.want(result.digest) is Residency.LOADING:
            self._hint(result.digest)
        return error

    def finish_load(self, result: LoadResult) -> str | None:
        """Take a load's end; return the reason when the adapter cannot be served, else None.

        An image that proves too large for the bytes left is dropped and stays wanted: its load begins again, now with
        its size known, when there is room. So does one that the executor had no room for.
        """
        digest, resident = result.digest, self.device.residents[result.digest]
        assert resident.slot == result.slot, f"adapter {digest} was loaded into slot {result.slot}, not {resident.slot}"
        error = self._too_large(digest, result.num_bytes) or (None if result.is_out_of_room else result.error)
        resident.num_bytes = 0
        if result.num_bytes:
            self._known.remember(digest, result.num_bytes)
        if error is not None:
            self.operator_pins.fail(digest, error)
        elif result.num_bytes:
            self.operator_pins.weigh(digest, result.num_bytes)
        self._end_reading(digest, is_good=error is None)
        if result.error is not None:
            # a failed load left no bytes behind
            is_wanted = error is None and digest not in self._unwanted | self._leaving
            self.device.remove(digest)
            self._leaving.discard(digest)
            if is_wanted:
                self.want(digest)
        elif error is not None or not self.device.settle(result):
            self.device.drop(digest, "no_fit")
            self._leaving.discard(digest)
        elif self.host is not None and self.host.is_device_memory and self.device.has_room_to_spare(digest):
            self.host.discard(digest, "on_device")
        self._drop_unwanted(digest)
        self._drop_leaving(digest)
        return error

    def states(self) -> list[AdapterState]:
        """Describe every adapter in memory or under way, for the heartbeat."""
        return describe(self.device, self.host, self._leaving)

    def take_moves(self) -> list[AdapterMove]:
        """Hand out what came and went since the last call, in each tier in order."""
        return ([] if self.host is None else self.host.moves.take_recent()) + self.device.moves.take_recent()

    def check_invariants(self, pinned: Counter[str], users: Counter[str]) -> None:
        """Compare both tiers with each other and with what the live sequences say."""
        assert self._num_users == users, f"users {self._num_users} differ from the live sequences' {users}"
        self.device.check_invariants(pinned)
        self.operator_pins.check_invariants()
        residents = self.device.residents
        loading = {digest for digest, resident in residents.items() if not resident.is_ready}
        if self.host is not None:
            self.host.check_invariants(loading)
        held_up = loading | {digest for digest, resident in residents.items() if resident.num_pins}
        assert self._leaving <= held_up, "an adapter that nothing holds was not evicted as the operator asked"

    def _is_ready(self, digest: str) -> bool:
        return self.device.residency(digest) is Residency.READY

    def _hint(self, digest: str) -> None:
        if digest not in self.device.residents:
            self._hinted.add(digest)

    def _end_reading(self, digest: str, *, is_good: bool) -> None:
        """Release the image that a load has read; one that could not be loaded is read and verified anew next time."""
        if self.host is not None:
            self.host.let_go(digest)
            if not is_good:
                self.host.discard(digest, "failed")

    def _too_large(self, digest: str, num_bytes: int) -> str | None:
        num_pinned = self.operator_pins.num_bytes_beside((digest,))
        if num_bytes <= self.device.max_bytes - num_pinned:
            return None
        others = f", {num_pinned} of them for other adapters that are pinned" if num_pinned else ""
        return (
            f"the adapter takes {num_bytes} bytes in memory; this server holds at most {self.device.max_bytes}{others} "
            "(--adapter-device-bytes)"
        )

    def _drop_unwanted(self, digest: str) -> None:
        """Carry out an `unload` that nothing holds up any more; a load under way is dropped when it ends."""
        if digest not in self._unwanted or digest in self._num_users:
            return
        resident = self.device.residents.get(digest)
        if resident is None or resident.is_ready:
            self._unwanted.discard(digest)
        if resident is not None and resident.is_ready:
            self._drop(digest, "unload")
        if self.host is not None:
            self.host.discard(digest, "unload")

    def _drop_leaving(self, digest: str) -> None:
        """Carry out an `evict` that no running sequence holds up any more."""
        resident = self.device.residents.get(digest)
        if digest in self._leaving and resident is not None and resident.is_ready and resident.num_pins == 0:
            self._drop(digest, "operator")

    def _drop(self, digest: str, cause: str) -> None:
        self._leaving.discard(digest)
        self.device.drop(digest, cause)
