"""EVA: LoRA's A from the directions in which the training data's activations vary, found by PEFT.

Owns the data that PEFT's search sees. Invariant: every module keeps the rank of the spec (no redistribution), so the
export is a plain LoRA.

Source: "One Initialization to Rule them All", arXiv 2410.07170; the search is PEFT's.
"""

from peft import EvaConfig, PeftModel, initialize_lora_eva_weights

from serve.trainer.methods.method import Setting
from serve.trainer.progress import TrainingFailed


def eva_config() -> EvaConfig:
    """Return PEFT's config: equal ranks, activations of learnt tokens only."""
    return EvaConfig(rho=1.0, use_label_mask=True, adjust_scaling_factors=False)


def initialise_eva(model: PeftModel, setting: Setting) -> None:
    """Set A from the calibration batches; raises TrainingFailed when they have too few learnt tokens."""
    rank = setting.spec.rank
    fewest = min(batch.num_learnt for batch in setting.calibration)
    if fewest < rank:
        raise TrainingFailed(
            "bad_spec", f"init eva needs at least {rank} learnt tokens (the rank) in every batch; one has {fewest}"
        )
    batches = [{"input_ids": batch.token_ids, "labels": batch.labels} for batch in setting.calibration]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
