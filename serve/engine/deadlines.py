"""When requests must have ended: whose time is over, in order.

Owns the times only. Invariant: a deadline never moves; what is kept of sequences that ended before theirs is bounded by
the number of live ones.
"""

import heapq

from serve.engine.sequence import Sequence

# entries of ended sequences, beside as many as are live, before they are swept out
_MAX_STALE = 256


class Deadlines:
    """The deadlines of the sequences that have one."""

    def __init__(self, live: dict[str, Sequence]) -> None:
        """Prepare; `live` are the sequences that have not ended, by their ids, as the owner keeps them."""
        self._live = live
        # (time, arrival, id): ids come back, arrivals do not
        self._heap: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, seq: Sequence) -> None:
        """Watch a sequence, if it has a deadline."""
        if seq.deadline_at_s is None:
            return
        heapq.heappush(self._heap, (seq.deadline_at_s, seq.arrival_index, seq.request_id))
        if len(self._heap) > 2 * len(self._live) + _MAX_STALE:
            self._heap = [entry for entry in self._heap if self._find(entry) is not None]
            heapq.heapify(self._heap)

    def expired(self, now_s: float) -> list[Sequence]:
        """Return the live sequences whose time is over, and watch them no more; the caller ends them."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            seq = self._find(heapq.heappop(self._heap))
            if seq is not None:
                found.append(seq)
        return found

    def _find(self, entry: tuple[float, int, str]) -> Sequence | None:
        seq = self._live.get(entry[2])
        return seq if seq is not None and seq.arrival_index == entry[1] else None
