"""When each adapter was last asked for on this replica.

Owns a bounded memory of it. Invariant: what is forgotten was asked for longest ago.
"""

from collections import OrderedDict
from collections.abc import Callable

_MAX_ADAPTERS = 1 << 16


class LastUses:
    """Digest -> unix time of the last request. Event loop only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at: OrderedDict[str, int] = OrderedDict()

    def use(self, digest: str) -> None:
        """Note a request."""
        self._at[digest] = int(self._clock())
        self._at.move_to_end(digest)
        if len(self._at) > _MAX_ADAPTERS:
            self._at.popitem(last=False)

    def of(self, digest: str) -> int | None:
        """Return when it was last asked for, None if not since this replica started."""
        return self._at.get(digest)
