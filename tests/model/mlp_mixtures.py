"""MixLoRA and LLaVA-MoLE as published, run by transformers with a loop in place of each MLP, and as ours hold them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from adapter_kernels.extras import AdapterExtras, GroupExperts, RareSite
from adapter_kernels.gate_options import GateOptions
from adapter_kernels.model_image import ModelTensors
from adapter_kernels.model_rows import GateRow
from serve.model.spec import ModelSpec
from tests.kernels.model_adapters import mlp_gate
from tests.model.tiny_models import reference_logits

SCALING = 0.5
NUM_EXPERTS = 4
SITES = ("gate_proj", "up_proj", "down_proj")
# softmax over all, top 2, renormalised; the best alone, weighed 1
MIXLORA = GateRow(0, NUM_EXPERTS, 2, 1.0, 0, options=GateOptions(weight="softmax_all_renorm"), is_ffn_moe=True)
LLAVA_MOLE = GateRow(0, NUM_EXPERTS, 1, 1.0, 0, options=GateOptions(weight="one"))


@dataclass
class Experts:
    """One layer's factors as published: router [E, H] and bias [E], A [r, in] and B [out, r] per site and expert."""

    router: Tensor
    bias: Tensor
    a: dict[str, list[Tensor]]
    b: dict[str, list[Tensor]]

    def delta(self, site: str, expert: int, x: Tensor) -> Tensor:
        return SCALING * (self.b[site][expert] @ (self.a[site][expert] @ x))


def make_experts(spec: ModelSpec, seed: int) -> list[Experts]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    layers = []
    for _ in range(spec.dims.num_hidden_layers):
        shapes = {site: spec.dims.site_shape(site) for site in SITES}
        a = {site: [normal(2 + e % 2, shape[1]) * 0.4 for e in range(NUM_EXPERTS)] for site, shape in shapes.items()}
        b = {site: [normal(shape[0], 2 + e % 2) for e in range(NUM_EXPERTS)] for site, shape in shapes.items()}
        layers.append(Experts(normal(NUM_EXPERTS, spec.dims.hidden_size), normal(NUM_EXPERTS), a, b))
    return layers


def mixlora(mlp: LlamaMLP, experts: Experts, x: Tensor) -> Tensor:
    """Each expert a whole MLP, base biases and all; two of them mixed at its end."""
    shares = torch.softmax(experts.router @ x, 0).topk(2)
    out = torch.zeros(x.shape[0])
    for share, expert in zip(shares.values / shares.values.sum(), shares.indices.tolist(), strict=True):
        gated = mlp.act_fn(mlp.gate_proj(x) + experts.delta("gate_proj", expert, x))
        own = gated * (mlp.up_proj(x) + experts.delta("up_proj", expert, x))
        out = out + share * (mlp.down_proj(own) + experts.delta("down_proj", expert, own))
    return out


def llava_mole(mlp: LlamaMLP, experts: Experts, x: Tensor) -> Tensor:
    """One expert for all three projections, chosen by the MLP's input."""
    expert = int((experts.router @ x + experts.bias).argmax())
    gated = mlp.act_fn(mlp.gate_proj(x) + experts.delta("gate_proj", expert, x))
    own = gated * (mlp.up_proj(x) + experts.delta("up_proj", expert, x))
    projected: Tensor = mlp.down_proj(own)
    return projected + experts.delta("down_proj", expert, own)


Forward = Callable[[LlamaMLP, Experts, Tensor], Tensor]


def source_logits(model: torch.nn.Module, layers: list[Experts], forward: Forward, ids: list[int]) -> Tensor:
    """Run transformers with every MLP replaced by the loop."""
    hooks = []
    for index, experts in enumerate(layers):
        mlp = model.get_submodule(f"model.layers.{index}.mlp")

        def run(module: LlamaMLP, inputs: tuple[Tensor], _: Tensor, *, experts: Experts = experts) -> Tensor:
            return torch.stack([forward(module, experts, x) for x in inputs[0][0]])[None]

        hooks.append(mlp.register_forward_hook(run))
    try:
        return reference_logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


def extras_of(layers: list[Experts], row: GateRow, *, has_bias: bool) -> AdapterExtras:
    gates, sites = {}, {}
    for index, experts in enumerate(layers):
        bias = experts.bias if has_bias else None
        gates[index] = mlp_gate(row, experts.router, bias)
        for site in SITES:
            ranks = tuple(a.shape[0] for a in experts.a[site])
            bt = torch.cat([SCALING * b.T for b in experts.b[site]])
            own = GroupExperts(f"layers.{index}.mlp", ranks, torch.cat(experts.a[site]), bt)
            sites[index, site] = RareSite(experts=own)
    return AdapterExtras(sites, ModelTensors(gates=gates))
