"""PEFT's adapters outside the linear layers, on the tiny models: PEFT's own logits, and the tensors as ours hold them.

Owns the way from PEFT's modules to `ModelTensors`, independent of the store's converter.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import peft
import torch
from torch import Tensor

from adapter_kernels.model_image import EmbedLowrank, HeadSite, KvPrefix, ModelTensors, TokenRows
from serve.model.families import QkNorm
from serve.model.spec import ModelSpec

NUM_VIRTUAL = 11
TOKEN_INDICES = [3, 4, 17, 40, 77, 95]
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
)


@dataclass(frozen=True)
class PeftCase:
    """An adapter, and the logits [T, V] that PEFT's own model gives for a prompt."""

    name: str
    tensors: ModelTensors
    logits: Tensor


def peft_cases(model: torch.nn.Module, spec: ModelSpec, ids: list[int]) -> Iterator[PeftCase]:
    """Wrap copies of the model with every kind that acts outside the linear layers, as far as PEFT lets it."""
    yield from (_norms(model, spec, ids), _embed_lora(model, ids), _tokens(model, spec, "embed_tokens", ids))
    if not spec.dims.tie_word_embeddings:
        yield from (_tokens(model, spec, "lm_head", ids), _head_lora(model, ids))
    yield from (_prompt(model, spec, ids), _prefix(model, spec, ids))


def _wrap(model: torch.nn.Module, config: peft.PeftConfig, trained: str) -> torch.nn.Module:
    wrapped: torch.nn.Module = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if trained in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.3 * noise if "ln_tuning" in name else 0.6 * noise)
    return wrapped.eval()


def _logits(wrapped: torch.nn.Module, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = wrapped(input_ids=torch.tensor([ids])).logits
    return logits[0, -len(ids) :].float()


def _norms(model: torch.nn.Module, spec: ModelSpec, ids: list[int]) -> PeftCase:
    # a norm over all heads at once cannot be replaced
    names = _NORMS[:-2] if spec.qk_norm is QkNorm.FULL else _NORMS
    wrapped = _wrap(model, peft.LNTuningConfig(target_modules=[*names, "norm"], task_type="CAUSAL_LM"), "ln_tuning")
    norms = {}
    for path, module in wrapped.named_modules():
        if hasattr(module, "ln_tuning_layers"):
            place = path.split(".layers.")
            layer = int(place[1].split(".")[0]) if len(place) > 1 else -1
            norms[layer, path.rsplit(".", 1)[1]] = module.ln_tuning_layers["default"].weight.detach().float()
    assert (-1, "norm") in norms and len(norms) > 2 * spec.dims.num_hidden_layers
    return PeftCase("norms", ModelTensors(norms=norms), _logits(wrapped, ids))


def _embed_lora(model: torch.nn.Module, ids: list[int]) -> PeftCase:
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    wrapped = _wrap(model, config, "lora_embedding")
    layer = next(module for path, module in wrapped.named_modules() if path.endswith("embed_tokens"))
    a, b = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    lowrank = EmbedLowrank(a.T.contiguous(), (b * layer.scaling["default"]).T.contiguous())
    return PeftCase("embed lora", ModelTensors(embed_lowrank=lowrank), _logits(wrapped, ids))


def _head_lora(model: torch.nn.Module, ids: list[int]) -> PeftCase:
    config = peft.LoraConfig(r=3, lora_alpha=2, lora_bias=True, target_modules=["lm_head"], task_type="CAUSAL_LM")
    wrapped = _wrap(model, config, "lora_")
    layer = next(module for path, module in wrapped.named_modules() if path.endswith("lm_head"))
    up, scaling = layer.lora_B["default"], layer.scaling["default"]
    head = HeadSite(
        layer.lora_A["default"].weight.detach(),
        (up.weight.detach() * scaling).T.contiguous(),
        up.bias.detach() * scaling,
    )
    return PeftCase("head lora", ModelTensors(head=head), _logits(wrapped, ids))


def _tokens(model: torch.nn.Module, spec: ModelSpec, target: str, ids: list[int]) -> PeftCase:
    """Trained rows; of a tied base PEFT changes table and head alike."""
    config = peft.TrainableTokensConfig(target_modules=[target], token_indices=TOKEN_INDICES, task_type="CAUSAL_LM")
    wrapped = _wrap(model, config, "trainable_tokens_delta")
    layer = next(module for path, module in wrapped.named_modules() if path.endswith(target))
    rows = TokenRows(torch.tensor(TOKEN_INDICES), layer.trainable_tokens_delta["default"].detach())
    is_tied = spec.dims.tie_word_embeddings
    tensors = ModelTensors(
        embed_rows=rows if is_tied or target == "embed_tokens" else None,
        head_rows=rows if is_tied or target == "lm_head" else None,
    )
    return PeftCase(f"rows of {target}", tensors, _logits(wrapped, ids))


def _prompt(model: torch.nn.Module, spec: ModelSpec, ids: list[int]) -> PeftCase:
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, token_dim=spec.dims.hidden_size, num_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    wrapped = _wrap(model, config, "prompt_encoder")
    prompt = wrapped.get_parameter("prompt_encoder.default.embedding.weight").detach()
    return PeftCase("prompt", ModelTensors(prompt_embeds=prompt), _logits(wrapped, ids))


def _prefix(model: torch.nn.Module, spec: ModelSpec, ids: list[int]) -> PeftCase:
    dims = spec.dims
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=NUM_VIRTUAL,
        num_layers=dims.num_hidden_layers,
        num_attention_heads=dims.num_key_value_heads,
        token_dim=dims.num_key_value_heads * dims.head_dim,
    )
    wrapped = _wrap(model, config, "prompt_encoder")
    stored = wrapped.get_parameter("prompt_encoder.default.embedding.weight").detach()
    pairs = stored.view(NUM_VIRTUAL, dims.num_hidden_layers, 2, dims.num_key_value_heads, dims.head_dim)
    prefix = KvPrefix(*(pairs[:, :, part].transpose(0, 1).contiguous() for part in range(2)))
    return PeftCase("prefix", ModelTensors(kv_prefix=prefix), _logits(wrapped, ids))
