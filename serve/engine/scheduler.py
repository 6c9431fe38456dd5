"""What runs next, and what a finished step means: continuous batching with chunked prefill under a token budget.

Owns the order inside a step (decodes, running prefills, admissions) and the translation of row results into events.
No torch, no clock of its own. Invariant: the oldest running sequence is in every plan and is never preempted for
another, so every accepted sequence ends; each ends in exactly one terminal event.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from serve.engine.adapter_tiers import Residency
from serve.engine.admission import StepDraft, admit_waiting, refusal
from serve.engine.lifecycle import LiveSequences
from serve.engine.limits import EngineLimits
from serve.engine.outcome import Counters, finish_row
from serve.engine.plan import Executor, LoadResult, RowResult, StepPlan
from serve.engine.sequence import Sequence, SequenceState
from serve.messages import Embed, Event, Failed, Finished, FinishReason, Submit

logger = logging.getLogger(__name__)


class Scheduler:
    """Turns accepted sequences into step plans and results into events."""

    def __init__(self, limits: EngineLimits, executor: Executor, clock: Callable[[], float]) -> None:
        self.live = LiveSequences(limits, executor)
        self.counters = Counters()
        self._limits = limits
        self._clock = clock
        self._planned: list[Sequence] = []

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

    def schedule(self) -> StepPlan:
        """Choose the rows of the next step; its results must come back through `finish_step` before the next call."""
        draft = StepDraft(budget=self._limits.max_step_tokens)
        num_preemptions = self.live.num_preemptions
        self._plan_decodes(draft)
        self._plan_prefills(draft)
        # what was just taken from one sequence is not given to another in the same step
        is_open = self.live.num_preemptions == num_preemptions
        admit_waiting(self.live, draft, self._clock(), is_open=is_open)
        self._planned = draft.seqs
        slot_digests = {
            seq.adapter_slot: seq.adapter_digest
            for seq in draft.seqs
            if seq.adapter_slot is not None and seq.adapter_digest is not None
        }
        return StepPlan(draft.rows, slot_digests)

    def finish_step(self, plan: StepPlan, results: SequenceOf[RowResult | None]) -> list[Event]:
        """Apply the results of the last plan, in its order; None stands for a row whose execution failed."""
        events: list[Event] = []
        self.counters.num_steps += 1
        for seq, row, result in zip(self._planned, plan.rows, results, strict=True):
            assert result is None or result.request_id == row.request_id, "results are out of the plan's order"
            events += finish_row(self.live, self.counters, seq, row, result)
        self._planned = []
        return events

    def finish_load(self, result: LoadResult) -> list[Event]:
        """Take the end of an adapter's load; when it failed, its waiting sequences fail with the reason."""
        error = self.live.tiers.finish_load(result)
        waiting = self.live.waiting.of(result.digest)
        if error is not None:
            logger.warning("adapter %s could not be loaded: %s", result.digest, error)
            for seq in waiting:
                self.live.end(seq)
            message = f"the adapter could not be loaded: {error}"
            return [Failed(seq.request_id, "adapter_load_failed", message, 503) for seq in waiting]
        if self.live.tiers.residency(result.digest) is Residency.READY:
            self.counters.adapter_load_s.append(result.seconds)
            now_s = self._clock()
            for seq in waiting:
                if seq.load_wait_since_s is not None:
                    seq.adapter_load_s = now_s - seq.load_wait_since_s
                    seq.load_wait_since_s = None
        return []

    def _plan_decodes(self, draft: StepDraft) -> None:
        # oldest first: the victims of `grow` are the youngest, so never one that is planned already
        for seq in list(self.live.running):
            if draft.budget == 0:
                return
            if seq.state is SequenceState.RUNNING and seq.is_decoding and self.live.grow(seq):
                draft.add(seq)

    def _plan_prefills(self, draft: StepDraft) -> None:
        for seq in self.live.running:
            if draft.budget == 0:
                return
            if not seq.is_decoding:
                draft.add(seq)
