"""The converter's self-test convicts planted conversion bugs, and says how exact a sound conversion is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters_store.convert import peft
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import Float32
from adapters_store.manifest import parse_manifest
from tests.store.folders import TINY, lora_config, lora_tensors, write_folder

Fold = Callable[[Float32, str, float], Float32]


sound: Fold = peft._folded


def scaled(kind: str, values: Float32, scaling: float) -> Float32:
    return values if kind == "A" else values * np.float32(scaling)


PLANTED: dict[str, Fold] = {
    "the scaling is forgotten": lambda values, kind, scaling: values.T if kind == "BT" else values,
    "the scaling is folded in twice": lambda values, kind, scaling: sound(values, kind, scaling * scaling),
    "rsLoRA is read as LoRA": lambda values, kind, scaling: sound(values, kind, scaling / 2**0.5),
    "A is scaled too": lambda values, kind, scaling: (
        values * np.float32(scaling) if kind == "A" else sound(values, kind, scaling)
    ),
    "B is not transposed": lambda values, kind, scaling: (
        scaled(kind, values, scaling).reshape(values.T.shape) if kind == "BT" else scaled(kind, values, scaling)
    ),
    "the bias is not scaled": lambda values, kind, scaling: values if kind == "bias" else sound(values, kind, scaling),
    "one row is lost": lambda values, kind, scaling: (
        sound(values, kind, scaling)
        * (np.arange(len(values.T if kind == "BT" else values)) > 0).reshape(-1, *[1] * (values.ndim - 1))
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fold", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_conversion_bug_is_found(
    fold: Fold, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "_folded", fold)
    config = lora_config(lora_bias=True, lora_alpha=3)
    folder = write_folder(tmp_path / "good", config, lora_tensors(bias=True))
    with pytest.raises(ConversionFailed, match=r"layers\.0\.self_attn\.q_proj"):
        convert_peft(folder, tmp_path, ConvertOptions(TINY, dtype, 16))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1.0), ("float16", 0.1)])
def test_the_measured_error_is_recorded(dtype: str, bound: float, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "good", lora_config(lora_bias=True, lora_alpha=3), lora_tensors(bias=True))
    convert_peft(folder, tmp_path, ConvertOptions(TINY, dtype, 16))
    error = parse_manifest((tmp_path / "adapter.json").read_bytes()).source.max_abs_error
    assert 0 <= error < bound and (error > 0 or dtype == "float32")
