"""IA3 through PEFT: one factor per output of keys and values, and per input of down_proj.

Owns the choice of modules. Invariant: the exported folder is PEFT's own IA3 format.
"""

from pathlib import Path

import torch
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from serve.trainer.batching import Batch
from serve.trainer.methods.method import Losses, Setting, Upload, linears, plain_logits
from serve.trainer.methods.peft_files import trained_parameters, write_peft

_DEFAULT = ("k_proj", "v_proj", "down_proj")
# modules whose inputs are scaled, not their outputs
_FEEDFORWARD = ("down_proj",)


class Ia3Attached:
    """A PEFT model of IA3."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the factors."""
        return trained_parameters(self.model)

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run the batch."""
        return Losses(plain_logits(self.model, batch))

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return nothing: all that is exported is trained."""
        return {}

    def export(self, folder: Path) -> Upload:
        """Write a PEFT folder."""
        write_peft(folder, self.model, get_peft_model_state_dict(self.model, save_embedding_layers=False), {})
        return Upload("peft", {})


def attach_ia3(model: nn.Module, setting: Setting) -> Ia3Attached:
    """Put factors of 1 on the spec's linear layers; raises TrainingFailed."""
    sites = setting.spec.target_modules or _DEFAULT
    for _ in linears(model, sites):
        pass
    torch.manual_seed(setting.spec.seed)
    feedforward = [site for site in sites if site in _FEEDFORWARD]
    config = IA3Config(target_modules=list(sites), feedforward_modules=feedforward, task_type="CAUSAL_LM")
    return Ia3Attached(get_peft_model(model, config))
