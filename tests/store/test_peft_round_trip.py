"""What the store holds acts exactly as PEFT acts on the same folder: every pattern, dtype and partial target.

PEFT is the reference: the effective delta of each module is taken from a model that PEFT loaded the folder into.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from adapters_store.base import BaseDims, read_base_dims
from adapters_store.float_bits import decode
from tests.store.deltas import Deltas, assert_equal_deltas, fused_deltas, stored_deltas
from tests.store.folders import open_store

# PEFT warns about transformers' names and about targets it finds odd: not ours to fix
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    # PEFT 0.21 takes its own lora_bias tensors for broken shards
    pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

BASE = BaseDims(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    tie_word_embeddings=False,
    weights_fingerprint="sha256:" + "1" * 64,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DIMS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One LoraConfig, and how many modules it acts on."""

    num_modules: int
    options: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


CASES = {
    "plain": Case(21, {"target_modules": ALL}),
    "rank 1": Case(21, {"target_modules": ALL, "r": 1, "lora_alpha": 3}),
    "rank 64, above every dimension": Case(21, {"target_modules": ALL, "r": 64}),
    "rslora": Case(21, {"target_modules": ALL, "use_rslora": True, "r": 3, "lora_alpha": 5}),
    "partial targets": Case(6, {"target_modules": ["v_proj", "down_proj"]}),
    "full paths": Case(2, {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]}),
    "excluded": Case(20, {"target_modules": ALL, "exclude_modules": ["layers.1.self_attn.k_proj"]}),
    "some layers": Case(14, {"target_modules": ALL, "layers_to_transform": [0, 2]}),
    "one layer": Case(7, {"target_modules": ALL, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "lora bias": Case(21, {"target_modules": ALL, "lora_bias": True, "lora_alpha": 3}),
    "patterns": Case(
        21,
        {
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {
                "layers.1.self_attn.q_proj": 8,
                "q_proj": 3,
                "mlp.down_proj": 16,
                "layers.0.mlp.up.proj": 1,
            },
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 7, r"layers\.2\.mlp\.gate_proj": 9, "o_proj": 1},
        },
    ),
    "the first pattern wins": Case(
        21,
        {
            "target_modules": ALL,
            "rank_pattern": {"layers.1.self_attn.q_proj": 8, "proj": 5, "q_proj": 3, "self_attn.q_proj": 1},
        },
        ignored=("rank_pattern[proj]", "rank_pattern[self_attn.q_proj]"),
    ),
}


def trained_folder(folder: Path, options: dict[str, Any], dtype: torch.dtype, model: PreTrainedModel) -> PeftModel:
    """Save a PEFT adapter with random A, B and biases and return the model that holds it, read back from the folder."""
    torch.manual_seed(7)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    peft_model.save_pretrained(str(folder))
    fresh = peft_model.unload()
    loaded = PeftModel.from_pretrained(fresh, folder, autocast_adapter_dtype=False)
    assert isinstance(loaded, PeftModel)
    return loaded


def llama() -> PreTrainedModel:
    """Return a tiny random Llama."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**DIMS))


def peft_deltas(model: PeftModel) -> Deltas:
    """Return PEFT's effective delta `[out, in]` and bias of every module, by base-neutral path."""
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            scaling = module.scaling["default"]
            a, b = module.lora_A["default"], module.lora_B["default"]
            assert isinstance(a, torch.nn.Linear) and isinstance(b, torch.nn.Linear)
            delta = (b.weight.double() @ a.weight.double() * scaling).float()
            bias = None if b.bias is None else (b.bias.double() * scaling).float().detach().numpy()
            deltas[name.removeprefix("base_model.model.model.")] = (delta.detach().numpy(), bias)
    return deltas


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_store_acts_as_peft_acts(case: Case, tmp_path: Path) -> None:
    model = trained_folder(tmp_path / "peft", case.options, torch.float32, llama())
    store = open_store(tmp_path / "store", BASE)
    version = store.put_dir("a", tmp_path / "peft")
    image = store.open_image(version.digest)
    assert len(version.report.applied) == case.num_modules
    assert version.report.ignored == case.ignored
    assert_equal_deltas(stored_deltas(image, BASE), peft_deltas(model), rtol=1e-6)
    store.close()


@pytest.mark.parametrize("image_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_file_dtype_goes_into_every_image_dtype(
    file_dtype: torch.dtype, image_dtype: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"target_modules": ALL, "r": 4, "lora_alpha": 3, "lora_bias": True}
    model = trained_folder(tmp_path / "peft", options, file_dtype, llama())
    store = open_store(tmp_path / "store", BASE, image_dtype=image_dtype)
    image = store.open_image(store.put_dir("a", tmp_path / "peft").digest)
    assert image.dtype == image_dtype
    # two rounded factors per product
    rtol = {"float32": 1e-6, "bfloat16": 2 * 2.0**-8, "float16": 2 * 2.0**-11}[image_dtype]
    assert_equal_deltas(stored_deltas(image, BASE), peft_deltas(model), rtol=rtol)
    store.close()


def test_an_image_of_the_files_own_dtype_loses_nothing_in_a(tmp_path: Path) -> None:
    model = trained_folder(tmp_path / "peft", {"target_modules": ["q_proj"], "r": 4}, torch.bfloat16, llama())
    store = open_store(tmp_path / "store", BASE, image_dtype="bfloat16")
    image = store.open_image(store.put_dir("a", tmp_path / "peft").digest)
    wanted = dict(model.named_modules())["base_model.model.model.layers.0.self_attn.q_proj"]
    assert isinstance(wanted, LoraLinear)
    a = wanted.lora_A["default"]
    assert isinstance(a, torch.nn.Linear)
    entry = image.entries[0]
    stored = decode(image.data[entry.a_offset : entry.a_offset + 4 * 32 * 2], "BF16").reshape(4, 32)
    np.testing.assert_array_equal(stored, a.weight.detach().float().numpy())
    store.close()


def test_fused_phi3_projections_are_split(tmp_path: Path) -> None:
    torch.manual_seed(3)
    phi = Phi3ForCausalLM(Phi3Config(**DIMS))
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    options: dict[str, Any] = {"target_modules": targets, "lora_bias": True, "lora_alpha": 3}
    model = trained_folder(tmp_path / "peft", options, torch.float32, phi)
    store = open_store(tmp_path / "store", BASE)
    version = store.put_dir("a", tmp_path / "peft")
    assert len(version.report.applied) == 21
    stored = stored_deltas(store.open_image(version.digest), BASE)
    assert_equal_deltas(fused_deltas(stored), peft_deltas(model), rtol=1e-6)
    store.close()


@pytest.mark.shared_data
@pytest.mark.parametrize("adapter", ["ts656k-exclaim", "ts656k-zog", "ts656k-qa", "ts656k-qa1", "s260k-exclaim"])
def test_real_adapters_are_accepted_and_act_as_peft_acts(adapter: str, shared_data: Path, tmp_path: Path) -> None:
    model_dir = shared_data / "models" / ("stories260k-hf" if adapter.startswith("s260k") else "tinystories-656k")
    base = read_base_dims(model_dir)
    store = open_store(tmp_path / "store", base)
    version = store.put_dir(adapter, shared_data / "adapters" / adapter, trusted=True)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), shared_data / "adapters" / adapter)
    assert isinstance(model, PeftModel)
    assert version.report.missing == () and version.report.ignored == ()
    assert_equal_deltas(stored_deltas(store.open_image(version.digest), base), peft_deltas(model), rtol=1e-6)
    store.close()
