"""Whose turn it is: the line of waiting sequences, ordered by what tenants and their adapters were served.

Owns the order of admission within one priority; whether a sequence can be admitted is the scheduler's question.
Invariants: within one priority those that were preempted come first, then the least served tenant, in it the least
served adapters, and of those the first to arrive; the counters know exactly who waits.
"""

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from serve.engine.sequence import Sequence
from serve.engine.virtual_tokens import Adapters, ServedTokens

Queues = dict[tuple[int, Adapters], list[Sequence]]


class WaitingLine:
    """Sequences that wait for admission; walked in order of turn, left by `remove`."""

    def __init__(self, served: ServedTokens) -> None:
        self._served = served
        self._queues: dict[str, Queues] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Go through all waiting sequences, in no order that matters."""
        for queue in self._all_queues():
            yield from queue

    def join(self, seq: Sequence) -> None:
        """Put a sequence in its place: a preempted one before those that never ran, else by arrival."""
        self._served.join(seq.payer)
        queues = self._queues.setdefault(seq.payer.tenant, {})
        insort(queues.setdefault((seq.priority, seq.payer.adapters), []), seq, key=_rank)
        self._num_waiting += 1

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out: it was admitted, or it ended."""
        tenant, key = seq.payer.tenant, (seq.priority, seq.payer.adapters)
        queues = self._queues[tenant]
        queues[key].remove(seq)
        self._num_waiting -= 1
        self._served.leave(seq.payer)
        if not queues[key]:
            del queues[key]
        if not queues:
            del self._queues[tenant]

    def naming(self, digest: str) -> list[Sequence]:
        """Return the waiting sequences on which an adapter is to act, alone or with others."""
        return [seq for queue in self._all_queues() if digest in queue[0].acting.digests for seq in queue]

    def turns(self, held_groups: set[str]) -> Iterator[Sequence]:
        """Yield sequences in order of turn: priority, preempted first, least served tenant, adapters, arrival.

        The caller removes a yielded sequence to admit it; one it leaves in the line holds up the rest of its queue for
        this walk. Sequences of `held_groups` (which the caller may extend) are passed over and hold up nothing.
        """
        # a heap of tenants, each with a heap of its queues: what one admission changes is one entry of either
        tenants = [self._tenant_turn(self._heap(queues)) for queues in self._queues.values()]
        heapq.heapify(tenants)
        while tenants:
            heap = heapq.heappop(tenants).heap
            turn = heapq.heappop(heap)
            queue, index = turn.queue, turn.position
            seq = queue[index]
            if seq.group_id in held_groups:
                index += 1
            else:
                yield seq
                if index < len(queue) and queue[index] is seq:
                    index = len(queue)
            if index < len(queue):
                heapq.heappush(heap, self._turn(queue, index))
            if heap:
                heapq.heappush(tenants, self._tenant_turn(heap))

    def check_invariants(self) -> None:
        """Compare the counters with who waits."""
        self._served.check_invariants(Counter((seq.payer.tenant, seq.payer.adapters) for seq in self))

    def _all_queues(self) -> Iterator[list[Sequence]]:
        for queues in self._queues.values():
            yield from queues.values()

    def _heap(self, queues: Queues) -> list["_Turn"]:
        heap = [self._turn(queue, 0) for queue in queues.values()]
        heapq.heapify(heap)
        return heap

    def _turn(self, queue: list[Sequence], index: int) -> "_Turn":
        seq = queue[index]
        num_served = self._served.of_adapters(seq.payer)
        return _Turn(seq.priority, not seq.was_admitted, num_served, seq.arrival_index, queue, index)

    def _tenant_turn(self, heap: list["_Turn"]) -> "_TenantTurn":
        first = heap[0]
        num_served = self._served.of_tenant(first.queue[first.position].payer.tenant)
        return _TenantTurn(first.priority, first.is_new, num_served, first.arrival_index, heap)


class _Turn(NamedTuple):
    """One queue's next sequence in its tenant's heap; `arrival_index` is unique, so nothing compares `queue`."""

    priority: int
    is_new: bool
    num_served: float
    arrival_index: int
    queue: list[Sequence]
    position: int


class _TenantTurn(NamedTuple):
    """One tenant's next sequence among those of all tenants, and the heap in which it comes first."""

    priority: int
    is_new: bool
    num_served: float
    arrival_index: int
    heap: list[_Turn]


def _rank(seq: Sequence) -> tuple[bool, int]:
    return (not seq.was_admitted, seq.arrival_index)
