"""Converters that err: each changes a copy of the upload before the honest converter reads it.

Owns the faults only. Invariant: the files that were uploaded stay as they are, so whoever reads them again sees what
the converter should have made of them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from adapters_store.convert.options import ConvertOptions
from adapters_store.converter import convert_in_child

Tensors = dict[str, np.ndarray]
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _name(layer: int, site: str, factor: str) -> str:
    return f"base_model.model.model.layers.{layer}.{site}.lora_{factor}.weight"


def _swap(tensors: Tensors, first: str, second: str) -> None:
    tensors[first], tensors[second] = tensors[second], tensors[first]


def swap_a_of_two_sites(tensors: Tensors) -> None:
    """A of q_proj and of k_proj have one shape."""
    _swap(tensors, _name(1, "self_attn.q_proj", "A"), _name(1, "self_attn.k_proj", "A"))


def halve_one_layer(tensors: Tensors) -> None:
    """Every module of the last layer acts half as strongly."""
    for name in tensors:
        if ".layers.2." in name and "lora_B" in name:
            tensors[name] = tensors[name] / 2


def shift_layers(tensors: Tensors) -> None:
    """The first two layers are exchanged."""
    for name in [name for name in tensors if ".layers.0." in name]:
        _swap(tensors, name, name.replace(".layers.0.", ".layers.1."))


def transpose(tensors: Tensors) -> None:
    """The delta of one square module acts transposed."""
    a, b = (_name(0, "self_attn.o_proj", factor) for factor in "AB")
    tensors[a], tensors[b] = np.ascontiguousarray(tensors[b].T), np.ascontiguousarray(tensors[a].T)


def drop_one_module(tensors: Tensors) -> None:
    """One module of many does nothing."""
    tensors[_name(1, "mlp.up_proj", "B")] *= 0


def weaken_one_module(tensors: Tensors) -> None:
    """One module of 21 is a hundredth too weak."""
    tensors[_name(2, "self_attn.v_proj", "B")] *= np.float32(0.99)


OF_TENSORS: dict[str, Callable[[Tensors], None]] = {
    "two sites' A are exchanged": swap_a_of_two_sites,
    "one layer acts half as strongly": halve_one_layer,
    "two layers are exchanged": shift_layers,
    "one delta is transposed": transpose,
    "one module is dropped": drop_one_module,
    "one module is one percent too weak": weaken_one_module,
}
RSLORA_LOST = "the root of the rank is lost"
FAULTS = (RSLORA_LOST, *OF_TENSORS)


def convert_with(fault: str, source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert as a converter with that fault would; no fault: honestly."""
    if not fault:
        convert_in_child(source, target, options)
        return
    wrong = target.parent / "wrong"
    shutil.copytree(source, wrong)
    if fault == RSLORA_LOST:
        config = json.loads((wrong / _CONFIG).read_text())
        (wrong / _CONFIG).write_text(json.dumps(config | {"use_rslora": False}))
    else:
        tensors = load_file(wrong / _WEIGHTS)
        OF_TENSORS[fault](tensors)
        save_file(tensors, wrong / _WEIGHTS)
    convert_in_child(wrong, target, options)
