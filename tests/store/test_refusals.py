"""Attack rows A01-A12 of uploads: every hostile or wrong folder is refused with a code and the field that is wrong."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from adapters_store.base import SITE_PATHS
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.errors import AdapterRefused, UploadTooLarge
from adapters_store.store import AdapterStore
from tests.store.folders import (
    TINY,
    Tensors,
    float32,
    lora_config,
    lora_tensors,
    open_store,
    safetensors_bytes,
    write_folder,
)

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
EXTRA_LAYER = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
A_NAME, B_NAME = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


@dataclass(frozen=True)
class Bad:
    """One wrong upload: changed config keys, a change of the tensors, and how it must be refused."""

    code: str
    param: str | None = None
    config: dict[str, object] | None = None
    change: Callable[[Tensors], None] = lambda tensors: None


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, values: object) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = float32(values)  # type: ignore[arg-type]

    return change


def poison(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        dtype, shape, raw = tensors[name]
        values = np.frombuffer(raw, "<f4").copy()
        values[len(values) // 2] = value
        tensors[name] = (dtype, shape, values.tobytes())

    return change


def retype(name: str, dtype: str, num_bytes: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = (dtype, tensors[name][1], b"\1" * num_bytes)

    return change


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def fuse(tensors: Tensors) -> None:
    for matrix in "AB":
        tensors[f"{STEM[:-6]}qkv_proj.lora_{matrix}.weight"] = float32(np.ones((2, 2)))


def put_extra_layer(tensors: Tensors) -> None:
    tensors[EXTRA_LAYER.format(2)] = tensors[A_NAME]
    tensors[EXTRA_LAYER.format(2).replace("lora_A", "lora_B")] = tensors[B_NAME]


def zero(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name, (dtype, shape, raw) in tensors.items():
            if suffix in name:
                tensors[name] = (dtype, shape, bytes(len(raw)))

    return change


UNSUPPORTED = "unsupported_adapter"
CORRUPT = "corrupt_adapter"
# by key, and by value where only some of a key's values are told apart
CODES = {
    ("layer_replication", ""): "layer_replication",
    ("unheard_of", ""): "unknown_field",
    ("__class__", ""): "unknown_field",
    ("init_lora_weights", ""): "unconverted_init",
    # these need the base, which is not at hand here
    ("init_lora_weights", "pissa"): "wrong_base",
    ("init_lora_weights", "olora"): "wrong_base",
    ("bias", "all"): "wrong_base",
    ("bias", "lora_only"): "wrong_base",
    ("target_modules", "[]"): "no_target",
    ("target_modules", "['embed_tokens']"): "no_target",
    ("layers_to_transform", "[2]"): "no_target",
    ("modules_to_save", ""): CORRUPT,
    ("trainable_token_indices", "[1, 2]"): CORRUPT,
    ("kasa_config", "{'beta': 0.1}"): CORRUPT,
}
CONFIGS: dict[str, Bad] = {
    f"{key}={value!r}"[:70]: Bad(CODES.get((key, str(value)), CODES.get((key, ""), UNSUPPORTED)), param, {key: value})
    for key, value, param in [
        ("r", 0, "r"),
        ("r", -1, "r"),
        ("r", 10**6, "r"),
        ("r", 2.0, "r"),
        ("r", "2", "r"),
        ("r", True, "r"),
        ("r", None, "r"),
        ("r", 3, A_NAME),
        ("lora_alpha", 1e308, "lora_alpha"),
        ("lora_alpha", -1, "lora_alpha"),
        ("lora_alpha", 0, "lora_alpha"),
        ("lora_alpha", "16", "lora_alpha"),
        ("lora_alpha", True, "lora_alpha"),
        ("lora_alpha", [], "lora_alpha"),
        ("use_rslora", "yes", "use_rslora"),
        ("lora_bias", 1, "lora_bias"),
        ("peft_type", "XLORA", "peft_type"),
        ("peft_type", "lora", "peft_type"),
        ("peft_type", None, "peft_type"),
        ("peft_type", ["LORA"], "peft_type"),
        ("task_type", "SEQ_CLS", "task_type"),
        ("bias", "all", None),
        ("bias", "lora_only", None),
        ("bias", None, "bias"),
        ("target_modules", "(a+)+$", "target_modules"),
        ("target_modules", "q_proj", "target_modules"),
        ("target_modules", [], "target_modules"),
        ("target_modules", ["q_proj", "(a+)+$"], "target_modules"),
        ("target_modules", ["q_proj", 7], "target_modules"),
        ("target_modules", {"q_proj": 1}, "target_modules"),
        ("target_modules", ["q_proj", "lm_head"], "target_modules"),
        ("target_modules", ["embed_tokens"], "target_modules"),
        ("target_modules", ["k_proj"], "target_modules"),
        ("target_modules", [f"a{i}" for i in range(1025)], "target_modules"),
        ("rank_pattern", {f"a{i}": 2 for i in range(1025)}, "rank_pattern"),
        ("exclude_modules", ".*q_proj", "exclude_modules"),
        ("exclude_modules", ["q_proj"], "target_modules"),
        ("rank_pattern", {"(a+)+b": 4}, "rank_pattern"),
        ("rank_pattern", {"q_proj": "4"}, "rank_pattern"),
        ("rank_pattern", {"q_proj|k_proj": 4}, "rank_pattern"),
        ("rank_pattern", ["q_proj"], "rank_pattern"),
        ("rank_pattern", {"q_proj": 4}, A_NAME),
        ("alpha_pattern", {"layers.*": 4}, "alpha_pattern"),
        ("alpha_pattern", {"q_proj": -4}, "alpha_pattern"),
        ("layers_to_transform", [10**9], "layers_to_transform"),
        ("layers_to_transform", [2], "layers_to_transform"),
        ("layers_to_transform", [-1], "layers_to_transform"),
        ("layers_to_transform", "0", "layers_to_transform"),
        ("layers_to_transform", [True], "layers_to_transform"),
        ("layers_to_transform", [0], "target_modules"),
        ("layers_pattern", "(h|layers)+", "layers_pattern"),
        ("layers_pattern", ["h"], "layers_pattern"),
        ("layers_pattern", {"a": 1}, "layers_pattern"),
        ("init_lora_weights", "pissa", None),
        ("init_lora_weights", "pissa_niter_16", "init_lora_weights"),
        ("init_lora_weights", "olora", None),
        ("init_lora_weights", "corda", "init_lora_weights"),
        ("init_lora_weights", "lora_ga", "init_lora_weights"),
        ("init_lora_weights", "loftq", "init_lora_weights"),
        ("init_lora_weights", "new_kind", "init_lora_weights"),
        ("use_dora", "yes", "use_dora"),
        ("modules_to_save", ["lm_head"], "lm_head"),
        ("trainable_token_indices", [1, 2], "embed_tokens"),
        ("trainable_token_indices", {"norm": [1]}, "trainable_token_indices"),
        ("alora_invocation_tokens", "5", "alora_invocation_tokens"),
        ("alora_invocation_tokens", [-5], "alora_invocation_tokens"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("target_parameters", ["experts.w1"], "target_parameters"),
        ("megatron_config", {"a": 1}, "megatron_config"),
        ("monteclora_config", {"a": 1}, "monteclora_config"),
        ("arrow_config", {"a": 1}, "arrow_config"),
        ("kasa_config", {"beta": 0.1}, None),
        ("kasa_config", {"delta": 0.1}, "kasa_config"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
        ("peft_version", "9" * 100, "peft_version"),
        ("unheard_of", False, "unheard_of"),
        ("__class__", "x", "__class__"),
    ]
}
TENSORS: dict[str, Bad] = {
    "A is missing": Bad(CORRUPT, STEM.removeprefix("base_model.model."), change=drop(A_NAME)),
    "B is missing": Bad(CORRUPT, STEM.removeprefix("base_model.model."), change=drop(B_NAME)),
    "A and B have different ranks": Bad(UNSUPPORTED, A_NAME, change=put(A_NAME, np.ones((3, 16)))),
    "A is for another base": Bad("wrong_base", A_NAME, change=put(A_NAME, np.ones((2, 32)))),
    "B is for another base": Bad("wrong_base", B_NAME, change=put(B_NAME, np.ones((16, 2)))),
    "A is transposed": Bad("swapped_factors", A_NAME, change=put(A_NAME, np.ones((16, 2)))),
    "A has three dimensions": Bad(UNSUPPORTED, A_NAME, change=put(A_NAME, np.ones((1, 2, 16)))),
    "A has none": Bad(UNSUPPORTED, A_NAME, change=put(A_NAME, np.float32(1))),
    "a layer too many": Bad(UNSUPPORTED, EXTRA_LAYER.format(2), change=put_extra_layer),
    "layer 10^9": Bad(UNSUPPORTED, None, change=put(EXTRA_LAYER.format(10**9), np.ones((2, 16)))),
    "layer 00": Bad(UNSUPPORTED, None, change=put(EXTRA_LAYER.format("00"), np.ones((2, 16)))),
    "an unknown tensor": Bad(UNSUPPORTED, "optimizer.state", change=put("optimizer.state", [1])),
    "an embedding": Bad(CORRUPT, None, change=put("base_model.model.model.embed_tokens.lora_embedding_A", [1])),
    "a DoRA magnitude": Bad(UNSUPPORTED, None, change=put(f"{STEM}.lora_magnitude_vector", np.ones(24))),
    "a bias that the config does not announce": Bad(
        UNSUPPORTED, "lora_bias", change=put(f"{STEM}.lora_B.bias", np.ones(24))
    ),
    "an announced bias that lacks": Bad(CORRUPT, None, {"lora_bias": True}),
    "a bias of A": Bad(UNSUPPORTED, f"{STEM}.lora_A.bias", change=put(f"{STEM}.lora_A.bias", np.ones(2))),
    "the same matrix under two names": Bad(
        CORRUPT, None, change=put(A_NAME.replace("_A.", "_A.default."), np.ones((2, 16)))
    ),
    "modules of two models": Bad(UNSUPPORTED, None, change=rename(A_NAME, A_NAME.replace("model.model.", "model."))),
    "fused beside split": Bad("wrong_base", None, {"target_modules": [*SITE_PATHS, "qkv_proj"]}, fuse),
    "integers": Bad(UNSUPPORTED, A_NAME, change=retype(A_NAME, "U8", 32)),
    "NaN in A": Bad("non_finite", A_NAME, change=poison(A_NAME, np.nan)),
    "infinity in B": Bad("non_finite", B_NAME, change=poison(B_NAME, np.inf)),
    "minus infinity in B": Bad("non_finite", B_NAME, change=poison(B_NAME, -np.inf)),
    "B overflows once it is scaled": Bad(
        "overflow", STEM.removeprefix("base_model.model."), {"lora_alpha": 1000}, poison(B_NAME, 3e38)
    ),
    "every B is zero": Bad("adapter_no_effect", None, change=zero("lora_B")),
    "every A is zero": Bad("adapter_no_effect", None, change=zero("lora_A")),
    "no tensor at all": Bad(CORRUPT, None, change=lambda tensors: tensors.clear()),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    """Return one store that all refused uploads of this module go to."""
    store = open_store(tmp_path_factory.mktemp("attacked"))
    yield store
    store.close()


@pytest.mark.parametrize("bad", [*CONFIGS.values(), *TENSORS.values()], ids=[*CONFIGS, *TENSORS])
def test_a_wrong_upload_is_refused_by_name(bad: Bad, attacked: AdapterStore, tmp_path: Path) -> None:
    tensors = lora_tensors()
    bad.change(tensors)
    folder = write_folder(tmp_path / "bad", lora_config(**(bad.config or {})), tensors)
    with pytest.raises(AdapterRefused) as refusal:
        attacked.put_dir("a", folder)
    error = refusal.value
    assert (error.http_status, error.code) == (400, bad.code), error.message
    assert bad.param is None or error.param == bad.param, error.message
    assert str(tmp_path) not in error.message and len(error.message) < 400 and error.message.isprintable()
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}
    assert attacked.list() == [] and list(attacked._staging.root.iterdir()) == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b'{"r":1,"r":1}',
        b'{"r": NaN}',
        b'{"r": 1e999}',
        b"\xff",
        b'{"a":' * 5000,
        b'{"r":' + b"9" * 9999 + b"}",
    ],
)
def test_a_config_that_is_not_strict_json_is_corrupt(raw: bytes, attacked: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        attacked.put_dir("a", write_folder(tmp_path / "bad", raw, lora_tensors()))
    assert refusal.value.code == CORRUPT


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x04\x95", b"\x80\x05"])
def test_a_pickle_under_the_right_name_is_named_and_never_opened(
    start: bytes, attacked: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        attacked.put_dir("a", write_folder(tmp_path / "bad", lora_config(), start + b"cposix\nsystem\n" * 9))
    assert refusal.value.code == "unsupported_format"


@pytest.mark.parametrize(
    "name",
    ["../../x", "adapter_config.json/..", "/etc/passwd", "ADAPTER_CONFIG.JSON", "", "a\0", "modeling.py", "x" * 9999,
     "tokenizer_config.json", "adapter_config.json\n", "source/adapter_config.json", "adapter_model.safetensors.zip"],
)  # fmt: skip
def test_only_two_file_names_are_taken(name: str, attacked: AdapterStore) -> None:
    with attacked.stage() as upload:
        with pytest.raises(AdapterRefused) as refusal:
            upload.open_part(name)
        assert list(upload.source.iterdir()) == []
    assert refusal.value.param == "files" and len(refusal.value.message) < 300


def test_the_same_part_twice_and_a_missing_part_are_refused(store: AdapterStore) -> None:
    with store.stage() as upload:
        upload.open_part("adapter_config.json").write(b"{}")
        with pytest.raises(AdapterRefused, match="twice"):
            upload.open_part("adapter_config.json")
        with pytest.raises(AdapterRefused, match=r"adapter_model\.safetensors"):
            upload.commit("a")


def test_the_size_cap_holds_while_bytes_arrive(store_dir: Path) -> None:
    store = open_store(store_dir, max_upload_bytes=10_000)
    with store.stage() as upload, upload.open_part("adapter_model.safetensors") as part:
        for _ in range(10):
            part.write(b"x" * 1000)
        with pytest.raises(UploadTooLarge) as refusal:
            part.write(b"x")
        assert refusal.value.http_status == 413
        assert (upload.source / "adapter_model.safetensors").stat().st_size == 10_000
    with store.stage() as upload, pytest.raises(UploadTooLarge):
        upload.open_part("adapter_config.json").write(b" " * ((1 << 20) + 1))
    store.close()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "hard link", "folder", "missing"])
def test_only_regular_files_with_one_name_are_read(kind: str, store: AdapterStore, good_folder: Path) -> None:
    model = good_folder / "adapter_model.safetensors"
    elsewhere = good_folder.parent / "elsewhere"
    model.rename(elsewhere)
    match kind:
        case "symlink":
            model.symlink_to(elsewhere)
        case "dangling":
            model.symlink_to(good_folder / "nothing")
        case "fifo":
            os.mkfifo(model)
        case "hard link":
            os.link(elsewhere, model)
        case "folder":
            model.mkdir()
    with pytest.raises(AdapterRefused) as refusal:
        store.put_dir("a", good_folder)
    assert refusal.value.param == "files"
    if kind in ("symlink", "hard link"):
        assert store.put_dir("a", good_folder, trusted=True).version == 1
    elif kind != "missing":
        with pytest.raises(AdapterRefused):
            store.put_dir("a", good_folder, trusted=True)


def test_other_files_of_a_folder_are_not_read(store: AdapterStore, good_folder: Path) -> None:
    first = store.put_dir("a", good_folder)
    (good_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1/0 }}"}))
    (good_folder / "modeling.py").write_text("raise SystemExit")
    os.mkfifo(good_folder / "adapter_model.bin")
    assert store.put_dir("a", good_folder).digest == first.digest
    (good_folder / "new_embeddings.safetensors").write_bytes(b"")
    with pytest.raises(AdapterRefused, match="vocabulary"):
        store.put_dir("a", good_folder)


def test_nothing_in_a_config_opens_a_socket_or_imports(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    config = lora_config(
        base_model_name_or_path="http://169.254.169.254/",
        auto_mapping={"parent_library": "antigravity", "base_model_class": "os"},
        lora_dropout=0.1,
        fan_in_fan_out=True,
    )
    version = store.put_dir("a", write_folder(tmp_path / "odd", config, lora_tensors()))
    assert version.report.ignored == ("auto_mapping", "fan_in_fan_out", "lora_dropout")


def test_every_truncation_of_a_small_upload_is_refused(tmp_path: Path) -> None:
    raw = safetensors_bytes(lora_tensors(TINY, sites=("k_proj",), rank=1))
    config = lora_config(r=1, target_modules=["k_proj"])
    options = ConvertOptions(TINY, "float32", 16)
    target = tmp_path / "target"
    target.mkdir()
    folder = write_folder(tmp_path / "cut", config, raw)
    for length in range(len(raw)):
        (folder / "adapter_model.safetensors").write_bytes(raw[:length])
        with pytest.raises(AdapterRefused):
            convert_peft(folder, target, options)
        assert list(target.iterdir()) == []
    convert_peft(write_folder(tmp_path / "cut", config, raw), target, options)
