"""Incremental decoding: whatever the pieces, the text is the whole's, and no character is ever cut."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serve.api.detokenizer import Detokenizer
from serve.text.token_bytes import TokenBytes, byte_level_alphabet
from tests.api.byte_tokenizer import IM_END, THINK, VOCAB_SIZE, tokenizer_json

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json()))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Return a tokenizer as Llama 2's: metaspace, byte fallback, one leading space stripped."""
    pieces = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "▁b", "漢", "ab", "▁▁"]
    described = {
        **tokenizer_json(),
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 1,
                "content": "<s>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [],
        },
    }
    return Tokenizer.from_str(json.dumps(described))


BYTE_LEVEL = _byte_level()
SENTENCEPIECE = _sentencepiece()
BYTE_LEVEL_BYTES = TokenBytes(BYTE_LEVEL)
SENTENCEPIECE_BYTES = TokenBytes(SENTENCEPIECE)


def decode(token_bytes: TokenBytes, groups: list[list[int]], *, at_text_start: bool = True, skip: bool = True) -> str:
    """Decode incrementally."""
    skipped = token_bytes.special_ids if skip else frozenset()
    detokenizer = Detokenizer(token_bytes, skipped, at_text_start=at_text_start)
    pieces = [detokenizer.feed(group) for group in groups]
    return "".join([*pieces, detokenizer.finish()])


@st.composite
def split_lists(draw: st.DrawFn, ids: st.SearchStrategy[int]) -> list[list[int]]:
    """Draw groups of ids, some empty."""
    return draw(st.lists(st.lists(ids, max_size=5), max_size=12))


@SETTINGS
@given(split_lists(st.integers(0, VOCAB_SIZE - 1)))
def test_byte_level_pieces_join_to_the_tokenizers_own_decoding(groups: list[list[int]]) -> None:
    flat = [token_id for group in groups for token_id in group]
    for skip in (True, False):
        assert decode(BYTE_LEVEL_BYTES, groups, skip=skip) == BYTE_LEVEL.decode(flat, skip_special_tokens=skip)


@SETTINGS
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), st.integers(1, 4))
def test_text_never_shows_a_cut_character(text: str, group_size: int) -> None:
    ids = list(text.encode("utf-8"))
    groups = [ids[start : start + group_size] for start in range(0, len(ids), group_size)]
    detokenizer = Detokenizer(BYTE_LEVEL_BYTES, frozenset(), at_text_start=True)
    shown = ""
    for group in groups:
        shown += detokenizer.feed(group)
        assert text.startswith(shown)
    assert shown == text and detokenizer.finish() == ""


@SETTINGS
@given(st.text(alphabet="ab 漢é🙂", max_size=20), st.integers(1, 4))
def test_sentencepiece_text_comes_back_whole(text: str, group_size: int) -> None:
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False).ids
    groups = [ids[start : start + group_size] for start in range(0, len(ids), group_size)]
    assert decode(SENTENCEPIECE_BYTES, groups) == SENTENCEPIECE.decode(ids) == text


@SETTINGS
@given(split_lists(st.integers(258, 265)))
def test_sentencepiece_pieces_join_to_the_tokenizers_own_decoding(groups: list[list[int]]) -> None:
    flat = [token_id for group in groups for token_id in group]
    assert decode(SENTENCEPIECE_BYTES, groups) == SENTENCEPIECE.decode(flat)


def test_bytes_that_are_no_characters_become_replacements_as_they_are_certain() -> None:
    detokenizer = Detokenizer(SENTENCEPIECE_BYTES, frozenset(), at_text_start=True)
    byte = 2
    assert detokenizer.feed([byte + 0xE6, byte + 0xBC]) == ""
    assert detokenizer.feed([byte + ord("x")]) == "\ufffdx"
    assert detokenizer.feed([byte + 0xF0]) == "" and detokenizer.finish() == "\ufffd"


def test_a_continued_text_keeps_its_leading_space() -> None:
    space_a = 261
    assert decode(SENTENCEPIECE_BYTES, [[space_a], [space_a]], at_text_start=True) == "a a"
    assert decode(SENTENCEPIECE_BYTES, [[space_a], [space_a]], at_text_start=False) == " a a"


def test_control_tokens_are_skipped_and_markup_is_not() -> None:
    assert decode(BYTE_LEVEL_BYTES, [[97, IM_END, THINK, 98]]) == "a<think>b"
    assert decode(BYTE_LEVEL_BYTES, [[97, IM_END, 98]], skip=False) == "a<|im_end|>b"


def test_the_byte_alphabet_covers_every_byte_once() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))


@pytest.mark.shared_data
@pytest.mark.parametrize("folder", ["models/tinystories-656k", "models/stories260k-hf", "tokenizers/gpt2"])
def test_real_tokenizers_decode_real_text_piece_by_piece(shared_data: Path, folder: str) -> None:
    tokenizer = Tokenizer.from_file(str(shared_data / folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token_bytes = TokenBytes(tokenizer)
    text = "Once upon a time, Lily saw  two dogs.\n"
    if tokenizer.token_to_id("<unk>") not in tokenizer.encode("é漢🙂\t").ids:
        text += "Zoë saw 漢字 🙂🏽 — “quoted”.\n  Two  spaces\tand a tab."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert decode(token_bytes, [[token_id] for token_id in ids]) == tokenizer.decode(ids)
    vocabulary = range(0, tokenizer.get_vocab_size(), 7)
    for token_id in set(vocabulary) - tokenizer.get_added_tokens_decoder().keys():
        plain = decode(token_bytes, [[token_id]], skip=False)
        assert plain == tokenizer.decode([token_id], skip_special_tokens=False)
