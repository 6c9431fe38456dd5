"""Which adapter images lie in host memory: the tier between the store and the device.

Owns the decision to fetch, keep or drop an image; the bytes belong to the fetcher. Invariants: an image that a load to
the device reads is never dropped; images and their bytes never exceed their budgets once `finish_fetch` returned; one
fetch per digest at a time; no call waits for a fetch.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet

from serve.engine.adapter_moves import AdapterMoves, KnownSizes
from serve.engine.eviction import EvictionPolicy, Lfu
from serve.engine.plan import FetchResult
from serve.engine.resident import HostImage, ImageFetcher, Residency
from serve.engine.wish_order import Room, WishOrder, find_victims


class HostTier:
    """The images in host memory and the room for more."""

    def __init__(
        self,
        fetcher: ImageFetcher,
        max_images: int,
        max_bytes: int,
        policy: EvictionPolicy | None = None,
        *,
        is_device_memory: bool = False,
    ) -> None:
        """Prepare; `is_device_memory`: the device is a CPU, and what it holds lies in this memory a second time."""
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.is_device_memory = is_device_memory
        self.order = WishOrder()
        self.moves = AdapterMoves("host", "disk")
        self._fetcher = fetcher
        self._policy = Lfu() if policy is None else policy
        self._images: dict[str, HostImage] = {}
        self._known = KnownSizes()
        # false once a wish of this walk found no room: what becomes free is for that one first
        self._has_room = True
        # fetches that began, also those that failed; those that brought an image; images dropped for others
        self.num_fetches_begun = 0
        self.num_fetches_total = 0
        self.num_evictions_total = 0

    @property
    def is_fetching(self) -> bool:
        """Say whether a fetch is under way."""
        return any(not image.is_here for image in self._images.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all images, those under way as far as they are known."""
        return sum(image.num_bytes for image in self._images.values())

    def residency(self, digest: str) -> Residency:
        """Tell where an image is, without asking for it."""
        image = self._images.get(digest)
        if image is None:
            return Residency.ABSENT
        return Residency.READY if image.is_here else Residency.LOADING

    def get(self, digest: str) -> HostImage | None:
        """Return the image's entry, if there is one."""
        return self._images.get(digest)

    def images(self) -> Iterator[tuple[str, HostImage]]:
        """Go through all images, those under way included."""
        return iter(self._images.items())

    def refusal(self, digest: str) -> str | None:
        """Return the reason why this image can never be brought here, when one is known."""
        if self.max_images == 0:
            return "this server holds no adapter images in host memory (--adapter-host-count 0)"
        return self._too_large(self._known.get(digest))

    def begin_walk(self) -> None:
        """Forget the order of wishes."""
        self.order.begin_walk()
        self._has_room = True

    def want(self, digest: str, is_settled: Callable[[str], bool]) -> Residency:
        """Ask for an image and start its fetch where there is room; `order` knows the wish's place.

        Args:
            is_settled: says of another adapter that it is on the device, so that its wish needs no image here.
        """
        image = self._images.get(digest)
        if image is not None:
            image.leaves_for = None
            return Residency.READY if image.is_here else Residency.LOADING
        num_bytes = self._known.get(digest)
        self._has_room = self._has_room and self._make_room(digest, Room(1, num_bytes), is_settled)
        if not self._has_room:
            return Residency.ABSENT
        self._images[digest] = HostImage(num_bytes)
        self._policy.enter(digest)
        self.num_fetches_begun += 1
        self._fetcher.start_fetch(digest)
        return Residency.LOADING

    def use(self, digest: str) -> None:
        """Count a request's use of an adapter, wherever it runs: an image of a hot one is worth keeping."""
        if digest in self._images:
            self._policy.use(digest)

    def hold(self, digest: str) -> None:
        """Keep an image for a load that reads it; `let_go` when the load has ended."""
        image = self._images[digest]
        assert image.is_here, f"a load reads the image of {digest}, which is not here"
        image.num_readers += 1

    def let_go(self, digest: str) -> None:
        """Give `hold` back."""
        image = self._images[digest]
        assert image.num_readers > 0, f"the image of {digest} is let go more often than held"
        image.num_readers -= 1
        self._drop_leaving(digest, image)

    def discard(self, digest: str, cause: str) -> int | None:
        """Drop an image; return the bytes freed, or None when a fetch or a load holds it: it goes when that ends."""
        image = self._images.get(digest)
        if image is None:
            return 0
        image.leaves_for = cause
        if not image.is_here or image.num_readers:
            return None
        return self._drop(digest, cause)

    def finish_fetch(self, result: FetchResult, is_settled: Callable[[str], bool]) -> str | None:
        """Take a fetch's end; return the reason when the adapter cannot be served, else None.

        One that found no room is forgotten; whoever still wants it asks again, now with its size known.
        """
        digest, image = result.digest, self._images[result.digest]
        if result.num_bytes:
            self._known.remember(digest, result.num_bytes)
        error = self._too_large(result.num_bytes) or (None if result.is_out_of_room else result.error)
        image.num_bytes = 0
        if result.error is not None:
            # a failed fetch left no bytes behind
            self._remove(digest)
        elif error is not None or not self._make_room(digest, Room(0, result.num_bytes), is_settled):
            self._drop(digest, "no_fit")
        else:
            image.num_bytes, image.rank, image.is_here = result.num_bytes, result.rank, True
            self._policy.weigh(digest, result.num_bytes)
            self.num_fetches_total += 1
            self.moves.came(digest, result.num_bytes, result.seconds)
            self._drop_leaving(digest, image)
        return error

    def check_invariants(self, readers: AbstractSet[str]) -> None:
        """Compare readers, count and bytes with the loads under way and with the budgets."""
        held = {digest for digest, image in self._images.items() if image.num_readers}
        assert held == readers, f"images held are {held}, loads read {readers}"
        assert all(image.num_readers in (0, 1) for image in self._images.values()), "an image is loaded twice at once"
        assert len(self._images) <= self.max_images, f"{len(self._images)} images exceed {self.max_images}"
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} image bytes exceed {self.max_bytes}"
        self.moves.check_balance(sum(image.num_bytes for image in self._images.values() if image.is_here))
        for digest, image in self._images.items():
            is_held_up = image.num_readers > 0 or not image.is_here
            assert is_held_up or image.leaves_for is None, f"the image of {digest} was to go, and nothing holds it"

    def _make_room(self, digest: str, needed: Room, is_settled: Callable[[str], bool]) -> bool:
        """Drop what the policy names until count and bytes suffice; drop none when they cannot."""

        def freed_by(other: str) -> int | None:
            image = self._images[other]
            is_idle = image.is_here and image.num_readers == 0
            # an adapter on the device needs its image here no more, however early it was asked for
            may_go = is_idle and (is_settled(other) or not self.order.is_before(other, digest))
            return image.num_bytes if may_go else None

        free = Room(self.max_images - len(self._images), self.max_bytes - self.num_bytes)
        victims = find_victims(self._policy.victims(), free, needed, freed_by)
        for victim in victims or ():
            self._drop(victim, "room")
            self.num_evictions_total += 1
        return victims is not None

    def _too_large(self, num_bytes: int) -> str | None:
        if num_bytes <= self.max_bytes:
            return None
        return (
            f"the adapter takes {num_bytes} bytes in host memory; this server holds at most {self.max_bytes} there "
            "(--adapter-host-bytes)"
        )

    def _drop_leaving(self, digest: str, image: HostImage) -> None:
        if image.leaves_for is not None and image.is_here and image.num_readers == 0:
            self._drop(digest, image.leaves_for)

    def _drop(self, digest: str, cause: str) -> int:
        num_bytes = self._remove(digest).num_bytes
        self.moves.went(digest, cause, num_bytes)
        self._fetcher.drop(digest)
        return num_bytes

    def _remove(self, digest: str) -> HostImage:
        self._policy.leave(digest)
        return self._images.pop(digest)
