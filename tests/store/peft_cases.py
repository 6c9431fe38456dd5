"""One folder per served kind of adapter and form of it, saved by PEFT from a tiny Llama with random trained values.

Owns the options and the making of folders, and PEFT's own answers for them. Invariant: the answers come from a model
that PEFT loaded the folder into, so a folder that PEFT itself reads differently is no reference.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.model.tiny_models import BY_NAME
from tests.store.deltas import Deltas

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """`scale` is the size of the trained values, so that deltas stay near the base's weights."""

    peft_type: str
    options: dict[str, Any]
    targets: list[str] = field(default_factory=lambda: ALL)
    scale: float = 0.2


CASES = {
    "lora": Case("LORA", {"r": 4, "use_rslora": True}),
    "dora": Case("LORA", {"r": 4, "lora_alpha": 6, "use_dora": True}, scale=0.5),
    "dora-ranks": Case(
        "LORA",
        {"r": 4, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3}},
        ["q_proj", "v_proj", "o_proj", "up_proj"],
        scale=0.5,
    ),
    "adalora": Case("ADALORA", {"init_r": 6, "lora_alpha": 5, "total_step": 10}),
    "adalora-pruned": Case("ADALORA", {"init_r": 4, "lora_alpha": 7, "total_step": 10}),
    "loha": Case(
        "LOHA", {"r": 3, "alpha": 5, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 2}}, scale=0.4
    ),
    "lokr": Case("LOKR", {"r": 2, "alpha": 3, "rank_pattern": {"layers.1.mlp.up_proj": 1}}),
    "lokr-factored": Case("LOKR", {"r": 2, "alpha": 3, "decompose_both": True}, scale=0.4),
    "lokr-whole": Case("LOKR", {"r": 16, "alpha": 16}, ["q_proj", "v_proj"]),
    "vera": Case("VERA", {"r": 5}),
    "pvera": Case("PVERA", {"r": 5}),
    "vblora": Case("VBLORA", {"r": 3, "num_vectors": 12, "vector_length": 8}, scale=0.3),
    "vblora-uint8": Case(
        "VBLORA", {"r": 3, "num_vectors": 12, "vector_length": 8, "topk": 3, "save_only_topk_weights": True}
    ),
    "vblora-int16": Case("VBLORA", {"r": 2, "num_vectors": 300, "vector_length": 4, "save_only_topk_weights": True}),
    "unilora": Case("UNILORA", {"r": 3, "theta_d_length": 40, "save_indices": True}, scale=1.0),
    "miss": Case("MISS", {"r": 6}, scale=0.05),
    "miss-mini": Case("MISS", {"r": 6, "mini_r": 8, "init_weights": "mini"}, scale=0.05),
    "bone": Case("MISS", {"r": 7}, scale=0.05),
    "delora": Case("DELORA", {"r": 4, "rank_pattern": {"q_proj": 2}}, scale=5.0),
    "gralora": Case("GRALORA", {"r": 8, "gralora_k": 4, "alpha": 6}),
    "gralora-hybrid": Case("GRALORA", {"r": 4, "gralora_k": 2, "alpha": 6, "hybrid_r": 3}),
    "tinylora": Case("TINYLORA", {"r": 3, "u": 5}),
    "tinylora-tied": Case("TINYLORA", {"r": 3, "u": 5, "weight_tying": 0.6, "layers_to_transform": [0, 2]}),
    "randlora": Case("RANDLORA", {"r": 10, "randlora_alpha": 4}, ["v_proj", "o_proj", "down_proj"]),
    "poly": Case("POLY", {"r": 3, "n_skills": 3, "n_splits": 2}),
    "beft": Case("BEFT", {}, ["v_proj", "down_proj"]),
    "ia3": Case("IA3", {"feedforward_modules": ["down_proj"]}, ["k_proj", "v_proj", "down_proj"], scale=0.5),
    "ia3-inputs": Case("IA3", {"feedforward_modules": ["q_proj", "o_proj", "up_proj"]}, scale=0.5),
}


@dataclass(frozen=True)
class Answer:
    """What PEFT does: the delta of every module, and the log-probabilities [T, V] of the prompt."""

    deltas: Deltas
    logprobs: Tensor


def tiny_llama() -> nn.Module:
    """Return the base of all folders: hidden size 64, 3 layers, grouped heads, biases everywhere."""
    return BY_NAME["llama3"].build()


def save_case(model: nn.Module, case: Case, folder: Path, seed: int) -> None:
    """Wrap the model, give every trained value a random one, save, and unwrap it again."""
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(case.peft_type)]
    config = config_class(task_type="CAUSAL_LM", target_modules=list(case.targets), **case.options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * case.scale)
    if folder.name == "adalora-pruned":
        _prune(wrapped)
    wrapped.save_pretrained(str(folder))
    wrapped.unload()


def ask_peft(model: nn.Module, folder: Path, prompt: list[int]) -> Answer:
    """Load the folder into the model and take PEFT's own answers."""
    loaded = PeftModel.from_pretrained(model, folder).eval()
    arguments = {"task_ids": torch.tensor([0])} if folder.name == "poly" else {}
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([prompt]), use_cache=False, **arguments).logits[0]
        deltas = _deltas(loaded, arguments)
    loaded.unload()
    return Answer(deltas, logits.float().log_softmax(-1))


def rename_to_bone(folder: Path) -> None:
    """Turn a MiSS folder into what PEFT before 0.18 saved as Bone; only the names differ."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("mini_r", "miss_dropout"):
        del config[key]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("miss_block", "bone_block"): value for name, value in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _prune(wrapped: PeftModel) -> None:
    """Let AdaLoRA keep two ranks of one module, none of another and all of the rest, as its allocator would."""
    stem = "model.layers.{}.lora_E.default"
    config: Any = wrapped.peft_config["default"]
    config.rank_pattern = {
        stem.format("0.self_attn.q_proj"): [True, False, False, True],
        stem.format("1.mlp.down_proj"): [False] * 4,
        stem.format("2.self_attn.v_proj"): [True] * 4,
    }


def _deltas(loaded: nn.Module, arguments: dict[str, Tensor]) -> Deltas:
    deltas: Deltas = {}
    for name, module in loaded.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.double()
        inputs = torch.eye(base.in_features, dtype=torch.float64)[None]
        at_zero = torch.zeros(1, 1, base.in_features, dtype=torch.float64)
        bias = (layer(at_zero, **arguments) - base(at_zero))[0, 0]
        delta = (layer(inputs, **arguments) - base(inputs))[0] - bias
        layer.to(dtype)
        has_bias = bool(bias.abs().max() > 1e-9)
        deltas[name.removeprefix("base_model.model.model.")] = (
            delta.T.float().numpy(),
            bias.float().numpy() if has_bias else None,
        )
    return deltas
