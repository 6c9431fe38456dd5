"""The config reader knows every key that PEFT writes, and 78 real configs are each accepted or refused by name."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

from adapters_store.convert.format_notes import FORMAT_NOTES
from adapters_store.convert.key_docs import render
from adapters_store.convert.lora import LORA, LoraTuner
from adapters_store.convert.peft_config import read_config
from adapters_store.convert.peft_keys import Use
from adapters_store.convert.peft_patterns import parse_pattern_key
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.formats import AUTO, FORMATS
from tests.live_server import REPO_ROOT
from tests.store.folders import lora_config

METAMATH = "MetaMathQA__{}__llama-3.2-3B-{}"
ACCEPTED = {
    METAMATH.format(*name.split("/"))
    for name in (
        "lora/rank10-target-mlp", "lora/rank32", "lora/rank32-lorafa", "lora/rank32-mica", "lora/rank32-riemannian",
        "lora/rank32-dora", "lora/rank64", "lora/rank64-rslora", "lora/rank14-target-mlp-bdlora", "lora/rank32-kasa",
        "adalora/rank32", "beft/target-v_proj", "boft/default", "deft/rank32", "deft/rank32-para", "delora/rank32",
        "ia3/default", "ia3/lr_0.001", "ia3/all-attn-5k-lr0.005", "gralora/rank32", "ln_tuning/default", "loha/rank32",
        "lokr/rank32-factor4-lr0.003", "miss/default", "miss/mini", "peanut/rank1-relu-depth0-s32.0",
        "peanut/rank32-relu-depth0-s2.0", "prefixtuning/lr_0.001", "prefixtuning/lr_0.005_zero_init",
        "prefixtuning/tokens50-init_prefix-lr_0.005", "prompt_tuning/default", "prompt_tuning/lr_0.001",
        "prompt_tuning/sample_vocab-lr_0.001", "ptuning/default", "pvera/default", "pvera/rank64", "randlora/default",
        "road/lr_0.001", "shira/lr_0.0003-random_seed_42", "supertuning/s974-topk", "supertuning/s99-supra-r32",
        "supertuning/s99-supra-r8", "supertuning/s9935-bottomk", "supertuning/s9935-topk", "tinylora/default",
        "tinylora/weight-tying", "trainable_tokens/sos+eos", "vblora/bank1024-lr5e4", "vblora/default",
        "vera/default",
    )
} | {
    # of image models: their configs read well, their tensors name no layer of a language model
    "image-gen__adalora__flux2-klein-default",
    "image-gen__dora__flux2-klein-rank64",
    "image-gen__lora__flux2-klein-default",
    "image-gen__lora__flux2-klein-rank64",
    "image-gen__lora__flux2-klein-rank64-kasa",
    "image-gen__vera__flux2-klein-default",
    "text_generation_benchmark__lora__lora_r8",
}  # fmt: skip
REFUSED_KEYS = {
    METAMATH.format("miss", "bat"): "init_weights",
    METAMATH.format("oft", "rank32"): "use_cayley_neumann",
    METAMATH.format("unilora", "default"): "save_indices",
}
RULES = LORA.rules
SERVED = {name: kind for name, kind in PEFT_TYPES.items() if isinstance(kind, Served)}
# what PEFT itself demands before it writes a config, and what it cannot write any more
DEMANDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "TRAINABLE_TOKENS": {"token_indices": [3]},
    **{
        name: {"num_virtual_tokens": 4}
        for name in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")
    },
}
# of these, what is reported as without effect
REPORTED = {"ADALORA": ("total_step",), "CPT": ("cpt_mask", "cpt_token_ids", "cpt_tokens_type_mask")}
GONE = {"BONE"}
PROMPTS = {name for name, kind in SERVED.items() if kind.acts_on == "prompt"}


@pytest.mark.shared_data
def test_each_of_78_real_configs_is_accepted_or_refused_by_name(shared_data: Path) -> None:
    paths = sorted((shared_data / "adapter_configs").rglob("*.json"))
    assert len(paths) == 78
    accepted = set()
    for path in paths:
        config = json.loads(path.read_bytes())
        try:
            read_config(path.read_bytes(), model_type="llama")
        except UnsupportedAdapter as refusal:
            key = REFUSED_KEYS.get(path.stem, "peft_type")
            assert refusal.param == key, path.stem
            assert key in refusal.message
            assert key != "peft_type" or config["peft_type"] in refusal.message
            assert len(refusal.message) < 400
        else:
            accepted.add(path.stem)
    assert accepted == ACCEPTED


@pytest.mark.parametrize("name", sorted(SERVED.keys() - GONE))
def test_a_table_has_every_field_of_pefts_own_dataclass_and_reads_its_defaults(name: str, tmp_path: Path) -> None:
    keys = {rule.key for rule in SERVED[name].rules}
    assert len(keys) == len(SERVED[name].rules)
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
    assert {field.name for field in fields(config_class)} - keys == set()
    # Uni-LoRA leaves its positions out by default, which is refused
    saved: dict[str, Any] = {"save_indices": True} if name == "UNILORA" else {}
    demanded = DEMANDED.get(name, {})
    targets = {} if name in PROMPTS else {"target_modules": ["q_proj"]}
    config_class(task_type="CAUSAL_LM", **targets, **demanded, **saved).save_pretrained(str(tmp_path))
    config = read_config((tmp_path / "adapter_config.json").read_bytes(), model_type="llama")
    assert config.ignored == REPORTED.get(name, ())
    assert config.targets.names == tuple(targets.get("target_modules", ()))


@pytest.mark.parametrize("name", sorted(SERVED.keys() - GONE - PROMPTS))
def test_null_targets_mean_pefts_own_choice(name: str) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)]
    for model_type in ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "granite"):
        mapping = getattr(tuner, "target_module_mapping", TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
        names = mapping.get(model_type)
        default = SERVED[name].default_targets
        assert names is None or model_type not in default.model_types or tuple(names) == default.names
        assert names is not None or model_type not in default.model_types


def test_a_lora_config_as_peft_writes_it_by_default_has_pefts_scaling(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    tuner = read_config((tmp_path / "adapter_config.json").read_bytes(), model_type="llama").tuner
    assert isinstance(tuner, LoraTuner)
    assert (tuner.rank, tuner.alpha) == (8, 8.0)


def test_every_kind_that_peft_registers_is_served_or_refused_with_a_way_out() -> None:
    registered = {kind.value for kind in PeftType} | {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert registered - PEFT_TYPES.keys() == set()
    for name, kind in PEFT_TYPES.items():
        raw = json.dumps({"peft_type": name, "target_modules": ["q_proj"], "save_indices": True}).encode()
        if isinstance(kind, Served):
            assert kind.title and kind.served_as and kind.limits
            continue
        with pytest.raises(UnsupportedAdapter) as refusal:
            read_config(raw, model_type="llama")
        assert refusal.value.param == "peft_type"
        assert kind.reason in refusal.value.message and kind.way_out in refusal.value.message


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.use is Use.REFUSED], ids=lambda rule: str(rule.key))
def test_a_refused_key_is_refused_by_name_and_accepted_at_its_defaults(rule: object) -> None:
    key = rule.key  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedAdapter, match=key) as refusal:
        read_config(json.dumps(lora_config(**{key: {"x": 1}})).encode(), model_type="llama")
    assert refusal.value.param == key
    defaults: list[object] = [None, False, [], {}]
    for default in defaults:
        read_config(json.dumps(lora_config(**{key: default})).encode(), model_type="llama")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.use is Use.HARMLESS], ids=lambda rule: str(rule.key))
def test_a_harmless_key_is_reported_when_it_is_set(rule: object) -> None:
    key = rule.key  # type: ignore[attr-defined]
    config = read_config(json.dumps(lora_config(**{key: {"x": 1}})).encode(), model_type="llama")
    assert config.ignored == (() if key in ("base_model_name_or_path", "revision") else (key,))


def test_null_targets_mean_pefts_default_where_it_has_one() -> None:
    raw = json.dumps(lora_config(target_modules=None)).encode()
    assert read_config(raw, model_type="llama").targets.names == ("q_proj", "v_proj")
    with pytest.raises(UnsupportedAdapter, match="target_modules"):
        read_config(raw, model_type="granite")


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_means_every_site(spelling: str) -> None:
    config = read_config(json.dumps(lora_config(target_modules=spelling)).encode(), model_type="llama")
    assert config.targets.is_target("model.layers.7.mlp.gate_proj", 7)


@pytest.mark.parametrize(
    ("key", "path", "is_match"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("_proj", "model.layers.0.self_attn.q_proj", False),
        ("0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", False),
        ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", True),
        ("self.attn.q.proj", "model.layers.1.self_attn.q_proj", True),
        (r"self_attn\.q_proj", "model.layers.1.self_attn.q_proj", True),
        (r"self\.attn.q_proj", "model.layers.1.self_attn.q_proj", False),
        ("^q_proj", "model.layers.1.self_attn.q_proj", False),
        ("^model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", True),
        ("q_proj$", "model.layers.1.self_attn.q_proj", True),
        ("model.layers.1.self_attn.q_proj.x", "model.layers.1.self_attn.q_proj", False),
    ],
)
def test_plain_pattern_keys_match_as_pefts_regex_does(key: str, path: str, is_match: bool) -> None:
    assert parse_pattern_key(key, "rank_pattern").matches(path) == is_match
    assert bool(re.match(rf"(.*\.)?({key})$", path)) == is_match


@pytest.mark.parametrize(
    "key", ["", ".*", "q_proj|k_proj", "(a+)+$", "q.*", "[qk]_proj", "a..b", ".a", "a.", "a\n", "ä", "a" * 300]
)
def test_pattern_keys_that_need_a_regex_are_refused(key: str) -> None:
    with pytest.raises(UnsupportedAdapter, match="rank_pattern"):
        parse_pattern_key(key, "rank_pattern")


def test_the_page_about_adapters_lists_the_table_as_it_is() -> None:
    page = (REPO_ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert page.endswith(render()), "run: python -m adapters_store.convert.key_docs, and paste it into docs/adapters.md"


def test_every_format_has_its_row_in_the_generated_table() -> None:
    assert {AUTO, "peft", *FORMAT_NOTES} == set(FORMATS)


def test_each_family_of_the_literature_has_its_row() -> None:
    page = (REPO_ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = page.partition("## Families of the literature")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| (\d+) \| .+ \| (served as|after export:|not yet:|not served:) (.+) \|$", table, re.MULTILINE
    )
    assert len(rows) == len({number for number, _, _ in rows}) == table.count("\n| ") - 1 == 65
    for number, standing, text in rows:
        if text.split("`")[1:2] in [[name] for name in FORMATS]:
            # a checkpoint format of its own, not a kind of PEFT's
            continue
        named = re.findall(r"`([A-Z_]+)`", text)
        assert named or standing in ("not yet:", "not served:"), number
        assert set(named) <= SERVED.keys(), number
