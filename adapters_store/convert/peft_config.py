"""The strict reader of a PEFT LORA `adapter_config.json`.

Owns types, ranges and refusals of the values that are used; the meaning of keys is the table in `peft_keys.py`.
Invariant: a returned `LoraConfig` says completely how the tensors act; nothing else in the file matters.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.convert.peft_keys import check_keys
from adapters_store.convert.peft_patterns import PatternKey, names_module, parse_pattern_key, read_names
from adapters_store.errors import UnsupportedAdapter
from adapters_store.strict_json import Json, read_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

# PEFT's own default for LORA when target_modules is null, for the served architectures that it lists
_DEFAULT_TARGETS = ("q_proj", "v_proj")
_TYPES_WITH_DEFAULT = frozenset({"llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"})

_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_MAX_ALPHA = 1e6
_MAX_RANK = 1 << 20
_MAX_PATTERN_KEYS = 1024


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How PEFT would act. `targets` is None for all linear layers; `layers` is None for all decoder layers."""

    rank: int
    alpha: float
    use_rslora: bool
    lora_bias: bool
    rank_pattern: tuple[tuple[PatternKey, int], ...]
    alpha_pattern: tuple[tuple[PatternKey, float], ...]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    ignored: tuple[str, ...]
    recorded: dict[str, Json]

    def is_target(self, path: str, layer: int) -> bool:
        """Return whether PEFT puts a LoRA on the module at `path`."""
        if any(names_module(name, path) for name in self.excluded):
            return False
        if self.targets is None or path in self.targets:
            # PEFT filters by layer only where a target matched as a suffix
            return True
        found = any(names_module(name, path) for name in self.targets)
        return found and (self.layers is None or layer in self.layers)

    def rank_of(self, path: str) -> int:
        """Return the module's rank: of the first pattern key that matches, else the common one."""
        return next((rank for key, rank in self.rank_pattern if key.matches(path)), self.rank)

    def without_effect(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the targets and pattern keys that decide nothing for these modules, as `rank_pattern[key]`."""
        paths = list(paths)
        targets = self.targets or ()
        unused = [f"target_modules[{name}]" for name in targets if not any(names_module(name, path) for path in paths)]
        for field, keys in (
            ("rank_pattern", [key for key, _ in self.rank_pattern]),
            ("alpha_pattern", [key for key, _ in self.alpha_pattern]),
        ):
            deciding = {next((key.key for key in keys if key.matches(path)), None) for path in paths}
            unused += [f"{field}[{key.key}]" for key in keys if key.key not in deciding]
        return tuple(unused)

    def scaling_of(self, path: str) -> float:
        """Return what PEFT multiplies B A with."""
        alpha = next((alpha for key, alpha in self.alpha_pattern if key.matches(path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(raw: bytes, *, model_type: str) -> LoraConfig:
    """Read the config of an adapter for a base of `model_type`.

    Raises:
        CorruptUpload: not strict JSON. UnsupportedAdapter: a value that is wrong or not served; `param` is its key.
    """
    config = read_json(raw, CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    _check_peft_type(config.get("peft_type"))
    ignored = check_keys(config)
    _check_fixed(config)
    return LoraConfig(
        rank=_rank(config.get("r", 8), "r"),
        alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        lora_bias=_flag(config, "lora_bias"),
        rank_pattern=tuple(
            (parse_pattern_key(key, "rank_pattern"), _rank(value, "rank_pattern"))
            for key, value in _pattern(config, "rank_pattern").items()
        ),
        alpha_pattern=tuple(
            (parse_pattern_key(key, "alpha_pattern"), _alpha(value, "alpha_pattern"))
            for key, value in _pattern(config, "alpha_pattern").items()
        ),
        targets=_targets(config.get("target_modules"), model_type),
        excluded=read_names(config.get("exclude_modules"), "exclude_modules"),
        layers=_layers(config),
        ignored=ignored,
        recorded=_recorded(config),
    )


def _check_peft_type(value: Json) -> None:
    if value == "LORA":
        return
    shown = ascii(value)[:60]
    raise UnsupportedAdapter(
        f"peft_type is {shown}; this server reads LORA. Convert the adapter to LORA, or train it as one",
        param="peft_type",
    )


def _check_fixed(config: dict[str, Json]) -> None:
    bias = config.get("bias", "none")
    if bias != "none":
        raise UnsupportedAdapter(
            f"bias is {ascii(bias)[:40]}; trained biases of the base are not served: train with bias='none', "
            "or with lora_bias=True",
            param="bias",
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise UnsupportedAdapter(
            f"task_type is {ascii(task)[:40]}; adapters of causal language models are served", param="task_type"
        )
    init = config.get("init_lora_weights", True)
    keeps_base = isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _KEEPS_BASE)
    if not keeps_base:
        raise UnsupportedAdapter(
            f"init_lora_weights is {ascii(init)[:40]}, which changed the base weights while training; save the adapter "
            "with path_initial_model_for_weight_conversion, which turns it into a plain LoRA of twice the rank",
            param="init_lora_weights",
        )


def _rank(value: Json, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_RANK:
        shown = ascii(value)[:40]
        raise UnsupportedAdapter(f"{field} holds the rank {shown}; it must be a whole number from 1", param=field)
    return value


def _alpha(value: Json, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isinstance(value, int | float) or not 0 < value <= _MAX_ALPHA:
        raise UnsupportedAdapter(
            f"{field} holds {ascii(value)[:40]}; it must be a number above 0 and up to {_MAX_ALPHA:.0f}", param=field
        )
    return float(value)


def _flag(config: dict[str, Json], field: str) -> bool:
    value = config.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise UnsupportedAdapter(f"{field} is {ascii(value)[:40]}; it must be true or false", param=field)


def _pattern(config: dict[str, Json], field: str) -> dict[str, Json]:
    value = config.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERN_KEYS:
        raise UnsupportedAdapter(f"{field} must map at most {_MAX_PATTERN_KEYS} module names to numbers", param=field)
    return value


def _targets(value: Json, model_type: str) -> tuple[str, ...] | None:
    if isinstance(value, str) and value.lower() == "all-linear":
        return None
    if value is None and model_type in _TYPES_WITH_DEFAULT:
        return _DEFAULT_TARGETS
    targets = read_names(value, "target_modules")
    if not targets:
        raise UnsupportedAdapter(
            "target_modules is empty; list the modules that the adapter acts on", param="target_modules"
        )
    unserved = [name for name in targets if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]
    if unserved:
        raise UnsupportedAdapter(
            f"target_modules names '{unserved[0]}'; LoRA on embeddings is not served yet: "
            "train on the linear layers of the decoder",
            param="target_modules",
        )
    return targets


def _layers(config: dict[str, Json]) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    names = [pattern] if isinstance(pattern, str) and pattern else pattern or ["layers"]
    if not isinstance(names, list) or not any(name in ("layers", "model.layers") for name in names):
        raise UnsupportedAdapter(
            f"layers_pattern is {ascii(pattern)[:80]}; layers are called 'layers' in every base here",
            param="layers_pattern",
        )
    if value is None or value == []:
        return None
    if isinstance(config.get("target_modules"), str):
        raise UnsupportedAdapter(
            "layers_to_transform needs target_modules to be a list of module names", param="layers_to_transform"
        )
    numbers = value if isinstance(value, list) else [value]
    layers = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 16]
    if len(layers) != len(numbers):
        raise UnsupportedAdapter("layers_to_transform must hold layer numbers from 0", param="layers_to_transform")
    return frozenset(layers)


def _recorded(config: dict[str, Json]) -> dict[str, Json]:
    """Keep what shapes the result, for the manifest; the rest of the file stays with its hash."""
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "peft_version")
    recorded: dict[str, Json] = {key: config[key] for key in keys if config.get(key) not in (None, False, {})}
    version = recorded.get("peft_version")
    if version is not None and not (isinstance(version, str) and len(version) <= 40):
        raise UnsupportedAdapter("peft_version must be a short text", param="peft_version")
    return recorded
