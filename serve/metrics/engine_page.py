"""What the last heartbeat said, under our own names.

Owns the rendering only. Invariant: nothing is asked of the engine when the page is read.
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.messages import AdapterState
from serve.metrics.adapter_usage import AdapterUsage
from serve.metrics.engine_view import EngineView
from serve.metrics.names import COUNTERS, GAUGES

_CAUSES = ("room", "operator", "unload", "no_fit")
_TIERS = ("loading", "host", "device")


class EngineCollector(Collector):
    """Our series of one scrape."""

    def __init__(self, view: EngineView, usage: AdapterUsage) -> None:
        self._view = view
        self._usage = usage

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        stats = self._view.stats
        for name, text, field in GAUGES:
            yield GaugeMetricFamily(name, text, value=0 if stats is None else getattr(stats, field))
        for name, text, field in COUNTERS:
            yield CounterMetricFamily(name, text, value=self._view.totals[field])
        pinned = 0 if stats is None else sum(pin.error is None for pin in stats.operator_pins)
        yield GaugeMetricFamily("chorale_adapters_pinned", "Adapters that the operator keeps in memory.", value=pinned)
        yield from self._resident([] if stats is None else stats.adapters)
        yield from self._moved()
        yield from self._used()

    def _resident(self, adapters: list[AdapterState]) -> Iterable[Metric]:
        resident = GaugeMetricFamily("chorale_adapters_resident", "Adapters by tier.", labels=["tier"])
        num_bytes = GaugeMetricFamily("chorale_adapter_bytes", "Bytes of adapter images by tier.", labels=["tier"])
        for tier in _TIERS:
            held = [adapter for adapter in adapters if adapter.tier == tier]
            resident.add_metric([tier], len(held))
            num_bytes.add_metric([tier], sum(adapter.num_bytes for adapter in held))
        yield from (resident, num_bytes)

    def _moved(self) -> Iterable[Metric]:
        drops = CounterMetricFamily("chorale_adapter_drops", "Adapters that left memory by cause.", labels=["cause"])
        for cause in _CAUSES:
            drops.add_metric([cause], self._view.drops[cause])
        swapped = CounterMetricFamily(
            "chorale_adapter_swap_bytes", "Bytes of adapters into and out of memory.", labels=["direction"]
        )
        for direction in ("in", "out"):
            swapped.add_metric([direction], self._view.swap_bytes[direction])
        yield from (drops, swapped)

    def _used(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("chorale_adapter_requests", "Ended sequences by adapter.", labels=["adapter"])
        tokens = CounterMetricFamily("chorale_adapter_tokens", "Generated tokens by adapter.", labels=["adapter"])
        for name, (num_requests, num_tokens) in self._usage.rows():
            requests.add_metric([name], num_requests)
            tokens.add_metric([name], num_tokens)
        yield from (requests, tokens)
