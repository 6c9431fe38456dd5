"""A histogram for the event loop: what every token costs here must be next to nothing.

Owns the counts of one histogram without labels. Invariant: `collect` and `text` give what `prometheus_client.Histogram`
would of the same observations; no lock, so all of it is the event loop's alone.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from serve.metrics.exposition import TextCollector, head_text, number_text


class LoopHistogram(TextCollector):
    """Counts observations by upper bounds; `buckets` ascend, and infinity is added."""

    def __init__(self, name: str, text: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        # the same in every scrape
        self._labels = [{"le": str(floatToGoString(bound))} for bound in self._bounds]  # type: ignore[no-untyped-call]
        self._head = head_text(name, text, "histogram")
        self._begins = [f'{name}_bucket{{le="{labels["le"]}"}} ' for labels in self._labels]
        # of the last page; "" when something was counted since
        self._lines = ""
        registry.register(self)

    def observe(self, amount: float) -> None:
        """Count one observation, a number and not NaN."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount
        self._lines = ""

    def text(self) -> str:
        """Return the lines; put together only when something was counted."""
        if not self._lines:
            totals = [number_text(total) for total in accumulate(self._counts)]
            buckets = "".join([f"{begin}{total}\n" for begin, total in zip(self._begins, totals, strict=True)])
            rest = f"{self._name}_count {totals[-1]}\n{self._name}_sum {number_text(self._sum)}\n"
            self._lines = f"{self._head}{buckets}{rest}"
        return self._lines

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        family = Metric(self._name, self._text, "histogram")
        total = 0
        for labels, total in zip(self._labels, accumulate(self._counts), strict=True):
            family.add_sample(f"{self._name}_bucket", labels, total)
        family.add_sample(f"{self._name}_count", {}, total)
        family.add_sample(f"{self._name}_sum", {}, self._sum)
        yield family
