"""DoRA and IA3: scales in fp32, computed from the base, and every way in which the base or the file can lack."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.base import SITE_PATHS, SITES
from adapters_store.blobs import open_image
from adapters_store.canonical import check_adapter
from adapters_store.convert import base_weights, ia3
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.dora import DoraDelta
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.tuner import Factors
from adapters_store.converter import convert_in_child
from adapters_store.errors import AdapterNotFound, AdapterRefused, ConversionFailed
from adapters_store.manifest import Manifest
from tests.store.deltas import scale_at
from tests.store.folders import TINY, Tensors, float32, lora_config, lora_tensors, open_store, write_folder
from tests.store.tiny_checkpoints import TinyBase, Weights, write_checkpoint

MAGNITUDE = "base_model.model.model.layers.{}.{}.lora_magnitude_vector"
IA3_CONFIG: dict[str, object] = {
    "peft_type": "IA3",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
SCALING = 2.0


def dora_tensors(rank: int = 2) -> Tensors:
    """Return a DoRA's tensors with magnitudes near 1."""
    random = np.random.default_rng(8)
    tensors = lora_tensors(rank=rank)
    for layer in range(TINY.num_hidden_layers):
        for site in SITES:
            values = 1 + random.standard_normal(TINY.site_shape(site)[0]) / 8
            tensors[MAGNITUDE.format(layer, SITE_PATHS[site])] = float32(values)
    return tensors


def ia3_tensors(sites: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")) -> Tensors:
    """Return an IA3's vectors near 1."""
    random = np.random.default_rng(9)
    tensors: Tensors = {}
    for layer in range(TINY.num_hidden_layers):
        for site in sites:
            num_out, num_in = TINY.site_shape(site)
            shape = (1, num_in) if site == "down_proj" else (num_out, 1)
            values = 1 + random.standard_normal(shape) / 8
            tensors[f"base_model.model.model.layers.{layer}.{SITE_PATHS[site]}.ia3_l"] = float32(values)
    return tensors


@dataclass
class Room:
    """A tiny base and conversions over it."""

    root: Path
    base: TinyBase

    def convert(
        self, config: dict[str, object], tensors: Tensors, dtype: str = "float32", *, has_base: bool = True
    ) -> Manifest:
        """Convert into the folder `target`; the result is checked as the server does."""
        options = ConvertOptions(self.base.dims, dtype, 16, base_dir=str(self.base.folder) if has_base else None)
        target = self.root / f"target{len(list(self.root.iterdir()))}"
        target.mkdir()
        convert_peft(write_folder(self.root / "source", config, tensors), target, options)
        manifest = check_adapter(target, self.base.dims, dtype, 16)
        target.rename(self.root / manifest.digest())
        return manifest

    def refusal(self, config: dict[str, object], tensors: Tensors, *, has_base: bool = True) -> AdapterRefused:
        """Convert, which must be refused."""
        with pytest.raises(AdapterRefused) as refusal:
            self.convert(config, tensors, has_base=has_base)
        return refusal.value


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path, TinyBase.write(tmp_path / "base", TINY))


DORA_CONFIG = lora_config(use_dora=True)
KINDS: dict[str, tuple[dict[str, object], Callable[[], Tensors]]] = {
    "dora": (DORA_CONFIG, dora_tensors),
    "ia3": (IA3_CONFIG, ia3_tensors),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_doras_scale_is_the_magnitude_by_the_length_of_the_row_in_every_dtype(dtype: str, room: Room) -> None:
    tensors = dora_tensors()
    image = open_image(room.root, room.convert(DORA_CONFIG, tensors, dtype).digest())
    assert len(image.entries) == 2 * len(SITES)
    for entry in image.entries:
        path = SITE_PATHS[entry.site]
        stem = f"base_model.model.model.layers.{entry.layer}.{path}"
        a, b, magnitude = (
            np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64)
            for _, shape, raw in (
                tensors[f"{stem}.{name}"] for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
        )
        weight = room.base.weights[f"model.layers.{entry.layer}.{path}.weight"]
        lengths = np.array([sum(v * v for v in row) ** 0.5 for row in (weight + SCALING * b @ a).tolist()])
        stored = scale_at(image, entry.out_scale_offset, len(b))
        np.testing.assert_allclose(stored, magnitude / lengths, rtol=2.0**-23)
        assert entry.in_scale_offset is None and entry.rank == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_computed_from_the_base_is_served_over_it_alone(kind: str, room: Room) -> None:
    config, tensors = KINDS[kind][0], KINDS[kind][1]()
    folder = write_folder(room.root / "up", config, tensors)
    store = open_store(room.root / "store", room.base.dims, base_dir=room.base.folder)
    version = store.put_dir("a", folder)
    assert version.base["base_dependent"] is True
    assert store.open_image(version.digest).base_dependent
    store.close()
    other = open_store(room.root / "store", replace(room.base.dims, weights_fingerprint="sha256:" + "1" * 64))
    with pytest.raises(AdapterNotFound):
        other.open_image(version.digest)
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_base_the_reason_is_named(kind: str, room: Room) -> None:
    error = room.refusal(KINDS[kind][0], KINDS[kind][1](), has_base=False)
    assert error.code == "wrong_base" and "--base" in error.message


def test_scales_of_inputs_need_no_base(room: Room) -> None:
    config = IA3_CONFIG | {"target_modules": ["down_proj"]}
    made = room.convert(config, ia3_tensors(("down_proj",)), "bfloat16", has_base=False)
    assert not made.base_dependent
    (entry, _) = open_image(room.root, made.digest()).entries
    wanted = ia3_tensors(("down_proj",))["base_model.model.model.layers.0.mlp.down_proj.ia3_l"][2]
    stored = scale_at(open_image(room.root, made.digest()), entry.in_scale_offset, TINY.intermediate_size)
    assert stored.tobytes() == wanted


def test_a_bias_is_served_only_where_the_base_has_one(tmp_path: Path) -> None:
    def add_bias(weights: Weights) -> None:
        weights["model.layers.1.self_attn.k_proj.bias"] = np.full(TINY.site_shape("k_proj")[0], 2.0, np.float32)

    room = Room(tmp_path, TinyBase.write(tmp_path / "base", TINY, add_bias))
    made = room.convert(IA3_CONFIG, ia3_tensors())
    assert [module.path for module in made.modules if module.has_bias] == ["layers.1.self_attn.k_proj"]


def test_both_spellings_of_the_magnitude_are_one_adapter(room: Room) -> None:
    new = dora_tensors()
    old = {f"{name}.weight" if name.endswith("_vector") else name: value for name, value in new.items()}
    assert room.convert(DORA_CONFIG, old).file_sha256 == room.convert(DORA_CONFIG, new).file_sha256
    both = new | {f"{MAGNITUDE.format(0, SITE_PATHS['q_proj'])}.weight": float32(np.ones(24))}
    assert room.refusal(DORA_CONFIG, both).code == "unsupported_adapter"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (None, "corrupt_adapter"),
        (np.ones(23), "unsupported_adapter"),
        (np.ones((24, 1)), "unsupported_adapter"),
        (np.full(24, np.nan), "non_finite"),
    ],
    ids=["missing", "too short", "a matrix", "NaN"],
)
def test_a_wrong_magnitude_is_refused(change: np.ndarray | None, code: str, room: Room) -> None:
    name = MAGNITUDE.format(1, SITE_PATHS["q_proj"])
    tensors = dora_tensors()
    del tensors[name]
    if change is not None:
        tensors[name] = float32(change)
    error = room.refusal(DORA_CONFIG, tensors)
    assert error.code == code
    assert error.param is not None and "layers.1.self_attn.q_proj" in error.param


def test_a_row_of_length_zero_is_refused_and_its_neighbour_taken(tmp_path: Path) -> None:
    def clear_row(weights: Weights) -> None:
        weights["model.layers.1.self_attn.q_proj.weight"][5] = 0

    room = Room(tmp_path, TinyBase.write(tmp_path / "base", TINY, clear_row))
    room.convert(DORA_CONFIG, dora_tensors())
    tensors = dora_tensors()
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    b = np.frombuffer(tensors[name][2], "<f4").reshape(24, 2).copy()
    b[5] = 0
    error = room.refusal(DORA_CONFIG, tensors | {name: float32(b)})
    assert error.code == "unsupported_adapter" and error.param == "model.layers.1.self_attn.q_proj"
    assert "row 5" in error.message


def test_a_quotient_beyond_float32_is_refused(tmp_path: Path) -> None:
    def shrink(weights: Weights) -> None:
        weights["model.layers.0.self_attn.q_proj.weight"] *= np.float32(2.0**-100)

    room = Room(tmp_path, TinyBase.write(tmp_path / "base", TINY, shrink))
    tensors = dora_tensors()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{stem}.lora_B.weight"] = float32(np.zeros((24, 2)))
    tensors[f"{stem}.lora_magnitude_vector"] = float32(np.full(24, 2.0**60))
    error = room.refusal(DORA_CONFIG, tensors)
    assert error.code == "overflow" and error.param == "model.layers.0.self_attn.q_proj"


def test_a_base_without_the_layer_is_another_base(tmp_path: Path) -> None:
    def quantise(weights: Weights) -> None:
        weights["model.layers.1.mlp.up_proj.qweight"] = weights.pop("model.layers.1.mlp.up_proj.weight")

    room = Room(tmp_path, TinyBase.write(tmp_path / "base", TINY, quantise))
    error = room.refusal(DORA_CONFIG, dora_tensors())
    assert error.code == "wrong_base" and "layers.1.mlp.up_proj" in error.message


def test_pieces_and_fused_files_of_a_base_read_alike(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = dict(room.base.weights)
    for layer in range(TINY.num_hidden_layers):
        for name, sites in base_weights.FUSED_SITES.items():
            parts = [fused.pop(f"model.layers.{layer}.{SITE_PATHS[site]}.weight") for site in sites]
            fused[f"model.layers.{layer}.{name}.weight"] = np.concatenate(parts)
    fused["model.layers.0.self_attn.qkv_proj.bias"] = np.arange(48, dtype=np.float32)
    write_checkpoint(room.root / "fused", fused)
    monkeypatch.setattr(base_weights, "_CHUNK_VALUES", 3 * TINY.hidden_size)
    whole = BaseWeights(str(room.base.folder), TINY)
    other = BaseWeights(str(room.root / "fused"), TINY)
    for sites in [("k_proj",), ("up_proj",), ("down_proj",), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]:
        wanted = np.concatenate([room.base.weights[f"model.layers.1.{SITE_PATHS[site]}.weight"] for site in sites])
        for files in (whole, other):
            pieces = list(files.rows(1, sites))
            assert len(pieces) > 1
            for rows, piece in pieces:
                np.testing.assert_array_equal(piece, wanted[rows])
            assert sum(len(piece) for _, piece in pieces) == len(wanted)
    assert whole.bias(0, ("k_proj",)) is None
    np.testing.assert_array_equal(other.bias(0, ("k_proj", "v_proj")), np.arange(24, 48))
    whole.close()
    other.close()


PLANTED: dict[str, Callable[[Factors], Factors]] = {
    "a scale is off by a millionth": lambda good: replace(
        good,
        out_scale=None if good.out_scale is None else good.out_scale.astype(np.float64) * (1 + 1e-6),
        in_scale=None if good.in_scale is None else good.in_scale.astype(np.float64) * (1 + 1e-6),
    ),
    "scales are shifted by one": lambda good: replace(
        good,
        out_scale=None if good.out_scale is None else np.roll(good.out_scale, 1),
        in_scale=None if good.in_scale is None else np.roll(good.in_scale, 1),
    ),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_scale_is_never_published(
    kind: str, planted: Callable[[Factors], Factors], room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta_class: type = DoraDelta if kind == "dora" else ia3._Delta
    sound = delta_class.factors  # type: ignore[attr-defined]
    monkeypatch.setattr(delta_class, "factors", lambda delta: planted(sound(delta)))
    with pytest.raises(ConversionFailed):
        room.convert(KINDS[kind][0], KINDS[kind][1]())


def test_the_child_reads_the_base_too(room: Room) -> None:
    target = room.root / "work" / "target"
    target.mkdir(parents=True)
    options = ConvertOptions(room.base.dims, "float32", 16, base_dir=str(room.base.folder))
    convert_in_child(write_folder(room.root / "up", DORA_CONFIG, dora_tensors()), target, options)
    assert check_adapter(target, room.base.dims, "float32", 16) == room.convert(DORA_CONFIG, dora_tensors())
