"""Log-probabilities in OpenAI's two shapes.

Owns the spelling only; the numbers are the engine's. Invariant: no infinity reaches JSON, and a token's text in one
shape is its text in the other.
"""

from collections.abc import Sequence

from serve.api.detokenizer import Detokenizer
from serve.messages import TokenLogprobs
from serve.text.tokenizer import TextTokenizer

Json = dict[str, object]

# OpenAI's own stand-in for minus infinity
_LOWEST = -9999.0


def chat_logprobs(tokenizer: TextTokenizer, entries: Sequence[TokenLogprobs]) -> Json:
    """Return the `logprobs` object of a chat choice."""
    content = []
    for entry in entries:
        pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
        top = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in pairs]
        content.append({**_chat_token(tokenizer, entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: TextTokenizer, token_id: int, logprob: float) -> Json:
    token = tokenizer.token_bytes[token_id]
    return {"token": token.decode("utf-8", "replace"), "logprob": max(logprob, _LOWEST), "bytes": list(token)}


class CompletionLogprobs:
    """Builds the `logprobs` objects of one completion choice; offsets count from the choice's first character."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, at_text_start: bool) -> None:
        self._tokenizer = tokenizer
        skipped = tokenizer.token_bytes.special_ids if skip_special_tokens else frozenset()
        self._detokenizer = Detokenizer(tokenizer.token_bytes, skipped, at_text_start=at_text_start)
        self._offset = 0

    def prompt(self, prompt_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> Json:
        """Return the object of an echoed prompt: nothing precedes its first token, so that one has no logprob."""
        return self._body(prompt_ids, [None, *entries])

    def output(self, entries: Sequence[TokenLogprobs]) -> Json:
        """Return the object of generated tokens."""
        return self._body([entry.token_id for entry in entries], entries)

    def _body(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Json:
        return {
            "text_offset": [self._advance(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else max(entry.logprob, _LOWEST) for entry in entries],
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
        }

    def _advance(self, token_id: int) -> int:
        """Return where the token's text begins, and step over it."""
        offset = self._offset
        self._offset += len(self._detokenizer.feed((token_id,)))
        return offset

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the most likely tokens and the chosen one; of two with the same text the likelier one stays."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, _LOWEST))
        top.setdefault(self._tokenizer.token_text(entry.token_id), max(entry.logprob, _LOWEST))
        return top


def join_logprobs(first: Json, second: object) -> Json:
    """Return one completion logprobs object of two consecutive ones."""
    assert isinstance(second, dict), "a logprobs object is a dict"
    return {key: [*_list(first[key]), *_list(second[key])] for key in first}


def _list(value: object) -> list[object]:
    assert isinstance(value, list), "the fields of a logprobs object are lists"
    return value
