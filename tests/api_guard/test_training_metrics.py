"""What /metrics says of training jobs is what their table holds."""

from dataclasses import replace
from typing import cast

import pytest

from adapters_store.jobs.job import Job, JobState, Progress
from adapters_store.jobs.jobs import Jobs
from serve.api.training_metrics import summarise
from serve.metrics import Metrics

NOW = 1_000.0
RUNNING = Progress(step=3, total_steps=9, train_loss=2.0, started=900.0, updated=970.0, steps_per_s=0.5)


class Table:
    """The part of the jobs' table that is read."""

    def __init__(self, *progress: Progress | None) -> None:
        self._progress = progress

    def counts(self) -> dict[JobState, int]:
        return {state: 2 if state is JobState.FAILED else 0 for state in JobState} | {
            JobState.RUNNING: len(self._progress)
        }

    def running(self) -> list[Job]:
        jobs = []
        for progress in self._progress:
            job = object.__new__(Job)
            object.__setattr__(job, "progress", progress)
            jobs.append(job)
        return jobs


def page(*progress: Progress | None) -> dict[str, float]:
    metrics = Metrics()
    metrics.observe_training(summarise(cast(Jobs, Table(*progress)), NOW))
    rows = (line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows if name.startswith("chorale_training")}


def test_running_jobs_are_summed_up() -> None:
    slow = replace(RUNNING, train_loss=4.0, updated=940.0, steps_per_s=0.25)
    fresh = replace(RUNNING, train_loss=None, updated=999.0, steps_per_s=0.0)
    seen = page(RUNNING, slow, fresh, None)
    assert seen["chorale_training_steps_per_second"] == pytest.approx(0.75)
    assert seen["chorale_training_loss"] == pytest.approx(3.0)
    assert seen["chorale_training_silent_seconds"] == pytest.approx(60.0)
    assert seen['chorale_training_jobs{status="running"}'] == 4.0
    assert seen['chorale_training_jobs{status="failed"}'] == 2.0


def test_at_rest_all_but_the_counts_is_zero() -> None:
    seen = page()
    assert [seen[f"chorale_training_{name}"] for name in ("steps_per_second", "loss", "silent_seconds")] == [0, 0, 0]
    assert seen['chorale_training_jobs{status="running"}'] == 0.0
