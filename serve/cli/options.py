"""The flags of `chorale serve`, each with its environment variable, and the file that may hold the same keys.

Owns spelling and help only; the defaults are those of `serve.config`. Invariant: file < environment < flags, and a key
of the file that is no flag is an error.
"""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    INTERPRETER = "interpreter"


class Dtype(StrEnum):
    """What the model computes in; `auto` is the checkpoint's own dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Probe(StrEnum):
    """Whether adapters are run on the base before they are published."""

    ON = "on"
    OFF = "off"


class MetricsCompat(StrEnum):
    """Whose metric names `/metrics` has beside our own."""

    VLLM = "vllm"
    NONE = "none"


class LogLevel(StrEnum):
    """How much goes to stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def read_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's keys the defaults of this command's flags.

    Raises:
        typer.BadParameter: not TOML, or a key that is no flag.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in context.command.params} - {"config_file"}
    for key in values:
        if key not in known:
            raise typer.BadParameter(f"{path}: unknown key '{key}'; known: {', '.join(sorted(filter(None, known)))}")
    context.default_map = values
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", callback=read_config_file, is_eager=True, help="TOML file with these flags as keys."),
]
Model = Annotated[str, typer.Option(envvar="CHORALE_MODEL", help="Folder of the base model, or a Hugging Face id.")]
Store = Annotated[Path, typer.Option(envvar="CHORALE_STORE", help="Folder of the adapter store; created if absent.")]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="CHORALE_REDIS_URL",
        help="Redis through which replicas of one store tell each other of changes: redis://user:password@host:6379",
    ),
]
ServedModelName = Annotated[
    str | None, typer.Option(envvar="CHORALE_SERVED_MODEL_NAME", help="The base's name; default: the folder's name.")
]
Host = Annotated[str, typer.Option(envvar="CHORALE_HOST", help="Address to listen on.")]
Port = Annotated[int, typer.Option(envvar="CHORALE_PORT", min=0, max=65535, help="Port; 0 takes a free one.")]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="CHORALE_DEVICE",
        help="Where the model runs; auto: a GPU if there is one. interpreter: the GPU's code on the CPU, to test it.",
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        envvar="CHORALE_GPU_MEMORY_UTILIZATION",
        min=0.05,
        max=1.0,
        help="Share of the GPU's memory for model, KV cache and adapters together.",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", envvar="CHORALE_DTYPE", help="What the model computes in; auto: the checkpoint's.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(envvar="CHORALE_MAX_MODEL_LEN", min=1, help="Prompt plus output; default: the model's.")
]
KvBlocks = Annotated[
    int | None, typer.Option(envvar="CHORALE_KV_BLOCKS", min=1, help="KV blocks; default: sized from free memory.")
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        envvar="CHORALE_MAX_NUM_SEQS", min=1, help="Sequences running at once; default: 64 on a CPU, 256 on a GPU."
    ),
]
MaxStepTokens = Annotated[
    int | None,
    typer.Option(
        envvar="CHORALE_MAX_STEP_TOKENS", min=1, help="Token budget of one step; default: 512 on a CPU, 2048 on a GPU."
    ),
]
MaxMixedPrefillTokens = Annotated[
    int | None,
    typer.Option(
        envvar="CHORALE_MAX_MIXED_PREFILL_TOKENS",
        min=1,
        help="Prompt tokens in a step in which others decode; fewer: shorter gaps between tokens, later first tokens. "
        "Default: on a CPU 32, or a quarter of the prompt tokens that wait if that is more; no bound on a GPU.",
    ),
]
AdapterHostBytes = Annotated[
    int,
    typer.Option(
        envvar="CHORALE_ADAPTER_HOST_BYTES",
        min=0,
        help="Bytes of adapter images held in host memory, from where they reach the device; 0: always from disk.",
    ),
]
AdapterHostCount = Annotated[
    int, typer.Option(envvar="CHORALE_ADAPTER_HOST_COUNT", min=1, help="Adapter images held in host memory.")
]
AdapterDeviceCount = Annotated[
    int,
    typer.Option(
        envvar="CHORALE_ADAPTER_DEVICE_COUNT", min=0, help="Adapters on the device at once; vLLM's max_loras."
    ),
]
AdapterDeviceBytes = Annotated[
    int | None,
    typer.Option(
        envvar="CHORALE_ADAPTER_DEVICE_BYTES",
        min=0,
        help="Bytes of adapters held on the device; default: 2 GiB on a CPU, a quarter of what is free on a GPU.",
    ),
]
MaxRank = Annotated[int, typer.Option(envvar="CHORALE_MAX_RANK", min=1, help="Largest rank an adapter may have.")]
NumThreads = Annotated[
    int | None,
    typer.Option(envvar="CHORALE_NUM_THREADS", min=1, help="Threads of the CPU kernels; default: all cores."),
]
PrefixCache = Annotated[bool, typer.Option(envvar="CHORALE_PREFIX_CACHE", help="Reuse KV blocks of equal prefixes.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", envvar="CHORALE_API_KEY", help="A key that clients may use; repeatable."),
]
RequireKeys = Annotated[
    bool,
    typer.Option(
        "--require-keys/--no-require-keys",
        envvar="CHORALE_REQUIRE_KEYS",
        help="Let in only keys made by `chorale keys create`, and those of --api-key.",
    ),
]
PepperFile = Annotated[
    Path | None,
    typer.Option(
        "--pepper-file",
        envvar="CHORALE_PEPPER_FILE",
        help="File of 32 or more random bytes that keys are hashed with; default: one in the store's folder.",
    ),
]
TenantLimit = Annotated[
    list[str] | None,
    typer.Option(
        "--tenant-limit",
        envvar="CHORALE_TENANT_LIMIT",
        help="Bound of each tenant as NAME=NUMBER; repeatable: "
        "requests-per-minute, tokens-per-minute, max-concurrent, max-adapters, max-adapter-bytes, "
        "max-training-jobs, max-training-bytes.",
    ),
]
TenantWeight = Annotated[
    list[str] | None,
    typer.Option(
        "--tenant-weight",
        envvar="CHORALE_TENANT_WEIGHT",
        help="A tenant's part of the service relative to others' 1, as TENANT=WEIGHT; repeatable.",
    ),
]
LoraRoots = Annotated[
    list[Path] | None,
    typer.Option("--lora-root", envvar="CHORALE_LORA_ROOT", help="Folder that lora_path may lie under; repeatable."),
]
MaxInFlight = Annotated[
    int, typer.Option(envvar="CHORALE_MAX_IN_FLIGHT", min=1, help="Sequences let in before clients get 429.")
]
MaxUploadBytes = Annotated[int, typer.Option(envvar="CHORALE_MAX_UPLOAD_BYTES", min=1, help="Largest adapter upload.")]
DenseBudgetBytes = Annotated[
    int,
    typer.Option(
        envvar="CHORALE_DENSE_BUDGET_BYTES",
        min=0,
        help="Bytes that one adapter may hold of dense changes of whole matrices; 0: such adapters are refused.",
    ),
]
RequestTimeoutS = Annotated[
    float,
    typer.Option(
        envvar="CHORALE_REQUEST_TIMEOUT_S",
        min=0.1,
        # a removed adapter's bytes stay for an hour, for the requests that had been accepted
        max=3540.0,
        help="Seconds a request may take in all.",
    ),
]
HeartbeatTimeoutS = Annotated[
    float,
    typer.Option(
        envvar="CHORALE_HEARTBEAT_TIMEOUT_S", min=1.0, help="A silent engine is replaced after so many seconds."
    ),
]
StartTimeoutS = Annotated[
    float, typer.Option(envvar="CHORALE_START_TIMEOUT_S", min=1.0, help="Seconds the model may take to load.")
]
Preload = Annotated[
    Path | None,
    typer.Option(
        envvar="CHORALE_PRELOAD", help="Folder of PEFT folders; names the store lacks are published at start."
    ),
]
DrainDelayS = Annotated[
    float,
    typer.Option(
        "--drain-delay-s",
        "--drain-delay",
        envvar="CHORALE_DRAIN_DELAY_S",
        min=0.0,
        help="Seconds after SIGTERM in which the server is not ready but still takes requests, until load balancers "
        "have noticed.",
    ),
]
DrainTimeoutS = Annotated[
    float,
    typer.Option(
        "--drain-timeout-s",
        "--drain-timeout",
        "--grace-s",
        envvar="CHORALE_DRAIN_TIMEOUT_S",
        min=0.0,
        help="Seconds from SIGTERM to the end, the delay included; what runs longer is cut.",
    ),
]
MetricsCompatOption = Annotated[
    MetricsCompat,
    typer.Option(
        "--metrics-compat",
        envvar="CHORALE_METRICS_COMPAT",
        help="Whose metric names /metrics has beside our own; routers read vLLM's.",
    ),
]
ProbeOption = Annotated[
    Probe,
    typer.Option(
        "--probe",
        envvar="CHORALE_PROBE",
        help="Whether an adapter is run on the base, and compared with its source's own formula, before it is visible.",
    ),
]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", envvar="CHORALE_LOG_LEVEL", help="How much goes to stderr.")
]
