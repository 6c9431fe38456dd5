"""What routers that were made for vLLM read: the same facts under vLLM's names.

Owns the rendering only. Invariant: `vllm:lora_requests_info` is exactly one series, whose labels are at most
`MAX_LABEL_BYTES` long; the hottest adapters come first, so what the cap cuts off matters least.
"""

from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.messages import AdapterState
from serve.metrics.adapter_usage import AdapterNames
from serve.metrics.engine_view import EngineView
from serve.metrics.names import MAX_ADAPTER_SERIES, MAX_LABEL_BYTES


class VllmCollector(Collector):
    """vLLM's series of one scrape; `max_adapters` are those that the device holds at once."""

    def __init__(
        self, view: EngineView, names: AdapterNames, max_adapters: int, unix_clock: Callable[[], float]
    ) -> None:
        self._view = view
        self._names = names
        self._max_adapters = max_adapters
        self._unix_clock = unix_clock

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        stats = self._view.stats
        adapters = [] if stats is None else self._names.hottest(stats.adapters)
        on_device = [adapter for adapter in adapters if adapter.tier == "device"]
        on_host = [adapter for adapter in adapters if adapter.tier == "host"]
        loading = [adapter for adapter in adapters if adapter.tier in ("loading", "fetching")]
        usage = stats.num_kv_blocks_in_use / max(1, stats.num_kv_blocks) if stats is not None else 0.0
        simple = {
            "vllm:num_requests_running": stats.num_running if stats is not None else 0,
            "vllm:num_requests_waiting": stats.num_waiting if stats is not None else 0,
            "vllm:kv_cache_usage_perc": usage,
            "vllm:num_gpu_loaded_lora_adapters": len(on_device),
            "vllm:num_cpu_loaded_lora_adapters": len(on_host),
        }
        for name, value in simple.items():
            yield GaugeMetricFamily(name, "Alias that routers made for vLLM read.", value=value)
        cache = GaugeMetricFamily("vllm:cache_config_info", "KV geometry.", labels=["block_size", "num_gpu_blocks"])
        if stats is not None:
            cache.add_metric([str(stats.block_size), str(stats.num_kv_blocks)], 1)
        yield cache
        yield self._info(on_device, loading)
        yield self._loaded([*on_device, *on_host])

    def _info(self, on_device: list[AdapterState], loading: list[AdapterState]) -> Metric:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Resident and loading adapters.", labels=labels)
        names = [str(self._max_adapters), self._joined(on_device), self._joined(loading)]
        info.add_metric(names, self._unix_clock())
        return info

    def _loaded(self, adapters: list[AdapterState]) -> Metric:
        stats = self._view.stats
        pinned = set() if stats is None else {pin.digest for pin in stats.operator_pins if pin.error is None}
        labels = ["adapter_name", "level", "pinned", "rank"]
        loaded = GaugeMetricFamily("vllm:lora_adapter_loaded", "Adapters in memory.", labels=labels)
        for name, adapter in list(self._names.first_of_each(adapters).items())[:MAX_ADAPTER_SERIES]:
            is_pinned = str(adapter.digest in pinned).lower()
            loaded.add_metric([name, adapter.tier, is_pinned, str(adapter.rank)], 1)
        return loaded

    def _joined(self, adapters: list[AdapterState]) -> str:
        """Return the adapters' names, comma-separated, as many as fit the label's cap."""
        text = ""
        for name in self._names.first_of_each(adapters):
            longer = f"{text},{name}" if text else name
            if len(longer.encode()) > MAX_LABEL_BYTES:
                break
            text = longer
        return text
