"""Every series that the API promises is on the page: each by name, type and labels, with the buckets of vLLM."""

from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.adapter_messages import AdapterMove
from serve.messages import AdapterState, Finished, FinishReason, Started, Tokens
from serve.metrics import Metrics
from tests.process.test_metrics import stats

# name without a counter's `_total` -> type and labels
PROMISED: dict[str, tuple[str, frozenset[str]]] = {
    **{
        name: ("gauge", frozenset())
        for name in (
            *("chorale_requests_running", "chorale_requests_waiting", "chorale_adapter_pins"),
            *("chorale_kv_blocks", "chorale_kv_blocks_in_use", "chorale_adapters_pinned"),
            *("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
            *("vllm:num_gpu_loaded_lora_adapters", "vllm:num_cpu_loaded_lora_adapters"),
        )
    },
    **{
        name: ("counter", frozenset())
        for name in (
            *("chorale_prompt_tokens", "chorale_generation_tokens", "chorale_prefix_hit_tokens"),
            *("chorale_preemptions", "chorale_adapter_hits", "chorale_adapter_misses", "chorale_adapter_evictions"),
            *("chorale_adapter_loads", "chorale_engine_restarts", "chorale_engine_steps"),
            "chorale_cold_start_base",
        )
    },
    **{
        name: ("histogram", frozenset())
        for name in (
            *("chorale_time_to_first_token_seconds", "chorale_inter_token_latency_seconds"),
            *("chorale_time_per_output_token_seconds", "chorale_e2e_request_latency_seconds"),
            *("chorale_request_queue_time_seconds", "chorale_request_prefill_time_seconds"),
            *("chorale_request_decode_time_seconds", "chorale_step_adapters", "vllm:lora_adapter_load_seconds"),
        )
    },
    "chorale_requests_finished": ("counter", frozenset({"reason"})),
    "chorale_requests_rejected": ("counter", frozenset({"code"})),
    "chorale_adapter_requests": ("counter", frozenset({"adapter"})),
    "chorale_adapter_tokens": ("counter", frozenset({"adapter"})),
    "chorale_adapters_resident": ("gauge", frozenset({"tier"})),
    "chorale_adapter_bytes": ("gauge", frozenset({"tier"})),
    "chorale_adapter_drops": ("counter", frozenset({"tier", "cause"})),
    "chorale_adapter_swap_bytes": ("counter", frozenset({"tier", "direction"})),
    "chorale_adapter_load_seconds": ("histogram", frozenset({"source", "target"})),
    "vllm:cache_config_info": ("gauge", frozenset({"block_size", "num_gpu_blocks"})),
    "vllm:lora_requests_info": (
        "gauge",
        frozenset({"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
    ),
    "vllm:lora_adapter_loaded": ("gauge", frozenset({"adapter_name", "level", "pinned", "rank"})),
}


@pytest.fixture(scope="module")
def page() -> str:
    """A page of a server that has seen one of everything."""
    metrics = Metrics(max_adapters=4)
    metrics.name_adapter("a" * 64, "voice")
    metrics.count_rejection("queue_full")
    meter = metrics.open_request("a" * 64)
    for event in (Started("r", 0, 0.1, 0.0), Tokens("r", [1]), Tokens("r", [2]), Finished("r", FinishReason.STOP)):
        meter.saw(event)
    states = [AdapterState("a" * 64, "device", 1, 100, 8), AdapterState("b" * 64, "loading", 0, 100, 8)]
    moves = [AdapterMove("a" * 64, "load", 100, 0.5), AdapterMove("c" * 64, "room", 100)]
    metrics.observe_stats(stats(adapters=states, adapter_moves=moves, step_adapters=[1]))
    return metrics.render().decode()


def _labels(samples: Iterable[dict[str, str]]) -> frozenset[str]:
    return frozenset(name for labels in samples for name in labels if name != "le")


def test_every_promised_series_is_there_with_its_type_and_labels(page: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(page)}
    found = {
        name: (family.type, _labels(sample.labels for sample in family.samples))
        for name, family in families.items()
        if name in PROMISED
    }
    assert found == PROMISED


def test_every_histogram_of_requests_has_vllms_buckets_and_names_no_adapter(page: str) -> None:
    histograms = [family for family in text_string_to_metric_families(page) if family.type == "histogram"]
    assert len(histograms) >= 10
    for family in histograms:
        assert _labels(sample.labels for sample in family.samples) <= {"source", "target"}
    buckets = {
        family.name: [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
        for family in histograms
    }
    assert buckets["chorale_time_to_first_token_seconds"][:3] == ["0.001", "0.005", "0.01"]
    assert buckets["chorale_inter_token_latency_seconds"][:3] == ["0.01", "0.025", "0.05"]
    assert buckets["chorale_e2e_request_latency_seconds"][:3] == ["0.3", "0.5", "0.8"]
    assert all(line[-1] == "+Inf" for line in buckets.values())


def test_there_is_exactly_one_series_of_what_is_resident(page: str) -> None:
    (line,) = (line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{"))
    assert 'max_lora="4"' in line and 'running_lora_adapters="voice"' in line
    assert f'waiting_lora_adapters="{"b" * 12}"' in line
