"""Executes plans so that a failure hits no more rows than it must.

Owns the second attempt, the bisection by adapter, and the judgement that the engine is lost. Invariant: rows are
independent, so running a plan again, or in parts, gives the same tokens.
"""

import logging
from collections import defaultdict

from serve.engine.plan import Executor, RowResult, StepPlan

logger = logging.getLogger(__name__)


class ContainedExecutor:
    """An executor behind the engine step's wall."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._was_lost = False

    def note_success(self) -> None:
        """Take note that a step ran well: the engine is alive, and the next failure counts as a first one."""
        self._was_lost = False

    def execute(self, plan: StepPlan) -> list[RowResult | None]:
        """Run a plan; on failure once more, then each adapter's and each composition's rows alone.

        Returns:
            Results in the order of `plan.rows`; None for the rows of an adapter that cannot be run.
        Raises:
            Exception: what the executor raised, when every part of the plan failed. One adapter that all parts name
                proves nothing against the engine, so the first such step only fails its rows; the second raises.
        """
        for attempt in ("first", "second"):
            try:
                results: list[RowResult | None] = list(self._executor.execute(plan))
            except Exception:
                logger.exception("a step of %d rows failed (%s attempt)", len(plan.rows), attempt)
            else:
                self.note_success()
                return results
        return self._execute_by_adapter(plan)

    def _execute_by_adapter(self, plan: StepPlan) -> list[RowResult | None]:
        groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, row in enumerate(plan.rows):
            groups[row.slots].append(index)
        results: list[RowResult | None] = [None] * len(plan.rows)
        failures: list[Exception] = []
        for slots, indices in groups.items():
            digests = {slot: plan.slot_digests[slot] for slot in slots}
            part = StepPlan([plan.rows[index] for index in indices], digests)
            try:
                part_results = self._executor.execute(part)
            except Exception as failure:
                logger.exception("the %d rows of %s failed alone", len(indices), list(digests.values()) or "the base")
                failures.append(failure)
            else:
                for index, result in zip(indices, part_results, strict=True):
                    results[index] = result
        is_lost = len(failures) == len(groups)
        # one adapter that all parts name, alone or composed, may be to blame for all of them
        suspects = frozenset.intersection(*map(frozenset, groups))
        if is_lost and (self._was_lost or not suspects):
            raise failures[-1]
        self._was_lost = is_lost
        return results
