"""Prompt tuning through PEFT: embeddings in front of every sequence.

Owns the cut of what the added rows predict. Invariant: the exported folder is PEFT's own PROMPT_TUNING format.
"""

from pathlib import Path

import torch
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from serve.trainer.batching import Batch
from serve.trainer.methods.method import Losses, Setting, Upload
from serve.trainer.methods.peft_files import trained_parameters, write_peft


class PromptAttached:
    """A PEFT model of prompt tuning."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the rows."""
        return trained_parameters(self.model)

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run the batch; its lines hold one row each."""
        logits: Tensor = self.model(input_ids=batch.token_ids, use_cache=False).logits
        return Losses(logits[:, -batch.token_ids.shape[1] :])

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return nothing: all that is exported is trained."""
        return {}

    def export(self, folder: Path) -> Upload:
        """Write a PEFT folder."""
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        write_peft(folder, self.model, tensors, {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None})
        return Upload("peft", {})


def attach_prompt(model: nn.Module, setting: Setting) -> PromptAttached:
    """Put the rows in front, each starting as the embedding of a random token; raises TrainingFailed."""
    spec = setting.spec
    torch.manual_seed(spec.seed)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=spec.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    adapted = get_peft_model(model, config)
    return PromptAttached(adapted)
