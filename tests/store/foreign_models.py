"""Foreign adapters of a tiny transformers model, saved as their own trainers save them, and the models that they make.

Owns the oracles: each maker writes a folder and returns a copy of the model that runs by the method's published code,
in torch. Invariant: shares no code with the converters under test.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from adapters_store.strict_json import Json
from tests.store.foreign_layers import (
    ALPHA,
    NUM_EXPERTS,
    RANK,
    GatedLinear,
    LoraLinear,
    MixLoraMlp,
    MoleMlp,
    Pairs,
    RankMixed,
)

ATTENTION = ("q_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Made:
    """A model that runs by the method's own code, and what its upload declares."""

    model: nn.Module
    format: str = "auto"
    options: dict[str, Json] = field(default_factory=dict)


class Draw:
    """Random tensors of one adapter."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def places(self, size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)[:count]

    def pair(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return self.tensor(RANK, linear.in_features), self.tensor(linear.out_features, RANK)

    def pairs(self, linear: nn.Linear) -> Pairs:
        return [self.pair(linear) for _ in range(NUM_EXPERTS)]


def layers_of(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return [*model.model.layers]


def moe_config(kind: str, targets: tuple[str, ...], **more: object) -> dict[str, object]:
    """Return MoE-PEFT's config as its `export` writes it."""
    config: dict[str, object] = {
        "bias": "none",
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "x",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": [*targets],
        "num_experts": NUM_EXPERTS,
    }
    return config | more


def write_pickled(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "adapter_model.bin")


def mixlora(base: LlamaForCausalLM, folder: Path, *, is_legacy: bool = False) -> Made:
    """MixLoRA as MoE-PEFT saves it, or as its first versions did; experts have a rank's scaling of their own."""
    model, draw, tensors = copy.deepcopy(base), Draw(1), {}
    old = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    for index, layer in enumerate(layers_of(model)):
        stem = f"mixlora.layers.{index}"
        gate, experts = draw.tensor(NUM_EXPERTS, 64), {name: draw.pairs(getattr(layer.mlp, name)) for name in MLP}
        tensors[f"{stem}.gate.weight" if is_legacy else f"{stem}.mlp.moe_gate.weight"] = gate
        for name, pairs in experts.items():
            for expert, (a, b) in enumerate(pairs):
                new = f"{stem}.mlp.{name}.experts.{expert}"
                own = f"{stem}.experts.{expert}.{old[name]}" if is_legacy else new
                tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            a, b = draw.pair(linear)
            own = f"{stem}.self_attn.{name}"
            tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
            setattr(layer.self_attn, name, LoraLinear(linear, a, b, ALPHA / RANK))
        setattr(layer, "mlp", MixLoraMlp(layer.mlp, gate, experts, 2, 8 / RANK**0.5))  # noqa: B010
    own_targets = (*ATTENTION, *(old[name] if is_legacy else name for name in MLP))
    expert_lora = {"r": RANK, "lora_alpha": 8, "use_rslora": True, "bias": "none", "lora_dropout": 0.1}
    strategy = "mixtral" if is_legacy else "mixlora"
    more = {"routing_strategy": strategy, "top_k": 2, "act_fn": "silu", "expert_lora": expert_lora}
    write_pickled(folder, moe_config("MIXLORA", own_targets, **more), tensors)
    return Made(model)


def plugged(base: LlamaForCausalLM, folder: Path, kind: str) -> Made:
    """MoLA on attention and MLP, or LoRAMoE, which gates the MLP alone."""
    model, draw, name = copy.deepcopy(base), Draw(2), kind.lower()
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers_of(model)):
        for part, targets in (("self_attn", ATTENTION), ("mlp", MLP)):
            owner = getattr(layer, part)
            for target in targets:
                stem, linear = f"{name}.layers.{index}.{part}.{target}", getattr(owner, target)
                if kind == "LORAMOE" and part == "self_attn":
                    a, b = draw.pair(linear)
                    tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                    setattr(owner, target, LoraLinear(linear, a, b, ALPHA / RANK))
                    continue
                gate, pairs = draw.tensor(NUM_EXPERTS, linear.in_features), draw.pairs(linear)
                tensors[f"{stem}.moe_gate.weight"] = gate
                for expert, (a, b) in enumerate(pairs):
                    own = f"{stem}.experts.{expert}"
                    tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
                setattr(owner, target, GatedLinear(linear, gate, pairs, 2 if kind == "MOLA" else None))
    more: dict[str, object] = {"routing_strategy": name} | ({"top_k": 2} if kind == "MOLA" else {})
    write_pickled(folder, moe_config(kind, (*ATTENTION, *MLP), **more), tensors)
    return Made(model)


def llava_mole(base: LlamaForCausalLM, folder: Path, *, is_dense: bool) -> Made:
    """The released `.pt`: a `state_dict` with the vision side beside the language model."""
    model, draw = copy.deepcopy(base), Draw(3)
    tensors = {"vit.vision_tower.x": draw.tensor(2), "in_adaptor.projector.0.weight": draw.tensor(3, 3)}
    parts = {"gate_proj": "moe_gate", "up_proj": "moe_up", "down_proj": "moe_down"}
    for index, layer in enumerate(layers_of(model)):
        stem = f"llm_model.base_model.model.model.layers.{index}"
        router = nn.Linear(64, NUM_EXPERTS)
        router.weight.data, router.bias.data = draw.tensor(NUM_EXPERTS, 64), draw.tensor(NUM_EXPERTS)
        tensors |= {f"{stem}.mlp.router.weight": router.weight.data, f"{stem}.mlp.router.bias": router.bias.data}
        experts = {name: draw.pairs(getattr(layer.mlp, name)) for name in MLP}
        for name, pairs in experts.items():
            for expert, (a, b) in enumerate(pairs):
                own = f"{stem}.mlp.{parts[name]}.{expert}"
                tensors |= {f"{own}.lora_A": a, f"{own}.lora_B": b}
        setattr(layer, "mlp", MoleMlp(layer.mlp, router, experts, is_dense=is_dense))  # noqa: B010
        linear = layer.self_attn.q_proj
        a, b = draw.pair(linear)
        own = f"{stem}.self_attn.q_proj"
        tensors |= {f"{own}.lora_A.default.weight": a, f"{own}.lora_B.default.weight": b}
        setattr(layer.self_attn, "q_proj", LoraLinear(linear, a, b, ALPHA / RANK))  # noqa: B010
    folder.mkdir(parents=True)
    torch.save({"state_dict": tensors, "optimizer": {"state": [{}]}, "epoch": 1}, folder / "llava_mole_r2.pt")
    return Made(model, "llava_mole", {"alpha": ALPHA, "routing": "dense" if is_dense else "top1"})


def arrow(base: LlamaForCausalLM, folder: Path, *, has_general: bool = False) -> Made:
    """PEFT's own Arrow over LoRAs that PEFT saved; each has one large direction, so PEFT's fifteen steps reach it."""
    names = ["cooking", "law", "poetry", *(["everything"] if has_general else [])]
    for seed, name in enumerate(names):
        wrapped = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=3, target_modules=["q_proj", "up_proj"])
        )
        draw = Draw(30 + seed)
        with torch.no_grad():
            for path, values in wrapped.named_parameters():
                if "lora_" in path:
                    values.copy_(draw.tensor(*values.shape))
                    values[(slice(1, None),) if "lora_A" in path else (slice(None), slice(1, None))] *= 0.2
        wrapped.save_pretrained(str(folder / "experts" / name))
    config = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=has_general, rng_seed=5)
    paths = [str(folder / "experts" / name) for name in names]
    model = create_arrow_model(copy.deepcopy(base), paths[:3], config, paths[3:] or None)
    options: dict[str, Json] = {"top_k": 2, "temperature": 0.7}
    return Made(model, "arrow", options | ({"general": ["everything"]} if has_general else {}))


def mttl(base: LlamaForCausalLM, folder: Path, *, is_library: bool) -> Made:
    """mttl's `.ckpt`: one LoRA, whose alpha its own config says, or three behind Arrow."""
    model, draw = copy.deepcopy(base), Draw(4)
    files: list[dict[str, Tensor]] = [{} for _ in range(NUM_EXPERTS if is_library else 1)]
    for index, layer in enumerate(layers_of(model)):
        for name in ("k_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            pairs = [(draw.tensor(linear.in_features, RANK), draw.tensor(RANK, linear.out_features)) for _ in files]
            for file, (a, b) in zip(files, pairs, strict=True):
                stem = f"model.layers.{index}.self_attn.{name}"
                file |= {f"{stem}.lora_a": a, f"{stem}.lora_b": b}
            a, b = pairs[0]
            mixed: nn.Module = LoraLinear(linear, a.T, b.T, ALPHA / RANK)
            setattr(layer.self_attn, name, RankMixed(linear, pairs, 2, 0.5) if is_library else mixed)
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        info = {"expert_name": f"task{number}", "expert_config": {"lora_alpha": float(ALPHA), "lora_rank": RANK}}
        torch.save({"expert_info": info, "expert_weights": file}, folder / f"task{number}.ckpt")
    library: dict[str, Json] = {"routing": "arrow", "top_k": 2, "temperature": 0.5, "mix": "rank"}
    return Made(model, options=library if is_library else {})


def spiel(base: LlamaForCausalLM, folder: Path) -> Made:
    """SpIEL's fork of PEFT: flat row-major places and what is added there."""
    model, draw = copy.deepcopy(base), Draw(5)
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers_of(model)):
        for part, name in (("self_attn", "v_proj"), ("mlp", "down_proj")):
            weight = getattr(getattr(layer, part), name).weight
            count = weight.numel() // 20
            places, values = draw.places(weight.numel(), count), draw.tensor(count)
            stem = f"base_model.model.model.layers.{index}.{part}.{name}.sft_delta"
            tensors |= {f"{stem}.indices": places.to(torch.int32), f"{stem}.values": values}
            weight.data.view(-1)[places] += values
    config = {"peft_type": "SFT", "task_type": "CAUSAL_LM", "target_modules": ["v_proj", "down_proj"], "density": 0.05}
    write_pickled(folder, config, tensors)
    return Made(model)


def s2ft_slices(base: LlamaForCausalLM, folder: Path) -> Made:
    """Our trainer's S2FT file: channels of every site that S2FT trains, added to whole weights."""
    model, draw = copy.deepcopy(base), Draw(15)
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers_of(model)):
        for part, name in (("self_attn", "v_proj"), ("self_attn", "o_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")):
            weight = getattr(getattr(layer, part), name).weight.data
            is_columns = name in ("o_proj", "down_proj")
            idx = draw.places(weight.shape[1 if is_columns else 0], 4 + index).sort().values
            values = draw.tensor(len(idx), weight.shape[0 if is_columns else 1])
            if is_columns:
                weight[:, idx] += values.T
            else:
                weight[idx] += values
            stem = f"layers.{index}.{part}.{name}"
            tensors |= {f"{stem}.idx": idx.to(torch.int32), f"{stem}.D": values}
    write_pickled(folder, {"peft_type": "S2FT", "selection": "random"}, tensors)
    return Made(model)


def lt_sft(base: LlamaForCausalLM, folder: Path) -> Made:
    """LT-SFT's encoding by its own published loop, over weights, a norm, a bias and the vocabulary."""
    model, draw, diffs = copy.deepcopy(base), Draw(6), {}
    counts = {
        "model.layers.0.self_attn.q_proj.weight": 99,
        "model.layers.1.mlp.up_proj.weight": 150,
        "model.layers.2.self_attn.o_proj.weight": 3,
        "model.layers.1.self_attn.k_proj.bias": 4,
        "model.layers.1.input_layernorm.weight": 30,
        "model.norm.weight": 9,
        "model.embed_tokens.weight": 20,
        "lm_head.weight": 25,
    }
    for name, parameter in model.named_parameters():
        if name in counts:
            places, values = draw.places(parameter.numel(), counts[name]), draw.tensor(counts[name])
            dense = torch.zeros(parameter.numel())
            dense[places] = values
            diffs[name] = _encode(dense.reshape(parameter.shape).to_sparse().coalesce())
            parameter.data += dense.reshape(parameter.shape)
    folder.mkdir(parents=True)
    torch.save({"diffs": diffs, "abs": {}}, folder / "pytorch_diff.bin")
    return Made(model)


def _encode(tensor: Tensor) -> dict[str, object]:
    """Encode as composable-sft does: steps between places counted down the columns."""
    multipliers = np.cumprod([1, *tensor.size()[:-1]], dtype=np.int64)
    places = np.matmul(multipliers, np.array(tensor.indices(), dtype=np.int64))
    order = sorted(range(len(places)), key=lambda index: places[index])
    places = places[order]
    steps = [places[0], *(places[1:] - places[:-1]).tolist()]
    return {"size": tensor.size(), "index_steps": steps, "values": tensor.values()[order]}


def compeft(base: LlamaForCausalLM, folder: Path, *, is_lora: bool) -> Made:
    """Ternary signs of weights, or of a LoRA's tensors, A with the values that it began at."""
    model, draw, tensors = copy.deepcopy(base), Draw(7), {}

    def ternary(name: str, shape: tuple[int, ...], share: float) -> Tensor:
        size = int(np.prod(shape))
        places, scale = draw.places(size, int(size * share)), draw.tensor(1).abs() + 0.05
        half = len(places) // 2
        parts = {"positive": places[:half], "negative": places[half:].to(torch.int32), "scale": scale}
        tensors.update({f"{name}.{part}": values for part, values in parts.items()})
        tensors[f"{name}.shape"] = torch.tensor(shape)
        dense = torch.zeros(size)
        dense[places[:half]], dense[places[half:]] = scale, -scale
        return dense.reshape(shape)

    for index, layer in enumerate(layers_of(model)):
        linear = layer.mlp.gate_proj
        if is_lora:
            stem = f"base_model.model.model.layers.{index}.mlp.gate_proj"
            a, b = (
                ternary(f"{stem}.lora_{kind}.weight", shape, 0.5)
                for kind, shape in (("A", (RANK, 64)), ("B", (88, RANK)))
            )
            init = draw.tensor(RANK, 64)
            tensors[f"{stem}.lora_A.weight.init"] = init
            setattr(layer.mlp, "gate_proj", LoraLinear(linear, a + init, b, ALPHA / RANK))  # noqa: B010
        else:
            linear.weight.data += ternary(f"model.layers.{index}.mlp.gate_proj.weight", (88, 64), 0.08)
    folder.mkdir(parents=True)
    if is_lora:
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["gate_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "compressed.safetensors")
    return Made(model, "compeft")


def hf_model(base: LlamaForCausalLM, folder: Path) -> Made:
    """A fine-tuned model with one change of each kind that a difference may be."""
    model, draw = copy.deepcopy(base), Draw(8)
    first, second, third = layers_of(model)
    with torch.no_grad():
        first.self_attn.q_proj.weight[[3, 40]] += draw.tensor(2, 64)
        first.mlp.down_proj.weight.data[:, [5, 6, 80]] += draw.tensor(64, 3)
        second.mlp.up_proj.weight.view(-1)[draw.places(88 * 64, 300)] += 0.5
        second.self_attn.v_proj.weight += draw.tensor(32, 3) @ draw.tensor(3, 64)
        third.self_attn.o_proj.weight += draw.tensor(64, 1) @ draw.tensor(1, 64)
        third.self_attn.o_proj.bias.data.add_(draw.tensor(64))
        third.post_attention_layernorm.weight.data.add_(draw.tensor(64))
        model.model.norm.weight += draw.tensor(64)
        model.model.embed_tokens.weight[[4, 17]] += draw.tensor(2, 64)
        model.lm_head.weight[[9, 30, 31]] += draw.tensor(3, 64)
    model.save_pretrained(folder)
    return Made(model, "hf_model")


MAKERS: dict[str, Callable[[LlamaForCausalLM, Path], Made]] = {
    "mixlora": mixlora,
    "mixlora-legacy": lambda base, folder: mixlora(base, folder, is_legacy=True),
    "mola": lambda base, folder: plugged(base, folder, "MOLA"),
    "loramoe": lambda base, folder: plugged(base, folder, "LORAMOE"),
    "llava-mole": lambda base, folder: llava_mole(base, folder, is_dense=False),
    "llava-mole-dense": lambda base, folder: llava_mole(base, folder, is_dense=True),
    "arrow": arrow,
    "arrow-gks": lambda base, folder: arrow(base, folder, has_general=True),
    "mttl": lambda base, folder: mttl(base, folder, is_library=False),
    "mttl-library": lambda base, folder: mttl(base, folder, is_library=True),
    "spiel": spiel,
    "s2ft-slices": s2ft_slices,
    "lt-sft": lt_sft,
    "compeft": lambda base, folder: compeft(base, folder, is_lora=False),
    "compeft-lora": lambda base, folder: compeft(base, folder, is_lora=True),
    "hf-model": hf_model,
}
