"""S2FT: dense slices of the weights of few channels, chosen once, on the base in its own order.

Owns attaching and the export as S2FT slices (`adapters_store/convert/s2ft_slices.py`). Invariant: base plus slices is
the trained model, exactly: nothing is permuted, scaled or fused.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters_store.base import SITE_PATHS
from adapters_store.jobs.base_fit import s2ft_sites
from adapters_store.jobs.spec import TrainSpec
from adapters_store.parts import CONFIG_PART, WEIGHTS_PART
from serve.trainer.batching import Batch
from serve.trainer.methods.canonical_folder import selected_channels
from serve.trainer.methods.method import Losses, Setting, Upload, linears, plain_logits
from serve.trainer.methods.s2ft_linear import S2ftLinear
from serve.trainer.methods.selection import IS_COLUMNS, Place, select


class S2ftAttached:
    """A model with some linear layers replaced."""

    def __init__(self, model: nn.Module, layers: dict[Place, S2ftLinear], spec: TrainSpec) -> None:
        self.model = model
        self._layers = layers
        self._spec = spec

    def trained(self) -> dict[str, nn.Parameter]:
        """Return every D."""
        return {f"{_stem(place)}.D": layer.delta for place, layer in self._layers.items()}

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run the batch."""
        return Losses(plain_logits(self.model, batch))

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return the selected channels."""
        return {f"{_stem(place)}.idx": layer.idx for place, layer in self._layers.items()}

    def export(self, folder: Path) -> Upload:
        """Write channels and slices, in float32."""
        config = {
            "peft_type": "S2FT",
            "target_modules": sorted({site for _, site in self._layers}),
            "selection": self._spec.selection,
        }
        (folder / CONFIG_PART).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.to(torch.int32).cpu() for name, tensor in self.frozen_choice().items()}
        tensors |= {name: delta.detach().float().cpu() for name, delta in self.trained().items()}
        save_file(dict(sorted(tensors.items())), folder / WEIGHTS_PART)
        return Upload("s2ft_slices", {})


def attach_s2ft(model: nn.Module, setting: Setting) -> S2ftAttached:
    """Choose the channels and replace the layers that have some; raises TrainingFailed."""
    model.requires_grad_(False)
    taken: dict[Place, Tensor] = {}
    for other in setting.disjoint_with:
        for place, idx in selected_channels(other).items():
            taken[place] = torch.cat([taken[place], idx]) if place in taken else idx
    chosen = select(model, setting, taken)
    layers: dict[Place, S2ftLinear] = {}
    for layer, site, parent, linear in list(linears(model, s2ft_sites(setting.spec))):
        if (layer, site) in chosen:
            layers[layer, site] = S2ftLinear(linear, chosen[layer, site], is_columns=IS_COLUMNS[site])
            setattr(parent, site, layers[layer, site])
    return S2ftAttached(model, layers, setting.spec)


def _stem(place: Place) -> str:
    layer, site = place
    return f"layers.{layer}.{SITE_PATHS[site]}"
