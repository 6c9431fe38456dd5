"""The gate of a mixture: which experts a row takes, how much of each, and where their rows lie in the stack.

Owns the choice and the two ways to carry it out: weigh the bridge of all experts, or fetch the chosen experts' rows.
Logits and weights are fp32. Invariant: experts that a row did not choose are selected away, never multiplied by zero,
and no row's choice depends on another row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @classmethod
    def build(cls, ranks: tuple[int, ...], top_k: int, temperature: float, begin: int) -> "Mixture":
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


def choose(logits: Tensor, mixture: Mixture) -> Choice:
    """Take the `top_k` largest logits [.., E] fp32, of equal ones the lower expert; softmax over them / temperature.

    One expert alone weighs exactly 1.
    """
    # stable, which topk does not promise; 128 experts at most
    ordered, experts = torch.sort(logits, dim=-1, descending=True, stable=True)
    experts = experts[..., : mixture.top_k]
    if mixture.top_k == 1:
        return Choice(experts, torch.ones(experts.shape))
    return Choice(experts, torch.softmax(ordered[..., : mixture.top_k] / mixture.temperature, dim=-1))


def weigh(bridge: Tensor, choice: Choice, mixture: Mixture) -> Tensor:
    """Weigh the bridge [.., R] of all experts: c[j] * w of j's expert where it is chosen, else zero."""
    shape = (*bridge.shape[:-1], mixture.num_experts)
    weights = torch.zeros(shape).scatter_(-1, choice.experts, choice.weights)
    is_chosen = torch.zeros(shape, dtype=torch.bool).scatter_(-1, choice.experts, torch.tensor(True).expand(shape))
    of_rank = mixture.expert_of_rank
    weighed = bridge * weights[..., of_rank]
    return torch.where(is_chosen[..., of_rank], weighed, 0.0).to(bridge.dtype)


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
    chosen_bt = bt.index_select(0, (ranks + first_bt[:, None, None]).flatten()).view(num_rows, -1, y.shape[1])
    y.add_(torch.bmm(weighed.to(x.dtype).view(num_rows, 1, -1), chosen_bt)[:, 0])
