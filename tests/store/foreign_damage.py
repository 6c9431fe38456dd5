"""Ways to spoil a foreign upload, each with the refusal that it must meet.

Owns the damages; `foreign_models.py` makes what is damaged. Invariant: each changes one thing of a sound upload.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def config_key(key: str, value: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return spoil


def pickled(change: Callable[[dict[str, Any]], object], name: str = "adapter_model.bin") -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=False)
        change(state)
        torch.save(state, folder / name)

    return spoil


def drop(part: str) -> Callable[[State], object]:
    return lambda state: state.pop(next(name for name in state if part in name))


def narrow(part: str) -> Callable[[State], object]:
    def change(state: State) -> None:
        name = next(name for name in state if part in name)
        state[name] = state[name][:1]

    return change


def fill(part: str, value: float) -> Callable[[State], object]:
    def change(state: State) -> None:
        for name in state:
            if part in name:
                state[name] = torch.full_like(state[name], value)

    return change


def no_expert_weights(folder: Path) -> None:
    (folder / "experts" / "law" / "adapter_model.safetensors").unlink()


def expert_key(key: str, value: object) -> Callable[[Path], object]:
    return lambda folder: config_key(key, value)(folder / "experts" / "law")


def expert_tensors(change: Callable[[State], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "experts" / "law" / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return spoil


def model(change: Callable[[State], object], name: str = "model.safetensors") -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, metadata={"format": "pt"})

    return spoil


def add_to(name: str, seed: int = 1) -> Callable[[State], object]:
    def change(state: State) -> None:
        state[name] = state[name] + torch.randn(state[name].shape, generator=torch.Generator().manual_seed(seed))

    return change


def no_last_layer(state: State) -> None:
    for name in [name for name in state if "layers.2." in name]:
        del state[name]


def no_router_bias(state: dict[str, State]) -> None:
    del state["state_dict"]["llm_model.base_model.model.model.layers.1.mlp.router.bias"]


def with_a_stranger(state: State) -> None:
    state["model.x.weight"] = torch.ones(2)


def repeat_a_place(state: State) -> None:
    name = next(name for name in state if name.endswith("indices"))
    state[name][0] = state[name][1]


def whole_head(state: dict[str, dict[str, Tensor]]) -> None:
    state["abs"]["classifier.weight"] = torch.ones(2, 2)


def long_step(state: dict[str, dict[str, dict[str, list[int]]]]) -> None:
    state["diffs"]["lm_head.weight"]["index_steps"][3] += 1 << 20


def both_signs(state: State) -> None:
    name = next(name for name in state if name.endswith(".positive"))
    state[name.replace("positive", "negative")][0] = state[name][0]


SPOILED: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("mixlora", config_key("routing_strategy", "mixlora-dynamic"), "unsupported_adapter", "routing_strategy"),
    ("mixlora", config_key("use_dora", True), "unsupported_adapter", "use_dora"),
    ("mixlora", config_key("jitter_noise", 0.1), "unsupported_adapter", "jitter_noise"),
    ("mixlora", config_key("act_fn", "relu"), "unsupported_adapter", "the base's MLP has 'silu'"),
    ("mixlora", config_key("sparkle", 1), "unknown_field", "sparkle"),
    ("mixlora", config_key("top_k", 4), "invalid_gate", "top 4 experts"),
    ("mixlora", config_key("num_experts", 4), "corrupt_adapter", "experts.3"),
    ("mixlora", config_key("r", 3), "unsupported_adapter", "has shape"),
    ("mixlora", config_key("target_modules", ["q_proj", "dense"]), "no_target", "dense"),
    ("mixlora", pickled(drop("moe_gate")), "corrupt_adapter", "lacks"),
    ("mixlora", pickled(drop("experts.2.lora_B")), "corrupt_adapter", "lacks"),
    ("mixlora", pickled(narrow("experts.0.lora_A")), "unsupported_adapter", "has shape"),
    ("mixlora", pickled(with_a_stranger), "unsupported_adapter", "model.x"),
    ("mixlora", pickled(fill("experts.1.lora_A", float("nan"))), "non_finite", "NaN"),
    ("mola", pickled(fill("lora_B", 0.0)), "adapter_no_effect", "zero"),
    ("mola", config_key("peft_type", "LORAMOE"), "unsupported_adapter", "routing_strategy"),
    ("llava-mole", pickled(no_router_bias, "llava_mole_r2.pt"), "corrupt_adapter", "lacks"),
    ("arrow", no_expert_weights, "corrupt_adapter", "adapter_model.safetensors"),
    ("arrow", expert_key("r", 3), "unsupported_adapter", "has shape"),
    ("arrow", expert_key("use_dora", True), "unsupported_adapter", "plain LoRA"),
    ("arrow", expert_key("target_modules", ["q_proj"]), "unsupported_adapter", "does not target"),
    ("arrow", expert_tensors(fill("layers.1.self_attn.q_proj.lora_B", 0.0)), "adapter_no_effect", "no direction"),
    ("arrow", expert_tensors(fill("layers.1.mlp.up_proj.lora_A", float("nan"))), "non_finite", "NaN"),
    ("arrow", expert_tensors(no_last_layer), "missing_layers", "layers.2"),
    ("spiel", config_key("modules_to_save", ["lm_head"]), "unsupported_adapter", "modules_to_save"),
    ("spiel", pickled(repeat_a_place), "invalid_index", "twice"),
    ("spiel", pickled(fill("indices", 1 << 30)), "invalid_index", "outside"),
    ("spiel", pickled(drop("indices")), "corrupt_adapter", "lacks"),
    ("spiel", pickled(fill("values", 0.0)), "adapter_no_effect", "changes nothing"),
    ("s2ft-slices", pickled(drop("down_proj.idx")), "corrupt_adapter", "lacks"),
    ("s2ft-slices", pickled(fill("idx", 1)), "invalid_index", "increase"),
    ("s2ft-slices", pickled(narrow("up_proj.D")), "unsupported_adapter", "has shape"),
    ("s2ft-slices", pickled(fill(".D", 0.0)), "adapter_no_effect", "changes nothing"),
    ("s2ft-slices", pickled(fill("o_proj.D", float("nan"))), "non_finite", "NaN"),
    ("s2ft-slices", pickled(with_a_stranger), "unsupported_adapter", "x.weight"),
    ("s2ft-slices", config_key("alpha", 2), "unknown_field", "alpha"),
    ("lt-sft", pickled(whole_head, "pytorch_diff.bin"), "unsupported_adapter", "heads of classifiers"),
    ("lt-sft", pickled(long_step, "pytorch_diff.bin"), "corrupt_adapter", "beyond"),
    ("compeft", model(both_signs, "compressed.safetensors"), "invalid_index", "twice"),
    ("compeft", model(drop(".shape"), "compressed.safetensors"), "corrupt_adapter", "lacks"),
    ("compeft-lora", config_key("r", 5), "unsupported_adapter", "another shape"),
    ("hf-model", model(add_to("model.layers.0.mlp.gate_proj.weight")), "unsupported_adapter", "100% of its values"),
    ("hf-model", model(add_to("model.embed_tokens.weight")), "limit_exceeded", "96 rows"),
    ("hf-model", model(drop("layers.1.mlp.up_proj.weight")), "corrupt_adapter", "lacks"),
    ("hf-model", model(with_a_stranger), "unsupported_adapter", "model.x"),
    ("hf-model", model(narrow("layers.1.mlp.up_proj.weight")), "wrong_base", "has shape"),
    ("hf-model", model(fill("layers.2.mlp.up_proj.weight", float("inf"))), "unsupported_adapter|non_finite", ""),
]  # fmt: skip
