"""The base model as one frozen value: dimensions, kinds of layers, multipliers, end tokens; read from its config.

Owns the translation from a Hugging Face folder's `config.json` and `generation_config.json`; knows no torch and no
weights. Invariant: a spec exists only for a model whose every number the decoder computes; all else is a `StartError`.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters_store.base import BaseDims, read_base_dims
from adapters_store.jobs.base_fit import BaseRoom
from serve.errors import StartError
from serve.model.families import FAMILIES, Family, NormKind, NormPlacement, QkNorm, rotary_layers
from serve.model.hf_config import HfConfig
from serve.model.rope import RopeSpec, read_layered_ropes, read_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
DTYPES = ("float32", "bfloat16", "float16")

# keys that change the math in a way the decoder does not compute, whenever they are set
_REFUSED_KEYS = (
    "add_cross_attention",
    "attention_chunk_size",
    "clip_qkv",
    "is_encoder_decoder",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "use_bidirectional_attention",
)
_QUANTISATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: how far it sees (None: all) and which of `ModelSpec.ropes` turns it (None: no rotation)."""

    window: int | None
    rope_index: int | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the decoder is built from."""

    architecture: str
    dims: BaseDims
    # the checkpoint's own dtype: "float32", "bfloat16" or "float16"
    dtype: str
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    norm_kind: NormKind
    norm_placement: NormPlacement
    qk_norm: QkNorm
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    has_fused_checkpoint: bool
    # "silu", "gelu_tanh" or "gelu"
    activation: str
    attention_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    logit_divisor: float
    embedding_scale: float
    residual_scale: float
    # factor on embeddings that an adapter brings instead of tokens: Granite scales them too, Gemma its table alone
    prompt_scale: float = 1.0

    @property
    def room(self) -> BaseRoom:
        """Return what a training job may ask of this base."""
        windows = tuple(layer.window for layer in self.layers if layer.window is not None)
        return BaseRoom(self.dims, self.max_position_embeddings, windows)

    def has_bias(self, site: str) -> bool:
        """Do the base's linear layers of a fused site have a bias?"""
        return {"qkv": self.qkv_bias, "o": self.o_bias, "gate_up": self.mlp_bias, "down": self.mlp_bias}[site]

    def qk_norm_widths(self) -> tuple[int, int]:
        """Widths of the norms of queries and of keys: one head, or all heads at once."""
        dims, is_full = self.dims, self.qk_norm is QkNorm.FULL
        return (
            dims.head_dim * (dims.num_attention_heads if is_full else 1),
            dims.head_dim * (dims.num_key_value_heads if is_full else 1),
        )


def read_spec(model_dir: Path) -> ModelSpec:
    """Read the spec of a Hugging Face model folder.

    Raises:
        StartError: unsupported architecture, quantised checkpoint, or a key whose math is not implemented; the message
            names it.
    """
    config = HfConfig.read(model_dir / "config.json")
    family = _family(config)
    _refuse_other_math(config, family)
    dims = _dims(model_dir)
    _check(dims)
    max_positions = config.integer("max_position_embeddings", family.max_position_embeddings)
    return ModelSpec(
        architecture=config.architecture,
        dims=dims,
        dtype=_dtype(config),
        max_position_embeddings=max_positions,
        eos_token_ids=_eos_token_ids(config, model_dir),
        bos_token_id=next(iter(config.token_ids("bos_token_id")), None),
        layers=_layers(config, family, dims.num_hidden_layers),
        ropes=_ropes(config, family, dims.head_dim, max_positions),
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        norm_kind=family.norm_kind,
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        qkv_bias=_bias(config, family.qkv_bias, "attention_bias"),
        o_bias=_bias(config, family.o_bias, "attention_bias"),
        mlp_bias=_bias(config, family.mlp_bias, "mlp_bias"),
        has_fused_checkpoint=family.has_fused_checkpoint,
        activation=_activation(config, family),
        attention_scale=_attention_scale(config, family, dims.head_dim),
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping", family.attention_soft_cap),
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping", family.logit_soft_cap),
        logit_divisor=_multiplier(config, family, "logits_scaling"),
        embedding_scale=_embedding_scale(config, family, dims.hidden_size),
        residual_scale=_multiplier(config, family, "residual_multiplier"),
        prompt_scale=_multiplier(config, family, "embedding_multiplier"),
    )


def _family(config: HfConfig) -> Family:
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise StartError(
            f"architecture {config.architecture or 'unnamed'!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return family


def _refuse_other_math(config: HfConfig, family: Family) -> None:
    for key in _QUANTISATION_KEYS:
        if config.value(key):
            raise StartError(
                f"config.json has {key}: quantised checkpoints are not supported; "
                "use the float32, bfloat16 or float16 checkpoint of this model"
            )
    for key in _REFUSED_KEYS:
        if config.value(key):
            raise StartError(f"config.json has {key}={config.value(key)!r}, which this decoder does not compute")
    if family is FAMILIES["Gemma3ForCausalLM"] and config.value("attn_logit_softcapping"):
        raise StartError("config.json has attn_logit_softcapping, which Gemma 3 layers do not compute")


def _dims(model_dir: Path) -> BaseDims:
    try:
        return read_base_dims(model_dir)
    except KeyError as error:
        raise StartError(f"config.json lacks {error.args[0]}") from error
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise StartError(f"the model folder {model_dir.name}/ cannot be read: {error}") from error


def _check(dims: BaseDims) -> None:
    for name, value in dims.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise StartError(f"config.json: {name} is {value}; at least 1 is needed")
    if dims.num_attention_heads % dims.num_key_value_heads:
        raise StartError(
            f"config.json: {dims.num_attention_heads} query heads do not share {dims.num_key_value_heads} "
            "key-value heads evenly"
        )


def _dtype(config: HfConfig) -> str:
    name = config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise StartError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _eos_token_ids(config: HfConfig, model_dir: Path) -> tuple[int, ...]:
    path = model_dir / "generation_config.json"
    generation = HfConfig.read(path).token_ids("eos_token_id") if path.is_file() else ()
    return generation or config.token_ids("eos_token_id")


def _layers(config: HfConfig, family: Family, num_layers: int) -> tuple[LayerSpec, ...]:
    windows = family.windows(config, num_layers)
    if any(window is not None and window < 1 for window in windows):
        raise StartError(f"config.json: sliding_window is {min(w for w in windows if w is not None)}; 1 is the least")
    turns = rotary_layers(config, num_layers)
    return tuple(
        LayerSpec(window=windows[i], rope_index=_rope_index(family, windows[i]) if turns[i] else None)
        for i in range(num_layers)
    )


def _rope_index(family: Family, window: int | None) -> int:
    return 1 if family.has_layered_ropes and window is not None else 0


def _ropes(config: HfConfig, family: Family, head_dim: int, max_positions: int) -> tuple[RopeSpec, ...]:
    ropes: tuple[RopeSpec, ...] = (
        read_layered_ropes(config, head_dim, max_positions)
        if family.has_layered_ropes
        else (read_rope(config, head_dim, max_positions, default_theta=family.rope_theta),)
    )
    for rope in ropes:
        if rope.rotary_dim != head_dim and not family.has_partial_rotary:
            raise StartError(f"config.json: partial_rotary_factor is not supported for {config.architecture}")
    return ropes


def _bias(config: HfConfig, fixed: bool | None, key: str) -> bool:
    return config.flag(key, default=False) if fixed is None else fixed


def _activation(config: HfConfig, family: Family) -> str:
    name = config.text(family.activation_key, family.activation)
    if name not in ACTIVATIONS:
        raise StartError(f"config.json: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _attention_scale(config: HfConfig, family: Family, head_dim: int) -> float:
    if family.has_multipliers:
        return config.number("attention_multiplier", 1.0)
    if family.query_pre_attn_scalar is not None:
        return float(config.number("query_pre_attn_scalar", family.query_pre_attn_scalar) ** -0.5)
    return float(head_dim**-0.5)


def _soft_cap(config: HfConfig, key: str, default: float | None) -> float | None:
    if default is None and not config.architecture.startswith("Gemma"):
        return None
    return config.number_or_null(key, default)


def _multiplier(config: HfConfig, family: Family, key: str) -> float:
    return config.number(key, 1.0) if family.has_multipliers else 1.0


def _embedding_scale(config: HfConfig, family: Family, hidden_size: int) -> float:
    return float(hidden_size**0.5) if family.scales_embedding else _multiplier(config, family, "embedding_multiplier")
