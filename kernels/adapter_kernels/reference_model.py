"""What adapters do outside the linear layers, in plain fp32 torch: the definition that `model_delta.py` is tested by.

One token at a time, no batching. Invariant: a token's result depends on its own row and its own adapter only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels.extras import GroupExperts
from adapter_kernels.image import Gate
from adapter_kernels.model_image import MlpGate, ModelTensors, TokenRows
from adapter_kernels.reference import expand, gate_weights, shrink


def token_row(token_id: int, table: Tensor, rows: TokenRows | None) -> Tensor:
    """Return the row [H] of a token: the adapter's own where it has one, otherwise the table's, in fp32."""
    if rows is not None and token_id in rows.idx.tolist():
        return rows.e[rows.idx.tolist().index(token_id)].float()
    return table[token_id].float()


def embedding(
    token_id: int, table: Tensor, model: ModelTensors, *, embedding_scale: float, prompt_scale: float
) -> Tensor:
    """Embed one token: [H] fp32.

    embedding_scale * (row + AT[t] @ BT); a virtual token -2 - i is prompt_scale * prompt[i], or zero where the adapter
    brings keys and values instead: nothing of such a token is ever read.
    """
    if token_id < -1:
        if model.prompt_embeds is None:
            return torch.zeros(table.shape[1])
        return prompt_scale * model.prompt_embeds[-2 - token_id].float()
    x = token_row(token_id, table, model.embed_rows)
    if model.embed_lowrank is not None:
        x = x + model.embed_lowrank.at[token_id].float() @ model.embed_lowrank.bt.float()
    return embedding_scale * x


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one row [D] with a weight of the adapter: w * x / sqrt(mean(x^2) + eps), fp32."""
    return x.float() * torch.rsqrt(x.float().square().mean() + eps) * weight.float()


def logits(hidden: Tensor, table: Tensor, model: ModelTensors) -> Tensor:
    """Run the output head on one hidden state [H]: [V] fp32.

    W' h + (h A.T) BT + bias, W' the table with the adapter's own rows; divisor and cap follow.
    """
    own = torch.stack([token_row(token, table, model.head_rows) for token in range(table.shape[0])])
    product, head = own @ hidden.float(), model.head
    if head is None:
        return product
    product = product + expand(shrink(hidden[None], head.a), head.bt)[0]
    return product if head.bias is None else product + head.bias.float()


def mlp_weights(x: Tensor, gate: MlpGate) -> list[tuple[int, float]]:
    """Choose one token's experts by the gate of its MLP: (expert, weight), the largest logit first."""
    mixture = gate.mixture
    ranks = (1,) * mixture.num_experts
    return gate_weights(x, Gate(gate.weight, ranks, mixture.top_k, mixture.temperature, gate.bias, mixture.options))


def expert_delta(x: Tensor, experts: GroupExperts | None, expert: int, width: int) -> Tensor:
    """Delta of one expert for one row x [D]: (x A_e.T) BT_e, [O] fp32; zero where the site has no experts."""
    if experts is None:
        return torch.zeros(width)
    end = sum(experts.ranks[: expert + 1])
    own = slice(end - experts.ranks[expert], end)
    return expand(shrink(x[None], experts.a[own]), experts.bt[own])[0]


def rank_mixed(x: Tensor, experts: GroupExperts, chosen: list[tuple[int, float]]) -> Tensor:
    """Mix in rank space: (sum_e w_e A_e x) (sum_e w_e BT_e), [O] fp32; the experts' ranks are equal."""
    a, bt = (stack.float().view(len(experts.ranks), -1, stack.shape[1]) for stack in (experts.a, experts.bt))
    mixed_a, mixed_bt = (sum((w * part[e] for e, w in chosen), torch.zeros(1)) for part in (a, bt))
    return expand(shrink(x[None], mixed_a), mixed_bt)[0]


def mlp(
    x: Tensor,
    gate: MlpGate,
    sites: dict[str, GroupExperts],
    weights: dict[str, Tensor],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run one token x [H] through an MLP whose experts share a gate: [H] fp32.

    Each site mixing its own: z_s(x) = W_s x + sum_e w_e delta_s_e(x), y = z_down(act(z_gate(x)) * z_up(x)); with
    mix "rank": z_s(x) = W_s x + (sum_e w_e A_e x) (sum_e w_e BT_e).
    `is_ffn_moe`: a_e = act(W_gate x + delta_gate_e(x)) * (W_up x + delta_up_e(x)),
    y = W_down (sum_e w_e a_e) + sum_e w_e delta_down_e(a_e).

    Args:
        sites: experts by base-neutral site. weights: W [out, in] by site.
    """
    chosen = mlp_weights(x, gate)

    def delta(site: str, expert: int, row: Tensor) -> Tensor:
        return expert_delta(row, sites.get(site), expert, weights[site].shape[0])

    def mixed(site: str, row: Tensor) -> Tensor:
        experts = sites.get(site)
        if gate.mixture.options.mix == "rank" and experts is not None:
            return weights[site] @ row + rank_mixed(row, experts, chosen)
        return weights[site] @ row + sum((w * delta(site, e, row) for e, w in chosen), torch.zeros(1))

    if not gate.is_ffn_moe:
        return mixed("down_proj", activation(mixed("gate_proj", x)) * mixed("up_proj", x))
    activated, change = torch.zeros(weights["up_proj"].shape[0]), torch.zeros(weights["down_proj"].shape[0])
    for expert, weight in chosen:
        gated = activation(weights["gate_proj"] @ x + delta("gate_proj", expert, x))
        own = gated * (weights["up_proj"] @ x + delta("up_proj", expert, x))
        activated = activated + weight * own
        change = change + weight * delta("down_proj", expert, own)
    return weights["down_proj"] @ activated + change
