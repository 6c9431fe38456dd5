"""The frozen base in memory, from safetensors alone, and the first batches that some methods look at.

Owns loading and what it refuses. Invariant: no code and no pickle of a model folder is ever run.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from adapters_store.jobs.base_fit import fit_job
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from serve.errors import ServeError
from serve.model.spec import ModelSpec, read_spec
from serve.trainer.methods.ia3 import attach_ia3
from serve.trainer.methods.lora import attach_lora
from serve.trainer.methods.meteora import attach_meteora
from serve.trainer.methods.method import Attached, Method, Setting
from serve.trainer.methods.prompt import attach_prompt
from serve.trainer.methods.s2ft import attach_s2ft
from serve.trainer.progress import TrainingFailed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_base(base: Path) -> ModelSpec:
    """Read the base's shape; raises TrainingFailed."""
    try:
        return read_spec(base)
    except ServeError as error:
        raise TrainingFailed("bad_base", error.message) from error


def load_base(base: Path, spec: TrainSpec, device: str) -> nn.Module:
    """Load the weights in the spec's dtype, frozen; raises TrainingFailed."""
    _check_device(device)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base, dtype=DTYPES[spec.dtype], use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise TrainingFailed("bad_base", f"the base {base.name!r} cannot be loaded for training: {error}") from error
    model.requires_grad_(False)
    return model.to(device)


def _check_device(device: str) -> None:
    """Raise TrainingFailed if this machine's torch does not have the device."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= count:
        raise TrainingFailed("bad_device", f"the device is {device!r}; this machine's torch sees {count} CUDA devices")


def attach(model: nn.Module, setting: Setting) -> Attached:
    """Put the spec's family on the base; raises TrainingFailed."""
    methods: dict[str, Method] = {
        "lora": attach_lora,
        "s2ft": attach_s2ft,
        "meteora": attach_meteora,
        "ia3": attach_ia3,
        "prompt": attach_prompt,
    }
    return methods[setting.spec.family](model, setting)


def fit_base(spec: TrainSpec, base: ModelSpec) -> TrainSpec:
    """Return the spec with its `max_length` decided; raises TrainingFailed for what this base cannot do."""
    try:
        return fit_job(spec, base.room)
    except InvalidJob as error:
        raise TrainingFailed("bad_spec", error.message) from error
