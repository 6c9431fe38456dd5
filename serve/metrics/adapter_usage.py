"""What requests did with adapters: under which names they appear, how much they were used, how hot they are.

Owns bounded memories of each. Invariant: usage is never lost, only summed up.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

from serve.messages import AdapterState
from serve.metrics.names import MAX_ADAPTER_SERIES

MAX_NAMES = 1 << 14
# heat halves in this time
HALF_LIFE_S = 60.0

Value = TypeVar("Value")


class AdapterUsage:
    """Requests and tokens per adapter name: the most recent ones, and the sum of all that fell out."""

    def __init__(self, max_series: int = MAX_ADAPTER_SERIES) -> None:
        self._max_series = max_series
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._other = (0, 0)

    def add(self, name: str, *, num_requests: int, num_tokens: int) -> None:
        """Count usage and make this adapter the most recent one."""
        requests, tokens = self._counts.get(name, (0, 0))
        self._counts[name] = (requests + num_requests, tokens + num_tokens)
        self._counts.move_to_end(name)
        if len(self._counts) > self._max_series:
            _, (requests, tokens) = self._counts.popitem(last=False)
            self._other = (self._other[0] + requests, self._other[1] + tokens)

    def rows(self) -> list[tuple[str, tuple[int, int]]]:
        """Return (name, (requests, tokens)), `_other` last."""
        return [*self._counts.items(), ("_other", self._other)]


class AdapterNames:
    """Under which name an adapter's series appear, and how often it was asked for lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._names: OrderedDict[str, str] = OrderedDict()
        # heat, and when it was that
        self._heat: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def set(self, digest: str, name: str) -> None:
        """Remember a name."""
        _put(self._names, digest, name)

    def get(self, digest: str) -> str:
        """Return the adapter's name, or the start of its digest if nobody named it."""
        return self._names.get(digest, digest[:12])

    def use(self, digest: str) -> None:
        """Count a request's wish."""
        _put(self._heat, digest, (self._heat_of(digest) + 1.0, self._clock()))

    def hottest(self, adapters: Iterable[AdapterState]) -> list[AdapterState]:
        """Sort adapters: those of most running sequences first, among equals those asked for most often lately."""
        return sorted(adapters, key=lambda adapter: (-adapter.num_pins, -self._heat_of(adapter.digest)))

    def first_of_each(self, adapters: Iterable[AdapterState]) -> dict[str, AdapterState]:
        """Return the first version of each name, in order: a series may not occur twice."""
        found: dict[str, AdapterState] = {}
        for adapter in adapters:
            found.setdefault(self.get(adapter.digest), adapter)
        return found

    def _heat_of(self, digest: str) -> float:
        heat, since = self._heat.get(digest, (0.0, 0.0))
        return heat * math.exp2((since - self._clock()) / HALF_LIFE_S)


def _put(memory: "OrderedDict[str, Value]", digest: str, value: Value) -> None:
    memory[digest] = value
    memory.move_to_end(digest)
    if len(memory) > MAX_NAMES:
        memory.popitem(last=False)
