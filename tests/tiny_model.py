"""A random Llama of a few hundred kilobytes with a byte tokenizer and a chat template, and random LoRA folders for it.

Owns files on disk only (safetensors, JSON), written with numpy. Invariant: the same seed writes the same bytes, so two
servers over two copies give the same tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 128, 3, 4, 2, 16
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# Hermes' spelling of tools, as Qwen's template has it
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SITES = {
    "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


@dataclass(frozen=True, slots=True)
class TinyAdapter:
    """A PEFT folder on disk and the rank it was made with."""

    name: str
    folder: Path
    rank: int


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the model folder and return it."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257, 259]}))
    write_tokenizer(folder)
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": _matrix(rng, VOCAB_SIZE, HIDDEN, 1.0)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
        for site, (out_dim, in_dim) in SITES.items():
            tensors[f"{prefix}.{site}.weight"] = _matrix(rng, out_dim, in_dim, 2.0 / in_dim**0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tiny_adapter(folder: Path, name: str, rank: int, seed: int, num_sites: int = 7) -> TinyAdapter:
    """Write a PEFT LoRA folder on the first `num_sites` sites of every layer, strong enough to change tokens."""
    path = folder / name
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sites = list(SITES)[:num_sites]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [site.split(".")[1] for site in sites],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(NUM_LAYERS):
        for site in sites:
            out_dim, in_dim = SITES[site]
            prefix = f"base_model.model.model.layers.{layer}.{site}"
            tensors[f"{prefix}.lora_A.weight"] = _matrix(rng, rank, in_dim, 1.0 / in_dim**0.5)
            tensors[f"{prefix}.lora_B.weight"] = _matrix(rng, out_dim, rank, 0.4 / rank**0.5)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return TinyAdapter(name, path, rank)


def _matrix(rng: np.random.Generator, num_rows: int, num_columns: int, scale: float) -> np.ndarray:
    return (rng.standard_normal((num_rows, num_columns)) * scale).astype(np.float32)


def write_tokenizer(folder: Path) -> None:
    """Write a byte tokenizer of `VOCAB_SIZE` tokens into a model's folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
