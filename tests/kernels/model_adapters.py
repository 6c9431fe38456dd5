"""Random adapters that act outside the linear layers: by hand, as tensors and as image bytes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras, GroupExperts, RareSite
from adapter_kernels.gate import Mixture
from adapter_kernels.model_image import EmbedLowrank, HeadSite, KvPrefix, MlpGate, ModelTensors, TokenRows
from adapter_kernels.model_rows import GateRow, ModelShapes
from adapter_kernels.profile import Profile
from adapter_kernels.route import Placement
from adapter_kernels.slab import Slab

HIDDEN, INTERMEDIATE, VOCAB, LAYERS, KV_HEADS, HEAD_DIM = 16, 40, 50, 2, 2, 4
SHAPES = ModelShapes(
    HIDDEN, VOCAB, LAYERS, KV_HEADS, HEAD_DIM, {"input_layernorm": HIDDEN, "q_norm": HEAD_DIM, "norm": HIDDEN}
)
MLP_SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


@dataclass
class Maker:
    """Draws tensors of healthy size from one seed."""

    seed: int
    dtype: torch.dtype = torch.float32
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def token_rows(self, count: int) -> TokenRows:
        idx = torch.randperm(VOCAB, generator=self._generator)[:count].sort().values
        return TokenRows(idx, self.normal(count, HIDDEN))

    def everything(self, *, prompt: int = 0, prefix: int = 0) -> ModelTensors:
        """Every op that an adapter can have beside one another."""
        shape = (LAYERS, prefix, KV_HEADS, HEAD_DIM)
        return ModelTensors(
            norms={(0, "input_layernorm"): self.normal(HIDDEN).float(), (-1, "norm"): self.normal(HIDDEN).float()},
            embed_rows=self.token_rows(20),
            head_rows=self.token_rows(9),
            embed_lowrank=EmbedLowrank(self.normal(VOCAB, 3), self.normal(3, HIDDEN)),
            prompt_embeds=self.normal(prompt, HIDDEN) if prompt else None,
            kv_prefix=KvPrefix(self.normal(*shape), self.normal(*shape)) if prefix else None,
            head=HeadSite(self.normal(2, HIDDEN), self.normal(2, VOCAB), self.normal(VOCAB)),
        )

    def mixture(self, row: GateRow, ranks: tuple[int, ...], sites: tuple[str, ...], *, bias: bool) -> AdapterExtras:
        """Experts of both layers' MLPs behind a shared gate."""
        gates, found = {}, {}
        for layer in range(LAYERS):
            weight, gate_bias = self.normal(len(ranks), HIDDEN).float(), self.normal(len(ranks)).float()
            gates[layer] = mlp_gate(row, weight, gate_bias if bias else None)
            for site in sites:
                out_dim, in_dim = MLP_SHAPES[site]
                a, bt = self.normal(sum(ranks), in_dim) / in_dim**0.5, self.normal(sum(ranks), out_dim)
                experts = GroupExperts(f"layers.{layer}.mlp", ranks, a.to(self.dtype), bt)
                found[layer, site] = RareSite(experts=experts)
        return AdapterExtras(found, ModelTensors(gates=gates))


def mlp_gate(row: GateRow, weight: Tensor, bias: Tensor | None) -> MlpGate:
    """Make the gate that an image's row describes."""
    mixture = Mixture.build((1,) * row.num_experts, row.top_k, row.temperature, 0, row.options)
    return MlpGate(weight, bias, mixture, row.is_ffn_moe)


def place(extras: AdapterExtras | None, position: int) -> Placement:
    """Lay an adapter that has nothing in its slab."""
    return Placement(0, Slab(Profile(()), {}, torch.float32), position, extras)
