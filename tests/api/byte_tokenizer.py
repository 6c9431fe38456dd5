"""A model folder with a byte-level tokenizer and a ChatML template: token id = byte value, plus a few control tokens.

Owns test data only. Invariant: for plain text the ids are its UTF-8 bytes, so tests can read and write them by eye.
"""

import json
from pathlib import Path

from serve.text.token_bytes import byte_level_alphabet

IM_START, IM_END, END_OF_TEXT, THINK, TOOL_CALL = 256, 257, 258, 259, 260
VOCAB_SIZE = 261

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{{ message.content | trim }}<think>{% else %}{{ message.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ADDED = [
    ("<|im_start|>", IM_START, True),
    ("<|im_end|>", IM_END, True),
    ("<|endoftext|>", END_OF_TEXT, True),
    ("<think>", THINK, False),
    ("<tool_call>", TOOL_CALL, False),
]


def write_model_dir(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write tokenizer files into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    config: dict[str, object] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tokenizer_json() -> dict[str, object]:
    """Return the tokenizer's description, with the traps (padding, truncation) that some files have baked in."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 4},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": END_OF_TEXT,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
        "added_tokens": [
            {"id": token_id, "content": content, "special": special, **flags} for content, token_id, special in _ADDED
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": byte_level_alphabet(),
            "merges": [],
        },
    }
