"""`chorale serve`: flags, environment and file merged once into a `ServeConfig`, then the server.

Owns the merge and what the start must know of the base before the engine has loaded it (its folder, dtype, the store).
Invariant: every start that cannot work ends with one line on stderr and status 2.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from serve.cli import adapter_options, options
from serve.cli.blob_options import BlobsCacheBytes, BlobsUrl
from serve.cli.operator_errors import one_line_errors
from serve.cli.server import run_server
from serve.cli.tracing_extra import OtelEndpoint
from serve.cli.train_options import TrainWorker, TrainWorkerOption
from serve.cli.train_sidecar import run_beside
from serve.config import ApiConfig, DrainConfig, EngineConfig, LimitsConfig, ServeConfig, TenantLimits, WatchdogConfig
from serve.errors import StartError
from serve.messages import MAX_TENANT_WEIGHT, MIN_TENANT_WEIGHT
from serve.model.download import resolve_model_dir
from serve.tenants.principal import check_tenant

Config = TypeVar("Config", ApiConfig, LimitsConfig, WatchdogConfig)

# the dataclasses own the defaults; the flags only show them
_API = ApiConfig(model_dir=Path(), store_dir=Path(), served_model_name="")
_ENGINE = EngineConfig(model_dir=Path(), store_dir=Path())
_LIMITS = LimitsConfig()
_WATCHDOG = WatchdogConfig()
_DRAIN = DrainConfig()
# flags that go unchanged into a field of the same name
_SAME = (
    "model_dir",
    "served_model_name",
    "host",
    "port",
    "redis_url",
    "blobs_url",
    "keep_versions",
    "signatures",
    "trust_roots",
    "otel_endpoint",
)
_WATCH_FLAGS = ("heartbeat_timeout_s", "start_timeout_s")
_LIMIT_FLAGS = ("max_in_flight", "max_upload_bytes", "request_timeout_s", "dense_budget_bytes")
# flags that go unchanged into a field of the engine's config
_ENGINE_FLAGS = MappingProxyType(
    {
        # absolute by then: the engine process has another working folder
        "model_dir": "model_dir",
        "store": "store_dir",
        "max_in_flight": "max_waiting",
        "max_model_len": "max_model_len",
        "kv_blocks": "num_kv_blocks",
        "max_num_seqs": "max_num_seqs",
        "max_step_tokens": "max_step_tokens",
        "max_mixed_prefill_tokens": "max_mixed_prefill_tokens",
        "num_threads": "num_threads",
        "adapter_host_bytes": "adapter_host_bytes",
        "adapter_host_count": "adapter_host_count",
        "adapter_device_bytes": "adapter_device_bytes",
        "adapter_device_count": "num_adapter_slots",
        "gpu_memory_utilization": "gpu_memory_utilization",
        "max_rank": "max_adapter_rank",
        "prefix_cache": "enable_prefix_cache",
        "blobs_url": "blobs_url",
        "blobs_cache_bytes": "blobs_cache_bytes",
        "signatures": "signatures",
        "trust_roots": "trust_roots",
    }
)


@one_line_errors(exit_status=2)
def serve(
    model: options.Model,
    store: options.Store,
    redis_url: options.RedisUrl = None,
    blobs_url: BlobsUrl = None,
    blobs_cache_bytes: BlobsCacheBytes = _ENGINE.blobs_cache_bytes,
    config_file: options.ConfigFile = None,
    served_model_name: options.ServedModelName = None,
    host: options.Host = _API.host,
    port: options.Port = _API.port,
    device: options.DeviceOption = options.Device.AUTO,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    max_model_len: options.MaxModelLen = None,
    kv_blocks: options.KvBlocks = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_step_tokens: options.MaxStepTokens = None,
    max_mixed_prefill_tokens: options.MaxMixedPrefillTokens = None,
    adapter_host_bytes: options.AdapterHostBytes = _ENGINE.adapter_host_bytes,
    adapter_host_count: options.AdapterHostCount = _ENGINE.adapter_host_count,
    adapter_device_bytes: options.AdapterDeviceBytes = _ENGINE.adapter_device_bytes,
    adapter_device_count: options.AdapterDeviceCount = _ENGINE.num_adapter_slots,
    gpu_memory_utilization: options.GpuMemoryUtilization = _ENGINE.gpu_memory_utilization,
    max_rank: options.MaxRank = _ENGINE.max_adapter_rank,
    num_threads: options.NumThreads = None,
    prefix_cache: options.PrefixCache = _ENGINE.enable_prefix_cache,
    api_key: options.ApiKeys = None,
    require_keys: options.RequireKeys = _API.require_keys,
    pepper_file: options.PepperFile = None,
    tenant_limit: options.TenantLimit = None,
    tenant_weight: options.TenantWeight = None,
    lora_root: options.LoraRoots = None,
    max_in_flight: options.MaxInFlight = _LIMITS.max_in_flight,
    max_upload_bytes: options.MaxUploadBytes = _LIMITS.max_upload_bytes,
    dense_budget_bytes: options.DenseBudgetBytes = _LIMITS.dense_budget_bytes,
    request_timeout_s: options.RequestTimeoutS = _LIMITS.request_timeout_s,
    heartbeat_timeout_s: options.HeartbeatTimeoutS = _WATCHDOG.heartbeat_timeout_s,
    start_timeout_s: options.StartTimeoutS = _WATCHDOG.start_timeout_s,
    preload: options.Preload = None,
    drain_delay_s: options.DrainDelayS = _DRAIN.delay_s,
    drain_timeout_s: options.DrainTimeoutS = _DRAIN.timeout_s,
    keep_versions: adapter_options.KeepVersions = None,
    signatures: adapter_options.SignaturesOption = adapter_options.Signatures.OFF,
    trust_roots: adapter_options.TrustRoots = None,
    probe: options.ProbeOption = options.Probe.ON,
    metrics_compat: options.MetricsCompatOption = options.MetricsCompat.VLLM,
    otel_endpoint: OtelEndpoint = None,
    train_worker: TrainWorkerOption = TrainWorker.OFF,
    log_level: options.LogLevelOption = options.LogLevel.INFO,
) -> None:
    """Serve a base model and the adapters of a store over HTTP."""
    start_logging(log_level)
    model_dir, store = resolve_model_dir(model).absolute(), store.absolute()
    served_model_name = served_model_name or served_name(model, model_dir)
    flags = dict(locals())
    api = replace(_same(_API, flags, _SAME), metrics_compat_vllm=metrics_compat == "vllm", probe_adapters=probe == "on")
    limits = replace(_same(_LIMITS, flags, _LIMIT_FLAGS), tenant_weights=read_tenant_weights(tenant_weight or ()))
    api = replace(api, store_dir=store, limits=limits, lora_roots=tuple(lora_root or ()), api_keys=tuple(api_key or ()))
    api = with_tenants(api, require_keys=require_keys, pepper_file=pepper_file, limits=tenant_limit or ())
    config = ServeConfig(api, _engine(flags), _same(_WATCHDOG, flags, _WATCH_FLAGS), _drain(flags))
    run_beside(train_worker, config, partial(run_server, config, preload=preload))


def with_tenants(api: ApiConfig, *, require_keys: bool, pepper_file: Path | None, limits: Iterable[str]) -> ApiConfig:
    """Add what concerns tenants; raises StartError for a limit that cannot be read."""
    pepper_file = None if pepper_file is None else pepper_file.absolute()
    return replace(api, require_keys=require_keys, pepper_file=pepper_file, tenant_limits=read_tenant_limits(limits))


def read_tenant_limits(values: Iterable[str]) -> TenantLimits:
    """Read NAME=NUMBER bounds.

    Raises:
        StartError: an unknown name, one given twice, or not a positive whole number.
    """
    known = {field.name.replace("_", "-"): field.name for field in fields(TenantLimits)}
    found: dict[str, int] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in known or known[name] in found or not re.fullmatch(r"[1-9][0-9]{0,17}", number):
            raise StartError(
                f"--tenant-limit {ascii(value)[:80]}: give each of {', '.join(known)} at most once, as NAME=NUMBER "
                "with a number of 1 or more"
            )
        found[known[name]] = int(number)
    return TenantLimits(**found)


def read_tenant_weights(values: Iterable[str]) -> dict[str, float]:
    """Read TENANT=WEIGHT.

    Raises:
        StartError: one given twice, or a weight out of bounds. InvalidValue: no tenant's name.
    """
    found: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        # also false for NaN
        if name in found or not MIN_TENANT_WEIGHT <= weight <= MAX_TENANT_WEIGHT:
            raise StartError(
                f"--tenant-weight {ascii(value)[:80]}: give each tenant at most once, as TENANT=WEIGHT with a weight "
                f"from {MIN_TENANT_WEIGHT} to {MAX_TENANT_WEIGHT:g}; others have 1"
            )
        found[check_tenant(name)] = weight
    return found


def _same(config: Config, flags: Mapping[str, Any], names: Iterable[str]) -> Config:
    """Take the flags of these names into the fields of the same names."""
    return replace(config, **{name: flags[name] for name in names})


def _drain(flags: Mapping[str, Any]) -> DrainConfig:
    return DrainConfig(flags["drain_delay_s"], flags["drain_timeout_s"])


def _engine(flags: Mapping[str, Any]) -> EngineConfig:
    same = {field: flags[flag] for flag, field in _ENGINE_FLAGS.items()}
    # the engine process has another working folder
    same["trust_roots"] = flags["trust_roots"] and flags["trust_roots"].absolute()
    return replace(_ENGINE, device=flags["device"].value, dtype=flags["dtype"].value, **same)


def served_name(model: str, model_dir: Path) -> str:
    """Return the base's default name: the folder's, or the Hugging Face id it was downloaded by."""
    return model_dir.resolve().name if Path(model).expanduser().is_dir() else model


def start_logging(level: str) -> None:
    """Send every log line to stderr: stdout carries the ready line alone."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s api %(levelname)s %(name)s: %(message)s"
    )
    # one JSON object per line and nothing before it: what collects logs need not know ours
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("chorale.request").addHandler(lines)
    logging.getLogger("chorale.request").propagate = False
    # one line per start and stop of its own; ours say more
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
