"""How long to train, how fast, and when to look: pure arithmetic of steps.

Owns the number of steps and the learning rate. Invariant: both are functions of the resolved spec and the number of
rows alone.
"""

import math
from dataclasses import dataclass

from adapters_store.jobs.spec import TrainSpec

# a kill loses at most this share of a run
_RESUME_SHARE = 50


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of the optimiser; a step sees `rows_per_step` rows, in micro-batches of `micro_rows`."""

    total_steps: int
    steps_per_epoch: int
    rows_per_step: int
    micro_rows: int
    warmup_steps: int
    learning_rate: float
    eval_every: int
    checkpoint_every: int
    resume_every: int

    @classmethod
    def of(cls, spec: TrainSpec, num_rows: int) -> "Schedule":
        """Return the schedule of a resolved spec."""
        assert spec.batch_size is not None and spec.n_epochs is not None and spec.learning_rate is not None
        rows = spec.batch_size * spec.gradient_accumulation
        per_epoch = -(-num_rows // rows)
        total = per_epoch * spec.n_epochs
        total = total if spec.max_steps is None else min(total, spec.max_steps)
        return cls(
            total_steps=total,
            steps_per_epoch=per_epoch,
            rows_per_step=rows,
            micro_rows=spec.batch_size,
            warmup_steps=math.ceil(spec.warmup * total),
            learning_rate=spec.learning_rate,
            eval_every=spec.eval_every or per_epoch,
            checkpoint_every=spec.checkpoint_every or per_epoch,
            resume_every=max(1, total // _RESUME_SHARE),
        )

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of the step after `step` steps: a linear warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        rest = max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / rest))

    def is_due(self, every: int, step: int) -> bool:
        """Is something that happens every so often due after `step` steps? At the end it always is."""
        return step % every == 0 or step == self.total_steps
