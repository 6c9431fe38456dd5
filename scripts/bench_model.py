"""Builds what `make bench-cpu` serves: a random Qwen2.5-0.5B-shaped bf16 checkpoint and random rank-16 LoRA folders.

Random weights cost the same as trained ones. Built once into a cache folder; nothing here is committed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of Qwen2.5-0.5B."""

    hidden: int = 896
    intermediate: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 151936

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each adapted linear layer."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def build_base(folder: Path, shape: Shape) -> None:
    """Write config, tokenizer and random weights; does nothing where they already lie."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": _random((shape.vocab, shape.hidden), generator)}
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for name, dims in shape.linears().items():
            tensors[f"{prefix}{name}.weight"] = _random(dims, generator)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}self_attn.{name}.bias"] = _random((shape.linears()[f"self_attn.{name}"][0],), generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    _write_config(folder, shape)
    _write_tokenizer(folder, shape.vocab)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def build_adapters(folder: Path, shape: Shape, count: int, rank: int = RANK) -> list[Path]:
    """Write `count` PEFT folders `bench-00`, `bench-01`, ... (`bench-r8-00` of another rank) and return them."""
    name = "bench" if rank == RANK else f"bench-r{rank}"
    folders = [folder / f"{name}-{index:02d}" for index in range(count)]
    for index, own in enumerate(folders):
        if (own / "adapter_model.safetensors").exists():
            continue
        own.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index + 1)
        tensors = {}
        for layer in range(shape.num_layers):
            for name, (out_dim, in_dim) in shape.linears().items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = _random((rank, in_dim), generator)
                tensors[f"{prefix}.lora_B.weight"] = _random((out_dim, rank), generator)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
        config |= {"bias": "none", "target_modules": list(TARGETS), "base_model_name_or_path": "bench-base"}
        (own / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders


def _random(dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(dims, generator=generator) * 0.02).to(torch.bfloat16)


def _write_config(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _write_tokenizer(folder: Path, vocab: int) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={f"t{index:06d}": index for index in range(vocab)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
