"""What sets one supported architecture apart from another, as data and a few small questions to its config.

Owns the table of families; knows no torch and reads no files. Invariant: everything that differs between families is
here or in the config; the decoder never asks for an architecture's name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from serve.errors import StartError
from serve.model.hf_config import HfConfig


class NormPlacement(StrEnum):
    """Where a block's norms stand: before it (Llama), after it (OLMo2), or on both sides (Gemma)."""

    PRE = "pre"
    POST = "post"
    BOTH = "both"


class NormKind(StrEnum):
    """The last step of RMSNorm: weight after the cast to the model's dtype, before it, or 1 + weight before it."""

    CAST_THEN_SCALE = "cast_then_scale"
    SCALE_THEN_CAST = "scale_then_cast"
    UNIT_OFFSET = "unit_offset"


class QkNorm(StrEnum):
    """RMSNorm of queries and keys: none, per head (Qwen3, Gemma 3), or over all heads at once (OLMo2)."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


Windows = Callable[[HfConfig, int], list[int | None]]


def _no_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    return [None] * num_layers


def _mistral_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    return [config.integer_or_null("sliding_window", 4096)] * num_layers


def _phi3_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    return [config.integer_or_null("sliding_window", None)] * num_layers


def _qwen_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    if not config.flag("use_sliding_window", default=False):
        return [None] * num_layers
    first = config.integer("max_window_layers", 28)
    return _typed_windows(config, [i >= first for i in range(num_layers)])


def _smollm3_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    if not config.flag("use_sliding_window", default=False):
        return [None] * num_layers
    return _typed_windows(config, [not turns for turns in rotary_layers(config, num_layers)], None)


def _gemma2_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    return _typed_windows(config, [i % 2 == 0 for i in range(num_layers)])


def _gemma3_windows(config: HfConfig, num_layers: int) -> list[int | None]:
    pattern = config.integer("sliding_window_pattern", 6)
    return _typed_windows(config, [(i + 1) % pattern != 0 for i in range(num_layers)])


def _typed_windows(
    config: HfConfig, slides_by_default: list[bool], default_window: int | None = 4096
) -> list[int | None]:
    window = config.integer_or_null("sliding_window", default_window)
    types = config.items("layer_types")
    if types is None:
        return [window if slides else None for slides in slides_by_default]
    if len(types) != len(slides_by_default):
        raise StartError(f"config.json: layer_types has {len(types)} entries for {len(slides_by_default)} layers")
    unknown = sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"})
    if unknown:
        raise StartError(f"config.json: layer_types has {unknown[0]!r}; supported: full_attention, sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in types]


def rotary_layers(config: HfConfig, num_layers: int) -> list[bool]:
    """Which layers turn queries and keys: SmolLM3 leaves out some, all others none."""
    if config.value("model_type") != "smollm3":
        return [True] * num_layers
    marks = config.items("no_rope_layers")
    if marks is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(marks) < num_layers:
        raise StartError(f"config.json: no_rope_layers has {len(marks)} entries for {num_layers} layers")
    return [bool(mark) for mark in marks[:num_layers]]


@dataclass(frozen=True, slots=True)
class Family:
    """Facts of one architecture. A bias of None means: as the config's `attention_bias` or `mlp_bias` says."""

    windows: Windows = _no_windows
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_kind: NormKind = NormKind.CAST_THEN_SCALE
    norm_eps: float = 1e-6
    qk_norm: QkNorm = QkNorm.NONE
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    rope_theta: float = 10_000.0
    has_layered_ropes: bool = False
    has_partial_rotary: bool = False
    # checkpoints hold qkv_proj and gate_up_proj as one tensor each
    has_fused_checkpoint: bool = False
    has_multipliers: bool = False
    scales_embedding: bool = False
    query_pre_attn_scalar: int | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    activation_key: str = "hidden_act"
    activation: str = "silu"
    max_position_embeddings: int = 2048


_GEMMA3 = Family(
    windows=_gemma3_windows,
    norm_placement=NormPlacement.BOTH,
    norm_kind=NormKind.UNIT_OFFSET,
    qk_norm=QkNorm.HEAD,
    qkv_bias=None,
    o_bias=None,
    has_layered_ropes=True,
    scales_embedding=True,
    query_pre_attn_scalar=256,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    max_position_embeddings=131_072,
)

FAMILIES = MappingProxyType(
    {
        "LlamaForCausalLM": Family(qkv_bias=None, o_bias=None, mlp_bias=None),
        "MistralForCausalLM": Family(windows=_mistral_windows, max_position_embeddings=131_072),
        "Qwen2ForCausalLM": Family(windows=_qwen_windows, qkv_bias=True, max_position_embeddings=32_768),
        "Qwen3ForCausalLM": Family(
            windows=_qwen_windows, qkv_bias=None, o_bias=None, qk_norm=QkNorm.HEAD, max_position_embeddings=32_768
        ),
        "Phi3ForCausalLM": Family(
            windows=_phi3_windows,
            norm_eps=1e-5,
            has_fused_checkpoint=True,
            has_partial_rotary=True,
            max_position_embeddings=4096,
        ),
        "SmolLM3ForCausalLM": Family(
            windows=_smollm3_windows,
            qkv_bias=None,
            o_bias=None,
            mlp_bias=None,
            rope_theta=2_000_000.0,
            max_position_embeddings=32_768,
        ),
        "GraniteForCausalLM": Family(qkv_bias=None, o_bias=None, mlp_bias=None, has_multipliers=True),
        "Olmo2ForCausalLM": Family(
            norm_placement=NormPlacement.POST,
            norm_kind=NormKind.SCALE_THEN_CAST,
            norm_eps=1e-5,
            qk_norm=QkNorm.FULL,
            qkv_bias=None,
            o_bias=None,
        ),
        "Gemma2ForCausalLM": Family(
            windows=_gemma2_windows,
            norm_placement=NormPlacement.BOTH,
            norm_kind=NormKind.UNIT_OFFSET,
            qkv_bias=None,
            o_bias=None,
            scales_embedding=True,
            query_pre_attn_scalar=256,
            attention_soft_cap=50.0,
            logit_soft_cap=30.0,
            activation_key="hidden_activation",
            activation="gelu_pytorch_tanh",
            max_position_embeddings=8192,
        ),
        "Gemma3ForCausalLM": _GEMMA3,
        # the text part; images are not read
        "Gemma3ForConditionalGeneration": _GEMMA3,
    }
)
