"""What came into adapter memory and went out of it: the record that counts, reports and balances.

Owns the counts only. Invariant: bytes that came less bytes that went are the bytes of the READY adapters, so that one
that is freed twice, or not at all, shows.
"""

from collections import OrderedDict
from dataclasses import dataclass

from serve.adapter_messages import AdapterMove

# sizes remembered of adapters that are not in memory now, so that a load that cannot fit is not begun twice
MAX_KNOWN_SIZES = 4096


class KnownSizes:
    """What adapters take in memory, as their last loads told; the most recent ones."""

    def __init__(self) -> None:
        self._num_bytes: OrderedDict[str, int] = OrderedDict()

    def get(self, digest: str) -> int:
        """Return an adapter's bytes; 0 while they are not known."""
        return self._num_bytes.get(digest, 0)

    def remember(self, digest: str, num_bytes: int) -> None:
        """Learn a size."""
        self._num_bytes[digest] = num_bytes
        self._num_bytes.move_to_end(digest)
        if len(self._num_bytes) > MAX_KNOWN_SIZES:
            self._num_bytes.popitem(last=False)


class AdapterMoves:
    """Loads and drops of one tier since the start, and those since the last heartbeat."""

    def __init__(self, tier: str, source: str) -> None:
        self._tier = tier
        self._source = source
        self._num_bytes = 0
        self._recent: list[AdapterMove] = []

    def came(self, digest: str, num_bytes: int, seconds: float) -> None:
        """Record a load that ended READY."""
        self._num_bytes += num_bytes
        self._recent.append(AdapterMove(digest, "load", num_bytes, seconds, self._tier, self._source))

    def went(self, digest: str, cause: str, num_bytes: int) -> None:
        """Record a drop; see `AdapterMove` for the causes."""
        self._num_bytes -= num_bytes
        self._recent.append(AdapterMove(digest, cause, num_bytes, 0.0, self._tier, self._source))

    def take_recent(self) -> list[AdapterMove]:
        """Hand out what happened since the last call."""
        recent, self._recent = self._recent, []
        return recent

    def check_balance(self, num_ready_bytes: int) -> None:
        """Compare with what is in memory now."""
        assert self._num_bytes == num_ready_bytes, (
            f"{self._num_bytes} adapter bytes came and did not go, {num_ready_bytes} are in memory"
        )


@dataclass(slots=True)
class AdapterHits:
    """Where the adapters of accepted sequences were when they were named."""

    num_on_device: int = 0
    num_on_host: int = 0
    num_missed: int = 0
