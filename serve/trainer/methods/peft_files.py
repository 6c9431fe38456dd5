"""PEFT's two files, written from a PEFT model, and how its parameters are named.

Owns the tidying: no path of this machine, no base weights, keys in sorted order. Invariant: the config's
`base_model_name_or_path` is the base's folder name alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters_store.parts import CONFIG_PART, WEIGHTS_PART
from adapters_store.strict_json import Json


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_peft(folder: Path, model: PeftModel, tensors: Mapping[str, Tensor], changes: Mapping[str, Json]) -> None:
    """Write config and tensors; `changes` replaces keys of the config."""
    config: dict[str, Json] = model.peft_config["default"].to_dict()
    named = {**config, "inference_mode": True, "base_model_name_or_path": None, **changes}
    text = json.dumps(named, indent=2, sort_keys=True, default=_plain)
    (folder / CONFIG_PART).write_text(f"{text}\n", encoding="utf-8")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}, folder / WEIGHTS_PART
    )


def _plain(value: object) -> Json:
    if isinstance(value, set | frozenset):
        return [*sorted(map(str, value))]
    # enums of PEFT's
    return str(getattr(value, "value", value))
