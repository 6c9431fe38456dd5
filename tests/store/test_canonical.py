"""The canonical file is the adapter image: order, alignment, padding and header follow from the manifest alone."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from adapters_store.base import SITES
from adapters_store.canonical import ALIGNMENT, encode_header, is_padding, layout
from adapters_store.errors import CorruptUpload
from adapters_store.manifest import Manifest, Module, Source, parse_manifest
from adapters_store.store import AdapterStore
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, write_folder

MANIFEST = Manifest(
    family="lora",
    base=TINY,
    dtype="bfloat16",
    file_bytes=1000,
    file_sha256="0" * 64,
    modules=(Module(0, 0, 3, has_bias=False), Module(1, 6, 0, has_bias=True)),
    source=Source("peft/LORA", {"adapter_config.json": "1" * 64}, {"r": 3}, ("lora_dropout",), 0.25),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_data_section_is_layer_major_in_site_order_and_128_byte_aligned(dtype: str) -> None:
    modules = [Module(layer, site, 3, has_bias=layer == 1) for layer in range(2) for site in range(7)]
    slots = layout(modules, TINY, dtype)
    assert [slot.begin for slot in slots[1:]] == [slot.end for slot in slots[:-1]]
    assert slots[-1].end % ALIGNMENT == 0
    tensors = [slot for slot in slots if not is_padding(slot)]
    assert all(slot.begin % ALIGNMENT == 0 for slot in tensors)
    shorts = [site.removesuffix("_proj") for site in SITES]
    wanted = [f"L0.{short}.{kind}" for short in shorts for kind in ("A", "BT")]
    wanted += [f"L1.{short}.{kind}" for short in shorts for kind in ("A", "BT", "bias")]
    assert [slot.name for slot in tensors] == wanted
    assert len(encode_header(slots)) % ALIGNMENT == 0


def test_ranks_are_true_and_never_padded(store: AdapterStore, tmp_path: Path) -> None:
    config = lora_config(target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5})
    tensors = lora_tensors(sites=("q_proj",), rank=2) | lora_tensors(sites=("k_proj",), rank=5)
    image = store.open_image(store.put_dir("a", write_folder(tmp_path / "f", config, tensors)).digest)
    assert [entry.rank for entry in image.entries] == [2, 5, 2, 5]
    assert image.rank == 5


def test_another_safetensors_reader_sees_the_same_tensors(store: AdapterStore, good_folder: Path) -> None:
    image = store.open_image(store.put_dir("a", good_folder).digest)
    theirs = load_file(store._blobs.root / image.digest / "adapter.safetensors")
    for entry in image.entries:
        short = entry.site.removesuffix("_proj")
        a = theirs[f"L{entry.layer}.{short}.A"]
        ours = np.frombuffer(image.data, dtype="<f4", count=a.size, offset=entry.a_offset).reshape(a.shape)
        np.testing.assert_array_equal(ours, a)
    assert all(not theirs[name].any() for name in theirs if name.startswith("pad."))


def test_the_image_is_mapped_read_only_and_outlives_the_store(store_dir: Path, good_folder: Path) -> None:
    store = open_store(store_dir)
    image = store.open_image(store.put_dir("a", good_folder).digest)
    store.close()
    assert image.data.readonly and len(image.data) == image.num_bytes
    with pytest.raises(TypeError):
        image.data[0] = 1
    assert np.frombuffer(image.data, dtype=np.uint8).ctypes.data % ALIGNMENT == 0


def test_a_manifest_reads_back_and_its_digest_follows_from_its_bytes() -> None:
    again = parse_manifest(MANIFEST.to_bytes())
    assert again == MANIFEST and again.digest() == MANIFEST.digest()
    assert b"created" not in MANIFEST.to_bytes() and b'"name":"a' not in MANIFEST.to_bytes().replace(b"adapter", b"")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("version",), True),
        (("format",), "other"),
        (("family",), "other"),
        (("extra",), 1),
        (("dtype",), "float64"),
        (("base", "hidden_size"), 0),
        (("base", "hidden_size"), 16.0),
        (("base", "hidden_size"), 1 << 40),
        (("base", "extra"), 1),
        (("base", "base_dependent"), 1),
        (("base", "tie_word_embeddings"), 0),
        (("files",), []),
        (("files", 0, "name"), "../x"),
        (("files", 0, "bytes"), -1),
        (("files", 0, "sha256"), "G" * 64),
        (("modules",), {}),
        (("modules", "layers.9.self_attn.q_proj"), [{"A": "L9.q.A", "BT": "L9.q.BT", "op": "lowrank", "rank": 1}]),
        (("modules", "layers.0.self_attn.q_proj"), []),
        (("modules", "layers.0.self_attn.x_proj"), [{"bias": "L0.x.bias", "op": "bias"}]),
        (("modules", "layers.0.mlp.q_proj"), [{"bias": "L0.q.bias", "op": "bias"}]),
        (("modules", "layers.0.self_attn.q_proj", 0, "rank"), -1),
        (("modules", "layers.0.self_attn.q_proj", 0, "A"), "L1.q.A"),
        (("modules", "layers.0.self_attn.q_proj", 0, "op"), "dense"),
        (("source", "max_abs_error"), "0"),
        (("source",), None),
    ],
)
def test_a_manifest_with_one_wrong_value_is_refused(path: tuple[str | int, ...], value: object) -> None:
    tree = json.loads(MANIFEST.to_bytes())
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, len(MANIFEST.to_bytes()) - 1), st.integers(0, 7))
def test_a_flipped_bit_of_a_manifest_never_keeps_its_digest(position: int, bit: int) -> None:
    raw = bytearray(MANIFEST.to_bytes())
    raw[position] ^= 1 << bit
    with contextlib.suppress(CorruptUpload):
        assert parse_manifest(bytes(raw)).digest() != MANIFEST.digest()
