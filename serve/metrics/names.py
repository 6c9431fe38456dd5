"""The names, help texts, buckets and bounds of the metrics page.

Owns tables only. Invariant: no label comes from a client unbounded.
"""

MAX_ADAPTER_SERIES = 200
MAX_LABEL_BYTES = 8 << 10

# vLLM's buckets, so that dashboards made for it read ours
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)

# adapters that act in one step
STEP_ADAPTER_BUCKETS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

# name, help, field of Stats
GAUGES = (
    ("chorale_requests_running", "Sequences in the running batch.", "num_running"),
    ("chorale_requests_waiting", "Sequences waiting for blocks, budget or their adapter.", "num_waiting"),
    ("chorale_kv_blocks", "KV blocks in all.", "num_kv_blocks"),
    ("chorale_kv_blocks_in_use", "KV blocks held by sequences.", "num_kv_blocks_in_use"),
    ("chorale_adapter_pins", "Holds of running sequences on adapters.", "num_adapter_pins"),
)
COUNTERS = (
    ("chorale_engine_steps", "Steps of the engine.", "num_steps_total"),
    ("chorale_prompt_tokens", "Prompt tokens of accepted sequences.", "num_prompt_tokens_total"),
    ("chorale_generation_tokens", "Generated tokens.", "num_generated_tokens_total"),
    ("chorale_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", "num_prefix_hit_tokens_total"),
    ("chorale_preemptions", "Running sequences sent back to waiting.", "num_preemptions_total"),
    ("chorale_adapter_loads", "Adapters brought to the device.", "num_adapter_loads_total"),
    ("chorale_adapter_evictions", "Adapters dropped from the device for others.", "num_adapter_evictions_total"),
    ("chorale_adapter_hits", "Adapters of accepted sequences that were on the device.", "num_adapter_hits_total"),
    ("chorale_adapter_misses", "Adapters of accepted sequences that were not.", "num_adapter_misses_total"),
    ("chorale_adapter_host_hits", "Of the misses, those in host memory.", "num_adapter_host_hits_total"),
    ("chorale_adapter_fetches", "Adapter images read into host memory.", "num_adapter_fetches_total"),
    ("chorale_adapter_host_evictions", "Images dropped from host memory.", "num_adapter_host_evictions_total"),
)
