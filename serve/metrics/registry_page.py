"""What this replica knows of the registry that it shares, as series of the metrics page.

Owns the rendering only. Invariant: a server that shares nothing has none of these series, and what is not known has no
sample instead of a guess.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class RegistryFacts:
    """As of one moment: `change` is the newest one followed; `lag` by how many Redis is ahead, None: unknown."""

    change: int
    lag: int | None
    seen_s_ago: float
    is_redis_up: bool


class RegistryCollector(Collector):
    """The series of one shared registry."""

    def __init__(self, facts: Callable[[], RegistryFacts]) -> None:
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        facts = self._facts()
        yield GaugeMetricFamily("chorale_registry_change", "Newest change followed.", value=facts.change)
        lag = GaugeMetricFamily(
            "chorale_registry_lag_changes", "Changes that Redis knows of and this replica does not."
        )
        if facts.lag is not None:
            lag.add_metric([], facts.lag)
        yield lag
        text = "Seconds since this replica last looked at the journal's end."
        yield GaugeMetricFamily("chorale_registry_seen_seconds", text, value=facts.seen_s_ago)
        yield GaugeMetricFamily("chorale_redis_up", "Whether Redis answered the last time.", value=facts.is_redis_up)
