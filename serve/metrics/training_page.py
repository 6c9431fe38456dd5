"""What the store's training jobs do, as whoever reads their table says now and then.

Owns the rendering only. Invariant: a scrape reads no table; nothing here is labelled by a job or a tenant.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """All jobs of the store at one moment; of the running ones: steps a second, mean loss, oldest sign of life."""

    jobs_by_status: Mapping[str, int] = field(default_factory=dict)
    steps_per_s: float = 0.0
    mean_loss: float = 0.0
    silent_s: float = 0.0


class TrainingCollector(Collector):
    """The series of one scrape."""

    def __init__(self) -> None:
        self.summary = TrainingSummary()

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        jobs = GaugeMetricFamily("chorale_training_jobs", "Training jobs of the store by status.", labels=["status"])
        for status, number in sorted(self.summary.jobs_by_status.items()):
            jobs.add_metric([status], number)
        yield jobs
        simple = (
            ("chorale_training_steps_per_second", "Steps of all running jobs.", self.summary.steps_per_s),
            ("chorale_training_loss", "Mean of the running jobs' last loss; 0 if none runs.", self.summary.mean_loss),
            ("chorale_training_silent_seconds", "Since the longest silent running job's step.", self.summary.silent_s),
        )
        for name, text, value in simple:
            yield GaugeMetricFamily(name, text, value=value)
