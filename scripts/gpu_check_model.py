"""The models that the grid measures, and the floors that physics set them.

Owns sizes and arithmetic (docs/kernels.md); measures nothing. Invariant: a floor counts every byte and product once: it
is what no implementation on a device of these rates goes below.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters_store.base import SITES
from serve.model.spec import ModelSpec, read_spec

# of one H200: device copy and dense bf16 products (KERNELS, head); other devices are measured
H200_BYTES_PER_S, H200_FLOP_PER_S = 4.3e12, 790e12

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
_SIZES: dict[str, dict[str, object]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 16384,
    },
    "qwen-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    },
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device can move and multiply at best."""

    bytes_per_s: float
    flop_per_s: float


def make_spec(name: str) -> ModelSpec:
    """Return the spec of a size, read as any model's is."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LLAMA | _SIZES[name]), encoding="utf-8")
        return read_spec(Path(folder))


def base_floor_us(spec: ModelSpec, rates: Rates, num_seqs: int, context: int, dtype: torch.dtype) -> float:
    """Floor of a decode step: every weight once, every sequence's keys and values once, or the products."""
    dims = spec.dims
    weights = sum(out * width for out, width in map(dims.site_shape, SITES)) * dims.num_hidden_layers
    weights += dims.vocab_size * dims.hidden_size
    kv = 2 * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim * context * num_seqs
    moved_s = (weights + kv) * dtype.itemsize / rates.bytes_per_s
    return 1e6 * max(moved_s, 2 * weights * num_seqs / rates.flop_per_s)


def adapter_floor_us(spec: ModelSpec, rates: Rates, rank: int, num_adapters: int, dtype: torch.dtype) -> float:
    """What the distinct adapters of a step add: their bytes, once."""
    per_rank = sum(sum(spec.dims.site_shape(site)) for site in SITES) * spec.dims.num_hidden_layers
    return 1e6 * per_rank * rank * num_adapters * dtype.itemsize / rates.bytes_per_s


def prefill_floors_us(spec: ModelSpec, rates: Rates, num_tokens: int, rank: int) -> tuple[float, float]:
    """Floors of a prefill, base and adapter's share: the products of both, attention's included."""
    dims = spec.dims
    weights = sum(out * width for out, width in map(dims.site_shape, SITES)) * dims.num_hidden_layers
    attention = 2 * dims.num_hidden_layers * dims.num_attention_heads * dims.head_dim * num_tokens**2
    lora = sum(sum(dims.site_shape(site)) for site in SITES) * dims.num_hidden_layers * rank
    base_s = (2 * weights * num_tokens + attention) / rates.flop_per_s
    return 1e6 * base_s, 1e6 * 2 * lora * num_tokens / rates.flop_per_s
