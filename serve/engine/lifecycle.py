"""The life of sequences: who waits, who runs, and what each one holds of the shared rooms.

Owns every hand-over between a sequence and the KV blocks, the adapter tiers and the waiting line; no other file takes
or gives back for a sequence. Invariant: a WAITING sequence holds nothing but its place, a RUNNING one holds its block
table and one pin of its adapter, an ENDED one holds nothing, and the executor was told once to forget it.
"""

from bisect import insort
from collections import Counter

from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.fairness import VirtualTokens, WaitingLine
from serve.engine.kv_blocks import KvBlocks
from serve.engine.limits import EngineLimits
from serve.engine.plan import Executor
from serve.engine.sequence import Sequence, SequenceState
from serve.messages import Embed, Submit


class LiveSequences:
    """All accepted sequences that have not ended, and the rooms they hold things of."""

    def __init__(self, limits: EngineLimits, executor: Executor) -> None:
        self.limits = limits
        self.kv = KvBlocks(limits.num_kv_blocks, limits.block_size)
        self.tiers = AdapterTiers(executor, limits.num_adapter_slots, limits.adapter_bytes)
        self.served = VirtualTokens()
        self.waiting = WaitingLine(self.served)
        # by right to run: the last one is the first to be preempted
        self.running: list[Sequence] = []
        self.by_id: dict[str, Sequence] = {}
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
        if seq.adapter_digest is not None:
            self.tiers.join(seq.adapter_digest)
            if self.tiers.residency(seq.adapter_digest) is not Residency.READY:
                seq.load_wait_since_s = now_s
        self.waiting.join(seq)

    def admit(self, seq: Sequence, now_s: float) -> bool:
        """Let a waiting sequence whose adapter is READY run; False, with nothing changed, when KV is short.

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
        if seq.adapter_digest is not None:
            seq.adapter_slot = self.tiers.pin(seq.adapter_digest)
        if seq.queue_s is None:
            seq.queue_s = max(0.0, now_s - seq.arrived_s - seq.adapter_load_s)
            seq.num_cached_tokens = seq.num_computed
            self.served.charge(seq.adapter_digest, num_input=seq.num_tokens - seq.num_computed)
        seq.state = SequenceState.RUNNING
        seq.held_up_since = None
        insort(self.running, seq, key=_age)
        self.num_admissions += 1
        return True

    def grow(self, seq: Sequence) -> bool:
        """Make room for the newest token, preempting the youngest while blocks are short; False if that was `seq`."""
        num_blocks = self._num_blocks_for(seq.num_tokens)
        while not self.kv.extend(seq.block_table, num_blocks):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def end(self, seq: Sequence) -> None:
        """Give back everything a sequence holds; the caller sends its one terminal event."""
        assert seq.state is not SequenceState.ENDED, f"sequence {seq.request_id} ends twice"
        was_running = seq.state is SequenceState.RUNNING
        seq.state = SequenceState.ENDED
        del self.by_id[seq.request_id]
        try:
            self._executor.release_request(seq.request_id)
        finally:
            if was_running:
                self._stop_running(seq)
            else:
                self.waiting.remove(seq)
            if seq.adapter_digest is not None:
                self.tiers.leave(seq.adapter_digest)

    def wipe(self, seq: Sequence) -> None:
        """Zero what a suspect running sequence wrote and nobody else reads, and keep it out of the prefix cache."""
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

    def check_invariants(self) -> None:
        """Recompute who holds what from the sequences alone and compare with the rooms' books."""
        for seq in self.running:
            assert seq.state is SequenceState.RUNNING and self.by_id[seq.request_id] is seq, "a stranger runs"
            first_open = seq.num_computed // self.kv.block_size
            for block_id in seq.block_table[first_open:]:
                assert not self.kv.is_published(block_id), f"block {block_id} is published before it was verified"
            assert seq.num_computed <= len(seq.block_table) * self.kv.block_size, "tokens lie outside the block table"
        for seq in self.waiting:
            assert seq.state is SequenceState.WAITING and self.by_id[seq.request_id] is seq, "a stranger waits"
            assert not seq.block_table and seq.adapter_slot is None, f"{seq.request_id} waits and holds something"
        assert len(self.running) + len(self.waiting) == len(self.by_id), "a live sequence neither runs nor waits"
        assert self.running == sorted(self.running, key=_age), "the running sequences are out of order"
        self.kv.check_invariants(seq.block_table for seq in self.running)
        pinned = Counter(seq.adapter_digest for seq in self.running if seq.adapter_digest is not None)
        users = Counter(seq.adapter_digest for seq in self.by_id.values() if seq.adapter_digest is not None)
        self.tiers.check_invariants(pinned, users)

    def _preempt(self, seq: Sequence) -> None:
        """Take everything from a running sequence but its output; it returns to the head of its line."""
        self._stop_running(seq)
        seq.forget_progress()
        seq.state = SequenceState.WAITING
        self.waiting.join(seq)
        self.num_preemptions += 1

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.kv.release(seq.block_table)
        if seq.adapter_digest is not None:
            self.tiers.unpin(seq.adapter_digest)
            seq.adapter_slot = None

    def _shared_blocks(self, seq: Sequence) -> list[int]:
        if not self.limits.enable_prefix_cache or seq.needs_every_position:
            return []
        # the last token is always recomputed: sampling needs its logits
        num_full = (seq.num_tokens - 1) // self.kv.block_size
        return self.kv.match(seq.prefix_hashes(num_full, self.kv.block_size))

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv.block_size)


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.age_key
