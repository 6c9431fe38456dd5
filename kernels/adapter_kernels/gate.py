"""The gate of a mixture: which experts a row takes, how much of each, and where their rows lie in the stack.

Owns the choice, by all options of a gate, and the two ways to carry it out: weigh the bridge of all experts, or fetch
the chosen experts' rows. Logits and weights are fp32. Invariant: experts that a row did not choose are selected away,
never multiplied by zero, and no row's choice depends on another row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gate_options import METEORA, GateOptions


@dataclass(frozen=True, slots=True)
class Mixture:
    """One site's gate as a slab packs it: its columns among the fused site's logits, and where each expert's rows lie.

    `expert_of_rank` [R] int64 belongs to the stacked ranks; `ranks_of_expert` [E, r] int64 lists them by expert, r the
    largest; `is_real` [E, r] tells the listed ones from padding, None: all experts have r.
    """

    begin: int
    end: int
    top_k: int
    temperature: float
    expert_of_rank: Tensor
    ranks_of_expert: Tensor
    is_real: Tensor | None
    options: GateOptions = METEORA

    @classmethod
    def build(
        cls, ranks: tuple[int, ...], top_k: int, temperature: float, begin: int, options: GateOptions = METEORA
    ) -> "Mixture":
        """Make the tables of a mixture whose logits begin at column `begin`."""
        sizes, widest = torch.tensor(ranks), max(ranks)
        steps = torch.arange(widest)
        is_real = steps < sizes[:, None]
        # padding repeats a row of the expert itself
        listed = (sizes.cumsum(0) - sizes)[:, None] + torch.minimum(steps, (sizes - 1).clamp(min=0)[:, None])
        return cls(
            begin=begin,
            end=begin + len(ranks),
            top_k=top_k,
            temperature=temperature,
            expert_of_rank=torch.repeat_interleave(torch.arange(len(ranks)), sizes),
            ranks_of_expert=listed.clamp(max=sum(ranks) - 1),
            is_real=None if bool(is_real.all()) else is_real,
            options=options,
        )

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Choice:
    """What rows chose: experts [.., k] int64, the largest logit first, and their weights [.., k] fp32."""

    experts: Tensor
    weights: Tensor


def normalised(x: Tensor, in_norm: str) -> Tensor:
    """Return the gate's view of rows x [.., D] fp32: as they are, without mean and of variance 1, or of length 1."""
    if in_norm == "layernorm_noaffine":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-12) if in_norm == "unit" else x


def choose(logits: Tensor, mixture: Mixture, bias: Tensor | None = None) -> Choice:
    """Take the `top_k` largest of g = logits [.., E] fp32 + bias, or of |g|; of equal ones the lower expert.

    Their weights by `GateOptions.weight`; by the softmax over the chosen, one expert alone weighs exactly 1.
    """
    if bias is not None:
        logits = logits + bias
    if mixture.options.logit == "abs":
        logits = logits.abs()
    # stable, which topk does not promise; 128 experts at most
    ordered, experts = torch.sort(logits, dim=-1, descending=True, stable=True)
    return Choice(experts[..., : mixture.top_k], _weights(ordered / mixture.temperature, mixture))


def _weights(ordered: Tensor, mixture: Mixture) -> Tensor:
    chosen, kind = ordered[..., : mixture.top_k], mixture.options.weight
    if kind == "one" or (kind == "softmax_selected" and mixture.top_k == 1):
        return torch.ones(chosen.shape)
    if kind == "sigmoid":
        return torch.sigmoid(chosen)
    if kind == "softmax_selected":
        return torch.softmax(chosen, dim=-1)
    shares = torch.softmax(ordered, dim=-1)[..., : mixture.top_k]
    return shares / shares.sum(dim=-1, keepdim=True) if kind == "softmax_all_renorm" else shares


def weigh(bridge: Tensor, choice: Choice, mixture: Mixture) -> Tensor:
    """Weigh the bridge [.., R] of all experts: c[j] * w of j's expert where it is chosen, else zero.

    Mixed in rank space, c[j] is first summed over the chosen experts, each weighed: z = sum_e w_e A_e x.
    """
    shape = (*bridge.shape[:-1], mixture.num_experts)
    weights = torch.zeros(shape).scatter_(-1, choice.experts, choice.weights)
    is_chosen = torch.zeros(shape, dtype=torch.bool).scatter_(-1, choice.experts, torch.tensor(True).expand(shape))
    of_rank = mixture.expert_of_rank
    weighed = torch.where(is_chosen[..., of_rank], bridge * weights[..., of_rank], 0.0)
    if mixture.options.mix == "rank":
        mixed = weighed.view(*bridge.shape[:-1], mixture.num_experts, -1).sum(dim=-2, keepdim=True)
        mixed = mixed.expand(*bridge.shape[:-1], mixture.num_experts, -1).flatten(-2)
        weighed = torch.where(is_chosen[..., of_rank], mixed * weights[..., of_rank], 0.0)
    return weighed.to(bridge.dtype)


def add_chosen(
    x: Tensor, a: Tensor, bt: Tensor, first_a: Tensor, first_bt: Tensor, choice: Choice, mixture: Mixture, y: Tensor
) -> None:
    """Add sum_e w_e (x A_e.T) BT_e into `y`, reading only the rows of chosen experts.

    Args:
        x: [n, D]. a: [any, D] and bt: [any, O] flat stacks; row i's mixture begins at first_a[i] and first_bt[i].
        choice: of [n] rows. y: [n, O] changed in place.
    """
    num_rows = x.shape[0]
    ranks = mixture.ranks_of_expert[choice.experts]  # [n, k, r]
    chosen_a = a.index_select(0, (ranks + first_a[:, None, None]).flatten()).view(num_rows, -1, x.shape[1])
    bridge = torch.bmm(chosen_a, x[:, :, None]).view(ranks.shape)
    weighed = bridge * choice.weights[..., None]
    if mixture.is_real is not None:
        weighed = torch.where(mixture.is_real[choice.experts], weighed, 0.0)
    if mixture.options.mix == "rank":
        weighed = weighed.sum(dim=1, keepdim=True) * choice.weights[..., None]
    chosen_bt = bt.index_select(0, (ranks + first_bt[:, None, None]).flatten()).view(num_rows, -1, y.shape[1])
    y.add_(torch.bmm(weighed.to(x.dtype).view(num_rows, 1, -1), chosen_bt)[:, 0])
