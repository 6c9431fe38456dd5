"""The strict reader of a PEFT `adapter_config.json`: which kind of adapter, on which modules, and how it acts.

Owns what all kinds share; the rest is in the tuners' files. Invariant: a returned `PeftConfig` says completely how the
tensors act; nothing else in the file matters.
"""

from dataclasses import dataclass

from adapters_store.convert.config_values import Config
from adapters_store.convert.model_factors import TaskTuner
from adapters_store.convert.peft_keys import check_keys
from adapters_store.convert.peft_patterns import is_plain_name
from adapters_store.convert.peft_targets import NO_TARGETS, Targets, read_targets
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.saved_modules import Saved, read_saved
from adapters_store.convert.tuner import Refused, Served, Tuner
from adapters_store.errors import InvalidOption, UnsupportedAdapter
from adapters_store.strict_json import Json, read_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
_INVOCATION = "alora_invocation_tokens"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """`ignored` are keys that are set without effect; `recorded` what shapes the result, for the manifest.

    `bias` as the config spells it: "none", "all" or a kind's name with "_only". `activation` are the tokens from whose
    last occurrence on the adapter acts; empty: everywhere.
    """

    peft_type: str
    kind: Served
    tuner: Tuner
    targets: Targets
    saved: Saved
    bias: str
    activation: tuple[int, ...]
    ignored: tuple[str, ...]
    recorded: Config

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the targets and pattern keys that decide nothing for these modules."""
        return self.targets.unused(paths) + self.tuner.unused(paths)


def read_config(raw: bytes, *, model_type: str, task_id: int | None = None) -> PeftConfig:
    """Read the config of an adapter for a base of `model_type`; `task_id` is the uploader's choice among its tasks.

    Raises:
        CorruptUpload: not strict JSON. UnsupportedAdapter: a value that is wrong or not served; `param` is its key.
        InvalidOption: a task that is not there.
    """
    config = read_json(raw, CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    peft_type, kind = _kind(config.get("peft_type"))
    ignored = check_keys(config, kind.rules)
    _check_fixed(config)
    has_targets = kind.acts_on != "prompt"
    return PeftConfig(
        peft_type=peft_type,
        kind=kind,
        tuner=_chosen(kind.read(config), task_id),
        targets=_targets(config, kind, model_type) if has_targets else NO_TARGETS,
        saved=read_saved(config),
        bias=_bias(config),
        activation=_activation(config),
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
    raise UnsupportedAdapter(
        f"peft_type is {ascii(value)[:60]}, which this server does not know; docs/adapters.md lists those it reads",
        param="peft_type",
    )


def _targets(config: Config, kind: Served, model_type: str) -> Targets:
    value = config.get("target_modules")
    if kind.acts_on == "tables" and value is None:
        # PEFT takes the model's own embedding
        return Targets(kind.default_targets.names, (), None)
    if kind.acts_on == "tables" and isinstance(value, str) and is_plain_name(value):
        # and writes its path, which as a regular expression means no other module
        return Targets((value,), (), None, is_whole=True)
    return read_targets(config, model_type, kind.default_targets)


def _chosen(tuner: Tuner, task_id: int | None) -> Tuner:
    if task_id is None:
        return tuner
    if not isinstance(tuner, TaskTuner) or tuner.num_tasks == 0:
        raise InvalidOption("task_id is set, but this kind of adapter has no tasks: leave it out", param="task_id")
    if not 0 <= task_id < tuner.num_tasks:
        raise InvalidOption(
            f"task_id is {task_id}; the file holds the tasks 0 to {tuner.num_tasks - 1}", param="task_id"
        )
    return tuner.choose(task_id)


def _bias(config: Config) -> str:
    bias = config.get("bias", "none")
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        raise UnsupportedAdapter(
            f"bias is {ascii(bias)[:40]}; it must be 'none', 'all' or a kind's name with '_only'", param="bias"
        )
    return bias


def _activation(config: Config) -> tuple[int, ...]:
    value = config.get(_INVOCATION)
    tokens = value if isinstance(value, list) else []
    whole = [token for token in tokens if isinstance(token, int) and not isinstance(token, bool) and token >= 0]
    if (value is not None and not isinstance(value, list)) or len(whole) != len(tokens):
        raise UnsupportedAdapter(f"{_INVOCATION} must list token ids", param=_INVOCATION)
    return tuple(whole)


def _check_fixed(config: Config) -> None:
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
