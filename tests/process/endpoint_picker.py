"""What an endpoint picker makes of /metrics: a port of its extractor and of its scorer for adapters.

Owns no expectations. Written from the description in the operations notes, on the Prometheus client's own parser, and
stricter where the original is: a page that it cannot read is an error, never a default.
"""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

QUEUED = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
CACHE_INFO = "vllm:cache_config_info"
LORA_INFO = "vllm:lora_requests_info"


class Unreadable(Exception):
    """The page lacks what the picker needs."""


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One endpoint as the picker sees it."""

    num_queued: float
    num_running: float
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    running: frozenset[str]
    waiting: frozenset[str]
    updated_at: float
    num_lora_series: int


def extract(page: str) -> EndpointState:
    """Read one scrape.

    Raises:
        Unreadable: one of the four plain metrics is absent, or `max_lora` is no integer.
    """
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    missing = [name for name in (QUEUED, RUNNING, KV_USAGE, CACHE_INFO) if name not in samples]
    if missing:
        raise Unreadable(f"absent: {missing}")
    cache = samples[CACHE_INFO][0][0]
    # the latest of several series counts
    labels, updated_at = max(samples.get(LORA_INFO, [({"max_lora": "0"}, 0.0)]), key=lambda sample: sample[1])
    try:
        max_adapters = int(labels["max_lora"])
    except (KeyError, ValueError) as error:
        raise Unreadable(f"max_lora: {labels}") from error
    return EndpointState(
        num_queued=samples[QUEUED][0][1],
        num_running=samples[RUNNING][0][1],
        kv_usage=samples[KV_USAGE][0][1],
        block_size=int(cache["block_size"]),
        num_blocks=int(cache["num_gpu_blocks"]),
        max_adapters=max_adapters,
        running=_names(labels, "running_lora_adapters"),
        waiting=_names(labels, "waiting_lora_adapters"),
        updated_at=updated_at,
        num_lora_series=len(samples.get(LORA_INFO, [])),
    )


def score(state: EndpointState, adapter: str) -> float:
    """Say how well an endpoint suits a request for an adapter."""
    if adapter in state.running:
        return 1.0
    if len(state.running) + len(state.waiting) < state.max_adapters:
        return 0.8
    return 0.6 if adapter in state.waiting else 0.0


def _names(labels: dict[str, str], label: str) -> frozenset[str]:
    return frozenset(name.strip() for name in labels.get(label, "").split(",") if name.strip())
