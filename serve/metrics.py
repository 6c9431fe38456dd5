"""Every Prometheus metric of the server: names, help texts, buckets, and what feeds them.

Fed by the engine's heartbeats (`Stats`) and by the life of each request; asks nothing of the engine when scraped and
renders at most every `RENDER_S`. Invariants: no label comes from a client unbounded (adapters: the most recent 200 and
`_other`; none on a histogram); counters never fall, also when the engine restarts; gauges are 0 at rest.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.messages import AdapterState, Embedded, Finished, Started, Stats, Tokens

RENDER_S = 0.1
MAX_ADAPTER_SERIES = 200
MAX_LABEL_BYTES = 8 << 10
MAX_NAMES = 1 << 14

# vLLM's buckets, so that dashboards made for it read ours
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)

# name, help, field of Stats
_GAUGES = (
    ("chorale_requests_running", "Sequences in the running batch.", "num_running"),
    ("chorale_requests_waiting", "Sequences waiting for blocks, budget or their adapter.", "num_waiting"),
    ("chorale_kv_blocks", "KV blocks in all.", "num_kv_blocks"),
    ("chorale_kv_blocks_in_use", "KV blocks held by sequences.", "num_kv_blocks_in_use"),
    ("chorale_adapter_pins", "Holds of running sequences on adapters.", "num_adapter_pins"),
)
_COUNTERS = (
    ("chorale_engine_steps", "Steps of the engine.", "num_steps_total"),
    ("chorale_prompt_tokens", "Prompt tokens of accepted sequences.", "num_prompt_tokens_total"),
    ("chorale_generation_tokens", "Generated tokens.", "num_generated_tokens_total"),
    ("chorale_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", "num_prefix_hit_tokens_total"),
    ("chorale_preemptions", "Running sequences sent back to waiting.", "num_preemptions_total"),
    ("chorale_adapter_loads", "Adapters brought into memory.", "num_adapter_loads_total"),
    ("chorale_adapter_evictions", "Adapters dropped from memory.", "num_adapter_evictions_total"),
)


class AdapterUsage:
    """Requests and tokens per adapter name: the most recent ones, and the sum of all that fell out."""

    def __init__(self, max_series: int = MAX_ADAPTER_SERIES) -> None:
        self._max_series = max_series
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._other = (0, 0)

    def add(self, name: str, *, num_requests: int, num_tokens: int) -> None:
        """Count usage and make this adapter the most recent one."""
        requests, tokens = self._counts.get(name, (0, 0))
        self._counts[name] = (requests + num_requests, tokens + num_tokens)
        self._counts.move_to_end(name)
        if len(self._counts) > self._max_series:
            _, (requests, tokens) = self._counts.popitem(last=False)
            self._other = (self._other[0] + requests, self._other[1] + tokens)

    def rows(self) -> list[tuple[str, tuple[int, int]]]:
        """Return (name, (requests, tokens)), `_other` last."""
        return [*self._counts.items(), ("_other", self._other)]


class Metrics:
    """The registry and everything in it; created once in the composition root. Event loop only."""

    def __init__(
        self,
        *,
        max_adapters: int = 0,
        compat_vllm: bool = True,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.max_adapters = max_adapters
        self.compat_vllm = compat_vllm
        self.clock = clock
        self.unix_clock = unix_clock
        self.stats: Stats | None = None
        self.totals = dict.fromkeys((field for _, _, field in _COUNTERS), 0)
        self.usage = AdapterUsage()
        self._names: OrderedDict[str, str] = OrderedDict()
        self._rendered = b""
        self._render_at = float("-inf")
        # `_created` would double the series of a page that is read twenty times a second
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self._registry = registry
        seconds = {
            "ttft": ("chorale_time_to_first_token_seconds", _TTFT_BUCKETS),
            "itl": ("chorale_inter_token_latency_seconds", _TOKEN_BUCKETS),
            "tpot": ("chorale_time_per_output_token_seconds", _TOKEN_BUCKETS),
            "e2e": ("chorale_e2e_request_latency_seconds", _REQUEST_BUCKETS),
            "queue": ("chorale_request_queue_time_seconds", _REQUEST_BUCKETS),
            "prefill": ("chorale_request_prefill_time_seconds", _REQUEST_BUCKETS),
            "decode": ("chorale_request_decode_time_seconds", _REQUEST_BUCKETS),
            "adapter_load": ("chorale_adapter_load_seconds", _TTFT_BUCKETS),
        }
        if compat_vllm:
            seconds["adapter_load_alias"] = ("vllm:lora_adapter_load_seconds", _TTFT_BUCKETS)
        self.seconds = {
            key: Histogram(name, f"Seconds: {key}.", buckets=buckets, registry=registry)
            for key, (name, buckets) in seconds.items()
        }
        self.finished = Counter(
            "chorale_requests_finished", "Ended sequences by reason.", ["reason"], registry=registry
        )
        self.rejected = Counter("chorale_requests_rejected", "Refusals by error code.", ["code"], registry=registry)
        self.restarts = Counter("chorale_engine_restarts", "Engine processes lost.", registry=registry)
        registry.register(EngineCollector(self))

    def name_adapter(self, digest: str, name: str) -> None:
        """Remember under which name an adapter's series appear."""
        self._names[digest] = name
        self._names.move_to_end(digest)
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)

    def adapter_name(self, digest: str) -> str:
        """Return the adapter's name, or the start of its digest if nobody named it."""
        return self._names.get(digest, digest[:12])

    def observe_stats(self, stats: Stats) -> None:
        """Take one heartbeat."""
        before = self.stats
        for field in self.totals:
            value = getattr(stats, field)
            last = 0 if before is None else getattr(before, field)
            # a fall is an engine that was restarted between two heartbeats
            self.totals[field] += value - last if value >= last else value
        for load_s in stats.adapter_load_s:
            for key in {"adapter_load", "adapter_load_alias"} & self.seconds.keys():
                self.seconds[key].observe(load_s)
        self.stats = stats

    def engine_lost(self) -> None:
        """Note that the engine process is gone: nothing runs, nothing is resident."""
        self.stats = None
        self.restarts.inc()

    def count_rejection(self, code: str) -> None:
        """Count a request that was refused before any work; `code` is one of our own error codes."""
        self.rejected.labels(code).inc()

    def open_request(self, *adapter_digests: str) -> "RequestMeter":
        """Start to measure one sequence; a composition counts for each of its adapters."""
        return RequestMeter(self, adapter_digests)

    def render(self) -> bytes:
        """Return the exposition text, at most `RENDER_S` old."""
        now = self.clock()
        if now - self._render_at >= RENDER_S:
            self._rendered = generate_latest(self._registry)
            self._render_at = now
        return self._rendered


class RequestMeter:
    """The times of one sequence; `close` may be called more than once, the first reason counts."""

    def __init__(self, metrics: Metrics, adapter_digests: tuple[str, ...]) -> None:
        self._metrics = metrics
        self._adapter_digests = adapter_digests
        self._opened_at = metrics.clock()
        self._queue_s = 0.0
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._num_tokens = 0
        self._is_closed = False

    def saw(self, event: Started | Tokens | Embedded | Finished) -> None:
        """Take one event of the sequence as it arrives from the engine."""
        now = self._metrics.clock()
        if isinstance(event, Started):
            self._queue_s = event.queue_s
            self._metrics.seconds["queue"].observe(event.queue_s)
        elif isinstance(event, Tokens):
            self._saw_tokens(len(event.token_ids), now)
        else:
            self.close(str(event.reason) if isinstance(event, Finished) else "embed")

    def close(self, reason: str) -> None:
        """Count the end: "stop", "length", "error", or "abort" for a reader that left (client gone, stop string)."""
        if self._is_closed:
            return
        self._is_closed = True
        now = self._metrics.clock()
        self._metrics.finished.labels(reason).inc()
        self._metrics.seconds["e2e"].observe(now - self._opened_at)
        if self._first_token_at is not None:
            decode_s = self._last_token_at - self._first_token_at
            self._metrics.seconds["decode"].observe(decode_s)
            if self._num_tokens > 1:
                self._metrics.seconds["tpot"].observe(decode_s / (self._num_tokens - 1))
        for digest in self._adapter_digests:
            name = self._metrics.adapter_name(digest)
            self._metrics.usage.add(name, num_requests=1, num_tokens=self._num_tokens)

    def _saw_tokens(self, num_tokens: int, now: float) -> None:
        if self._first_token_at is None:
            self._first_token_at = now
            ttft_s = now - self._opened_at
            self._metrics.seconds["ttft"].observe(ttft_s)
            self._metrics.seconds["prefill"].observe(max(0.0, ttft_s - self._queue_s))
        else:
            self._metrics.seconds["itl"].observe(now - self._last_token_at)
        self._last_token_at = now
        self._num_tokens += num_tokens


class EngineCollector(Collector):
    """Renders what the last heartbeat said, under our names and under vLLM's."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Yield the series of one scrape."""
        stats = self._metrics.stats
        for name, text, field in _GAUGES:
            yield GaugeMetricFamily(name, text, value=0 if stats is None else getattr(stats, field))
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(name, text, value=self._metrics.totals[field])
        yield from self._adapters([] if stats is None else stats.adapters)
        if self._metrics.compat_vllm:
            yield from self._aliases(stats)

    def _adapters(self, adapters: list[AdapterState]) -> Iterable[Metric]:
        resident = GaugeMetricFamily("chorale_adapters_resident", "Adapters by tier.", labels=["tier"])
        num_bytes = GaugeMetricFamily("chorale_adapter_bytes", "Bytes of adapter images by tier.", labels=["tier"])
        for tier in ("loading", "host", "device"):
            held = [adapter for adapter in adapters if adapter.tier == tier]
            resident.add_metric([tier], len(held))
            num_bytes.add_metric([tier], sum(adapter.num_bytes for adapter in held))
        requests = CounterMetricFamily("chorale_adapter_requests", "Ended sequences by adapter.", labels=["adapter"])
        tokens = CounterMetricFamily("chorale_adapter_tokens", "Generated tokens by adapter.", labels=["adapter"])
        for name, (num_requests, num_tokens) in self._metrics.usage.rows():
            requests.add_metric([name], num_requests)
            tokens.add_metric([name], num_tokens)
        yield from (resident, num_bytes, requests, tokens)

    def _aliases(self, stats: Stats | None) -> Iterable[Metric]:
        adapters = [] if stats is None else sorted(stats.adapters, key=lambda adapter: -adapter.num_pins)
        on_device = [adapter for adapter in adapters if adapter.tier == "device"]
        on_host = [adapter for adapter in adapters if adapter.tier == "host"]
        loading = [adapter for adapter in adapters if adapter.tier == "loading"]
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
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Resident and loading adapters.", labels=labels)
        names = [str(self._metrics.max_adapters), self._joined(on_device), self._joined(loading)]
        info.add_metric(names, self._metrics.unix_clock())
        yield info
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded", "Adapters in memory.", labels=["adapter_name", "level", "pinned", "rank"]
        )
        for name, adapter in list(self._by_name([*on_device, *on_host]).items())[:MAX_ADAPTER_SERIES]:
            loaded.add_metric([name, adapter.tier, str(adapter.num_pins > 0).lower(), str(adapter.rank)], 1)
        yield loaded

    def _by_name(self, adapters: list[AdapterState]) -> dict[str, AdapterState]:
        """Return the first version of each name: a series may not occur twice."""
        pairs = [(self._metrics.adapter_name(adapter.digest), adapter) for adapter in adapters]
        return dict(pairs) | dict(reversed(pairs))

    def _joined(self, adapters: list[AdapterState]) -> str:
        """Return the adapters' names, comma-separated, as many as fit the label's cap."""
        text = ""
        for name in self._by_name(adapters):
            longer = f"{text},{name}" if text else name
            if len(longer.encode()) > MAX_LABEL_BYTES:
                break
            text = longer
        return text
