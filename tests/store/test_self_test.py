"""The converter's self-test convicts planted conversion bugs, and says how exact a sound conversion is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.convert.lora_factors import LoraValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.tuner import Array, Factors
from adapters_store.errors import ConversionFailed
from adapters_store.manifest import parse_manifest
from tests.store.folders import TINY, lora_config, lora_tensors, write_folder

Change = Callable[[Factors, float], Factors]
sound = LoraValues.factors


PLANTED: dict[str, Change] = {
    "the scaling is forgotten": lambda good, scaling: replace(good, b=good.b / scaling),
    "the scaling is folded in twice": lambda good, scaling: replace(good, b=good.b * scaling),
    "rsLoRA is read as LoRA": lambda good, scaling: replace(good, b=good.b / 2**0.5),
    "A is scaled too": lambda good, scaling: replace(good, a=good.a * scaling),
    "B is not transposed": lambda good, scaling: replace(good, b=good.b.T.reshape(good.b.shape)),
    "the bias is not scaled": lambda good, scaling: replace(good, bias=bias_of(good) / scaling),
    "one row of A is lost": lambda good, scaling: replace(good, a=good.a * [[0], [1]]),
    "one output is lost": lambda good, scaling: replace(good, b=good.b * (np.arange(len(good.b)) > 0)[:, None]),
    "one bias is lost": lambda good, scaling: replace(good, bias=bias_of(good) * (np.arange(len(good.b)) > 0)),
}


def bias_of(factors: Factors) -> Array:
    assert factors.bias is not None
    return factors.bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_conversion_bug_is_found(
    change: Change, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraValues, "factors", lambda delta: change(sound(delta), delta.scaling))
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
