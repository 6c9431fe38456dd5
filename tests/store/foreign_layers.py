"""The layers of foreign adapters' models, each by the method's published code, in torch.

Owns the formulas of the mixtures. Invariant: shares no code with the converters under test.
"""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

NUM_EXPERTS, RANK, ALPHA = 3, 2, 5
# A and B of each expert
Pairs = list[tuple[Tensor, Tensor]]


class LoraLinear(nn.Module):
    """One linear layer with a plain LoRA."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + x @ self.a.T @ self.b.T * self.scaling


class GatedLinear(nn.Module):
    """MoE-PEFT's plugged mixtures: MoLA's loop over chosen experts, LoRAMoE's sum over all."""

    def __init__(self, base: nn.Linear, gate: Tensor, experts: Pairs, top_k: int | None) -> None:
        super().__init__()
        self.base, self.gate, self.experts, self.top_k = base, gate, experts, top_k

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(x @ self.gate.T, -1)
        if self.top_k is not None:
            best, chosen = torch.topk(shares, self.top_k, -1)
            shares = torch.zeros_like(shares).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        y: Tensor = self.base(x)
        for index, (a, b) in enumerate(self.experts):
            y = y + shares[..., index, None] * (x @ a.T @ b.T * (ALPHA / RANK))
        return y


class MixLoraMlp(nn.Module):
    """MixLoRA's block: every chosen expert is a whole MLP, their outputs are added up by the weights."""

    def __init__(self, base: LlamaMLP, gate: Tensor, experts: dict[str, Pairs], top_k: int, scaling: float) -> None:
        super().__init__()
        self.base, self.gate, self.experts, self.top_k, self.scaling = base, gate, experts, top_k, scaling

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = torch.topk(torch.softmax(x @ self.gate.T, 1), self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            rows, place = torch.where(chosen == expert)
            own = x[rows]
            inner = self.base.act_fn(self._linear("gate_proj", expert, own)) * self._linear("up_proj", expert, own)
            y.index_add_(0, rows, self._linear("down_proj", expert, inner) * weights[rows, place, None])
        return y.reshape(hidden.shape)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.base, name)(x)
        if name not in self.experts:
            return y
        a, b = self.experts[name][expert]
        return y + x @ a.T @ b.T * self.scaling


class MoleMlp(nn.Module):
    """LLaVA-MoLE's block: one router with bias for the three layers, which each add their own experts."""

    def __init__(self, base: LlamaMLP, router: nn.Linear, experts: dict[str, Pairs], *, is_dense: bool) -> None:
        super().__init__()
        self.base, self.router, self.experts, self.is_dense = base, router, experts, is_dense

    def forward(self, x: Tensor) -> Tensor:
        routing = torch.softmax(self.router(x), -1)
        if not self.is_dense:
            routing = nn.functional.one_hot(routing.max(-1)[1], NUM_EXPERTS).to(x.dtype)

        def linear(name: str, rows: Tensor) -> Tensor:
            outputs = torch.stack([rows @ a.T @ b.T * (ALPHA / RANK) for a, b in self.experts[name]], -1)
            y: Tensor = getattr(self.base, name)(rows)
            return y + (outputs * routing[..., None, :]).sum(-1)

        return linear("down_proj", self.base.act_fn(linear("gate_proj", x)) * linear("up_proj", x))


class RankMixed(nn.Module):
    """mttl's Arrow: A and B of the chosen experts are each added up by the weights, then applied."""

    def __init__(self, base: nn.Linear, experts: Pairs, top_k: int, temperature: float) -> None:
        super().__init__()
        self.base, self.experts, self.top_k, self.temperature = base, experts, top_k, temperature
        # lora_a is [in, r], lora_b [r, out]
        self.prototypes = torch.stack([torch.linalg.svd((a @ b).T)[2][0] for a, b in experts])

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax((x @ self.prototypes.T).abs() / self.temperature, -1)
        best, chosen = torch.topk(shares, self.top_k, -1)
        shares = torch.zeros_like(shares).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        a = torch.einsum("bse,eir->bsir", shares, torch.stack([a for a, _ in self.experts]))
        b = torch.einsum("bse,ero->bsro", shares, torch.stack([b for _, b in self.experts]))
        added = torch.einsum("bsr,bsro->bso", torch.einsum("bsi,bsir->bsr", x, a), b)
        y: Tensor = self.base(x)
        return y + added * (ALPHA / RANK)
