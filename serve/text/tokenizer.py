"""The base's tokenizer: text to ids and back, and the strings of its control tokens.

Owns loading (`tokenizer.json`, or `vocab.json` + `merges.txt`) and the begin-of-text rule; chat templates live in
`chat_template`, incremental decoding in `detokenizer`. Invariant: encoding never truncates, pads or doubles the begin
token, whatever the file has baked in. All methods are thread-safe.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve.errors import StartError
from serve.text.token_bytes import TokenBytes

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
    """Encodes prompts and names tokens."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, object]) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.config = config
        self.token_bytes = TokenBytes(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.encode("", add_special_tokens=True).ids
        self._leading_id = added[0] if added and tokenizer.encode("a").ids[:1] == added[:1] else None

    @classmethod
    def load(cls, model_dir: Path) -> "TextTokenizer":
        """Read a model folder's tokenizer.

        Raises:
            StartError: no tokenizer files, or they are of a kind that is not supported.
        """
        config_path = model_dir / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        try:
            return cls(_read_tokenizer(model_dir, config), config)
        except StartError:
            raise
        # the tokenizers library raises bare Exception for every bad file
        except Exception as error:
            raise StartError(f"the tokenizer of {model_dir.name!r} cannot be read: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a prompt; special-token text in it is recognised as control tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._leading_id is not None and ids[:2] == [self._leading_id] * 2:
            return ids[1:]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of a whole sequence."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Return one token's text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes[token_id].decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it, empty beyond the vocabulary."""
        return self.tokenizer.id_to_token(token_id) or ""

    def is_text(self, token_id: int) -> bool:
        """Say whether the token is text rather than a control token."""
        return token_id not in self.token_bytes.special_ids

    def control_strings(self) -> dict[str, str]:
        """Return the strings that chat templates know by name: bos_token, eos_token and their like."""
        named = {name: value for name, value in self.config.items() if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def special_ids_by_text(self) -> dict[str, int]:
        """Return the added tokens, text to id: Qwen's `<tool_call>` is a control token without being marked as one."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}


def _read_tokenizer(model_dir: Path, config: dict[str, object]) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    vocab, merges = model_dir / "vocab.json", model_dir / "merges.txt"
    if not (merges.is_file() and vocab.is_file()):
        raise StartError(f"{model_dir.name!r} holds no tokenizer: neither tokenizer.json nor vocab.json + merges.txt")
    return _build_byte_level(vocab, merges, config)


def _build_byte_level(vocab: Path, merges: Path, config: dict[str, object]) -> Tokenizer:
    """Build GPT-2's or Qwen2's byte-level BPE from its two plain files.

    Source: huggingface/transformers convert_slow_tokenizer.py, GPT2Converter and Qwen2Converter (Apache-2.0).
    """
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    if str(config.get("tokenizer_class", "")).startswith("Qwen2"):
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    declared = config.get("added_tokens_decoder")
    entries = declared if isinstance(declared, dict) else {}
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        flags = {name: entry[name] for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])
    return tokenizer
