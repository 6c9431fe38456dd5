"""A random walk over the waiting line and the counters that order it, against the order read straight off the rules.

Owns the rules as a slow key. Invariant: as in `state_walks`.
"""

import random

from serve.engine.fairness import WaitingLine
from serve.engine.sequence import Sequence
from serve.engine.virtual_tokens import ServedTokens
from serve.messages import SamplingParams, Submit

_DIGESTS = ("a" * 64, "b" * 64)
_PARAMS = SamplingParams(max_tokens=1, seed=1)


class LineWalk:
    """The waiting line and the counters that order it: tenants and adapters that come, are served, and go."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._served = ServedTokens()
        self._line = WaitingLine(self._served)
        self._waiting: list[Sequence] = []
        self._num_arrived = 0

    def step(self) -> None:
        """Do one operation."""
        choice, rng = self._rng.random(), self._rng
        if choice < 0.5 and len(self._waiting) < 8:
            self._join()
        elif choice < 0.8 and self._waiting:
            seq = self._waiting.pop(rng.randrange(len(self._waiting)))
            self._line.remove(seq)
            self._served.charge(seq.payer, num_input=rng.randint(1, 9), num_loads=rng.randint(0, 1))
        elif self._waiting:
            self._served.charge(rng.choice(self._waiting).payer, num_output=1)
        self._check()

    def end(self) -> None:
        """Empty the line."""
        for seq in self._waiting:
            self._line.remove(seq)
        self._waiting = []
        self._check()
        assert len(self._line) == 0, "somebody waits in the empty line"

    def _join(self) -> None:
        rng, number = self._rng, self._rng.randrange(3)
        command = Submit(
            f"r{self._num_arrived}",
            [1],
            _PARAMS,
            rng.choice((None, *_DIGESTS)),
            priority=rng.choice((0, 0, 1)),
            tenant=f"t{number}",
            tenant_weight=(0.5, 1.0, 4.0)[number],
        )
        seq = Sequence.build(command, arrival_index=self._num_arrived, now_s=0.0)
        # some were preempted
        seq.queue_s = rng.choice((None, None, 0.0))
        self._num_arrived += 1
        self._waiting.append(seq)
        self._line.join(seq)

    def _check(self) -> None:
        self._line.check_invariants()
        turns = self._line.turns(set())
        first = next(turns, None)
        if first is None:
            assert not self._waiting, "nobody has the turn though some wait"
            return
        # priority, preempted first, least served tenant, least served adapters in it, arrival
        assert first is min(self._waiting, key=self._right), "the turn is another's"

    def _right(self, seq: Sequence) -> tuple[int, bool, float, float, int]:
        own = [each for each in self._waiting if each.payer.tenant == seq.payer.tenant]
        best = min(own, key=lambda each: self._in_tenant(each))
        place = self._in_tenant(seq)
        tenant = self._served.of_tenant(seq.payer.tenant)
        if seq is not best:
            return (10**9, True, tenant, 0.0, seq.arrival_index)
        return (place[0], place[1], tenant, float(seq.arrival_index), seq.arrival_index)

    def _in_tenant(self, seq: Sequence) -> tuple[int, bool, float, int]:
        # in one queue, preempted ones come before those that never ran
        return (seq.priority, not seq.was_admitted, self._served.of_adapters(seq.payer), seq.arrival_index)
