"""MeteoRA checkpoints in the official key layout come in exactly; nothing that they do not store is ever assumed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.convert.dispatch import convert
from adapters_store.converter import convert_in_child
from adapters_store.errors import AdapterRefused
from adapters_store.formats import Declared
from adapters_store.store import AdapterStore, AdapterVersion
from adapters_store.strict_json import Json
from tests.store.folders import TINY, open_store
from tests.store.image_values import ImageValues
from tests.store.tiny_checkpoints import (
    Array,
    Mixture,
    TinyBase,
    Weights,
    bf16,
    forward,
    meteora_checkpoint,
    mixture,
    stem,
    write_checkpoint,
)

PREFIX = "base_model.model."
OPTIONS: dict[str, Json] = {"top_k": 2, "temperature": 1.0, "rank": 2, "alpha": 4}


def publish(
    root: Path, base: TinyBase, weights: Weights, options: dict[str, Json] = OPTIONS, **store_options: object
) -> tuple[AdapterStore, AdapterVersion]:
    """Write the checkpoint and put it into a store that has the base's weights at hand."""
    write_checkpoint(root / "ft", weights)
    (root / "ft" / "config.json").unlink()
    changed = {"convert": convert, "base_dir": base.folder, **store_options}
    store = open_store(root / "store", base.dims, **changed)  # type: ignore[arg-type]
    return store, store.put_dir("a", root / "ft", declared=Declared("auto", options))


def by_loop(made: Mixture, scalings: list[float], top_k: int, temperature: float) -> Callable[[int, str, Array], Array]:
    """Return what the mixture adds, token by token and expert by expert, from the separate experts."""

    def delta(layer: int, site: str, x: Array) -> Array:
        rows = []
        for token in x:
            logits = made.gates[layer, site] @ token
            chosen = [int(e) for e in np.argsort(-logits, kind="stable")[:top_k]]
            exps = [np.exp((logits[e] - max(logits)) / temperature) for e in chosen]
            y = np.zeros(len(made.b[layer, site][0]))
            for e, exp in zip(chosen, exps, strict=True):
                y += exp / sum(exps) * scalings[e] * (made.b[layer, site][e] @ (made.a[layer, site][e] @ token))
            rows.append(y)
        return np.array(rows, dtype=np.float32)

    return delta


@pytest.mark.parametrize(
    ("ranks", "options", "scalings"),
    [
        ((2, 2, 2), OPTIONS, [2.0, 2.0, 2.0]),
        ((2, 2, 2), OPTIONS | {"top_k": 1}, [2.0, 2.0, 2.0]),
        ((2, 2, 2), OPTIONS | {"temperature": 15}, [2.0, 2.0, 2.0]),
        ((4, 4), OPTIONS | {"rank": 4, "use_rslora": True}, [2.0, 2.0]),
        ((1, 3, 2, 5), OPTIONS | {"top_k": 3, "rank": [1, 3, 2, 5], "alpha": [1, 6, 1, 5]}, [1.0, 2.0, 0.5, 1.0]),
        ((2,), OPTIONS | {"top_k": 1}, [2.0]),
    ],
    ids=["top 2", "top 1", "temperature", "rslora", "unequal ranks", "one expert"],
)
def test_an_official_checkpoint_comes_in_exactly(
    ranks: tuple[int, ...], options: dict[str, Json], scalings: list[float], tmp_path: Path
) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    made = mixture(TINY, ranks)
    store, version = publish(tmp_path, base, meteora_checkpoint(base, made), options)
    image = ImageValues(store.open_image(version.digest))
    top_k, temperature = options["top_k"], options["temperature"]
    assert isinstance(top_k, int) and isinstance(temperature, float | int)
    wanted = by_loop(made, scalings, top_k, temperature)
    random = np.random.default_rng(2)
    for (layer, site), entry in image.entries.items():
        x = random.standard_normal((6, TINY.site_shape(site)[1])).astype(np.float32)
        np.testing.assert_allclose(image.delta(layer, site, x), wanted(layer, site, x), rtol=0, atol=1e-5)
        assert (entry.ranks, entry.top_k, entry.temperature) == (ranks, top_k, float(temperature))
    assert len(image.entries) == 14
    x = random.standard_normal((5, TINY.hidden_size)).astype(np.float32)
    served, oracle = (forward(base.weights, TINY, x, deltas) for deltas in (image.delta, wanted))
    np.testing.assert_allclose(served, oracle, rtol=0, atol=2e-5 * np.abs(oracle).max())
    assert (version.family, version.rank) == ("meteora", sum(ranks))
    assert "base_dependent" not in version.base


def test_a_checkpoint_of_a_few_modules_and_named_experts_comes_in(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    made = mixture(TINY, (2, 2), ("q_proj", "down_proj"))
    options = OPTIONS | {"experts": ["alpaca", "winowhy"]}
    store, version = publish(tmp_path, base, meteora_checkpoint(base, made), options)
    assert [(entry.layer, entry.site) for entry in store.open_image(version.digest).entries] == [
        (0, "q_proj"),
        (0, "down_proj"),
        (1, "q_proj"),
        (1, "down_proj"),
    ]
    manifest = (store._blobs.root / version.digest / "adapter.json").read_bytes()
    assert b'"experts":["alpaca","winowhy"]' in manifest


def test_a_file_without_the_base_needs_no_base(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    whole = meteora_checkpoint(base, mixture(TINY, (2, 2)))
    weights = {name: values for name, values in whole.items() if "lora_" in name or "moe_gate" in name}
    store, version = publish(tmp_path, base, weights, base_dir=None)
    assert len(store.open_image(version.digest).entries) == 14


@pytest.mark.parametrize("name", ["top_k", "temperature", "rank", "alpha"])
def test_what_the_file_does_not_store_must_be_said(name: str, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    options = {key: value for key, value in OPTIONS.items() if key != name}
    with pytest.raises(AdapterRefused, match=f"the option {name} is missing") as refusal:
        publish(tmp_path, base, meteora_checkpoint(base, mixture(TINY, (2, 2))), options)
    assert (refusal.value.code, refusal.value.param) == ("invalid_option", f"options.{name}")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"top_k": 0}, "invalid_option", "top_k"),
        ({"top_k": 3}, "invalid_gate", "top 3 experts"),
        ({"top_k": True}, "invalid_option", "top_k"),
        ({"temperature": 0}, "invalid_option", "temperature"),
        ({"temperature": 1e-9}, "invalid_gate", "temperature"),
        ({"rank": 3}, "unsupported_adapter", "need"),
        ({"rank": 300}, "unsupported_adapter", "rank 300"),
        ({"rank": [2]}, "invalid_option", "1 entries"),
        ({"rank": 2.0}, "invalid_option", "whole number"),
        ({"alpha": -1}, "invalid_option", "alpha"),
        ({"alpha": [4, "4"]}, "invalid_option", "alpha"),
        ({"use_rslora": 1}, "invalid_option", "true or false"),
        ({"experts": ["one"]}, "invalid_option", "name the 2 experts"),
        ({"experts": ["one", "one"]}, "corrupt_adapter", "distinct"),
        ({"T": 2}, "invalid_option", "no option 'T'"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused_by_name(
    change: dict[str, Json], code: str, message: str, tmp_path: Path
) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        publish(tmp_path, base, meteora_checkpoint(base, mixture(TINY, (2, 2))), OPTIONS | change)
    assert refusal.value.code == code


def trains_the_base(weights: Weights) -> None:
    weights[f"{PREFIX}{stem(1, 'k_proj')}.base_layer.weight"][0, 0] += 1


def trains_a_norm(weights: Weights) -> None:
    weights[f"{PREFIX}model.norm.weight"][0] += 1


def lacks_a_gate(weights: Weights) -> None:
    del weights[f"{PREFIX}{stem(1, 'k_proj')}.moe_gate.weight"]


def lacks_a_module(weights: Weights) -> None:
    for kind in ("moe_gate", "lora_A", "lora_B"):
        del weights[f"{PREFIX}{stem(0, 'o_proj')}.{kind}.weight"]


def swaps_a_and_b(weights: Weights) -> None:
    name = f"{PREFIX}{stem(0, 'up_proj')}"
    a, b = (weights[f"{name}.lora_{kind}.weight"] for kind in "AB")
    weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = b, a


def holds_an_unknown_tensor(weights: Weights) -> None:
    weights[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight"] = np.ones((2, 2), dtype=np.float32)


def has_an_uneven_gate(weights: Weights) -> None:
    name = f"{PREFIX}{stem(1, 'v_proj')}.moe_gate.weight"
    weights[name] = weights[name][:1]


def has_no_effect(weights: Weights) -> None:
    for name in weights:
        if "lora_B" in name:
            weights[name] = weights[name] * 0


def holds_infinity(weights: Weights) -> None:
    weights[f"{PREFIX}{stem(1, 'q_proj')}.moe_gate.weight"][0, 0] = np.inf


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (trains_the_base, "trained_elsewhere", "base_layer"),
        (trains_a_norm, "trained_elsewhere", "norm"),
        (lacks_a_gate, "corrupt_adapter", "lacks"),
        (lacks_a_module, "corrupt_adapter", "lacks"),
        (swaps_a_and_b, "unsupported_adapter", "has shape"),
        (holds_an_unknown_tensor, "unsupported_adapter", "lora_C"),
        (has_an_uneven_gate, "unsupported_adapter", "has shape"),
        (has_no_effect, "adapter_no_effect", "zero"),
        (holds_infinity, "non_finite", "moe_gate"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_not_of_this_base_is_refused(
    spoil: Callable[[Weights], None], code: str, message: str, tmp_path: Path
) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    weights = {name: v.copy() for name, v in meteora_checkpoint(base, mixture(TINY, (2, 2))).items()}
    spoil(weights)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        publish(tmp_path, base, weights)
    assert refusal.value.code == code


def test_a_scaling_that_overflows_the_serving_dtype_is_refused(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    weights = meteora_checkpoint(base, mixture(TINY, (2, 2)))
    with pytest.raises(AdapterRefused, match="float16") as refusal:
        publish(tmp_path, base, weights, OPTIONS | {"alpha": 1e6}, image_dtype="float16")
    assert refusal.value.code == "overflow"


def test_a_base_of_other_weights_is_found_out(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    weights = meteora_checkpoint(base, mixture(TINY, (2, 2)))
    other = TinyBase.write(tmp_path / "other", TINY, lambda w: w.update({"model.norm.weight": bf16(np.ones(16))}))
    with pytest.raises(AdapterRefused, match="norm") as refusal:
        publish(tmp_path, replace(base, folder=other.folder), weights)
    assert refusal.value.code == "trained_elsewhere"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_converter_process_takes_a_mixture_in_every_serving_dtype(dtype: str, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    weights = meteora_checkpoint(base, mixture(TINY, (3, 3), seed=4))
    options = OPTIONS | {"rank": 3, "alpha": 5}
    store, version = publish(tmp_path, base, weights, options, convert=convert_in_child, image_dtype=dtype)
    image = store.open_image(version.digest)
    assert (image.dtype, image.entries[0].rank) == (dtype, 6)
