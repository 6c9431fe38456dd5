"""LoRA through PEFT: any linear layers, rsLoRA, DoRA, and initialisations that change the base.

Owns the export. PiSSA and OLoRA move a part of the base's weights into the factors: what was trained is their
difference to where they started, so the export is a plain LoRA of twice the rank over the original base. Invariant: the
exported files mean the same on the original base, whatever the initialisation was.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from adapters_store.base import SITES
from adapters_store.jobs.spec import TrainSpec
from serve.trainer.batching import Batch
from serve.trainer.methods.eva import eva_config, initialise_eva
from serve.trainer.methods.method import Losses, Setting, Upload, linears, plain_logits
from serve.trainer.methods.peft_files import trained_parameters, write_peft

_INITS: Mapping[str, Any] = MappingProxyType(
    {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "eva": "eva"}
)
# initialisations that take their factors out of the base's weights
_MOVED = ("pissa", "olora")


class LoraAttached:
    """A PEFT model of LoRA; `_start` holds the first factors where the base was changed by them."""

    def __init__(self, model: PeftModel, spec: TrainSpec) -> None:
        self.model = model
        self._spec = spec
        self._start = self._factors() if spec.init in _MOVED else {}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return A, B and DoRA's magnitudes."""
        return trained_parameters(self.model)

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run the batch."""
        return Losses(plain_logits(self.model, batch))

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return the first factors where they are part of what is exported."""
        return self._start

    def export(self, folder: Path) -> Upload:
        """Write a PEFT folder that is plain LoRA, or DoRA, over the original base."""
        spec, tensors = self._spec, self._factors()
        assert spec.alpha is not None, "a resolved spec has an alpha"
        rank, alpha = spec.rank, spec.alpha
        if self._start:
            tensors = {name: _widened(name, tensor, self._start[name]) for name, tensor in tensors.items()}
            # the same scaling at twice the rank
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.use_rslora else 2)
        changes = {"r": rank, "lora_alpha": _whole(alpha), "init_lora_weights": True, "eva_config": None}
        write_peft(folder, self.model, tensors, changes)
        return Upload("peft", {})

    def _factors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def attach_lora(model: nn.Module, setting: Setting) -> LoraAttached:
    """Put LoRA on the spec's linear layers, all of them by default; raises TrainingFailed."""
    spec = setting.spec
    sites = spec.target_modules or SITES
    # a site that the base does not have must not pass silently
    for _ in linears(model, sites):
        pass
    torch.manual_seed(spec.seed)
    config = LoraConfig(
        r=spec.rank,
        # PEFT says int, and computes with floats as well
        lora_alpha=cast("int", spec.alpha),
        lora_dropout=spec.dropout,
        target_modules=list(sites),
        init_lora_weights=_INITS[spec.init],
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        eva_config=eva_config() if spec.init == "eva" else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if spec.init == "eva":
        initialise_eva(adapted, setting)
    return LoraAttached(adapted, spec)


def _widened(name: str, tensor: Tensor, start: Tensor) -> Tensor:
    """Return [A; A0] and [B, -B0]: the product is what was trained less what was taken out of the base."""
    if ".lora_A." in name:
        return torch.cat([tensor, start])
    return torch.cat([tensor, -start], dim=1)


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
