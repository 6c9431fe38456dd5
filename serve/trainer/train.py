"""The training loop: from a job to an adapter folder, step by step, resumable after a kill at any moment.

Owns the order of the work. Invariant: what the loop yields after step n is a function of the job alone, however often
the process was killed before.
"""

from collections.abc import Iterator

from serve.trainer.progress import Control, Progress, Stopped, TrainingFailed, TrainingRun


def run(job: TrainingRun, control: Control) -> Iterator[Progress]:
    """Train, and yield what happens; raises TrainingFailed."""
    if control.check() == "run":
        raise TrainingFailed("bad_spec", f"the family {job.spec.family} cannot be trained yet")
    yield Stopped(0, "cancel")
