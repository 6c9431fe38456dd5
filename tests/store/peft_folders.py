"""The folders of `peft_cases.py` in memory, and conversions of changed copies of them.

Owns no expectation. Invariant: every conversion is followed by the server's own check of what was written.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.base import BaseDims, read_base_dims
from adapters_store.canonical import check_adapter
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.errors import AdapterRefused
from tests.model.tiny_models import save
from tests.store.folders import Tensors, float32, read_tensors, write_folder
from tests.store.peft_cases import CASES, rename_to_bone, save_case, tiny_llama

# forms of a kind whose other forms take the same way through the converter
FORMS = {
    *("qalora", "bias-only", "hra-orthogonal", "deft-para", "peanut-deep", "road-2", "road-4", "oft-cayley"),
    *("oft-shared", "supra"),
}
SWEPT = [pytest.param(name, marks=[pytest.mark.slow] if name in FORMS else []) for name in CASES]
ODD_VALUES: list[object] = [
    None, True, False, 0, 1, 2, 3, 64, -1, 1 << 20, 2**70, 0.5, 1e308, "", "x", "q_proj", "all-linear", "\ud800",
    [], ["q_proj"], [0], [[0, 1]], ["(a+)+$"], {}, {"q_proj": 1}, {"q_proj": [True]}, {"(a|b)": 2}, {"x": {"y": []}},
]  # fmt: skip
INTEGERS = {"U8": "<u1", "I16": "<i2", "I64": "<i8"}


@dataclass(frozen=True)
class Saved:
    """One folder of PEFT's in memory."""

    config: dict[str, object]
    tensors: Tensors


class Folders:
    """All cases, and a way to convert changed copies of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saved: dict[str, Saved] = {}
        with torch.random.fork_rng():
            model = tiny_llama()
            self.base_dir = save(model, root / "base")
            self.base: BaseDims = read_base_dims(self.base_dir)
            for seed, (name, case) in enumerate(CASES.items()):
                save_case(model, case, root / name, seed)
        rename_to_bone(root / "bone")
        for name in CASES:
            config = json.loads((root / name / "adapter_config.json").read_text())
            self.saved[name] = Saved(config, read_tensors(root / name / "adapter_model.safetensors"))

    def convert(
        self, config: dict[str, object], tensors: Tensors | bytes, dtype: str = "float32", rank: int = 96
    ) -> None:
        source, target = self.root / "source", self.root / "target"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        options = ConvertOptions(self.base, dtype, rank, base_dir=str(self.base_dir))
        convert_peft(write_folder(source, config, tensors), target, options)
        check_adapter(target, self.base, dtype, rank)

    def untrained(self, saved: Saved) -> Tensors:
        """Return what leaves the base as it is, where zeros do not."""
        weights = read_tensors(self.base_dir / "model.safetensors")
        tensors: Tensors = {}
        for name, (_, shape, raw) in saved.tensors.items():
            stem, _, part = name.removeprefix("base_model.model.").rpartition(".")
            values = np.frombuffer(raw, "<f4").reshape(shape)
            if part == "lora_magnitude_vector":
                _, base_shape, base_raw = weights[f"{stem}.weight"]
                values = np.linalg.norm(np.frombuffer(base_raw, "<f4").reshape(base_shape), axis=1)
            elif "lora_B" in name:
                values = np.zeros(shape)
            elif part in ("ia3_l", "road_alpha", "boft_s"):
                values = np.ones(shape)
            elif part in ("road_theta", "boft_R") or "lora_A" in name:
                values = np.zeros(shape)
            elif part == "bias":
                _, base_shape, base_raw = weights[f"{stem.removesuffix('.base_layer')}.bias"]
                values = np.frombuffer(base_raw, "<f4").reshape(base_shape)
            tensors[name] = float32(values)
        return tensors

    def refusal(self, config: dict[str, object], tensors: Tensors) -> AdapterRefused:
        """Convert, which must be refused in words that name no path."""
        with pytest.raises(AdapterRefused) as refusal:
            self.convert(config, tensors)
        error = refusal.value
        assert error.http_status == 400 and len(error.message) < 400 and error.message.isprintable()
        assert str(self.root) not in error.message
        return error


def one_of_each(tensors: Tensors) -> list[str]:
    """Return one non-empty tensor of every name that the kind gives to tensors: a module's, then the model's."""
    kinds = {
        name.rpartition("_proj.")[2].rstrip("0123456789"): name
        for name, (_, shape, _) in tensors.items()
        if 0 not in shape
    }
    return list(kinds.values())


def scaled(tensors: Tensors, exponent: int) -> Tensors:
    """Multiply every value by a power of two; what overflows becomes infinity."""
    changed: Tensors = {}
    for key, (dtype, shape, raw) in tensors.items():
        if dtype == "F32":
            with np.errstate(over="ignore"):
                raw = np.ldexp(np.frombuffer(raw, "<f4"), exponent).astype("<f4").tobytes()
        changed[key] = (dtype, shape, raw)
    return changed
