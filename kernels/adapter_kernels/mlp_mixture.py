"""Experts of one MLP behind one gate: chosen once per row by the MLP's input, acting at gate, up and down.

Two data flows: each site adds its chosen experts' outputs (LLaVA-MoLE), or each expert is a whole MLP and their
activations are mixed before the base's down product (MixLoRA), which then runs once. Formulas: `reference_model.mlp`.
Invariant: an expert meets only rows that chose it: rows are selected, never multiplied by zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import BaseProduct
from adapter_kernels.extras import GroupExperts, RareSite
from adapter_kernels.gate import Choice, choose, normalised
from adapter_kernels.model_image import MlpGate

_SITES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class MlpRun:
    """One adapter's experts in one layer, by base-neutral site."""

    gate: MlpGate
    sites: dict[str, GroupExperts]

    @classmethod
    def of(cls, layer: int, gate: MlpGate, sites: dict[tuple[int, str], RareSite]) -> "MlpRun":
        """Collect the experts of the gate's MLP."""
        found = {site: rare.experts for site in _SITES if (rare := sites.get((layer, site))) is not None}
        return cls(gate, {site: experts for site, experts in found.items() if experts is not None})

    def add(self, site: str, x: Tensor, y: Tensor, choice: Choice) -> None:
        """Add sum_e w_e (x A_e.T) BT_e into y [n, O], x [n, D]."""
        experts = self.sites.get(site)
        if experts is None:
            return
        if self.gate.mixture.options.mix == "rank":
            _add_rank_mixed(experts, x, y, choice)
            return
        for expert, rows, weights in _chosen(choice):
            y.index_add_(0, rows, _delta(experts, expert, x[rows], weights))


def run_mlp(
    acting: list[tuple[int, int, MlpRun]],
    x: Tensor,
    gate_up: Tensor,
    activation: Callable[[Tensor], Tensor],
    down: BaseProduct,
) -> Tensor:
    """Run an MLP behind its gate_up product, rows `begin .. end` of each entry with their experts: [T, D].

    Args:
        x: [T, D] the MLP's input. gate_up: [T, 2 I], changed in place. down: the down site, all rows at once.
    """
    chosen = []
    for begin, end, run in acting:
        choice = choose_experts(x[begin:end], run.gate)
        chosen.append((begin, end, run, choice))
        if not run.gate.is_ffn_moe:
            gate, up = gate_up[begin:end].chunk(2, dim=-1)
            run.add("gate_proj", x[begin:end], gate, choice)
            run.add("up_proj", x[begin:end], up, choice)
    gate, up = gate_up.chunk(2, dim=-1)
    activated = activation(gate).mul_(up)
    changes = {}
    for begin, end, run, choice in chosen:
        if run.gate.is_ffn_moe:
            mixed, change = _mix_activations(run, x[begin:end], gate_up[begin:end], activation, choice)
            activated[begin:end] = mixed
            changes[begin] = change
    y = down(activated)
    for begin, end, run, choice in chosen:
        if run.gate.is_ffn_moe:
            y[begin:end] += changes[begin]
        else:
            run.add("down_proj", activated[begin:end], y[begin:end], choice)
    return y


def choose_experts(x: Tensor, gate: MlpGate) -> Choice:
    """Choose the experts of rows x [n, H] by the gate's options."""
    rows = normalised(x.float(), gate.mixture.options.in_norm)
    return choose(torch.nn.functional.linear(rows, gate.weight), gate.mixture, gate.bias)


def _mix_activations(
    run: MlpRun, x: Tensor, gate_up: Tensor, activation: Callable[[Tensor], Tensor], choice: Choice
) -> tuple[Tensor, Tensor]:
    """Return sum_e w_e a_e [n, I] and sum_e w_e (a_e A_e.T) BT_e of the down site [n, D], in x's dtype."""
    width = gate_up.shape[1] // 2
    mixed, change = torch.zeros(x.shape[0], width), torch.zeros(x.shape)
    for expert, rows, weights in _chosen(choice):
        own_x, own = x[rows], gate_up[rows]
        gate, up = own[:, :width], own[:, width:]
        for site, part in (("gate_proj", gate), ("up_proj", up)):
            if site in run.sites:
                part += _delta(run.sites[site], expert, own_x)
        own = activation(gate).mul_(up)
        mixed.index_add_(0, rows, own.float() * weights[:, None])
        if "down_proj" in run.sites:
            change.index_add_(0, rows, _delta(run.sites["down_proj"], expert, own, weights).float())
    return mixed.to(x.dtype), change.to(x.dtype)


def _chosen(choice: Choice) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each chosen expert in order, the rows that chose it, and its weights there."""
    for expert in sorted(set(choice.experts.flatten().tolist())):
        rows, places = (choice.experts == expert).nonzero(as_tuple=True)
        yield expert, rows, choice.weights[rows, places]


def _delta(experts: GroupExperts, expert: int, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute w (x A_e.T) BT_e: [n, O]."""
    end = sum(experts.ranks[: expert + 1])
    own = slice(end - experts.ranks[expert], end)
    bridge = torch.nn.functional.linear(x, experts.a[own])
    if weights is not None:
        bridge = (bridge * weights[:, None]).to(x.dtype)
    return bridge @ experts.bt[own]


def _add_rank_mixed(experts: GroupExperts, x: Tensor, y: Tensor, choice: Choice) -> None:
    """Add z B for z = sum_e w_e A_e x and B = sum_e w_e BT_e; the experts' ranks are equal."""
    rank = experts.ranks[0]
    bridge = torch.zeros(x.shape[0], rank)
    for expert, rows, weights in _chosen(choice):
        own_a = experts.a[expert * rank : (expert + 1) * rank]
        bridge.index_add_(0, rows, torch.nn.functional.linear(x[rows], own_a).float() * weights[:, None])
    for expert, rows, weights in _chosen(choice):
        own_bt = experts.bt[expert * rank : (expert + 1) * rank]
        y.index_add_(0, rows, (bridge[rows] * weights[:, None]).to(x.dtype) @ own_bt)
