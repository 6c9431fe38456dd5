"""MeteoRA: existing LoRAs behind a gate at every linear layer; gates alone are trained, or gates and LoRAs.

Owns the embedding of the experts, the gate's loss beside the language loss, and the export in the official layout
without the base's tensors. Invariant: gate row e, factors e and name e are the spec's expert e.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters_store.base import SITE_PATHS
from adapters_store.jobs.spec import TrainSpec
from serve.trainer.batching import Batch
from serve.trainer.methods.canonical_folder import ExpertFactors, read_lora
from serve.trainer.methods.meteora_linear import MeteoraLinear, gate_loss
from serve.trainer.methods.method import Losses, Setting, Upload, linears, plain_logits
from serve.trainer.progress import TrainingFailed

Place = tuple[int, str]

_WEIGHTS = "model.safetensors"
_PREFIX = "base_model.model.model."


class MeteoraAttached:
    """A model with gated layers."""

    def __init__(
        self, model: nn.Module, layers: dict[Place, MeteoraLinear], experts: list[ExpertFactors], spec: TrainSpec
    ) -> None:
        self.model = model
        self._layers = layers
        self._experts = experts
        self._spec = spec

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the gates, and the experts' factors if they are trained."""
        found: dict[str, nn.Parameter] = {}
        for place, layer in self._layers.items():
            found[f"{_stem(place)}.gate"] = layer.gate
            if self._spec.train_experts:
                found[f"{_stem(place)}.a"], found[f"{_stem(place)}.bt"] = layer.a, layer.bt
        return found

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run the batch; `extra` is the gates' mean cross-entropy times its weight."""
        logits = plain_logits(self.model, batch)
        gates = [layer.logits for layer in self._layers.values() if layer.logits is not None]
        total, num_right, count = gate_loss(gates, batch.tasks)
        if count == 0:
            return Losses(logits)
        shown = {"gate_loss": float(total.detach()), "gate_accuracy": float(num_right)}
        return Losses(logits, self._spec.gate_loss_weight * share * total / count, shown, count)

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return nothing: the experts are named by the spec."""
        return {}

    def export(self, folder: Path) -> Upload:
        """Write the official keys, without the base's tensors, and say what the official file does not."""
        tensors: dict[str, Tensor] = {}
        for place, layer in self._layers.items():
            stem = f"{_PREFIX}{_stem(place)}"
            tensors[f"{stem}.lora_A.weight"] = layer.a.detach().float().cpu().contiguous()
            tensors[f"{stem}.lora_B.weight"] = layer.bt.detach().float().cpu().T.contiguous()
            tensors[f"{stem}.moe_gate.weight"] = layer.gate.detach().float().cpu().contiguous()
        save_file(dict(sorted(tensors.items())), folder / _WEIGHTS)
        ranks = [expert.rank for expert in self._experts]
        return Upload(
            "meteora",
            {
                "top_k": self._spec.top_k,
                "temperature": float(self._spec.temperature),
                "rank": [*ranks],
                # the scaling is in B already
                "alpha": [float(rank) for rank in ranks],
                "experts": [expert.name for expert in self._experts],
            },
        )


def attach_meteora(model: nn.Module, setting: Setting) -> MeteoraAttached:
    """Put every expert behind new gates; raises TrainingFailed."""
    spec = setting.spec
    experts = [read_lora(adapter) for adapter in setting.experts]
    if len(experts) != len(spec.experts):
        raise TrainingFailed("bad_expert", f"{len(experts)} of {len(spec.experts)} experts are at hand")
    model.requires_grad_(False)
    torch.manual_seed(spec.seed)
    sites = tuple(sorted({site for expert in experts for _, site in expert.factors}))
    layers: dict[Place, MeteoraLinear] = {}
    for layer, site, parent, linear in list(linears(model, sites)):
        a, bt = _stacked(experts, (layer, site), linear)
        ranks = [expert.rank for expert in experts]
        gated = MeteoraLinear(linear, a, bt, ranks, top_k=spec.top_k, temperature=spec.temperature)
        gated.a.requires_grad_(spec.train_experts)
        gated.bt.requires_grad_(spec.train_experts)
        layers[layer, site] = gated
        setattr(parent, site, gated)
    return MeteoraAttached(model, layers, experts, spec)


def _stacked(experts: list[ExpertFactors], place: Place, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return A and B^T of all experts at one place; where one has less than its rank, the rest is zero."""
    rank = sum(expert.rank for expert in experts)
    a, bt = torch.zeros(rank, linear.in_features), torch.zeros(rank, linear.out_features)
    begin = 0
    for expert in experts:
        if place in expert.factors:
            own_a, own_bt = expert.factors[place]
            if own_a.shape[1] != linear.in_features or own_bt.shape[1] != linear.out_features:
                raise TrainingFailed("bad_expert", f"the expert {expert.name!r} was trained on another base")
            a[begin : begin + len(own_a)], bt[begin : begin + len(own_bt)] = own_a, own_bt
        begin += expert.rank
    return a, bt


def _stem(place: Place) -> str:
    layer, site = place
    return f"layers.{layer}.{SITE_PATHS[site]}"
