"""S2FT checkpoints by the published recipe come in exactly; what cannot be told is refused with its reason."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.base import BaseDims
from adapters_store.convert.dispatch import convert
from adapters_store.converter import convert_in_child
from adapters_store.errors import AdapterNotFound, AdapterRefused, StoreError
from adapters_store.formats import Declared
from adapters_store.store import AdapterStore, AdapterVersion
from tests.store.folders import open_store, safetensors_bytes
from tests.store.image_values import ImageValues
from tests.store.tiny_checkpoints import (
    GQA,
    MHA,
    S2ft,
    TinyBase,
    Weights,
    bf16,
    entry,
    forward,
    s2ft_checkpoint,
    stem,
    write_checkpoint,
)

# ragged, with empty layers; a quarter of 24 channels is 6, of 4 heads one
SELECTIONS = {
    "all four sites": S2ft(v=[[2], []], o=[[1], [3]], up=[[5, 20], [1]], down=[[20, 3, 7], []]),
    "the same heads and channels": S2ft(v=[[1], [1]], o=[[1], [1]], up=[[9, 4], [0]], down=[[4, 9], [0]]),
    "down alone": S2ft(down=[[], [23, 11, 2, 8, 15, 0]]),
    "one head of o": S2ft(o=[[2], []]),
}
GROUPED = {
    "down and up": S2ft(up=[[3], []], down=[[9, 1], [22]]),
    "groups of heads moved": S2ft(o=[[2], []], down=[[], [4]]),
}


def publish(root: Path, base: TinyBase, weights: Weights, **options: object) -> tuple[AdapterStore, AdapterVersion]:
    """Write the checkpoint and put it into a store that has the base's weights at hand."""
    write_checkpoint(root / "ft", weights, vocab_size=40)
    store = open_store(root / "store", base.dims, **{"convert": convert, "base_dir": base.folder, **options})  # type: ignore[arg-type]
    return store, store.put_dir("a", root / "ft")


@pytest.mark.parametrize(
    ("dims", "chosen"),
    [*((MHA, each) for each in SELECTIONS.values()), *((GQA, each) for each in GROUPED.values())],
    ids=[*SELECTIONS, *GROUPED],
)
def test_a_published_checkpoint_comes_in_exactly(dims: BaseDims, chosen: S2ft, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", dims)
    weights, trained = s2ft_checkpoint(base, chosen)
    store, version = publish(tmp_path, base, weights)
    image = ImageValues(store.open_image(version.digest))
    assert image.entries.keys() == trained.keys()
    for (layer, site), delta in trained.items():
        found = image.delta(layer, site, np.eye(delta.shape[1], dtype=np.float32)).T
        np.testing.assert_allclose(found, delta, rtol=0, atol=1e-7)
    x = np.random.default_rng(5).standard_normal((5, dims.hidden_size)).astype(np.float32)
    wanted = forward(weights, dims, x)
    np.testing.assert_allclose(forward(base.weights, dims, x, image.delta), wanted, rtol=0, atol=1e-5)
    assert np.abs(forward(base.weights, dims, x) - wanted).max() > 1e-3
    assert (version.family, version.rank) == ("s2ft", 0)


def test_selected_positions_are_those_of_the_recipe(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    store, version = publish(tmp_path, base, s2ft_checkpoint(base, SELECTIONS["all four sites"])[0])
    image = ImageValues(store.open_image(version.digest))
    down, o, v = (image.entries[0, site] for site in ("down_proj", "o_proj", "v_proj"))
    assert down.cols is not None and image.indices(down.cols) == [3, 7, 20]
    assert o.cols is not None and image.indices(o.cols) == [6, 7, 8, 9, 10, 11]
    assert v.rows is not None and image.indices(v.rows) == [12, 13, 14, 15, 16, 17]


def test_vocabulary_rows_added_by_resizing_are_taken_and_named(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights, _ = s2ft_checkpoint(base, SELECTIONS["down alone"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        added = bf16(np.ones((8, base.dims.hidden_size)))
        weights[name] = np.concatenate([weights[name], added])
    _, version = publish(tmp_path, base, weights)
    assert set(version.report.ignored) == {"model.embed_tokens.weight[32:40]", "lm_head.weight[32:40]"}


def test_a_float32_checkpoint_of_a_bfloat16_base_is_compared_by_value(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights, trained = s2ft_checkpoint(base, SELECTIONS["one head of o"])
    write_checkpoint(tmp_path / "ft", weights, "F32")
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    image = ImageValues(store.open_image(store.put_dir("a", tmp_path / "ft").digest))
    found = image.delta(0, "o_proj", np.eye(24, dtype=np.float32)).T
    np.testing.assert_allclose(found, trained[0, "o_proj"], rtol=0, atol=1e-7)


def test_shards_come_in_as_one_file_does(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights, _ = s2ft_checkpoint(base, SELECTIONS["all four sites"])
    store, version = publish(tmp_path, base, weights)
    (tmp_path / "ft" / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in ((1, names[:9]), (2, names[9:])):
        raw = safetensors_bytes({name: entry(weights[name], "BF16") for name in part})
        (tmp_path / "ft" / f"model-0000{number}-of-00002.safetensors").write_bytes(raw)
    again = store.put_dir("b", tmp_path / "ft")
    assert store.open_image(again.digest).data == store.open_image(version.digest).data
    (tmp_path / "ft" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AdapterRefused, match="promise another number") as refusal:
        store.put_dir("c", tmp_path / "ft")
    assert refusal.value.code == "corrupt_adapter"


def test_tensors_s2_that_were_not_fused_are_placed_where_that_can_be_told(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    chosen = S2ft(v=[[2], []], up=[[], [7, 3]], down=[[5, 4], []])
    fused, trained = s2ft_checkpoint(base, chosen)
    weights = dict(s2ft_checkpoint(base, chosen)[0])
    for (layer, site), delta in trained.items():
        head = base.dims.head_dim
        rows = {"v_proj": [2 * head + i for i in range(head)], "up_proj": [7, 3], "down_proj": [5, 4]}[site]
        s2 = delta[:, rows] if site == "down_proj" else delta[rows]
        count = len(rows)
        weight = weights[f"{stem(layer, site)}.weight"].copy()
        weight[np.s_[:, :count] if site == "down_proj" else np.s_[:count]] -= s2
        weights[f"{stem(layer, site)}.weight"] = weight
        weights[f"{stem(layer, site)}.s2"] = s2
    write_checkpoint(tmp_path / "ft", weights, "F32")
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    image = ImageValues(store.open_image(store.put_dir("a", tmp_path / "ft").digest))
    x = np.random.default_rng(5).standard_normal((5, MHA.hidden_size)).astype(np.float32)
    np.testing.assert_allclose(forward(base.weights, MHA, x, image.delta), forward(fused, MHA, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lm_head", ["absent", "equal", "other"])
def test_a_tied_head_may_be_saved_if_it_is_the_embedding(lm_head: str, tmp_path: Path) -> None:
    dims = replace(MHA, tie_word_embeddings=True)
    base = TinyBase.write(tmp_path / "base", dims, lambda weights: weights.pop("lm_head.weight"))
    weights, _ = s2ft_checkpoint(base, SELECTIONS["down alone"])
    if lm_head != "absent":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    if lm_head == "other":
        weights["lm_head.weight"][0, 0] += 1
        with pytest.raises(AdapterRefused, match="ties") as refusal:
            publish(tmp_path, base, weights)
        assert refusal.value.code == "trained_elsewhere"
    else:
        assert publish(tmp_path, base, weights)[1].family == "s2ft"


def test_a_tied_base_may_keep_its_one_table_as_the_head(tmp_path: Path) -> None:
    def keep_the_head(weights: Weights) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    base = TinyBase.write(tmp_path / "base", replace(MHA, tie_word_embeddings=True), keep_the_head)
    own, _ = s2ft_checkpoint(base, SELECTIONS["down alone"])
    table = own.pop("lm_head.weight")
    for number, names in enumerate((["lm_head"], ["model.embed_tokens"], ["lm_head", "model.embed_tokens"])):
        weights = own | {f"{name}.weight": table for name in names}
        assert publish(tmp_path / str(number), base, weights)[1].family == "s2ft"


def trains_gate(weights: Weights) -> None:
    weights[f"{stem(1, 'gate_proj')}.weight"][4, 2] += 1


def trains_q(weights: Weights) -> None:
    weights[f"{stem(0, 'q_proj')}.weight"][:6] += 1


def trains_a_norm(weights: Weights) -> None:
    weights["model.norm.weight"][0] += 1


def trains_the_vocabulary(weights: Weights) -> None:
    weights["model.embed_tokens.weight"][3, 3] += 1


def swaps_heads_of_q_alone(weights: Weights) -> None:
    name = f"{stem(1, 'q_proj')}.weight"
    weights[name] = np.concatenate([weights[name][6:12], weights[name][:6], weights[name][12:]])


def holds_a_gate_row_twice(weights: Weights) -> None:
    name = f"{stem(0, 'gate_proj')}.weight"
    weights[name] = weights[name][[0, 0, *range(2, 24)]]


def trains_everything(weights: Weights) -> None:
    weights[f"{stem(0, 'down_proj')}.weight"] += 1


def lacks_a_tensor(weights: Weights) -> None:
    del weights[f"{stem(1, 'up_proj')}.weight"]


def holds_another_tensor(weights: Weights) -> None:
    weights["model.layers.0.self_attn.extra.weight"] = np.ones(3, dtype=np.float32)


def is_another_base(weights: Weights) -> None:
    weights[f"{stem(0, 'gate_proj')}.weight"] = bf16(np.random.default_rng(1).standard_normal((24, 16)))


def has_another_width(weights: Weights) -> None:
    weights[f"{stem(0, 'gate_proj')}.weight"] = weights[f"{stem(0, 'gate_proj')}.weight"][:, :8]


def resizes_too_far(weights: Weights) -> None:
    weights["lm_head.weight"] = np.concatenate([weights["lm_head.weight"]] * 9)


def loses_vocabulary(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:8]


def holds_nan(weights: Weights) -> None:
    weights[f"{stem(0, 'down_proj')}.weight"][2, 0] = np.nan


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (trains_gate, "trained_elsewhere", "gate_proj"),
        (trains_q, "trained_elsewhere", "q_proj"),
        (trains_a_norm, "trained_elsewhere", "norm"),
        (trains_the_vocabulary, "trained_elsewhere", "embed_tokens"),
        (swaps_heads_of_q_alone, "ambiguous_order", "do not belong together"),
        (holds_a_gate_row_twice, "ambiguous_order", "twice"),
        (trains_everything, "limit_exceeded", "a quarter"),
        (lacks_a_tensor, "corrupt_adapter", "lacks"),
        (holds_another_tensor, "unsupported_adapter", "extra"),
        (is_another_base, "wrong_base", "another base"),
        (has_another_width, "wrong_base", "has shape"),
        (resizes_too_far, "wrong_base", "lm_head"),
        (loses_vocabulary, "wrong_base", "lm_head"),
        (holds_nan, "non_finite", "down_proj"),
    ],
)
def test_a_checkpoint_that_is_not_what_s2ft_leaves_is_refused(
    spoil: Callable[[Weights], None], code: str, message: str, tmp_path: Path
) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights = {name: v.copy() for name, v in s2ft_checkpoint(base, SELECTIONS["down alone"])[0].items()}
    spoil(weights)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        publish(tmp_path, base, weights)
    assert refusal.value.code == code


def equal_rows(weights: Weights) -> None:
    name = f"{stem(1, 'gate_proj')}.weight"
    weights[name][5] = weights[name][9]


def test_a_base_with_equal_rows_leaves_the_order_untold(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA, equal_rows)
    with pytest.raises(AdapterRefused, match="equal rows at 5 and 9") as refusal:
        publish(tmp_path, base, s2ft_checkpoint(base, SELECTIONS["down alone"])[0])
    assert refusal.value.code == "ambiguous_order"


def test_the_base_itself_in_another_order_is_no_adapter(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    with pytest.raises(AdapterRefused, match="nothing was trained") as refusal:
        publish(tmp_path, base, s2ft_checkpoint(base, S2ft())[0])
    assert refusal.value.code == "adapter_no_effect"


def test_another_computation_over_the_same_weights_is_refused_by_its_key(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    write_checkpoint(tmp_path / "ft", s2ft_checkpoint(base, SELECTIONS["down alone"])[0], rope_theta=5e5)
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(AdapterRefused, match="rope_theta"):
        store.put_dir("a", tmp_path / "ft")


def test_without_the_bases_weights_the_way_out_is_named(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights, _ = s2ft_checkpoint(base, SELECTIONS["down alone"])
    with pytest.raises(AdapterRefused, match="--base") as refusal:
        publish(tmp_path, base, weights, base_dir=None)
    assert refusal.value.code == "wrong_base"


@pytest.mark.parametrize(
    ("declared", "code"),
    [
        (Declared("s2ft", {"top_k": 2}), "invalid_option"),
        (Declared("peft"), "corrupt_adapter"),
        (Declared("meteora"), "corrupt_adapter"),
    ],
)
def test_a_checkpoint_declared_as_something_else_is_refused(declared: Declared, code: str, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    write_checkpoint(tmp_path / "ft", s2ft_checkpoint(base, SELECTIONS["down alone"])[0])
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(StoreError) as refusal:
        store.put_dir("a", tmp_path / "ft", declared=declared)
    assert refusal.value.code == code


def test_a_pickled_checkpoint_is_never_opened_in_this_process(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    (tmp_path / "ft").mkdir()
    (tmp_path / "ft" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(AdapterRefused, match="safe_serialization=True") as refusal:
        store.put_dir("a", tmp_path / "ft")
    assert refusal.value.code == "unsupported_format"


def test_only_the_weights_it_was_made_from_may_serve_it(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    store, version = publish(tmp_path, base, s2ft_checkpoint(base, SELECTIONS["down alone"])[0])
    assert store.resolve("a") is not None
    store.close()
    other = open_store(tmp_path / "store", MHA)
    assert other.resolve("a") is None and other.list() == []
    with pytest.raises(AdapterNotFound, match="weights"):
        other.open_image(version.digest)
    other.close()


def test_the_converter_process_takes_a_checkpoint_and_its_refusals_arrive(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    weights, _ = s2ft_checkpoint(base, SELECTIONS["all four sites"])
    store, version = publish(tmp_path, base, weights, convert=convert_in_child, image_dtype="bfloat16")
    assert len(store.open_image(version.digest).entries) == 6
    with pytest.raises(AdapterRefused, match="no option 'rank'") as refusal:
        store.put_dir("b", tmp_path / "ft", declared=Declared("s2ft", {"rank": 8}))
    assert (refusal.value.code, refusal.value.param) == ("invalid_option", "options")
