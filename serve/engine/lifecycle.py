"""The life of sequences: who waits, who runs, and what each one holds of the shared rooms.

Owns every hand-over between a sequence and the KV blocks, the adapter tiers and the waiting line; no other file takes
or gives back for a sequence. Invariants: a WAITING sequence holds nothing but its place and has no row in flight; a
RUNNING one holds its block table and one pin of each of its adapters; an ENDED one holds what it held until its last
row in flight has come back, then nothing, and the executor was told once to forget it. So nothing that a step in flight
names is handed out, dropped or published, whatever happens meanwhile.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable

from serve.engine import adapter_sets
from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.deadlines import Deadlines
from serve.engine.fairness import WaitingLine
from serve.engine.host_tier import HostTier
from serve.engine.kv_blocks import KvBlocks
from serve.engine.limits import EngineLimits
from serve.engine.plan import Executor, Row
from serve.engine.planned_step import PlannedStep
from serve.engine.resident import ImageFetcher
from serve.engine.sequence import Sequence, SequenceState
from serve.engine.virtual_tokens import ServedTokens
from serve.messages import Embed, Submit


class LiveSequences:
    """All accepted sequences that have not ended or still hold something, and the rooms they hold things of."""

    def __init__(self, limits: EngineLimits, executor: Executor, fetcher: ImageFetcher | None = None) -> None:
        self.limits = limits
        self.kv = KvBlocks(limits.num_kv_blocks, limits.block_size)
        host = None if fetcher is None else _host_tier(limits, fetcher)
        self.tiers = AdapterTiers(executor, limits.num_adapter_slots, limits.adapter_device_bytes, host=host)
        self.served = ServedTokens()
        self.waiting = WaitingLine(self.served)
        # by right to run: the last one is the first to be preempted
        self.running: list[Sequence] = []
        self.by_id: dict[str, Sequence] = {}
        self.deadlines = Deadlines(self.by_id)
        # ended with rows in flight
        self.leaving: list[Sequence] = []
        self.num_admissions = 0
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._executor = executor

    def accept(self, command: Submit | Embed, now_s: float) -> None:
        """Put a new sequence into the waiting line; from here on it ends in exactly one terminal event."""
        assert command.request_id not in self.by_id, f"request id {command.request_id} is already live"
        seq = Sequence.build(command, arrival_index=self._num_arrivals, now_s=now_s)
        self._num_arrivals += 1
        self.by_id[seq.request_id] = seq
        self.deadlines.add(seq)
        for digest in seq.acting.digests:
            self.tiers.join(digest)
        if adapter_sets.residency(self.tiers, seq.acting.digests) is not Residency.READY:
            seq.load_wait_since_s = now_s
        self.waiting.join(seq)

    def admit(self, seq: Sequence, now_s: float) -> bool:
        """Let a waiting sequence whose adapters are READY run; False, with nothing changed, when KV is short.

        The table covers all tokens known so far; a prefix hit starts the sequence behind its shared blocks.
        """
        num_blocks = self._num_blocks_for(seq.num_tokens)
        shared = self._shared_blocks(seq)
        # one block of headroom per running sequence: admitting into the last blocks would preempt at once
        if self.kv.num_new_needed(shared, num_blocks) + len(self.running) > self.kv.num_available:
            return False
        table = self.kv.acquire(shared, num_blocks)
        assert table is not None, "the room for the table was checked"
        self.waiting.remove(seq)
        seq.block_table = table
        seq.num_computed = len(shared) * self.kv.block_size
        # all at once: a running sequence never waits for an adapter
        seq.adapter_slots = tuple(map(self.tiers.pin, seq.acting.digests))
        if seq.queue_s is None:
            seq.queue_s = max(0.0, now_s - seq.arrived_s - seq.adapter_load_s)
            seq.admitted_s = now_s
            seq.num_cached_tokens = max(0, seq.num_computed - seq.num_virtual)
            self.served.charge(seq.payer, num_input=seq.num_tokens - seq.num_computed)
        self._charge_loads(seq)
        seq.state = SequenceState.RUNNING
        seq.held_up_since = None
        insort(self.running, seq, key=_age)
        self.num_admissions += 1
        return True

    def num_cached_now(self, seq: Sequence) -> int:
        """Tokens of a waiting sequence that the prefix cache has at this moment."""
        return len(self._shared_blocks(seq)) * self.kv.block_size

    def grow(self, seq: Sequence, *, may_preempt: bool) -> bool:
        """Make room for the next token, preempting the youngest while blocks are short.

        Returns:
            False when `seq` itself was preempted; without `may_preempt`, when blocks are short.
        """
        num_blocks = self._num_blocks_for(seq.num_computed + seq.num_in_flight + 1)
        while not self.kv.extend(seq.block_table, num_blocks):
            if not may_preempt:
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def end(self, seq: Sequence) -> None:
        """Take a sequence out; the caller sends its one terminal event.

        Everything it holds is given back at once, or by `let_go` when rows of it are in flight.
        """
        assert seq.state is not SequenceState.ENDED, f"sequence {seq.request_id} ends twice"
        (self.running if seq.state is SequenceState.RUNNING else self.waiting).remove(seq)
        self._charge_loads(seq)
        seq.state = SequenceState.ENDED
        del self.by_id[seq.request_id]
        if seq.num_in_flight:
            self.leaving.append(seq)
        else:
            self._forget(seq)

    def let_go(self, seq: Sequence) -> None:
        """Give back what an ended sequence still holds, now that a row of it came back, if that was the last one."""
        if seq.num_in_flight == 0:
            self.leaving.remove(seq)
            self._forget(seq)

    def wipe(self, seq: Sequence) -> None:
        """Zero what a suspect sequence wrote and nobody else reads, and keep it out of the prefix cache."""
        suspect = self.kv.retract(seq.block_table)
        if suspect:
            self._executor.zero_blocks(suspect)

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """Move past tokens whose step was verified finite, and publish the blocks they filled."""
        first = seq.num_computed // self.kv.block_size
        seq.num_computed += num_tokens
        last = seq.num_computed // self.kv.block_size
        if last > first and self.limits.enable_prefix_cache:
            hashes = seq.prefix_hashes(last, self.kv.block_size)
            for index in range(first, last):
                self.kv.publish(seq.block_table[index], hashes[index])

    def num_reusable_tokens(self, seq: Sequence) -> int:
        """Prompt tokens that a prefix hit may cover: full blocks, and never the last token, whose logits are needed."""
        return (len(seq.prompt_ids) - 1) // self.kv.block_size * self.kv.block_size

    def check_invariants(self, steps: Iterable[PlannedStep]) -> None:
        """Recompute who holds what from the sequences and the steps in flight, and compare with the rooms' books."""
        for seq in self.running:
            assert seq.state is SequenceState.RUNNING and self.by_id[seq.request_id] is seq, "a stranger runs"
        for seq in self.waiting:
            assert seq.state is SequenceState.WAITING and self.by_id[seq.request_id] is seq, "a stranger waits"
            assert not seq.block_table and not seq.adapter_slots, f"{seq.request_id} waits and holds something"
        for seq in self.leaving:
            assert seq.state is SequenceState.ENDED and seq.num_in_flight > 0, f"{seq.request_id} leaves for ever"
        assert len(self.running) + len(self.waiting) == len(self.by_id), "a live sequence neither runs nor waits"
        self.waiting.check_invariants()
        assert self.running == sorted(self.running, key=_age), "the running sequences are out of order"
        holders = [*self.running, *self.leaving]
        for seq in holders:
            self._check_table(seq)
        self._check_in_flight(steps, holders)
        self.kv.check_invariants(seq.block_table for seq in holders)
        pinned = Counter(digest for seq in holders for digest in seq.acting.digests)
        users = Counter(digest for seq in (*self.by_id.values(), *self.leaving) for digest in seq.acting.digests)
        self.tiers.check_invariants(pinned, users)

    def _check_table(self, seq: Sequence) -> None:
        first_open = seq.num_computed // self.kv.block_size
        for block_id in seq.block_table[first_open:]:
            assert not self.kv.is_published(block_id), f"block {block_id} is published before it was verified"
        num_written = seq.num_computed + seq.num_in_flight
        assert num_written <= len(seq.block_table) * self.kv.block_size, "tokens lie outside the block table"

    def _check_in_flight(self, steps: Iterable[PlannedStep], holders: list[Sequence]) -> None:
        in_flight: Counter[Sequence] = Counter()
        for step in steps:
            for seq, row in zip(step.seqs, step.plan.rows, strict=True):
                is_next = row.start == seq.num_computed + in_flight[seq]
                assert is_next or seq.state is SequenceState.ENDED, f"{row.request_id} has a gap in flight"
                assert row.slots == _slots_at(seq, row.start), f"{row.request_id} runs in a slot it does not pin"
                assert _keeps_to_edges(seq, row), f"{row.request_id} runs across a place where what acts changes"
                in_flight[seq] += len(row.token_ids)
        assert in_flight == Counter({seq: seq.num_in_flight for seq in holders if seq.num_in_flight}), (
            "the tokens in flight differ from the holders' books"
        )

    def _charge_loads(self, seq: Sequence) -> None:
        """Charge the loads that began for a sequence when it leaves the line.

        Not when they begin: it would fall behind in the line, and another's wish could evict what was loaded for it.
        """
        if seq.num_loads_owed:
            self.served.charge(seq.payer, num_loads=seq.num_loads_owed)
            seq.num_loads_owed = 0

    def _preempt(self, seq: Sequence) -> None:
        """Take everything from a running sequence but its output; it returns to the head of its line."""
        # its late token would be lost, or sampled again
        assert seq.num_in_flight == 0, f"sequence {seq.request_id} is preempted with a row in flight"
        self.running.remove(seq)
        self._give_back(seq)
        seq.forget_progress()
        seq.state = SequenceState.WAITING
        self.waiting.join(seq)
        self.num_preemptions += 1

    def _forget(self, seq: Sequence) -> None:
        try:
            self._executor.release_request(seq.request_id)
        finally:
            self._give_back(seq)
            for digest in seq.acting.digests:
                self.tiers.leave(digest)

    def _give_back(self, seq: Sequence) -> None:
        self.kv.release(seq.block_table)
        # pinned all together, or none
        if seq.adapter_slots:
            for digest in seq.acting.digests:
                self.tiers.unpin(digest)
            seq.adapter_slots = ()

    def _shared_blocks(self, seq: Sequence) -> list[int]:
        if not self.limits.enable_prefix_cache or seq.needs_every_position:
            return []
        # the last token is always recomputed: sampling needs its logits
        num_full = (seq.num_tokens - 1) // self.kv.block_size
        return self.kv.match(seq.prefix_hashes(num_full, self.kv.block_size))

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv.block_size)


def _slots_at(seq: Sequence, position: int) -> tuple[int, ...]:
    return seq.adapter_slots if position >= seq.acting.active_from else ()


def _keeps_to_edges(seq: Sequence, row: Row) -> bool:
    return not any(row.start < edge < row.start + len(row.token_ids) for edge in seq.row_edges)


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.age_key


def _host_tier(limits: EngineLimits, fetcher: ImageFetcher) -> HostTier:
    return HostTier(
        fetcher, limits.max_host_images, limits.adapter_host_bytes, is_device_memory=limits.is_host_device_memory
    )
