"""One folder per served kind of adapter and form of it, saved by PEFT from a tiny Llama with random trained values.

Owns the options and the making of folders, and PEFT's own answers for them. Invariant: the answers come from a model
that PEFT loaded the folder into, so a folder that PEFT itself reads differently is no reference.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.model.tiny_models import BY_NAME
from tests.store.deltas import Deltas

BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["q_proj", "k_proj", "v_proj", "up_proj"],
    nblocks=2,
    match_strict=False,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """`scale` is the size of the trained values, so that deltas stay near the base's weights.

    `upload` is what a client must say beside the files.
    """

    peft_type: str
    options: dict[str, Any]
    targets: list[str] | None = field(default_factory=lambda: ALL)
    scale: float = 0.2
    upload: dict[str, Any] = field(default_factory=dict)


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
    "pissa": Case("LORA", {"r": 4, "init_lora_weights": "pissa", "use_rslora": True}),
    "olora": Case("LORA", {"r": 4, "init_lora_weights": "olora", "lora_alpha": 4}),
    "kasa": Case("LORA", {"r": 4, "kasa_config": KasaConfig()}, scale=0.5),
    "bdlora": Case("LORA", {"r": 4, "use_bdlora": BLOCKS}),
    "qalora": Case("LORA", {"r": 4, "use_qalora": True, "qalora_group_size": 8}),
    "bias-only": Case("LORA", {"r": 4, "bias": "lora_only"}, ["q_proj", "down_proj"]),
    "bias-all": Case("LORA", {"r": 4, "bias": "all"}, ["q_proj", "down_proj"]),
    "hra": Case("HRA", {"r": 3}, scale=1.0),
    "hra-orthogonal": Case("HRA", {"r": 4, "apply_GS": True}, scale=1.0),
    "deft": Case("DEFT", {"r": 3, "alpha": 5}, scale=0.3),
    "deft-para": Case("DEFT", {"r": 3, "para": True, "decomposition_method": "qr"}, scale=0.3),
    "peanut": Case("PEANUT", {"r": 3, "scaling": 0.5}),
    "peanut-deep": Case("PEANUT", {"r": 3, "depth": 2, "act_fn": "silu"}),
    "road": Case("ROAD", {"group_size": 8}, scale=1.0),
    "road-2": Case("ROAD", {"group_size": 16, "variant": "road_2"}, ["q_proj", "o_proj", "down_proj"], scale=1.0),
    "road-4": Case("ROAD", {"group_size": 8, "variant": "road_4"}, scale=1.0),
    "oft": Case("OFT", {"oft_block_size": 8}, scale=0.04),
    "oft-cayley": Case("OFT", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}, scale=0.3),
    "oft-shared": Case("OFT", {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.05}, scale=0.3),
    "boft": Case("BOFT", {"boft_block_size": 8}, scale=0.5),
    "shira": Case("SHIRA", {"r": 1}, scale=0.5),
    "supertuning": Case("SUPERTUNING", {"sparsity": 0.95}, scale=0.5),
    "supra": Case("SUPERTUNING", {"sparsity": 0.97, "r": 3}, ["q_proj", "up_proj"]),
}
# what acts outside the linear layers: compared by logits alone
INVOCATION = [11, 12, 13]
EMBEDDINGS = ["embed_tokens", "lm_head", "q_proj"]
MODEL_CASES = {
    "ln": Case("LN_TUNING", {}, ["input_layernorm", "post_attention_layernorm", "norm"], scale=1.0),
    "tokens": Case("TRAINABLE_TOKENS", {"token_indices": [41, 12, 7]}, ["embed_tokens"], scale=1.0),
    "lora-tokens": Case("LORA", {"r": 2, "trainable_token_indices": [41, 12, 7]}, ["v_proj"], scale=0.4),
    "lora-rows": Case(
        "LORA", {"r": 2, "trainable_token_indices": {"embed_tokens": [12, 5], "lm_head": [6]}}, ["v_proj"], scale=0.4
    ),
    "lora-embeddings": Case("LORA", {"r": 3, "lora_alpha": 5, "rank_pattern": {"lm_head": 2}}, EMBEDDINGS, scale=0.4),
    "lora-saved": Case("LORA", {"r": 2, "modules_to_save": ["norm", "lm_head"]}, ["v_proj"], scale=0.5),
    "alora": Case("LORA", {"r": 4, "alora_invocation_tokens": INVOCATION}, scale=0.4),
    "prompt": Case("PROMPT_TUNING", {"num_virtual_tokens": 5}, None, scale=1.0),
    "p-tuning": Case("P_TUNING", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}, None, scale=0.5),
    "cpt": Case("CPT", {"cpt_token_ids": [5, 6, 7]}, None, scale=1.0),
    "multitask": Case(
        "MULTITASK_PROMPT_TUNING",
        {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
        None,
        scale=1.0,
        upload={"task_id": 1},
    ),
    "prefix": Case("PREFIX_TUNING", {"num_virtual_tokens": 5}, None, scale=1.0),
    "prefix-projected": Case(
        "PREFIX_TUNING", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16}, None
    ),
    "cartridge": Case("CARTRIDGE", {"num_virtual_tokens": 4}, None, scale=1.0),
}


@dataclass(frozen=True)
class Answer:
    """What PEFT does: the delta of every module, and the log-probabilities [T, V] of the prompt."""

    deltas: Deltas
    logprobs: Tensor


def tiny_llama(**changes: object) -> nn.Module:
    """Return the base of all folders: hidden size 64, 3 layers, grouped heads, biases everywhere."""
    return BY_NAME["llama3"].build(**changes)


def save_case(model: nn.Module, case: Case, folder: Path, seed: int) -> None:
    """Wrap a copy of the model, give every trained value a random one, and save."""
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(case.peft_type)]
    targets = {} if case.targets is None else {"target_modules": list(case.targets)}
    wrapped = peft.get_peft_model(copy.deepcopy(model), config_class(task_type="CAUSAL_LM", **targets, **case.options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            if "modules_to_save" in name and parameter.dim() == 2:
                # a few rows of a table: more would be a dense change
                parameter[[7, 30, 31]] += torch.randn(3, parameter.shape[1], generator=generator)
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * case.scale)
    if folder.name == "adalora-pruned":
        _prune(wrapped)
    wrapped.save_pretrained(str(folder))


def ask_peft(model: nn.Module, folder: Path, prompt: list[int], *, task_id: int = 0) -> Answer:
    """Load the folder into a copy of the model and take PEFT's own answers."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    kind = loaded.peft_config["default"].peft_type
    has_tasks = kind in ("POLY", "MULTITASK_PROMPT_TUNING")
    arguments = {"task_ids": torch.tensor([task_id])} if has_tasks else {}
    with torch.no_grad():
        # a prompt's own positions come before those of the tokens
        logits = loaded(input_ids=torch.tensor([prompt]), **arguments).logits[0, -len(prompt) :]
        deltas = _deltas(loaded, model, arguments)
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


def _deltas(loaded: nn.Module, model: nn.Module, arguments: dict[str, Tensor]) -> Deltas:
    """Return what the loaded model's linear layers do differently from the model's own."""
    deltas: Deltas = {}
    own: Any = dict(model.named_modules())
    for name, module in loaded.named_modules():
        path = name.removeprefix("base_model.model.")
        if path not in own or not isinstance(own[path], nn.Linear) or path == "lm_head":
            continue
        base = own[path]
        layer: Any = copy.deepcopy(module).double()
        extra = arguments if isinstance(module, BaseTunerLayer) else {}
        inputs = torch.eye(base.in_features, dtype=torch.float64)[None]
        at_zero = torch.zeros(1, 1, base.in_features, dtype=torch.float64)
        begin = layer(at_zero, **extra)[0, 0]
        delta = (layer(inputs, **extra)[0] - begin).T - base.weight.double()
        bias = begin if base.bias is None else begin - base.bias.double()
        has_bias = bool(bias.abs().max() > 1e-9)
        if isinstance(module, BaseTunerLayer) or has_bias:
            deltas[path.removeprefix("model.")] = (delta.float().numpy(), bias.float().numpy() if has_bias else None)
    return deltas
