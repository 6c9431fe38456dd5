"""Which resident adapter to drop first: five published policies behind one small protocol, and the default.

Owns the order only; whether an adapter may be dropped (pins, wishes, loads) is the tiers' question, so every policy
names all residents, and the tiers take the first ones they may. Invariants: `victims` names each resident exactly once;
a policy remembers a bounded number of digests that are not in memory. `docs/benchmarks/eviction.md` compares them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from serve.engine.recent_uses import RecentUses

# digests remembered that are not in memory now
MAX_GHOSTS = 4096
# how often a use counts at most: beyond it an adapter is hot, and should not stay so for ever
_MOST_USES = 3
# a load costs a fixed part and one by size: reading a header and a table row, at about 2 GB/s from a cold disk
_FIXED_LOAD_BYTES = 4 << 20


class EvictionPolicy(Protocol):
    """Told of every arrival, use and departure; asked who should go."""

    def enter(self, digest: str) -> None:
        """Take a new resident; it was asked for just now, and its size may not be known yet."""
        ...

    def weigh(self, digest: str, num_bytes: int) -> None:
        """Learn a resident's size, at the end of its load."""
        ...

    def use(self, digest: str) -> None:
        """Count a request's use of a resident."""
        ...

    def leave(self, digest: str) -> None:
        """Forget a resident, whatever made it go."""
        ...

    def victims(self) -> Iterator[str]:
        """Name every resident once, the best one to drop first. Residents must not change while it is read."""
        ...


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def enter(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._order[digest] = None

    def weigh(self, digest: str, num_bytes: int) -> None:
        """See `EvictionPolicy`; sizes do not matter here."""

    def use(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._order.move_to_end(digest)

    def leave(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        del self._order[digest]

    def victims(self) -> Iterator[str]:
        """See `EvictionPolicy`."""
        return iter(self._order)


class Lfu:
    """Least frequently used, by counts that halve as time goes; of equal ones the least recent."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()
        self._uses = RecentUses()

    def enter(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._order[digest] = None

    def weigh(self, digest: str, num_bytes: int) -> None:
        """See `EvictionPolicy`; sizes do not matter here."""

    def use(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._order.move_to_end(digest)
        self._uses.count(digest, len(self._order))

    def leave(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        del self._order[digest]

    def victims(self) -> Iterator[str]:
        """See `EvictionPolicy`."""
        return iter(sorted(self._order, key=self._uses.__getitem__))


class Gdsf:
    """Greedy dual size frequency: value = age when last used + uses * cost of a load / bytes.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy" (HP, 1998).
    """

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._uses = RecentUses()
        # value of the last one that was dropped: what those that stay are worth more than
        self._age = 0.0

    def enter(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._bytes[digest] = 0
        self._value(digest)

    def weigh(self, digest: str, num_bytes: int) -> None:
        """See `EvictionPolicy`."""
        self._bytes[digest] = num_bytes
        self._value(digest)

    def use(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._uses.count(digest, len(self._values))
        self._value(digest)

    def leave(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        del self._bytes[digest]
        self._age = max(self._age, self._values.pop(digest))

    def victims(self) -> Iterator[str]:
        """See `EvictionPolicy`."""
        return iter(sorted(self._values, key=self._values.__getitem__))

    def _value(self, digest: str) -> None:
        num_bytes = self._bytes[digest]
        # of unknown size: as if it were free to load again
        cost_per_byte = (num_bytes + _FIXED_LOAD_BYTES) / num_bytes if num_bytes else 0.0
        self._values[digest] = self._age + self._uses[digest] * cost_per_byte


class WTinyLfu:
    """A small recent part beside a main part; who goes is the less frequently used of both parts' oldest.

    A new adapter is always let in, since the request that brought it waits for it. Source of the rest: Einziger,
    Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (ACM ToS 2017).
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._main: OrderedDict[str, None] = OrderedDict()
        self._uses = RecentUses()

    def enter(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._recent[digest] = None
        if len(self._recent) > self._num_recent:
            oldest, _ = self._recent.popitem(last=False)
            self._main[oldest] = None

    def weigh(self, digest: str, num_bytes: int) -> None:
        """See `EvictionPolicy`; sizes do not matter here."""

    def use(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        self._uses.count(digest, len(self._recent) + len(self._main))
        (self._recent if digest in self._recent else self._main).move_to_end(digest)

    def leave(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        del (self._recent if digest in self._recent else self._main)[digest]

    def victims(self) -> Iterator[str]:
        """See `EvictionPolicy`."""
        recent, main = list(self._recent), list(self._main)
        place_recent = place_main = 0
        while place_recent < len(recent) and place_main < len(main):
            if self._uses[recent[place_recent]] <= self._uses[main[place_main]]:
                yield recent[place_recent]
                place_recent += 1
            else:
                yield main[place_main]
                place_main += 1
        yield from recent[place_recent:]
        yield from main[place_main:]

    @property
    def _num_recent(self) -> int:
        return max(1, (len(self._recent) + len(self._main)) // 8)


class S3Fifo:
    """A small queue of newcomers, a main queue of those used again, and ghosts that come back straight into the main.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023).
    """

    def __init__(self) -> None:
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        self._ghosts: OrderedDict[str, None] = OrderedDict()

    def enter(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        if digest in self._ghosts:
            del self._ghosts[digest]
            self._main[digest] = 0
        else:
            self._small[digest] = 0

    def weigh(self, digest: str, num_bytes: int) -> None:
        """See `EvictionPolicy`; sizes do not matter here."""

    def use(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        queue = self._small if digest in self._small else self._main
        queue[digest] = min(queue[digest] + 1, _MOST_USES)

    def leave(self, digest: str) -> None:
        """See `EvictionPolicy`."""
        if digest in self._main:
            del self._main[digest]
            return
        del self._small[digest]
        self._ghosts[digest] = None
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[str]:
        """See `EvictionPolicy`: first the queues do what they would have done by now."""
        self._settle()
        is_small_first = len(self._small) * 10 >= len(self._small) + len(self._main)
        first, second = (self._small, self._main) if is_small_first else (self._main, self._small)
        ordered = [*first, *second]
        return iter(sorted(ordered, key=lambda digest: self._main.get(digest, 0) > 0))

    def _settle(self) -> None:
        """Move newcomers that were used again, and give the used ones at the head of the main queue another round."""
        for digest in [digest for digest, uses in self._small.items() if uses > 1]:
            del self._small[digest]
            self._main[digest] = 0
        for _ in range(len(self._main)):
            digest, uses = next(iter(self._main.items()))
            if uses == 0:
                break
            self._main[digest] = uses - 1
            self._main.move_to_end(digest)


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"lru": Lru, "lfu": Lfu, "gdsf": Gdsf, "w-tinylfu": WTinyLfu, "s3-fifo": S3Fifo}
)
