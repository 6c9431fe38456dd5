"""A frozen linear layer with low-rank experts behind a gate of its own input.

Owns the mixture's forward and the gate's own loss. With G [E, in], experts A_e [r_e, in], B_e [out, r_e]:
`g = x G^T; y = x W^T + b + sum_{e in top-k(g)} softmax_{top-k}(g / T)_e B_e A_e x`. Invariant: the same experts act
with the same weights as in a server's gate: ties go to the lower number.

Source: MeteoRA, arXiv 2405.13053, section 3; the loss is cross-entropy of all E logits against the token's task.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from serve.trainer.batching import IGNORED


class MeteoraLinear(nn.Module):
    """Takes a linear layer's place. `a` [R, in] and `bt` [R, out] are stacked by expert, R the sum of ranks."""

    expert_of_row: Tensor

    def __init__(
        self, linear: nn.Linear, a: Tensor, bt: Tensor, ranks: Sequence[int], *, top_k: int, temperature: float
    ) -> None:
        super().__init__()
        self.linear = linear
        self.top_k = top_k
        self.temperature = temperature
        device = linear.weight.device
        self.a = nn.Parameter(a.to(device))
        self.bt = nn.Parameter(bt.to(device))
        # small and random: from zero, every token's choice would be a tie
        self.gate = nn.Parameter(torch.randn(len(ranks), linear.in_features).to(device) * 0.02)
        rows = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self.register_buffer("expert_of_row", rows.to(device), persistent=False)
        # of the newest forward pass, for the gate's loss
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed output [B, T, out]."""
        logits = x.float() @ self.gate.float().T
        self.logits = logits
        weights = expert_weights(logits, self.top_k, self.temperature).to(x.dtype)
        inner = (x @ self.a.to(x.dtype).T) * weights[..., self.expert_of_row]
        y: Tensor = self.linear(x)
        return y + inner @ self.bt.to(x.dtype)


def expert_weights(logits: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return the weight of every expert [..., E]: softmax over the top-k logits / T, zero for the others."""
    # a stable sort, so that ties go to the lower number
    chosen = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :top_k]
    shares = torch.softmax(logits.gather(-1, chosen) / temperature, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen, shares)


def gate_loss(all_logits: Sequence[Tensor], tasks: Tensor) -> tuple[Tensor, int, int]:
    """Return the summed cross-entropy of every gate at every labelled token, how many were right, and how many.

    Args:
        all_logits: of each gate [B, T, E]. tasks: [B, T], -100 where no task is known.
    """
    labels = tasks.flatten()
    total = torch.zeros((), device=tasks.device)
    num_right = 0
    for logits in all_logits:
        flat = logits.flatten(0, -2)
        total = total + nn.functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
        num_right += int(((flat.argmax(-1) == labels) & (labels != IGNORED)).sum())
    return total, num_right, int((labels != IGNORED).sum()) * len(all_logits)
