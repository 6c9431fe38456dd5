"""The demo base's tokenizer and chat template.

Owns the vocabulary: 256 bytes, the special tokens, and one token per frequent word of the world. A word has its own
token only in running text (after a space, or capitalised at the start); a quoted or unknown word falls apart into
bytes, which is what makes letter tasks learnable. Invariant: decoding gives back any text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from scripts.demo_world import conversations

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, END_ID = 0, 1
ROLE_IDS = {"system": 2, "user": 3, "assistant": 4}
MAX_VOCAB = 1024
NUM_COUNTED = 20_000
MIN_COUNT = 8
# Words that only the adapters' tasks use; the base never reads them.
TASK_WORDS = ("Sort", "Add", "Ġbackwards", "ĠZog", "ĠJSON")
# A run of letters, a digit or another sign, with the space before it; digits stay apart so that numbers generalise.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('this template knows the roles system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer(seed: int) -> Tokenizer:
    """Count the words of generated text and build the tokenizer from the most frequent ones."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *TASK_WORDS]
    pieces += _frequent_words(splitter, seed, MAX_VOCAB - len(pieces))
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    # ignore_merges takes a whole word when the vocabulary has it; without merges the rest falls into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _frequent_words(splitter: pre_tokenizers.PreTokenizer, seed: int, max_words: int) -> list[str]:
    counts: Counter[str] = Counter()
    for conversation in islice(conversations(seed), NUM_COUNTED):
        for turn in conversation.turns:
            counts.update(_word_pieces(splitter, (turn.user, turn.assistant)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [piece for piece, count in ranked if count >= MIN_COUNT][:max_words]


def _word_pieces(splitter: pre_tokenizers.PreTokenizer, texts: Iterable[str]) -> list[str]:
    found = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]
    # "Ġ" is the byte-level alphabet's space: a word inside a sentence; capitals open a sentence.
    return [piece for piece in found if len(piece) > 2 and (piece[0] == "Ġ" or piece[0].isupper())]
