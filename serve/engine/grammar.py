"""Token masks of constrained sequences, by llguidance on numpy. No torch here.

Owns one matcher per constrained sequence; the sampler applies the bits. Invariant: a token that `mask` allowed is
accepted by `accept`, and once a grammar is complete only end tokens are allowed.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from serve.engine.grammar_source import limits, source
from serve.messages import Grammar

BitMask = NDArray[np.int32]

# compiled grammars are kept for the next request that sends the same one
_MAX_COMPILED = 64

_log = logging.getLogger("chorale.grammar")


class GrammarMasks:
    """The matchers of all running constrained sequences. One thread."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read the tokenizer; about one second for 150,000 tokens."""
        self._eos = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        for token_id in eos_token_ids:
            self._eos.view(np.uint32)[token_id // 32] |= np.uint32(1 << (token_id % 32))
        self._tokenizer = _read_tokenizer(tokenizer_json, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._matchers: dict[str, llguidance.LLMatcher] = {}

    @classmethod
    def of_model(cls, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> "GrammarMasks | None":
        """Read a base's tokenizer; None when it has no tokenizer.json."""
        path = model_dir / "tokenizer.json"
        return cls(path.read_text(encoding="utf-8"), vocab_size, eos_token_ids) if path.is_file() else None

    def start(self, request_id: str, grammar: Grammar) -> None:
        """Hold a matcher for a sequence; the API has checked that the grammar compiles."""
        if self._tokenizer is None:
            return
        key = (grammar.kind, grammar.text)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = llguidance.LLMatcher(self._tokenizer, source(grammar), log_level=0, limits=limits())
            self._compiled[key] = compiled
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        self._matchers[request_id] = compiled.deep_copy()

    def mask(self, request_id: str) -> BitMask:
        """Return the allowed next tokens as bits: token t is bit t % 32 of word t // 32. Never empty."""
        matcher = self._matchers.get(request_id)
        if matcher is None:
            return self._eos.copy()
        bits = np.zeros((1, self._eos.shape[0]), dtype=np.int32)
        if not matcher.is_error() and not matcher.is_stopped():
            fill_next_token_bitmask(matcher, bits)
        if matcher.is_error():
            # a cost limit was hit in mid-text: ending is all that is left, and the batch must not suffer
            reason = matcher.get_error().splitlines()[0][:100]
            _log.error("the grammar of request %s failed: %s", request_id, ascii(reason))
            return self._eos.copy()
        if self._is_dead_end(matcher, bits[0]):
            _log.error("request %s: this tokenizer has no text token for what its grammar demands next", request_id)
            return self._eos.copy()
        return bits[0] if bits.any() else self._eos.copy()

    def _is_dead_end(self, matcher: llguidance.LLMatcher, bits: BitMask) -> bool:
        """Say whether the only token left is one that the matcher will refuse.

        llguidance answers so when no token can spell what comes next (it names token 0), and when forced text spells a
        control token, which is not text.
        """
        words = np.flatnonzero(bits)
        if len(words) != 1:
            return False
        word = int(bits.view(np.uint32)[words[0]])
        only = int(words[0]) * 32 + word.bit_length() - 1
        return word.bit_count() == 1 and matcher.validate_tokens([only]) == 0

    def accept(self, request_id: str, token_id: int) -> None:
        """Advance by a sampled token."""
        matcher = self._matchers.get(request_id)
        if matcher is not None:
            matcher.consume_token(token_id)

    def release(self, request_id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
        self._matchers.pop(request_id, None)


def _read_tokenizer(
    tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]
) -> llguidance.LLTokenizer | None:
    try:
        return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except ValueError as error:
        # a decoder that llguidance does not know: everything else can still be served
        _log.error("structured output is off, constrained answers end at once: %s", ascii(str(error)[:200]))
        return None
