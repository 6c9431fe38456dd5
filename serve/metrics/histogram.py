"""A histogram for the event loop: what every token costs here must be next to nothing.

Owns the counts of one histogram without labels. Invariant: `collect` gives what `prometheus_client.Histogram` would of
the same observations; no lock, so all of it is the event loop's alone.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class LoopHistogram(Collector):
    """Counts observations by upper bounds; `buckets` ascend, and infinity is added."""

    def __init__(self, name: str, text: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        # the same in every scrape
        self._labels = [{"le": str(floatToGoString(bound))} for bound in self._bounds]  # type: ignore[no-untyped-call]
        registry.register(self)

    def observe(self, amount: float) -> None:
        """Count one observation, a number and not NaN."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        family = Metric(self._name, self._text, "histogram")
        total = 0
        for labels, total in zip(self._labels, accumulate(self._counts), strict=True):
            family.add_sample(f"{self._name}_bucket", labels, total)
        family.add_sample(f"{self._name}_count", {}, total)
        family.add_sample(f"{self._name}_sum", {}, self._sum)
        yield family
