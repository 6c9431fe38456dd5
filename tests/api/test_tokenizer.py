"""The base's tokenizer: goldens, the begin token, baked-in traps, the two plain files."""

import json
from pathlib import Path

import pytest

from serve.errors import StartError
from serve.text.tokenizer import TextTokenizer
from tests.api.byte_tokenizer import IM_END, tokenizer_json, write_model_dir
from tests.api.fake_engine import text_ids


def test_baked_in_padding_and_truncation_are_switched_off(model_dir: Path) -> None:
    tokenizer = TextTokenizer.load(model_dir)
    assert tokenizer.encode("a") == [97]
    assert tokenizer.encode("a" * 50) == [97] * 50


def test_special_text_in_a_prompt_is_a_control_token(model_dir: Path) -> None:
    assert TextTokenizer.load(model_dir).encode("a<|im_end|>b") == [97, IM_END, 98]


def test_control_strings_are_read_in_both_spellings(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer.load(tmp_path).control_strings() == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_the_begin_token_is_added_once(tmp_path: Path) -> None:
    described = tokenizer_json()
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [256], "tokens": ["<|im_start|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode("<|im_start|>a") == [256, 97]
    assert tokenizer.encode("<|im_start|><|im_start|>a") == [256, 256, 97]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Nothing"}}'])
def test_a_broken_tokenizer_stops_the_start_with_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartError, match="cannot be read"):
        TextTokenizer.load(tmp_path)


def test_a_folder_without_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"neither tokenizer\.json nor vocab\.json"):
        TextTokenizer.load(tmp_path)


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    described = {**tokenizer_json(), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(StartError, match="WordPiece"):
        TextTokenizer.load(tmp_path)


@pytest.mark.shared_data
@pytest.mark.parametrize("model", ["tinystories-656k", "stories260k-hf"])
def test_golden_prompts_have_the_golden_ids(shared_data: Path, model: str) -> None:
    tokenizer = TextTokenizer.load(shared_data / "models" / model)
    golden = json.loads((shared_data / "models" / "golden.json").read_text())["models"][model]
    rows = [*golden["greedy"], *(row for rows in golden["adapters"].values() for row in rows)]
    assert len(rows) >= 6
    for row in rows:
        assert tokenizer.encode(row["prompt"]) == row["prompt_ids"]
        text = tokenizer.decode(row["greedy_ids"], skip_special_tokens=False)
        assert text.startswith(row["text"].split("<|")[0].strip())


@pytest.mark.shared_data
def test_the_two_plain_files_make_qwens_tokenizer(shared_data: Path) -> None:
    tokenizer = TextTokenizer.load(shared_data / "tokenizers" / "qwen2.5")
    # ids of Qwen2.5's published tokenizer
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert tokenizer.encode("<tool_call>") == [151657]
    # every digit is a token of its own; a combining accent is composed first (NFC)
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.vocab_size == 151665


@pytest.mark.shared_data
def test_the_gpt2_file_with_its_traps_encodes_long_text_whole(shared_data: Path) -> None:
    tokenizer = TextTokenizer.load(shared_data / "tokenizers" / "gpt2")
    assert len(tokenizer.encode(" word" * 2000)) == 2000
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_token_names_and_texts_beyond_the_vocabulary_are_empty(model_dir: Path) -> None:
    tokenizer = TextTokenizer.load(model_dir)
    assert tokenizer.token_name(10_000) == "" and tokenizer.token_text(10_000) == ""
    assert tokenizer.token_text(0xC3) == "\ufffd" and tokenizer.token_bytes[0xC3] == b"\xc3"
    assert tokenizer.decode(text_ids("é"), skip_special_tokens=True) == "é"
