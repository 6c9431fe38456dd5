"""What PEFT trains outside the linear layers: norms, rows of tokens, embeddings, prompts, prefixes, invocations.

The folders are PEFT's own; each is converted, damaged and converted with a planted bug. How they answer is compared
over HTTP in `test_peft_types_http.py`.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.base import read_base_dims
from adapters_store.canonical import check_adapter
from adapters_store.convert import kv_prefixes, lora_factors, prompts
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Served
from adapters_store.errors import AdapterRefused, ConversionFailed
from adapters_store.formats import Declared
from adapters_store.manifest import Manifest
from tests.model.tiny_models import BY_NAME, save
from tests.store.folders import Tensors, float32, read_tensors, safetensors_bytes, write_folder
from tests.store.peft_cases import MODEL_CASES, Case, save_case, tiny_llama
from tests.store.peft_folders import ODD_VALUES, Saved, scaled
from tests.store.test_fuzz import damaged

pytestmark = pytest.mark.filterwarnings("ignore")

APPLIED = {
    "ln": {"norm", "layers.0.input_layernorm", "layers.2.post_attention_layernorm"},
    "tokens": {"embed_tokens"},
    "lora-tokens": {"embed_tokens", "layers.0.self_attn.v_proj"},
    "lora-rows": {"embed_tokens", "lm_head"},
    "lora-embeddings": {"embed_tokens", "lm_head", "layers.1.self_attn.q_proj"},
    "lora-saved": {"norm", "layers.1.post_attention_layernorm", "lm_head"},
    "alora": {"layers.0.self_attn.q_proj"},
    **{name: {"prompt_embeds"} for name in ("prompt", "p-tuning", "cpt", "multitask")},
    **{name: {"kv_prefix"} for name in ("prefix", "prefix-projected", "cartridge")},
}  # fmt: skip
PREFIX = "base_model.model."
EMBED_ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


class Room:
    """All cases in memory, and conversions of changed copies over one base."""

    def __init__(self, root: Path, base_name: str) -> None:
        self.root = root
        self.saved: dict[str, Saved] = {}
        with torch.random.fork_rng():
            self.model = tiny_llama() if base_name == "llama3" else BY_NAME[base_name].build()
            self.base_dir = save(self.model, root / "base")
        self.base = read_base_dims(self.base_dir)

    def case(self, name: str, case: Case | None = None) -> Saved:
        """Return a case as PEFT saves it."""
        if name not in self.saved:
            with torch.random.fork_rng():
                save_case(self.model, case or MODEL_CASES[name], self.root / name, seed=len(name))
            config = json.loads((self.root / name / "adapter_config.json").read_text())
            self.saved[name] = Saved(config, read_tensors(self.root / name / "adapter_model.safetensors"))
        return self.saved[name]

    def convert(
        self, config: dict[str, object], tensors: Tensors | bytes, dtype: str = "float32", task_id: int | None = None
    ) -> Manifest:
        target = self.root / f"target{len(list(self.root.iterdir()))}"
        target.mkdir()
        declared = Declared("peft", {} if task_id is None else {"task_id": task_id})
        options = ConvertOptions(self.base, dtype, 96, base_dir=str(self.base_dir), declared=declared)
        convert_peft(write_folder(self.root / "source", config, tensors), target, options)
        return check_adapter(target, self.base, dtype, 96)

    def refusal(self, config: dict[str, object], tensors: Tensors, task_id: int | None = None) -> AdapterRefused:
        with pytest.raises(AdapterRefused) as refusal:
            self.convert(config, tensors, task_id=task_id)
        assert len(refusal.value.message) < 400 and refusal.value.message.isprintable()
        return refusal.value


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    yield Room(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    yield Room(tmp_path_factory.mktemp("tied"), "smollm2-tied")


def task_of(name: str) -> int | None:
    task_id = MODEL_CASES[name].upload.get("task_id")
    return task_id if isinstance(task_id, int) else None


@pytest.mark.parametrize("name", MODEL_CASES)
def test_every_case_says_what_it_acts_on_in_every_dtype(name: str, room: Room) -> None:
    saved = room.case(name)
    for dtype in ("float32", "bfloat16", "float16"):
        manifest = room.convert(saved.config, saved.tensors, dtype, task_of(name))
        assert set(manifest.report().applied) >= APPLIED[name]
        # the base's own table is compared with it only where the file holds a copy or biases
        assert manifest.base_dependent == (name in ("lora-embeddings", "lora-saved"))
    assert bool(manifest.activation) == (name == "alora")


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_tensor_that_lacks_or_has_another_shape_or_nan_is_named(name: str, room: Room) -> None:
    saved = room.case(name)
    outside = [key for key in saved.tensors if "_proj." not in key]
    for tensor in outside or [next(iter(saved.tensors))]:
        dtype, shape, raw = saved.tensors[tensor]
        doubled = saved.tensors | {tensor: (dtype, (2 * shape[0], *shape[1:]), 2 * raw)}
        error = room.refusal(saved.config, doubled, task_of(name))
        assert error.code in ("unsupported_adapter", "wrong_base", "swapped_factors"), tensor
        poisoned = np.frombuffer(raw, "<f4").copy()
        poisoned[len(poisoned) // 2] = np.nan
        error = room.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, poisoned.tobytes())}, task_of(name))
        assert error.code == "non_finite" and error.param == tensor
        if tensor.endswith("base_layer.weight"):
            continue
        rest = {key: value for key, value in saved.tensors.items() if key != tensor}
        error = room.refusal(saved.config, rest, task_of(name))
        assert error.code in ("corrupt_adapter", "missing_layers", "no_target"), error.message


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_tensor_that_nothing_declares_is_refused(name: str, room: Room) -> None:
    saved = room.case(name)
    for stranger, shape in (
        (f"{PREFIX}model.layers.1.self_attn.q_norm.weight", (16,)),
        (f"{PREFIX}model.layers.0.mlp.up_proj.bias", (88,)),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", (2, 96)),
        (f"{PREFIX}model.embed_tokens.trainable_tokens_delta", (9, 64)),
        (f"{PREFIX}model.layers.0.input_layernorm.extra.weight", (64,)),
        ("prompt_embeddings_more", (2, 64)),
    ):
        error = room.refusal(saved.config, saved.tensors | {stranger: float32(np.ones(shape))}, task_of(name))
        assert error.code in ("corrupt_adapter", "unsupported_adapter"), error.message


@pytest.mark.parametrize("name", MODEL_CASES)
def test_odd_values_and_damaged_bytes_are_refused_or_give_a_valid_adapter(name: str, room: Room) -> None:
    saved, choose = room.case(name), random.Random(name)
    kind = PEFT_TYPES[str(saved.config["peft_type"])]
    assert isinstance(kind, Served)
    keys = [rule.key for rule in kind.rules]
    attempts: list[tuple[dict[str, object], Tensors | bytes]] = [
        (saved.config | {choose.choice(keys): choose.choice(ODD_VALUES)}, saved.tensors) for _ in range(12)
    ]
    raw = safetensors_bytes(saved.tensors)
    attempts += [(saved.config, damaged(raw, random.Random(seed))) for seed in range(4)]
    attempts += [(saved.config, scaled(saved.tensors, exponent)) for exponent in (-140, 60, 110)]
    for number, (config, tensors) in enumerate(attempts):
        try:
            room.convert(config, tensors, ("float32", "bfloat16", "float16")[number % 3], task_of(name))
        except AdapterRefused as refusal:
            assert len(refusal.message) < 400 and refusal.message.isprintable()


PLANTED: list[tuple[str, type, Callable[[object], object]]] = [
    ("lora-embeddings", lora_factors.EmbeddingValues, lambda good: (good[0], good[1] * 1.01)),  # type: ignore[index]
    ("lora-embeddings", lora_factors.EmbeddingValues, lambda good: (good[0][::-1], good[1])),  # type: ignore[index]
    ("prompt", prompts._Delta, lambda good: good[::-1]),  # type: ignore[index]
    ("multitask", prompts._Delta, lambda good: good * 1.01),  # type: ignore[operator]
    ("prefix", kv_prefixes._Delta, lambda good: (good[1], good[0])),  # type: ignore[index]
    ("cartridge", kv_prefixes._Delta, lambda good: (good[0][:, ::-1], good[1])),  # type: ignore[index]
]


@pytest.mark.parametrize(("name", "kind", "planted"), PLANTED)
def test_a_planted_bug_is_found(
    name: str, kind: type, planted: Callable[[object], object], room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, sound = room.case(name), kind.factors  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "factors", lambda delta: planted(sound(delta)))
    with pytest.raises(ConversionFailed):
        room.convert(saved.config, saved.tensors, task_id=task_of(name))


CONFIGS: list[tuple[str, dict[str, object], str, str]] = [
    ("ln", {"target_modules": ["input_layernorm"]}, "unsupported_adapter", "target_modules"),
    ("ln", {"target_modules": ["q_proj"]}, "no_target", "target_modules"),
    ("tokens", {"token_indices": [41, 12]}, "unsupported_adapter", "trainable_tokens_delta"),
    ("tokens", {"token_indices": [41, 12, 12]}, "unsupported_adapter", "token_indices"),
    ("tokens", {"token_indices": [41, 12, 96]}, "unsupported_adapter", "token_indices"),
    ("lora-tokens", {"trainable_token_indices": [41, 12, -1]}, "unsupported_adapter", "trainable_token_indices"),
    ("lora-tokens", {"trainable_token_indices": None}, "unsupported_adapter", "trainable_tokens_delta"),
    ("lora-tokens", {"trainable_token_indices": {"norm": [3]}}, "unsupported_adapter", "trainable_token_indices"),
    ("lora-tokens", {"alora_invocation_tokens": [5]}, "unsupported_adapter", "alora_invocation_tokens"),
    ("lora-embeddings", {"target_modules": ["q_proj", "lm_head"]}, "unsupported_adapter", "target_modules"),
    ("lora-embeddings", {"rank_pattern": {}}, "unsupported_adapter", "lm_head"),
    ("lora-embeddings", {"use_dora": True}, "corrupt_adapter", ""),
    ("lora-saved", {"modules_to_save": ["norm"]}, "trained_elsewhere", "lm_head"),
    ("lora-saved", {"modules_to_save": ["lm_head"]}, "unsupported_adapter", "modules_to_save"),
    ("lora-saved", {"modules_to_save": ["norm", "lm_head", "q_proj"]}, "unsupported_adapter", "modules_to_save"),
    ("lora-saved", {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}, "corrupt_adapter", "embed_tokens"),
    ("alora", {"alora_invocation_tokens": [96]}, "corrupt_adapter", "activation"),
    ("alora", {"alora_invocation_tokens": [True]}, "unsupported_adapter", "alora_invocation_tokens"),
    ("alora", {"use_dora": True}, "unsupported_adapter", "alora_invocation_tokens"),
    ("prompt", {"num_virtual_tokens": 4}, "unsupported_adapter", "prompt_embeddings"),
    ("prompt", {"num_virtual_tokens": None}, "unsupported_adapter", "num_virtual_tokens"),
    ("prompt", {"num_transformer_submodules": 2}, "unsupported_adapter", "num_transformer_submodules"),
    ("multitask", {"num_ranks": 3}, "unsupported_adapter", "prefix_task_cols"),
    ("multitask", {"num_tasks": 2}, "unsupported_adapter", "prefix_task"),
    ("prefix", {"num_layers": 4}, "unsupported_adapter", "num_layers"),
    ("prefix", {"num_attention_heads": 4}, "unsupported_adapter", "num_attention_heads"),
    ("cartridge", {"token_dim": 64}, "unsupported_adapter", "token_dim"),
]


@pytest.mark.parametrize(("name", "change", "code", "param"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_disagrees_is_refused_by_name(
    name: str, change: dict[str, object], code: str, param: str, room: Room
) -> None:
    saved = room.case(name)
    error = room.refusal(saved.config | change, saved.tensors, task_of(name))
    assert error.code == code and param in (error.param or ""), (error.code, error.param, error.message)


def test_a_copy_of_the_table_that_is_not_the_bases_is_refused_and_a_whole_new_table_too(room: Room) -> None:
    saved = room.case("lora-embeddings")
    name = f"{PREFIX}lm_head.base_layer.weight"
    changed = np.frombuffer(saved.tensors[name][2], "<f4").copy()
    changed[5] += 1
    error = room.refusal(saved.config, saved.tensors | {name: ("F32", (96, 64), changed.tobytes())})
    assert error.code == "trained_elsewhere" and error.param == name
    saved = room.case("lora-saved")
    whole = saved.tensors | {f"{PREFIX}lm_head.weight": float32(np.ones((96, 64)))}
    assert room.refusal(saved.config, whole).code == "limit_exceeded"
    own = read_tensors(room.base_dir / "model.safetensors")["lm_head.weight"]
    manifest = room.convert(saved.config, saved.tensors | {f"{PREFIX}lm_head.weight": own})
    assert manifest.source.ignored == ("modules_to_save[lm_head]",) and manifest.model_ops.token_rows == ()


def test_rows_of_a_tied_base_are_those_of_both_ends(tied: Room) -> None:
    for name, key in (("tokens", "token_indices"), ("lora-tokens", "trainable_token_indices")):
        saved = tied.case(name)
        rows = tied.convert(saved.config, saved.tensors).model_ops.token_rows
        assert [(each.target, each.count) for each in rows] == [("both", 3)], key
    saved = tied.case("tokens")
    head = f"{PREFIX}lm_head.trainable_tokens_delta"
    dtype, shape, raw = saved.tensors[head]
    error = tied.refusal(saved.config, saved.tensors | {head: (dtype, shape, raw[4:] + raw[:4])})
    assert error.code == "corrupt_adapter" and error.param == "lm_head"
    saved = tied.case("lora-rows")
    rows = tied.convert(saved.config, saved.tensors).model_ops.token_rows
    assert [each.target for each in rows] == ["embed", "lm_head"]
    error = tied.refusal(saved.config | {"ensure_weight_tying": True}, saved.tensors)
    assert error.param == "ensure_weight_tying"


@pytest.mark.parametrize("base_name", ["room", "tied"])
def test_targets_that_peft_finds_itself_are_one_path(base_name: str, request: pytest.FixtureRequest) -> None:
    room: Room = request.getfixturevalue(base_name)
    saved = room.case("tokens-found", Case("TRAINABLE_TOKENS", {"token_indices": [41, 12, 7]}, None, scale=1.0))
    assert saved.config["target_modules"] == "model.embed_tokens"
    rows = room.convert(saved.config, saved.tensors).model_ops.token_rows
    assert [(each.target, each.count) for each in rows] == [("both" if base_name == "tied" else "embed", 3)]
    # PEFT matches a text with the whole path, so these name nothing
    for text in ("embed_tokens", "tokens", "model", "model.embed_token"):
        assert room.refusal(saved.config | {"target_modules": text}, saved.tensors).code == "no_target"
    error = room.refusal(saved.config | {"target_modules": ".*tokens"}, saved.tensors)
    assert (error.code, error.param) == ("unsupported_adapter", "target_modules")


def test_a_tied_base_may_keep_its_one_table_as_the_head(tmp_path: Path) -> None:
    room = Room(tmp_path, "smollm2-tied")
    file = room.base_dir / "model.safetensors"
    tensors = read_tensors(file)
    assert "lm_head.weight" not in tensors
    table = tensors.pop("model.embed_tokens.weight")
    file.write_bytes(safetensors_bytes(tensors | {"lm_head.weight": table}))
    saved = room.case("embedding", Case("LORA", {"r": 3}, ["embed_tokens"], scale=0.4))
    assert room.convert(saved.config, saved.tensors).model_ops.embed_lowrank is not None
    dtype, shape, raw = saved.tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"]
    other = saved.tensors | {f"{PREFIX}model.embed_tokens.base_layer.weight": (dtype, shape, raw[4:] + raw[:4])}
    assert room.refusal(saved.config, other).code == "trained_elsewhere"


def test_what_a_changed_base_took_is_computed_again_only_where_it_is_certain(tmp_path: Path) -> None:
    case = Case("LORA", {"r": 4, "init_lora_weights": "pissa"}, ["q_proj"])
    room = Room(tmp_path, "llama3")
    saved = room.case("pissa", case)
    room.convert(saved.config, saved.tensors)
    with torch.no_grad():
        layer = room.model.get_submodule("model.layers.1.self_attn.q_proj")
        u, _, v = torch.linalg.svd(layer.weight)
        layer.weight.copy_(u @ v)  # type: ignore[operator]
    room.base_dir = save(room.model, tmp_path / "equal")
    room.base = read_base_dims(room.base_dir)
    error = room.refusal(saved.config, saved.tensors)
    assert error.code == "unconverted_init" and "singular values 4 and 5" in error.message
    room.base_dir = save(BY_NAME["llama3"].build().to(torch.bfloat16), tmp_path / "half")
    room.base = read_base_dims(room.base_dir)
    error = room.refusal(saved.config, saved.tensors)
    assert error.code == "unconverted_init" and "float32" in error.message
    assert "path_initial_model_for_weight_conversion" in error.message


def test_swapped_and_transposed_factors_are_told_apart_from_another_base(room: Room) -> None:
    saved = room.case("lora-tokens")
    a, b = (f"{PREFIX}model.layers.1.self_attn.v_proj.lora_{matrix}.weight" for matrix in "AB")
    swapped = saved.tensors | {a: saved.tensors[b], b: saved.tensors[a]}
    assert room.refusal(saved.config, swapped).code == "swapped_factors"
    transposed = saved.tensors | {a: ("F32", (64, 2), saved.tensors[a][2])}
    assert room.refusal(saved.config, transposed).code == "swapped_factors"
    assert room.refusal(saved.config, saved.tensors | {a: float32(np.ones((2, 80)))}).code == "wrong_base"
