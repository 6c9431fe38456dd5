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

_TIERS = ("host", "device")
_CAUSES = ("room", "operator", "unload", "no_fit", "failed", "on_device")


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
        held = {
            # an adapter on the device may have its image on the host as well
            "host": [adapter.num_host_bytes for adapter in adapters if adapter.num_host_bytes],
            "device": [adapter.num_bytes for adapter in adapters if adapter.tier == "device"],
        }
        for tier in _TIERS:
            resident.add_metric([tier], len(held[tier]))
            num_bytes.add_metric([tier], sum(held[tier]))
        loading = GaugeMetricFamily("chorale_adapters_loading", "Adapters under way by their tier.", labels=["target"])
        for target, state in (("host", "fetching"), ("device", "loading")):
            loading.add_metric([target], sum(adapter.tier == state for adapter in adapters))
        yield from (resident, num_bytes, loading)

    def _moved(self) -> Iterable[Metric]:
        text = "Adapters that left a tier of memory by cause."
        drops = CounterMetricFamily("chorale_adapter_drops", text, labels=["tier", "cause"])
        text = "Bytes of adapters into and out of a tier of memory."
        swapped = CounterMetricFamily("chorale_adapter_swap_bytes", text, labels=["tier", "direction"])
        for tier in _TIERS:
            for cause in _CAUSES:
                drops.add_metric([tier, cause], self._view.drops[tier, cause])
            for direction in ("in", "out"):
                swapped.add_metric([tier, direction], self._view.swap_bytes[tier, direction])
        yield from (drops, swapped)

    def _used(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("chorale_adapter_requests", "Ended sequences by adapter.", labels=["adapter"])
        tokens = CounterMetricFamily("chorale_adapter_tokens", "Generated tokens by adapter.", labels=["adapter"])
        for name, (num_requests, num_tokens) in self._usage.rows():
            requests.add_metric([name], num_requests)
            tokens.add_metric([name], num_tokens)
        yield from (requests, tokens)
