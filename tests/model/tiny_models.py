"""Tiny random checkpoints of every supported family, made by transformers, each with what sets the family apart.

Owns the configs and the random weights; checks nothing. Weights are larger than transformers' own initial ones, so
that a wrong rotation, mask or multiplier shows in the logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

VOCAB = 96

_SIZES: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class TinyModel:
    """A family variant: `build(**overrides)` makes the transformers model."""

    name: str
    model_class: str
    config_class: str
    overrides: dict[str, object]

    def build(self, **more: object) -> torch.nn.Module:
        """Make the model with random weights, in eval mode and fp32."""
        config = getattr(transformers, self.config_class)(**{**_SIZES, **self.overrides, **more})
        torch.manual_seed(7)
        model: torch.nn.Module = getattr(transformers, self.model_class)(config)
        randomize(model)
        return model.eval()


def randomize(model: torch.nn.Module) -> None:
    """Fill all parameters with values of healthy size."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Gemma's norms are centred on 0, all others on 1
                parameter.add_(noise * 0.2)
            elif parameter.dim() < 2:
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]) * (3.0 if "embed" in name else 1.3))
        model.tie_weights()  # type: ignore[operator]


def _causal(name: str, family: str, **overrides: object) -> TinyModel:
    return TinyModel(name, f"{family}ForCausalLM", f"{family}Config", overrides)


def _longrope(original: int) -> dict[str, object]:
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * i for i in range(6)],
            "long_factor": [2.0 + 0.7 * i for i in range(6)],
        },
        "original_max_position_embeddings": original,
    }


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8, "num_hidden_layers": 4}

TINY_MODELS = (
    _causal("llama2", "Llama", num_key_value_heads=4),
    _causal("llama3", "Llama", rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True),
    _causal("llama-linear", "Llama", rope_parameters=_LINEAR, head_dim=24),
    _causal(
        "smollm2-tied", "Llama", tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, hidden_size=72
    ),
    _causal("mistral-window", "Mistral", sliding_window=8, head_dim=24),
    _causal("mistral-full", "Mistral", sliding_window=None),
    _causal("qwen2-tied", "Qwen2", tie_word_embeddings=True),
    _causal("qwen2-window", "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    _causal("qwen3", "Qwen3", head_dim=24),
    _causal(
        "qwen3-bias-window",
        "Qwen3",
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    _causal("phi3", "Phi3"),
    _causal(
        "phi3-window-partial",
        "Phi3",
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    _causal("phi3-longrope-short", "Phi3", **_longrope(128)),
    _causal("phi3-longrope-long", "Phi3", **_longrope(8)),
    _causal("smollm3", "SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2),
    _causal(
        "smollm3-window",
        "SmolLM3",
        num_hidden_layers=4,
        no_rope_layers=[1, 0, 0, 1],
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
    ),
    _causal(
        "granite",
        "Granite",
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
        residual_multiplier=0.6,
        logits_scaling=3.0,
        tie_word_embeddings=True,
    ),
    _causal("olmo2", "Olmo2", rms_norm_eps=1e-6),
    _causal("gemma2", "Gemma2", **_GEMMA),
    _causal("gemma2-no-caps", "Gemma2", **_GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    TinyModel(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "sliding_window_pattern": 3, "rope_parameters": _GEMMA3_ROPES},
    ),
)

BY_NAME = {model.name: model for model in TINY_MODELS}


def build_gemma3_multimodal() -> torch.nn.Module:
    """Make a Gemma 3 with a vision tower, whose text part is what is served."""
    text = {key: value for key, value in _SIZES.items() if key != "attn_implementation"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config={**text, **_GEMMA, "rope_parameters": _GEMMA3_ROPES, "sliding_window_pattern": 3},
        vision_config=vision,
        mm_tokens_per_image=1,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model: torch.nn.Module = transformers.Gemma3ForConditionalGeneration(config)
    randomize(model)
    return model.eval()


def save(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    """Write the checkpoint as transformers writes it."""
    save_pretrained: Callable[..., None] = model.save_pretrained  # type: ignore[assignment]
    save_pretrained(folder, **options)
    return folder


def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> Tensor:
    """Run transformers over the whole sequence at once: [T, V] fp32."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float()
