"""The strict reader of a PEFT `adapter_config.json`: which kind of adapter, on which modules, and how it acts.

Owns what all kinds share; the rest is in the tuners' files. Invariant: a returned `PeftConfig` says completely how the
tensors act; nothing else in the file matters.
"""

from dataclasses import dataclass

from adapters_store.convert.config_values import Config
from adapters_store.convert.peft_keys import check_keys
from adapters_store.convert.peft_targets import Targets, read_targets
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Refused, Served, Tuner
from adapters_store.errors import UnsupportedAdapter
from adapters_store.strict_json import Json, read_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """`ignored` are keys that are set without effect; `recorded` what shapes the result, for the manifest."""

    peft_type: str
    kind: Served
    tuner: Tuner
    targets: Targets
    ignored: tuple[str, ...]
    recorded: Config

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the targets and pattern keys that decide nothing for these modules."""
        return self.targets.unused(paths) + self.tuner.unused(paths)


def read_config(raw: bytes, *, model_type: str) -> PeftConfig:
    """Read the config of an adapter for a base of `model_type`.

    Raises:
        CorruptUpload: not strict JSON. UnsupportedAdapter: a value that is wrong or not served; `param` is its key.
    """
    config = read_json(raw, CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    peft_type, kind = _kind(config.get("peft_type"))
    ignored = check_keys(config, kind.rules)
    _check_fixed(config)
    return PeftConfig(
        peft_type=peft_type,
        kind=kind,
        tuner=kind.read(config),
        targets=read_targets(config, model_type, kind.default_targets),
        ignored=ignored,
        recorded=_recorded(config, kind.recorded),
    )


def _kind(value: Json) -> tuple[str, Served]:
    kind = PEFT_TYPES.get(value) if isinstance(value, str) else None
    if isinstance(value, str) and isinstance(kind, Served):
        return value, kind
    if isinstance(kind, Refused):
        raise UnsupportedAdapter(
            f"peft_type is {value}, {kind.title}, which is refused: {kind.reason}; {kind.way_out}", param="peft_type"
        )
    served = ", ".join(name for name, known in PEFT_TYPES.items() if isinstance(known, Served))
    raise UnsupportedAdapter(
        f"peft_type is {ascii(value)[:60]}, which this server does not know; it reads {served}", param="peft_type"
    )


def _check_fixed(config: Config) -> None:
    bias = config.get("bias", "none")
    if bias != "none":
        raise UnsupportedAdapter(
            f"bias is {ascii(bias)[:40]}; trained biases of the base are not served: train with bias='none', "
            "or a LoRA with lora_bias=True",
            param="bias",
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise UnsupportedAdapter(
            f"task_type is {ascii(task)[:40]}; adapters of causal language models are served", param="task_type"
        )


def _recorded(config: Config, keys: tuple[str, ...]) -> Config:
    """Keep what shapes the result; the rest of the file stays with its hash."""
    recorded: Config = {key: config[key] for key in (*keys, "peft_version") if config.get(key) not in (None, False, {})}
    version = recorded.get("peft_version")
    if version is not None and not (isinstance(version, str) and len(version) <= 40):
        raise UnsupportedAdapter("peft_version must be a short text", param="peft_version")
    return recorded
