"""Configuration of every room as frozen dataclasses: unit, default and reason of each field.

Owns no parsing and reads no environment: `serve.cli` merges flags, environment and file into these once, at start.
Values learnt at start-up (KV blocks, end tokens) arrive in `serve.messages.Ready`, never back in here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs; also sent to it as its only start-up argument (JSON)."""

    model_dir: Path
    store_dir: Path
    # "auto" | "cpu" | "cuda" | "interpreter": the CUDA path on the CPU through Triton's interpreter, for tests alone
    device: str = "auto"
    # "auto" takes the checkpoint's own dtype
    dtype: str = "auto"
    # None: the model's max_position_embeddings, at most what the KV cache holds
    max_model_len: int | None = None
    # None: sized from free memory
    num_kv_blocks: int | None = None
    # of all device memory, what weights, activations, KV cache and adapters may take together; the rest is for captured
    # graphs and for others on the device
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    # None: 64 on a CPU, 256 on a GPU
    max_num_seqs: int | None = None
    # token budget of one step: decodes first, then prefill chunks; None: 512 on a CPU, 2048 on a GPU
    max_step_tokens: int | None = None
    # of these, prompt tokens in a step in which others decode: few keep the gaps between their tokens short, many bring
    # first tokens sooner; None: 32 on a CPU, no bound on a GPU
    max_mixed_prefill_tokens: int | None = None
    # the bound on queued sequences; beyond it the API answers 429
    max_waiting: int = 512
    # of images in host memory, and how many; 0 bytes: no host tier, every load reads the disk
    adapter_host_bytes: int = 2 << 30
    adapter_host_count: int = 1024
    # None: 2 GiB on a CPU, a quarter of what the model leaves free on a GPU
    adapter_device_bytes: int | None = None
    # adapters on the device; slots are indices: the bytes bind first, this only bounds the tables
    num_adapter_slots: int = 4096
    max_adapter_rank: int = 256
    enable_prefix_cache: bool = True
    # None: all cores this process may use
    num_threads: int | None = None
    # where images are fetched from that the store's folder has no copy of; None: the folder has them all
    blobs_url: str | None = None
    blobs_cache_bytes: int = 64 << 30
    # "off", "warn" or "require", and the public keys that count: checked at each way to a faster tier
    signatures: str = "off"
    trust_roots: Path | None = None


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Bounds on what a client may ask or do; each refusal names the bound."""

    max_body_bytes: int = 8 << 20
    max_upload_bytes: int = 2 << 30
    # a dense change costs as much memory as the layers that it changes: none unless the operator allows them
    dense_budget_bytes: int = 0
    max_header_bytes: int = 64 << 10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    min_upload_bytes_per_s: int = 4 << 10
    max_connections_per_ip: int = 1024
    max_n: int = 16
    max_stop: int = 16
    max_top_logprobs: int = 20
    max_messages: int = 2048
    max_prompts: int = 256
    max_grammar_bytes: int = 64 << 10
    # running plus waiting sequences that the API lets in before it answers 429
    max_in_flight: int = 576
    # a stream whose client does not read is aborted after this long
    slow_client_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    cold_start_timeout_s: float = 60.0
    # a tenant's part of the service relative to others' 1
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """The bounds of each tenant; None: unbounded."""

    requests_per_minute: int | None = None
    # prompt plus output
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    # names, and the bytes of all their versions
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    # fine-tuning jobs that have not ended, and the bytes of its data files
    max_training_jobs: int | None = None
    max_training_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """What the API process needs."""

    model_dir: Path
    store_dir: Path
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    # folders that `lora_path` of /v1/load_lora_adapter may lie under; empty: the endpoint takes no path
    lora_roots: tuple[Path, ...] = ()
    # static bearer keys, the operator's own; with none, and none required: no authentication (loopback development)
    api_keys: tuple[str, ...] = ()
    # ask for a key of the store's tenants; off: one user, who owns everything
    require_keys: bool = False
    # what keys are hashed with; None: a file in the store's folder
    pepper_file: Path | None = None
    tenant_limits: TenantLimits = field(default_factory=TenantLimits)
    # where replicas of one store tell each other of changes; None: SQLite, for one server
    redis_url: str | None = None
    # the object store that replicas share instead of a folder: s3://BUCKET/PREFIX
    blobs_url: str | None = None
    # "off", "warn" or "require", and the public keys that count
    signatures: str = "off"
    trust_roots: Path | None = None
    # versions of a name that stay beside those that something points to; None: all
    keep_versions: int | None = None
    # run every adapter on the base, against its source's own formula, before it is published
    probe_adapters: bool = True
    metrics_compat_vllm: bool = True
    # base URL of the collector that takes traces, without secrets; None: no traces
    otel_endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class WatchdogConfig:
    """When the parent believes the engine dead, and how it restarts it."""

    # one step of a large model on few cores takes seconds, and a false alarm costs every running request
    heartbeat_timeout_s: float = 30.0
    start_timeout_s: float = 600.0
    restart_backoff_s: float = 1.0
    max_restart_backoff_s: float = 30.0


@dataclass(frozen=True, slots=True)
class DrainConfig:
    """How the server leaves after SIGTERM."""

    # not ready, but what still comes is served: load balancers hear of it late. SIGINT (Ctrl-C) has no such window
    delay_s: float = 5.0
    # from the signal to the end, the window included: what runs longer is cut
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything `chorale serve` starts with."""

    api: ApiConfig
    engine: EngineConfig
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    drain: DrainConfig = field(default_factory=DrainConfig)
