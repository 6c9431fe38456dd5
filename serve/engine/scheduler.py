"""What runs next, and what a finished step means: continuous batching with chunked prefill under a token budget.

Owns the order inside a step (decodes, running prefills, admissions) and the translation of row results into events.
No torch, no clock of its own. A step may be decided ahead, while the one before is in flight: its sampled tokens are
then unknown, and a sequence goes on with a chained row. Preemption waits until nothing is in flight.
Invariant: the oldest running sequence is in every plan (or in flight) and is never preempted for another, so every
accepted sequence ends; each ends in exactly one terminal event.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from serve.engine import adapter_sets
from serve.engine.adapter_tiers import Residency
from serve.engine.admission import StepDraft, admit_waiting, refusal
from serve.engine.lifecycle import LiveSequences
from serve.engine.limits import EngineLimits
from serve.engine.operator_hands import PinnedOut
from serve.engine.outcome import Counters, finish_row
from serve.engine.plan import Executor, FetchResult, LoadResult, RowResult, StepPlan
from serve.engine.planned_step import PlannedStep
from serve.engine.prefill_budget import mixed_prefill_budget
from serve.engine.resident import ImageFetcher
from serve.engine.sequence import Sequence, SequenceState
from serve.messages import Embed, Event, Failed, Finished, FinishReason, Submit

logger = logging.getLogger(__name__)

# a sequence that must see its last token runs in every second step of those decided ahead, and deciding ahead saves the
# others a few percent: they wait for it unless they are this many times as many
MIN_ROWS_PER_SITTING_OUT = 8


class Scheduler:
    """Turns accepted sequences into step plans and results into events."""

    def __init__(
        self,
        limits: EngineLimits,
        executor: Executor,
        clock: Callable[[], float],
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self.live = LiveSequences(limits, executor, fetcher)
        self.counters = Counters()
        self._pinned_out = PinnedOut(self.live)
        self._limits = limits
        self._clock = clock

    def submit(self, command: Submit | Embed) -> list[Event]:
        """Take a command into the waiting line, or refuse it with its terminal event."""
        refused = refusal(command, self.live)
        if refused is not None:
            return [refused]
        self.live.accept(command, self._clock())
        return []

    def abort(self, request_id: str) -> list[Event]:
        """End a sequence for the client; an unknown or ended one is ignored."""
        seq = self.live.by_id.get(request_id)
        if seq is None:
            return []
        self.live.end(seq)
        return [Finished(request_id, FinishReason.ABORTED)]

    def expire(self) -> list[Event]:
        """End the sequences whose deadline has passed, wherever they are."""
        events: list[Event] = []
        for seq in self.live.deadlines.expired(self._clock()):
            events.append(Failed(seq.request_id, "deadline_exceeded", _too_late(seq), 504))
            self.live.end(seq)
        return events

    def schedule(self, *, is_ahead: bool) -> PlannedStep | None:
        """Choose the rows of the next step; steps come back through `finish_step` in the order they were chosen.

        Args:
            is_ahead: one step is in flight, chosen and not finished. None is in flight otherwise.
        Returns:
            None when nothing is to be run, or when the step in flight must be finished first.
        """
        draft = StepDraft(budget=self._limits.max_step_tokens)
        num_preemptions = self.live.num_preemptions
        if not self._plan_decodes(draft, is_ahead=is_ahead):
            return None
        if draft.rows:
            # whoever decodes waits for every prompt token of the step
            num_left = draft.budget
            draft.budget = min(num_left, mixed_prefill_budget(self.live))
            draft.spare = num_left - draft.budget
        if self._limits.mixed_prefill_divisor is not None:
            draft.whole_prompts = draft.budget
        self._plan_prefills(draft)
        # what was just taken from one sequence is not given to another in the same step
        is_open = self.live.num_preemptions == num_preemptions
        admit_waiting(self.live, draft, self._clock(), is_open=is_open)
        if not draft.rows:
            return None
        slot_digests: dict[int, str] = {}
        for seq, row in zip(draft.seqs, draft.rows, strict=True):
            seq.num_in_flight += len(row.token_ids)
            if seq.acting.digests:
                # a row before its adapter's first position names no slot
                slot_digests.update(zip(row.slots, seq.acting.digests, strict=False))
        return PlannedStep(StepPlan(draft.rows, slot_digests), draft.seqs)

    def finish_step(self, step: PlannedStep, results: SequenceOf[RowResult | None]) -> list[Event]:
        """Apply a step's results, in its order; None stands for a row whose execution failed."""
        events: list[Event] = []
        now_s = self._clock()
        self.counters.num_steps += 1
        self.counters.step_adapters.append(len(step.plan.slot_digests))
        for seq, row, result in zip(step.seqs, step.plan.rows, results, strict=True):
            assert result is None or result.request_id == row.request_id, "results are out of the plan's order"
            events += finish_row(self.live, self.counters, seq, row, result, now_s)
        return events

    def finish_fetch(self, result: FetchResult) -> list[Event]:
        """Take the end of an image's fetch into host memory; when it failed, the sequences that wait for it fail."""
        error = self.live.tiers.finish_fetch(result)
        waiting, now_s = self.live.waiting.naming(result.digest), self._clock()
        if error is not None:
            return self._fail_load(result.digest, error, waiting)
        for seq in waiting:
            if seq.load_wait_since_s is not None:
                # a sequence that came while the fetch ran has waited for a part of it
                seq.adapter_fetch_s += min(result.seconds, now_s - seq.load_wait_since_s)
        return []

    def finish_load(self, result: LoadResult) -> list[Event]:
        """Take the end of an adapter's load; when it failed, its waiting sequences fail with the reason."""
        tiers, waiting = self.live.tiers, self.live.waiting.naming(result.digest)
        error = tiers.finish_load(result)
        if error is not None:
            return self._fail_load(result.digest, error, waiting)
        events: list[Event] = []
        now_s = self._clock()
        for seq in waiting:
            if seq.load_wait_since_s is not None:
                seq.adapter_move_s += min(result.seconds, now_s - seq.load_wait_since_s)
            # the size that was just learnt may be too much beside the others'
            reason = adapter_sets.refusal(tiers, seq.acting.digests)
            if reason is not None:
                events.append(self._fail_waiting(seq, reason))
            elif (
                seq.load_wait_since_s is not None
                and adapter_sets.residency(tiers, seq.acting.digests) is Residency.READY
            ):
                seq.adapter_load_s = now_s - seq.load_wait_since_s
                seq.load_wait_since_s = None
        return events

    def fail_pinned_out(self) -> list[Event]:
        """Fail the waiting sequences that can never run beside what the operator has pinned."""
        return [self._fail_waiting(seq, reason) for seq, reason in self._pinned_out.sequences()]

    def _fail_load(self, digest: str, error: str, waiting: list[Sequence]) -> list[Event]:
        logger.warning("adapter %s could not be loaded: %s", digest, error)
        return [self._fail_waiting(seq, f"the adapter could not be loaded: {error}") for seq in waiting]

    def _fail_waiting(self, seq: Sequence, message: str) -> Failed:
        self.live.end(seq)
        return Failed(seq.request_id, "adapter_load_failed", message, 503)

    def _plan_decodes(self, draft: StepDraft, *, is_ahead: bool) -> bool:
        """Add the sequences whose next row is one token; False when the step in flight must be finished first."""
        num_sitting_out = 0
        # oldest first: the victims of `grow` are the youngest, so never one that is planned already
        for seq in list(self.live.running):
            if draft.budget == 0:
                break
            if seq.state is not SequenceState.RUNNING or not seq.is_decoding:
                continue
            if is_ahead and seq.num_left == 0:
                if seq.ends_in_flight(self._limits):
                    continue
                if seq.needs_last_token:
                    num_sitting_out += 1
                    continue
            if self.live.grow(seq, may_preempt=not is_ahead):
                draft.add(seq)
            elif is_ahead:
                return False
        return num_sitting_out * MIN_ROWS_PER_SITTING_OUT <= len(draft.rows)

    def _plan_prefills(self, draft: StepDraft) -> None:
        if len(draft.seqs) == len(self.live.running):
            # all of them decode
            return
        for seq in self.live.running:
            if draft.budget == 0:
                return
            if not seq.is_decoding and draft.make_room_for(seq.num_left):
                draft.add_prompt(seq)


def _too_late(seq: Sequence) -> str:
    assert seq.deadline_at_s is not None, f"sequence {seq.request_id} has no deadline to miss"
    if seq.state is SequenceState.RUNNING:
        where = f"after {len(seq.output_ids)} tokens" if seq.is_started else "while its prompt was computed"
    else:
        where = "while it waited" if seq.load_wait_since_s is None else "while its adapter was not loaded"
    return (
        f"the request's deadline of {seq.deadline_at_s - seq.arrived_s:g} s passed {where}; allow more, or ask for less"
    )
