"""The `adapter_config.json` of the MoE-PEFT family: MixLoRA, MoLA and LoRAMoE.

Owns its keys: each is used, has no effect on inference, or must be at its default. Invariant: a key that is none of
these is refused by name, and a returned `MoeConfig` says completely how the tensors act.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters_store.convert.config_values import Config, read_flag, read_scale, read_whole
from adapters_store.convert.lora_mixtures import scaling_of
from adapters_store.errors import CorruptUpload, UnknownField, UnsupportedAdapter
from adapters_store.file_system import open_regular
from adapters_store.parts import CONFIG_PART
from adapters_store.strict_json import Json, read_json

MAX_CONFIG_BYTES = 1 << 20

_USED = frozenset(
    {"peft_type", "routing_strategy", "r", "lora_alpha", "use_rslora", "target_modules", "num_experts", "top_k"}
    | {"act_fn", "expert_lora"}
)
_HARMLESS = frozenset(
    {"base_model_name_or_path", "task_type", "lora_dropout", "lora_init", "router_aux_loss_coef", "router_init_range"}
    | {"router_loss", "router_dyn_loss_coef", "entropy_index", "entropy_type", "entropy_eps", "name", "task_name"}
    | {"inference_mode", "peft_version", "router_z_loss_coef"}
)
# key -> values at which it changes nothing
_DEFAULTS: dict[str, tuple[Json, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "jitter_noise": (0, 0.0, None),
    "sparse_step": (None, 1),
    "fan_in_fan_out": (False, None),
}
_STRATEGIES = {"MIXLORA": ("mixlora", "mixtral"), "MOLA": ("mola",), "LORAMOE": ("loramoe",)}
# names of the first MixLoRA files
LEGACY_TARGETS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """`targets` are names of linear layers; experts may have a rank and scaling of their own."""

    kind: str
    targets: frozenset[str]
    rank: int
    scaling: float
    expert_rank: int
    expert_scaling: float
    num_experts: int
    top_k: int
    act_fn: str | None
    ignored: tuple[str, ...]
    recorded: Config


def peft_type_of(source: Path) -> str | None:
    """Return `peft_type` of the upload's config, None where there is no config or no such text in it."""
    if not (source / CONFIG_PART).exists():
        return None
    value = read_config_file(source).get("peft_type")
    return value if isinstance(value, str) else None


def read_config_file(source: Path) -> Config:
    """Read `adapter_config.json`; raises CorruptUpload."""
    try:
        with open_regular(source / CONFIG_PART) as file:
            return read_json(file.read(MAX_CONFIG_BYTES + 1), CONFIG_PART, max_bytes=MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise CorruptUpload(f"the upload lacks the file {CONFIG_PART}", param="files") from None


def read_moe_config(source: Path, kind: str) -> MoeConfig:
    """Read the config of an adapter of this `peft_type`: MIXLORA, MOLA or LORAMOE.

    Raises:
        UnknownField, UnsupportedAdapter: a key or value that is not served; `param` is its key.
    """
    config = read_config_file(source)
    _check_keys(config)
    if config.get("peft_type") != kind:
        raise UnsupportedAdapter(
            f"peft_type is {ascii(config.get('peft_type'))[:40]}; this format has {kind}", param="peft_type"
        )
    strategy = config.get("routing_strategy", _STRATEGIES[kind][-1])
    if strategy not in _STRATEGIES[kind]:
        raise UnsupportedAdapter(
            f"routing_strategy is {ascii(strategy)[:40]}; served is {' or '.join(_STRATEGIES[kind])}, which chooses a "
            "fixed number of experts: train with it",
            param="routing_strategy",
        )
    rank, scaling = _rank_and_scaling(config)
    own = config.get("expert_lora")
    if own is not None and not isinstance(own, dict):
        raise UnsupportedAdapter("expert_lora must be an object", param="expert_lora")
    if own is not None:
        _check_keys(own)
    expert_rank, expert_scaling = _rank_and_scaling({**config, **(own or {})})
    act_fn = config.get("act_fn")
    if act_fn is not None and not isinstance(act_fn, str):
        raise UnsupportedAdapter("act_fn must be the name of an activation", param="act_fn")
    num_experts = read_whole(config, "num_experts", 0)
    return MoeConfig(
        kind=kind,
        targets=_targets(config.get("target_modules")),
        rank=rank,
        scaling=scaling,
        expert_rank=expert_rank,
        expert_scaling=expert_scaling,
        num_experts=num_experts,
        top_k=num_experts if kind == "LORAMOE" else read_whole(config, "top_k", 2),
        act_fn=act_fn,
        ignored=tuple(sorted(key for key in config.keys() & _HARMLESS if config[key] not in (None, False))),
        recorded={key: config[key] for key in sorted(config.keys() & _USED) if key != "peft_type"},
    )


def _rank_and_scaling(config: Config) -> tuple[int, float]:
    if "r" not in config or "lora_alpha" not in config:
        raise UnsupportedAdapter("the config must say r and lora_alpha", param="r")
    rank = read_whole(config, "r", 0)
    return rank, scaling_of(read_scale(config, "lora_alpha", 0), rank, is_stabilised=read_flag(config, "use_rslora"))


def _targets(value: Json) -> frozenset[str]:
    """Return the targeted names, of a list or of an object of flags."""
    if isinstance(value, dict):
        value = [name for name, is_target in value.items() if is_target is True]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise UnsupportedAdapter("target_modules must name linear layers", param="target_modules")
    return frozenset(LEGACY_TARGETS.get(name, name) for name in value if isinstance(name, str))


def _check_keys(config: Config) -> None:
    for key, defaults in _DEFAULTS.items():
        if key in config and config[key] not in defaults:
            raise UnsupportedAdapter(
                f"{key} is {ascii(config[key])[:40]}, which is not served: train with {defaults[0]!r}", param=key
            )
    unknown = sorted(config.keys() - _USED - _HARMLESS - _DEFAULTS.keys())
    if unknown:
        raise UnknownField(
            f"the config holds the key {unknown[0][:80]!a}, which this server does not know", param=unknown[0][:80]
        )
