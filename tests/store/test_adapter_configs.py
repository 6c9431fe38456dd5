"""The config reader knows every key that PEFT writes, and 78 real configs are each accepted or refused by name."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

from adapters_store.convert.key_docs import render
from adapters_store.convert.peft_config import read_config
from adapters_store.convert.peft_keys import RULES, Use
from adapters_store.convert.peft_patterns import parse_pattern_key
from adapters_store.errors import UnsupportedAdapter
from tests.live_server import REPO_ROOT
from tests.store.folders import lora_config

ACCEPTED = {
    "MetaMathQA__lora__llama-3.2-3B-rank10-target-mlp",
    "MetaMathQA__lora__llama-3.2-3B-rank32",
    "MetaMathQA__lora__llama-3.2-3B-rank32-lorafa",
    "MetaMathQA__lora__llama-3.2-3B-rank32-mica",
    "MetaMathQA__lora__llama-3.2-3B-rank32-riemannian",
    "MetaMathQA__lora__llama-3.2-3B-rank64",
    "MetaMathQA__lora__llama-3.2-3B-rank64-rslora",
    # an image model's: its config reads well, its tensors name no layer of a language model
    "image-gen__lora__flux2-klein-default",
    "image-gen__lora__flux2-klein-rank64",
    "text_generation_benchmark__lora__lora_r8",
}
REFUSED_KEYS = {
    "MetaMathQA__lora__llama-3.2-3B-rank14-target-mlp-bdlora": "use_bdlora",
    "MetaMathQA__lora__llama-3.2-3B-rank32-dora": "use_dora",
    "MetaMathQA__lora__llama-3.2-3B-rank32-kasa": "kasa_config",
    "image-gen__dora__flux2-klein-rank64": "use_dora",
    "image-gen__lora__flux2-klein-rank64-kasa": "kasa_config",
}


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
        else:
            accepted.add(path.stem)
    assert accepted == ACCEPTED


def test_the_table_has_every_field_of_pefts_own_dataclass() -> None:
    keys = {rule.key for rule in RULES}
    assert len(keys) == len(RULES)
    assert {field.name for field in fields(LoraConfig)} - keys == set()


def test_a_config_as_peft_writes_it_by_default_ignores_nothing(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    config = read_config((tmp_path / "adapter_config.json").read_bytes(), model_type="llama")
    assert config.ignored == ()
    assert (config.rank, config.alpha, config.targets) == (8, 8.0, ("q_proj",))


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
    assert read_config(raw, model_type="llama").targets == ("q_proj", "v_proj")
    with pytest.raises(UnsupportedAdapter, match="target_modules"):
        read_config(raw, model_type="granite")


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_means_every_site(spelling: str) -> None:
    config = read_config(json.dumps(lora_config(target_modules=spelling)).encode(), model_type="llama")
    assert config.is_target("model.layers.7.mlp.gate_proj", 7)


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
