"""Whose turn it is: virtual token counters per adapter, and the line of waiting sequences that they order.

Owns the order of admission within one priority; whether a sequence can be admitted is the scheduler's question. A key
is an adapter's digest, the digests of a composition, or None for the base. Invariants: a key is charged for what it was
served, never for waiting; a key that returns to the line starts level with the least served one there, so idle time
earns no credit; within one key the order is preempted first, then arrival.
Source: virtual token counter after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2.
"""

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from serve.engine.sequence import Sequence

# an output token costs about twice an input token: it is a step of its own
INPUT_PRICE = 1
OUTPUT_PRICE = 2
# beyond this number, keys at or below the floor are forgotten: they would return at the floor anyway
MAX_KEYS = 4096

Key = str | None


class VirtualTokens:
    """Priced tokens that each key was served."""

    def __init__(self) -> None:
        self._tokens: dict[Key, int] = {}
        # no counter that matters lies below this
        self._floor = 0

    def __getitem__(self, key: Key) -> int:
        return self._tokens.get(key, self._floor)

    def charge(self, key: Key, *, num_input: int = 0, num_output: int = 0) -> None:
        """Count tokens that were computed for `key`."""
        self._tokens[key] = self[key] + INPUT_PRICE * num_input + OUTPUT_PRICE * num_output

    def lift(self, key: Key, rivals: Iterable[Key]) -> None:
        """Bring a key that joins the line level with the least served of `rivals`."""
        self._floor = max(self._floor, min((self[rival] for rival in rivals), default=self._floor))
        self._tokens[key] = max(self[key], self._floor)
        if len(self._tokens) > MAX_KEYS:
            self._tokens = {k: count for k, count in self._tokens.items() if count > self._floor}


class WaitingLine:
    """Sequences that wait for admission; walked in order of turn, left by `remove`."""

    def __init__(self, served: VirtualTokens) -> None:
        self._served = served
        self._queues: dict[tuple[int, Key], list[Sequence]] = {}
        self._num_waiting = 0
        # whose last sequence left the line most recently: the rival of a key that finds the line empty
        self._last_left: Key = None

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Go through all waiting sequences, in no order that matters."""
        for queue in self._queues.values():
            yield from queue

    def join(self, seq: Sequence) -> None:
        """Put a sequence in its place: a preempted one before those that never ran, else by arrival."""
        waiting = {key for _, key in self._queues}
        if seq.turn_key not in waiting:
            self._served.lift(seq.turn_key, waiting or {self._last_left})
        insort(self._queues.setdefault((seq.priority, seq.turn_key), []), seq, key=_rank)
        self._num_waiting += 1

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out: it was admitted, or it ended."""
        queue = self._queues[seq.priority, seq.turn_key]
        queue.remove(seq)
        self._num_waiting -= 1
        if not queue:
            del self._queues[seq.priority, seq.turn_key]
            self._last_left = seq.turn_key

    def naming(self, digest: str) -> list[Sequence]:
        """Return the waiting sequences on which an adapter is to act, alone or with others."""
        return [seq for queue in self._queues.values() if digest in queue[0].acting.digests for seq in queue]

    def turns(self, held_groups: set[str]) -> Iterator[Sequence]:
        """Yield sequences in order of turn: priority, preempted first, least served key, arrival.

        The caller removes a yielded sequence to admit it; one it leaves in the line holds up the rest of its queue for
        this walk. Sequences of `held_groups` (which the caller may extend) are passed over and hold up nothing.
        """
        heap = [self._turn(queue, 0) for queue in self._queues.values()]
        heapq.heapify(heap)
        while heap:
            turn = heapq.heappop(heap)
            queue, index = turn.queue, turn.position
            seq = queue[index]
            if seq.group_id in held_groups:
                index += 1
            else:
                yield seq
                if index < len(queue) and queue[index] is seq:
                    continue
            if index < len(queue):
                heapq.heappush(heap, self._turn(queue, index))

    def _turn(self, queue: list[Sequence], index: int) -> "_Turn":
        seq = queue[index]
        return _Turn(seq.priority, not seq.was_admitted, self._served[seq.turn_key], seq.arrival_index, queue, index)


class _Turn(NamedTuple):
    """One queue's next sequence in the heap; `arrival_index` is unique, so a comparison never reaches `queue`."""

    priority: int
    is_new: bool
    num_served: int
    arrival_index: int
    queue: list[Sequence]
    position: int


def _rank(seq: Sequence) -> tuple[bool, int]:
    return (not seq.was_admitted, seq.arrival_index)
