"""The steps between their decision and their results: one at a time, or two on an executor that runs them itself.

Owns the order of submission and collection, and the way back to one step at a time when a step is lost. Decides nothing
about sequences. Invariants: steps finish in the order they were pushed; what was submitted is a leading part of what
was pushed, so no step is ever submitted behind one that was lost; every pushed step is popped with a result per row.
"""

import logging
from collections import deque
from collections.abc import Iterator

from serve.engine.containment import ContainedExecutor
from serve.engine.plan import AsyncExecutor, Executor, RowResult
from serve.engine.planned_step import PlannedStep
from serve.engine.sequence import SequenceState

logger = logging.getLogger(__name__)

# one on the device and one behind it: more would only make ends and aborts later
_MAX_SUBMITTED = 2


class StepPipeline:
    """Takes decided steps and hands them back with their results, oldest first."""

    def __init__(self, executor: Executor) -> None:
        # None: the executor is synchronous
        self._device = executor if isinstance(executor, AsyncExecutor) and executor.is_async else None
        self._contained = ContainedExecutor(executor)
        self._steps: deque[PlannedStep] = deque()
        self._num_submitted = 0

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[PlannedStep]:
        return iter(self._steps)

    @property
    def is_full(self) -> bool:
        """Say whether the oldest step must be popped before the next one is decided."""
        if self._device is None:
            return bool(self._steps)
        return len(self._steps) == _MAX_SUBMITTED or self._num_submitted < len(self._steps)

    def push(self, step: PlannedStep) -> None:
        """Take a step. An asynchronous executor begins it; one that cannot be begun is run when it is popped."""
        self._steps.append(step)
        if self._device is None:
            return
        try:
            self._device.submit(step.plan)
        except Exception:
            logger.exception("a step of %d rows could not be submitted", len(step.seqs))
        else:
            self._num_submitted += 1

    def pop(self) -> tuple[PlannedStep, list[RowResult | None]]:
        """Wait for the oldest step and return it with its results, which must be applied before the next `pop`.

        Results are None for rows that could not be run. A lost step is run again, alone: whatever was submitted behind
        it is drained first, and then run alone too, since it may have read tokens that the lost step did not give.

        Raises:
            Exception: the engine is lost (see `ContainedExecutor.execute`).
        """
        step = self._steps.popleft()
        if self._device is None:
            return step, self._contained.execute(step.plan)
        if self._num_submitted:
            self._num_submitted -= 1
            try:
                results: list[RowResult | None] = list(self._device.collect())
            except Exception:
                logger.exception("a submitted step of %d rows was lost", len(step.seqs))
                self._drain(self._device)
            else:
                self._contained.note_success()
                return step, results
        return step, self._run_alone(step)

    def _drain(self, device: AsyncExecutor) -> None:
        while self._num_submitted:
            self._num_submitted -= 1
            try:
                device.collect()
            except Exception:
                logger.exception("the step submitted behind a lost one was lost too")

    def _run_alone(self, step: PlannedStep) -> list[RowResult | None]:
        plan = step.settled()
        results = iter(self._contained.execute(plan) if plan.rows else ())
        return [None if seq.state is SequenceState.ENDED else next(results) for seq in step.seqs]
