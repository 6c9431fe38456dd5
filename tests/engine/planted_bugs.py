"""Bugs planted into the engine, one at a time, to prove that the trace checker sees them.

Owns one small wrong replacement per bug, each modelled on a bug that an engine of this kind has had. Invariant: a plant
changes one decision and leaves the rest of the engine as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from serve.engine import outcome, sequence
from serve.engine.adapter_tiers import AdapterTiers
from serve.engine.device_tier import DeviceTier
from serve.engine.fairness import WaitingLine
from serve.engine.kv_blocks import KvBlocks, hash_block, hash_seed
from serve.engine.lifecycle import LiveSequences
from serve.engine.limits import EngineLimits
from serve.engine.plan import Row, RowResult
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence, SequenceState
from serve.engine.wish_order import Room
from serve.messages import Event, SamplingParams, Tokens

Plant = Callable[[pytest.MonkeyPatch], None]


def _block_freed_twice(patch: pytest.MonkeyPatch) -> None:
    release = KvBlocks.release

    def wrong(self: KvBlocks, table: list[int]) -> None:
        first = table[:1]
        release(self, table)
        self._free += [block_id for block_id in first if self._num_refs[block_id] == 0]

    patch.setattr(KvBlocks, "release", wrong)


def _digest_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence, "hash_seed", lambda digest, salt: hash_seed(None, salt))


def _salt_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence, "hash_seed", lambda digest, salt: hash_seed(digest, ""))


def _parent_missing_from_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence, "hash_block", lambda parent, ids: hash_block(b"", ids))


def _abort_keeps_the_blocks(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: LiveSequences, seq: Sequence) -> None:
        if seq.adapter_slots:
            for digest in seq.acting.digests:
                self.tiers.unpin(digest)
            seq.adapter_slots = ()

    patch.setattr(LiveSequences, "_give_back", wrong)


def _preemption_keeps_the_pin(patch: pytest.MonkeyPatch) -> None:
    preempt = LiveSequences._preempt

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        for digest in seq.acting.digests:
            self.tiers.pin(digest)
        preempt(self, seq)

    patch.setattr(LiveSequences, "_preempt", wrong)


def _preemption_loses_the_output(patch: pytest.MonkeyPatch) -> None:
    forget = Sequence.forget_progress

    def wrong(self: Sequence) -> None:
        forget(self)
        self.output_ids.clear()

    patch.setattr(Sequence, "forget_progress", wrong)


def _preemption_keeps_the_progress(patch: pytest.MonkeyPatch) -> None:
    admit = LiveSequences.admit

    def wrong(self: LiveSequences, seq: Sequence, now_s: float) -> bool:
        was_admitted = seq.was_admitted
        is_admitted = admit(self, seq, now_s)
        if is_admitted and was_admitted:
            seq.num_computed = seq.num_tokens - 1
        return is_admitted

    patch.setattr(LiveSequences, "admit", wrong)


def _blocks_cached_before_they_are_verified(patch: pytest.MonkeyPatch) -> None:
    admit = LiveSequences.admit

    def wrong(self: LiveSequences, seq: Sequence, now_s: float) -> bool:
        is_admitted = admit(self, seq, now_s)
        if is_admitted and self.limits.enable_prefix_cache:
            num_full = len(seq.prompt_ids) // self.kv.block_size
            hashes = seq.prefix_hashes(num_full, self.kv.block_size)
            for block_id, block_hash in zip(seq.block_table, hashes, strict=False):
                self.kv.publish(block_id, block_hash)
        return is_admitted

    patch.setattr(LiveSequences, "admit", wrong)


def _half_full_block_cached(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: LiveSequences, seq: Sequence, num_tokens: int) -> None:
        seq.num_computed += num_tokens
        num_touched = min(-(-seq.num_computed // self.kv.block_size), seq.num_tokens // self.kv.block_size)
        for block_id, block_hash in zip(
            seq.block_table, seq.prefix_hashes(num_touched, self.kv.block_size), strict=False
        ):
            self.kv.publish(block_id, block_hash)

    patch.setattr(LiveSequences, "advance", wrong)


def _last_prompt_token_not_recomputed(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: LiveSequences, seq: Sequence) -> list[int]:
        if not self.limits.enable_prefix_cache or seq.needs_every_position:
            return []
        return self.kv.match(seq.prefix_hashes(seq.num_tokens // self.kv.block_size, self.kv.block_size))

    patch.setattr(LiveSequences, "_shared_blocks", wrong)


def _prompt_logprobs_skip_a_prefix_hit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "needs_every_position", property(lambda self: False))


def _shared_block_not_counted(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: KvBlocks, shared: list[int], num_blocks: int) -> list[int] | None:
        if num_blocks - len(shared) > self.num_available:
            return None
        return shared + [self._take() for _ in range(num_blocks - len(shared))]

    patch.setattr(KvBlocks, "acquire", wrong)


def _overwritten_block_stays_in_the_index(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: KvBlocks, block_id: int) -> None:
        self._hash_of[block_id] = None

    patch.setattr(KvBlocks, "_forget", wrong)


def _suspect_blocks_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LiveSequences, "wipe", lambda self, seq: None)


def _non_finite_row_taken_as_good(patch: pytest.MonkeyPatch) -> None:
    finish_row = outcome.finish_row

    def wrong(
        live: LiveSequences, counters: outcome.Counters, seq: Sequence, row: Row, result: RowResult | None, now_s: float
    ) -> list[Event]:
        if result is not None and not result.is_finite and row.sample is None:
            result = RowResult(row.request_id, None)
        return finish_row(live, counters, seq, row, result, now_s)

    patch.setattr("serve.engine.scheduler.finish_row", wrong)


def _pinned_adapter_evicted(patch: pytest.MonkeyPatch) -> None:
    make_room = DeviceTier._make_room

    def wrong(self: DeviceTier, digest: str, needed: Room) -> bool:
        pins = {other: resident.num_pins for other, resident in self.residents.items()}
        for resident in self.residents.values():
            resident.num_pins = 0
        has_room = make_room(self, digest, needed)
        for other, resident in self.residents.items():
            resident.num_pins = pins[other]
        return has_room

    patch.setattr(DeviceTier, "_make_room", wrong)


def _unload_ignores_the_last_user(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: AdapterTiers, digest: str) -> None:
        resident = self.device.residents.get(digest)
        if resident is not None and resident.is_ready:
            resident.num_pins = 0
            self._drop(digest, "unload")

    patch.setattr(AdapterTiers, "unload", wrong)


def _adapter_bytes_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AdapterTiers, "_too_large", lambda self, digest, num_bytes: None)
    patch.setattr(DeviceTier, "num_bytes", property(lambda self: 0))


def _failed_load_drops_its_requests_silently(patch: pytest.MonkeyPatch) -> None:
    finish_load = Scheduler.finish_load
    patch.setattr(Scheduler, "finish_load", lambda self, result: finish_load(self, result)[1:])


def _token_sent_twice(patch: pytest.MonkeyPatch) -> None:
    finish_row = outcome.finish_row

    def wrong(
        live: LiveSequences, counters: outcome.Counters, seq: Sequence, row: Row, result: RowResult | None, now_s: float
    ) -> Iterator[Event]:
        for event in finish_row(live, counters, seq, row, result, now_s):
            yield event
            if isinstance(event, Tokens) and len(seq.output_ids) == 3:
                yield event

    patch.setattr("serve.engine.scheduler.finish_row", wrong)


def _siblings_wait_for_each_other(patch: pytest.MonkeyPatch) -> None:
    turns = WaitingLine.turns

    def wrong(self: WaitingLine, held_groups: set[str]) -> Iterator[Sequence]:
        return turns(self, held_groups | {seq.group_id for seq in self if seq.group_id})

    patch.setattr(WaitingLine, "turns", wrong)


def _stops_before_min_tokens(patch: pytest.MonkeyPatch) -> None:
    is_stop = Sequence._is_stop

    def wrong(self: Sequence, token_id: int, params: SamplingParams, limits: EngineLimits) -> bool:
        return is_stop(self, token_id, replace(params, min_tokens=0), limits)

    patch.setattr(Sequence, "_is_stop", wrong)


def _waiting_request_released_twice(patch: pytest.MonkeyPatch) -> None:
    end = LiveSequences.end

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        was_waiting = seq.state is SequenceState.WAITING
        end(self, seq)
        if was_waiting:
            self._executor.release_request(seq.request_id)

    patch.setattr(LiveSequences, "end", wrong)


PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _block_freed_twice,
        _digest_missing_from_the_hash,
        _salt_missing_from_the_hash,
        _parent_missing_from_the_hash,
        _abort_keeps_the_blocks,
        _preemption_keeps_the_pin,
        _preemption_loses_the_output,
        _preemption_keeps_the_progress,
        _blocks_cached_before_they_are_verified,
        _half_full_block_cached,
        _last_prompt_token_not_recomputed,
        _prompt_logprobs_skip_a_prefix_hit,
        _shared_block_not_counted,
        _overwritten_block_stays_in_the_index,
        _suspect_blocks_not_zeroed,
        _non_finite_row_taken_as_good,
        _pinned_adapter_evicted,
        _unload_ignores_the_last_user,
        _adapter_bytes_not_counted,
        _failed_load_drops_its_requests_silently,
        _token_sent_twice,
        _siblings_wait_for_each_other,
        _stops_before_min_tokens,
        _waiting_request_released_twice,
    )
}
