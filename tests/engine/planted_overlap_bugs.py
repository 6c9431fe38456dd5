"""Bugs that only two steps in flight can have, planted one at a time; traces of the asynchronous mode must see them.

Owns one small wrong replacement per bug. Invariant: a plant changes one decision and leaves the rest as it is.
"""

from dataclasses import replace

import pytest

from serve.engine import outcome
from serve.engine.acting import Acting
from serve.engine.engine import Engine
from serve.engine.lifecycle import LiveSequences
from serve.engine.limits import EngineLimits
from serve.engine.pipeline import StepPipeline
from serve.engine.plan import AsyncExecutor, Row, RowResult, StepPlan
from serve.engine.planned_step import PlannedStep
from serve.engine.sequence import Sequence, SequenceState
from serve.messages import Event
from tests.engine.planted_bugs import Plant


def _blocks_freed_under_a_row_in_flight(patch: pytest.MonkeyPatch) -> None:
    end = LiveSequences.end

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        if seq.num_in_flight:
            self.kv.release(seq.block_table)
        end(self, seq)

    patch.setattr(LiveSequences, "end", wrong)
    patch.setattr(LiveSequences, "_check_table", lambda self, seq: None)


def _pin_given_back_under_a_row_in_flight(patch: pytest.MonkeyPatch) -> None:
    end, check = LiveSequences.end, LiveSequences.check_invariants

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        end(self, seq)
        if seq.num_in_flight:
            for digest in seq.acting.digests:
                self.tiers.unpin(digest)
                self.tiers.leave(digest)
            seq.acting, seq.adapter_slots = Acting(), ()

    # the books do not look: the device must
    patch.setattr(LiveSequences, "end", wrong)
    patch.setattr(LiveSequences, "check_invariants", lambda self, steps: check(self, ()) if not steps else None)


def _request_released_under_a_row_in_flight(patch: pytest.MonkeyPatch) -> None:
    end = LiveSequences.end

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        if seq.num_in_flight:
            self._executor.release_request(seq.request_id)
        end(self, seq)

    patch.setattr(LiveSequences, "end", wrong)


def _late_result_of_an_ended_sequence_applied(patch: pytest.MonkeyPatch) -> None:
    finish_row = outcome.finish_row

    def wrong(
        live: LiveSequences, counters: outcome.Counters, seq: Sequence, row: Row, result: RowResult | None, now_s: float
    ) -> list[Event]:
        was_ended = seq.state is SequenceState.ENDED
        events = finish_row(live, counters, seq, row, result, now_s)
        if was_ended and result is not None and result.token_id is not None:
            events.append(outcome._append(live, counters, seq, result))
        return events

    patch.setattr("serve.engine.scheduler.finish_row", wrong)


def _late_non_finite_row_not_wiped(patch: pytest.MonkeyPatch) -> None:
    wipe = LiveSequences.wipe

    def wrong(self: LiveSequences, seq: Sequence) -> None:
        if seq.state is not SequenceState.ENDED:
            wipe(self, seq)

    patch.setattr(LiveSequences, "wipe", wrong)


def _blocks_cached_while_they_are_in_flight(patch: pytest.MonkeyPatch) -> None:
    advance = LiveSequences.advance

    def wrong(self: LiveSequences, seq: Sequence, num_tokens: int) -> None:
        advance(self, seq, num_tokens)
        num_full = min(seq.num_computed + seq.num_in_flight, seq.num_tokens) // self.kv.block_size
        if self.limits.enable_prefix_cache:
            for block_id, block_hash in zip(
                seq.block_table, seq.prefix_hashes(num_full, self.kv.block_size), strict=False
            ):
                self.kv.publish(block_id, block_hash)

    # the books do not look: whoever reuses the block must show it
    patch.setattr(LiveSequences, "advance", wrong)
    patch.setattr(LiveSequences, "_check_table", lambda self, seq: None)


def _preempted_with_a_token_in_flight(patch: pytest.MonkeyPatch) -> None:
    grow = LiveSequences.grow
    forget = Sequence.forget_progress
    preempt = LiveSequences._preempt

    def wrong_preempt(self: LiveSequences, seq: Sequence) -> None:
        seq.num_in_flight = 0
        preempt(self, seq)

    def wrong_forget(self: Sequence) -> None:
        forget(self)
        self.num_in_flight = 0

    patch.setattr(LiveSequences, "grow", lambda self, seq, may_preempt: grow(self, seq, may_preempt=True))
    patch.setattr(LiveSequences, "_preempt", wrong_preempt)
    patch.setattr(Sequence, "forget_progress", wrong_forget)


def _penalised_sequence_chained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("serve.engine.sequence._needs_last_token", lambda params: False)


def _chained_behind_a_row_that_samples_nothing(patch: pytest.MonkeyPatch) -> None:
    ends = Sequence.ends_in_flight

    def wrong(self: Sequence, limits: EngineLimits) -> bool:
        return self.sample_spec is not None and ends(self, limits)

    patch.setattr(Sequence, "ends_in_flight", wrong)


def _token_in_flight_run_again(patch: pytest.MonkeyPatch) -> None:
    next_row = Sequence.next_row

    def wrong(self: Sequence, count: int) -> Row:
        row = next_row(self, count)
        return row if not row.is_chained else replace(row, token_ids=self._tokens(row.start - 1, row.start))

    patch.setattr(Sequence, "next_row", wrong)


def _step_behind_a_lost_one_believed(patch: pytest.MonkeyPatch) -> None:
    run_alone = StepPipeline._run_alone
    kept: dict[int, list[RowResult | None]] = {}

    def wrong_drain(self: StepPipeline, device: AsyncExecutor) -> None:
        for step in self._steps:
            self._num_submitted -= 1
            kept[id(step)] = list(device.collect())

    def wrong_run_alone(self: StepPipeline, step: PlannedStep) -> list[RowResult | None]:
        return kept.pop(id(step), None) or run_alone(self, step)

    patch.setattr(StepPipeline, "_drain", wrong_drain)
    patch.setattr(StepPipeline, "_run_alone", wrong_run_alone)


def _lost_chained_row_run_with_an_old_token(patch: pytest.MonkeyPatch) -> None:
    settled = PlannedStep.settled

    def wrong(self: PlannedStep) -> StepPlan:
        plan = settled(self)
        rows = [
            replace(row, token_ids=seq.output_ids[:1]) if old.is_chained else row
            for row, old, seq in zip(plan.rows, self.plan.rows, self.seqs, strict=False)
        ]
        return StepPlan(rows, plan.slot_digests)

    patch.setattr(PlannedStep, "settled", wrong)


def _ended_rows_of_a_lost_step_run_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PlannedStep, "settled", lambda self: self.plan)


def _submitted_behind_a_failed_submission(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepPipeline, "is_full", property(lambda self: len(self) == 2))


def _newest_step_finished_first(patch: pytest.MonkeyPatch) -> None:
    pop = StepPipeline.pop

    def wrong(self: StepPipeline) -> tuple[PlannedStep, list[RowResult | None]]:
        self._steps.reverse()
        return pop(self)

    patch.setattr(StepPipeline, "pop", wrong)


def _rests_with_a_step_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "has_work", lambda self: bool(self._events or self._scheduler.live.by_id))


OVERLAP_PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _blocks_freed_under_a_row_in_flight,
        _pin_given_back_under_a_row_in_flight,
        _request_released_under_a_row_in_flight,
        _late_result_of_an_ended_sequence_applied,
        _late_non_finite_row_not_wiped,
        _blocks_cached_while_they_are_in_flight,
        _preempted_with_a_token_in_flight,
        _penalised_sequence_chained,
        _chained_behind_a_row_that_samples_nothing,
        _token_in_flight_run_again,
        _step_behind_a_lost_one_believed,
        _lost_chained_row_run_with_an_old_token,
        _ended_rows_of_a_lost_step_run_again,
        _submitted_behind_a_failed_submission,
        _newest_step_finished_first,
        _rests_with_a_step_in_flight,
    )
}
