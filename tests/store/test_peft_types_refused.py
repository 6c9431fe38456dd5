"""Every kind of adapter, damaged: tensors that lack, repeat, have other shapes or values, and configs that disagree.

Each upload must end in a named refusal, never in a guess; and the self-test must convict a wrong reduction of any kind.
"""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Served
from adapters_store.errors import AdapterRefused, AdapterWithoutEffect, ConversionFailed, NonFiniteValues
from tests.store.folders import Tensors, float32, safetensors_bytes
from tests.store.peft_folders import INTEGERS, ODD_VALUES, SWEPT, Folders, one_of_each, scaled
from tests.store.test_fuzz import damaged

pytestmark = pytest.mark.filterwarnings("ignore")

# no value of theirs leaves the base as it is, as far as can be told without running it
ALWAYS_ACT = {"pissa", "olora", "kasa", "hra", "hra-orthogonal", "deft-para"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    yield Folders(tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("name", SWEPT)
def test_a_tensor_that_lacks_is_named(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    for tensor in one_of_each(saved.tensors):
        if "_proj.randlora_A" in tensor or "_proj.randlora_B" in tensor:
            # PEFT writes these once for the model and once more for every module
            continue
        error = folders.refusal(saved.config, {key: value for key, value in saved.tensors.items() if key != tensor})
        assert error.code in ("corrupt_adapter", "missing_layers", "unsupported_adapter"), tensor
        assert error.param is not None and (error.param in tensor or error.param == "lora_bias"), tensor


@pytest.mark.parametrize("name", SWEPT)
def test_another_shape_is_refused(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    for tensor in one_of_each(saved.tensors):
        dtype, shape, raw = saved.tensors[tensor]
        for axis in range(len(shape)):
            doubled = tuple(2 * size if at == axis else size for at, size in enumerate(shape))
            error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, doubled, 2 * raw)})
            assert error.code in ("unsupported_adapter", "wrong_base"), tensor
        flat = (int(np.prod(shape)),) if len(shape) > 1 else (1, *shape)
        folders.refusal(saved.config, saved.tensors | {tensor: (dtype, flat, raw)})


@pytest.mark.parametrize("name", SWEPT)
def test_nan_anywhere_is_named(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    for tensor in one_of_each(saved.tensors):
        dtype, shape, raw = saved.tensors[tensor]
        if dtype != "F32":
            continue
        values = np.frombuffer(raw, "<f4").copy()
        values[-1] = np.nan
        error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, values.tobytes())})
        assert isinstance(error, NonFiniteValues) and error.param == tensor


@pytest.mark.parametrize("name", SWEPT)
def test_a_tensor_too_many_is_refused(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    ours = PEFT_TYPES[str(saved.config["peft_type"])]
    assert isinstance(ours, Served)
    path = next(key for key in saved.tensors if "_proj." in key).rpartition("_proj.")[0] + "_proj."
    # other parts of the same kind have no meaning beside those that are there
    strangers = [*sorted(ours.parts), "lora_magnitude_vector", "hada_t1", "optimizer", "base_layer.bias"]
    for part in strangers:
        if f"{path}{part}" not in saved.tensors:
            error = folders.refusal(saved.config, saved.tensors | {f"{path}{part}": float32(np.ones((2, 2)))})
            assert error.code in ("unsupported_adapter", "corrupt_adapter"), part
    for stranger in (
        "base_model.vera_C",
        "base_model.tinylora_v.99",
        "base_model.model.lm_head.weight",
        "prompt_embeddings",
    ):
        folders.refusal(saved.config, saved.tensors | {stranger: float32(np.ones((2, 2)))})


@pytest.mark.parametrize("name", SWEPT)
def test_an_unknown_key_and_an_undeclared_module_are_refused(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    assert folders.refusal(saved.config | {"unheard_of": 1}, saved.tensors).param == "unheard_of"
    for key in ("modules_to_save", "bias"):
        assert folders.refusal(saved.config | {key: ["all"]}, saved.tensors).param == key
    targets = sorted(saved.config["target_modules"])[1:]  # type: ignore[call-overload]
    assert folders.refusal(saved.config | {"target_modules": targets}, saved.tensors).param == "target_modules"


@pytest.mark.parametrize("name", SWEPT)
def test_an_adapter_of_zeros_is_refused(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    zeros = {
        key: (dtype, shape, bytes(len(raw)) if dtype == "F32" else raw)
        for key, (dtype, shape, raw) in saved.tensors.items()
    }
    if name.startswith(("ia3", "dora", "road", "boft", "bias")):
        # scales and biases of zero act; those of an untrained adapter are one, or the base's
        zeros = folders.untrained(saved)
    if name in ALWAYS_ACT:
        return
    error = folders.refusal(saved.config, zeros)
    # of VB-LoRA's vectors any would be chosen: all logits are equal, or one index is there twice
    assert isinstance(error, AdapterWithoutEffect) or name.startswith("vblora")


@pytest.mark.parametrize("name", SWEPT)
def test_damaged_values_and_bytes_are_refused_or_give_a_valid_adapter(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    dtypes = ("float32", "bfloat16", "float16")
    attempts: list[Tensors | bytes] = [scaled(saved.tensors, exponent) for exponent in (-140, -100, -40, 20, 60, 110)]
    raw = safetensors_bytes(saved.tensors)
    attempts += [damaged(raw, random.Random(seed)) for seed in range(6)]
    for number, attempt in enumerate(attempts):
        try:
            folders.convert(saved.config, attempt, dtypes[number % 3])
        except AdapterRefused as refusal:
            assert refusal.http_status == 400
        except ConversionFailed:
            pytest.fail("the self-test must not depend on the values of an upload")


@pytest.mark.parametrize("name", SWEPT)
def test_odd_values_of_any_key_are_read_or_refused(name: str, folders: Folders) -> None:
    saved, choose = folders.saved[name], random.Random(name)
    kind = PEFT_TYPES[str(saved.config["peft_type"])]
    assert isinstance(kind, Served)
    keys = [rule.key for rule in kind.rules]
    for _ in range(24):
        changes = {choose.choice(keys): choose.choice(ODD_VALUES) for _ in range(choose.randint(1, 2))}
        try:
            folders.convert(saved.config | changes, saved.tensors)
        except AdapterRefused as refusal:
            assert len(refusal.message) < 400 and refusal.message.isprintable()


CONFIGS: list[tuple[str, dict[str, object], str]] = [
    ("adalora", {"init_r": 5}, "lora_A"),
    ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}}, "rank_pattern"),
    ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 5 + [False]}}, "lora_A"),
    ("adalora", {"rank_pattern": {"model.layers.9.self_attn.q_proj.lora_E": [True] * 6}}, "rank_pattern"),
    ("adalora", {"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ("adalora", {"lora_alpha": 0}, "lora_alpha"),
    ("adalora", {"use_dora": True}, "use_dora"),
    ("adalora", {"loftq_config": {"bits": 4}}, "loftq_config"),
    ("adalora-pruned", {"rank_pattern": None}, "lora_A"),
    ("loha", {"r": 4}, "hada_w1_a"),
    ("loha", {"alpha": -1}, "alpha"),
    ("loha", {"rank_pattern": {"(v|q)_proj": 2}}, "rank_pattern"),
    ("loha", {"use_dora": True}, "use_dora"),
    ("lokr", {"r": 3}, "lokr_w2_a"),
    ("lokr-factored", {"r": 3}, "lokr_w1_a"),
    ("vera", {"save_projection": False}, "save_projection"),
    ("vera", {"r": 4}, "vera_A"),
    ("pvera", {"save_projection": False}, "save_projection"),
    ("pvera", {"sample_at_inference": True}, "sample_at_inference"),
    ("vblora", {"save_only_topk_weights": True}, "model.layers."),
    ("vblora", {"topk": 13}, "topk"),
    ("vblora", {"num_vectors": 13}, "vblora_vector_bank"),
    ("vblora", {"vector_length": 24}, "vblora_vector_bank"),
    ("vblora-uint8", {"save_only_topk_weights": False}, "model.layers."),
    ("vblora-uint8", {"topk": 2}, "topk"),
    ("unilora", {"save_indices": False}, "save_indices"),
    ("unilora", {"theta_d_length": 41}, "unilora_theta_d"),
    ("miss", {"init_weights": "bat"}, "init_weights"),
    ("miss", {"init_weights": "mini"}, "miss_block"),
    ("miss", {"r": 65}, "r"),
    ("miss-mini", {"mini_r": 7}, "mini_r"),
    ("miss-mini", {"init_weights": True}, "miss_block"),
    ("bone", {"init_weights": "bat"}, "init_weights"),
    ("bone", {"mini_r": 2}, "mini_r"),
    ("delora", {"rank_pattern": {}}, "delora_A"),
    ("gralora", {"gralora_k": 3}, "gralora_k"),
    ("gralora", {"gralora_k": 16, "r": 16}, "gralora_k"),
    ("gralora", {"gralora_k": 2}, "gralora_A"),
    ("gralora", {"hybrid_r": 1}, "model.layers."),
    ("gralora-hybrid", {"hybrid_r": 0}, "gralora_A_general"),
    ("tinylora", {"save_projection": False}, "save_projection"),
    ("tinylora", {"weight_tying": 2}, "weight_tying"),
    ("tinylora", {"weight_tying": 0.5}, "tinylora_v"),
    ("tinylora-tied", {"weight_tying": 0.0}, "tinylora_v"),
    ("randlora", {"save_projection": False}, "save_projection"),
    ("randlora", {"r": 11}, "randlora_A"),
    ("dora", {"use_dora": False}, "lora_magnitude_vector"),
    ("dora", {"lora_bias": True}, "lora_bias"),
    ("dora", {"r": 3}, "lora_A"),
    ("lora", {"use_dora": True}, "model.layers."),
    ("ia3", {"feedforward_modules": []}, "ia3_l"),
    ("ia3", {"feedforward_modules": "down_proj"}, "feedforward_modules"),
    ("ia3", {"feedforward_modules": ["down_proj", "v_proj"]}, "ia3_l"),
    ("pissa", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ("pissa", {"use_dora": True}, "init_lora_weights"),
    ("kasa", {"kasa_config": None}, "lora_diag"),
    ("kasa", {"kasa_config": {"delta": 1}}, "kasa_config"),
    ("bdlora", {"use_bdlora": None}, "lora_"),
    ("bdlora", {"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["down_proj"]}}, "use_bdlora"),
    ("bdlora", {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["down_proj"]}}, "use_bdlora"),
    ("bias-all", {"bias": "lora_only"}, ".bias"),
    ("bias-only", {"bias": "none"}, "base_layer.bias"),
    ("bias-only", {"bias": "all"}, "model.layers."),
    ("hra", {"r": 4}, "hra_u"),
    ("deft", {"para": True}, "deft_R"),
    ("deft", {"decomposition_method": "qr"}, "decomposition_method"),
    ("peanut", {"act_fn": "gelu"}, "act_fn"),
    ("peanut", {"depth": 1}, "model.layers."),
    ("road", {"group_size": 7}, "group_size"),
    ("road", {"group_size": 24}, "group_size"),
    ("road", {"variant": "road_2"}, "road_theta"),
    ("oft", {"oft_block_size": 0, "r": 0}, "oft_block_size"),
    ("oft", {"oft_block_size": 4}, "oft_R"),
    ("oft", {"peft_version": None}, "use_cayley_neumann"),
    ("boft", {"boft_block_size": 6}, "boft_block_size"),
    ("boft", {"boft_block_num": 4}, "boft_block_size"),
    ("shira", {"r": 2}, "shira_weight"),
    ("supertuning", {"r": 2}, "model.layers."),
    ("supertuning", {"save_precomputed_indices": False}, "save_precomputed_indices"),
    ("poly", {"n_tasks": 2}, "n_tasks"),
    ("poly", {"n_splits": 3}, "n_splits"),
    ("poly", {"n_skills": 2}, "poly_lora_A"),
    ("poly", {"poly_type": "mhr"}, "poly_type"),
]


@pytest.mark.parametrize(("name", "change", "param"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_disagrees_is_refused_by_name(
    name: str, change: dict[str, object], param: str, folders: Folders
) -> None:
    saved = folders.saved[name]
    folders.convert(saved.config, saved.tensors)
    error = folders.refusal(saved.config | change, saved.tensors)
    assert error.param is not None and param in error.param, error.message


@pytest.mark.parametrize("name", ["vblora-uint8", "vblora-int16", "unilora"])
def test_positions_outside_the_bank_are_refused(name: str, folders: Folders) -> None:
    saved = folders.saved[name]
    for tensor in one_of_each(saved.tensors):
        dtype, shape, raw = saved.tensors[tensor]
        if dtype not in INTEGERS:
            continue
        for wrong in (-1, 10_000):
            values = np.frombuffer(raw, INTEGERS[dtype]).copy()
            values[0] = np.array(wrong).astype(values.dtype)
            error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, values.tobytes())})
            assert error.param == tensor and "positions" in error.message


def test_a_choice_of_vectors_that_is_none_is_refused(folders: Folders) -> None:
    saved = folders.saved["vblora-uint8"]
    tensor = next(name for name in saved.tensors if name.endswith("topk_weights"))
    for factor in (-1, 5):
        dtype, shape, raw = saved.tensors[tensor]
        values = np.frombuffer(raw, "<f4") * np.float32(factor)
        error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, values.tobytes())})
        assert error.param == tensor
    saved = folders.saved["vblora"]
    tensor = next(name for name in saved.tensors if name.endswith("logits_B"))
    dtype, shape, raw = saved.tensors[tensor]
    tied = np.zeros_like(np.frombuffer(raw, "<f4")).reshape(shape)
    tied[..., :3] = 1
    error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, tied.tobytes())})
    assert error.param == tensor and "save_only_topk_weights=True" in error.message


def test_a_copy_of_randloras_bases_that_differs_is_refused(folders: Folders) -> None:
    saved = folders.saved["randlora"]
    tensor = next(name for name in saved.tensors if name.endswith("_proj.randlora_B"))
    dtype, shape, raw = saved.tensors[tensor]
    error = folders.refusal(saved.config, saved.tensors | {tensor: (dtype, shape, raw[4:] + raw[:4])})
    assert error.param == tensor and error.code == "corrupt_adapter"
    copies = {name: value for name, value in saved.tensors.items() if "_proj.randlora_B" not in name}
    folders.convert(saved.config, copies)


@pytest.mark.parametrize(("name", "rank"), [("loha", 9), ("lokr-whole", 64), ("gralora", 32), ("randlora", 70)])
def test_the_limit_is_on_the_rank_that_is_served(name: str, rank: int, folders: Folders) -> None:
    saved = folders.saved[name]
    folders.convert(saved.config, saved.tensors, rank=rank)
    with pytest.raises(AdapterRefused, match=rf"rank {rank}.*up to {rank - 1}") as refusal:
        folders.convert(saved.config, saved.tensors, rank=rank - 1)
    assert refusal.value.param == "r"


def test_only_a_product_of_ranks_may_have_the_larger_limit(folders: Folders) -> None:
    options = ConvertOptions(folders.base, "float32", 8, 9)
    for name, is_allowed in (("loha", True), ("gralora", False)):
        source, target = folders.root / name, folders.root / f"{name} target"
        target.mkdir()
        if is_allowed:
            convert_peft(source, target, options)
            continue
        with pytest.raises(AdapterRefused, match=r"rank 32.*up to 8"):
            convert_peft(source, target, options)
