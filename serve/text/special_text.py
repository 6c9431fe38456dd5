"""Control tokens in chat text: recognised where the template wrote them, never where a client spelt them.

Owns the marking of foreign strings before rendering, and the encoding of the rendered text. A second tokenizer knows
each control token under a private name; the template's own spellings are renamed after rendering, a client's are not,
so the text is still encoded in one piece and merges exactly as the model was trained on. Invariant: no foreign text,
alone or joined to its neighbours by the template, becomes a control token.
"""

import json
import re
import secrets
from dataclasses import dataclass

from tokenizers import Tokenizer

# Unicode noncharacters: no text uses them, no normaliser touches them
_MARK_CHAR, _NAME_CHAR, _ESCAPE_CHAR = "\ufdd0", "\ufdd1", "\ufdd3"
# an added token that is not marked special but reads like markup, such as <tool_call> or [INST]
_MARKUP = re.compile(r"[<\[]\S*\w\S*[>\]]\Z")


class SpecialText:
    """Marks foreign strings and encodes rendered chats. Thread-safe after construction."""

    def __init__(self, tokenizer: Tokenizer, template_source: str) -> None:
        # unguessable, so that no client can write a mark or a private name itself
        nonce = secrets.token_hex(8)
        marks = _Marks(f"{_MARK_CHAR}{nonce}{_MARK_CHAR}", f"{_ESCAPE_CHAR}{nonce}{_ESCAPE_CHAR}")
        self._marks = marks
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        markup = {token.content for token in added.values() if token.content in template_source}
        markup = {text for text in markup - special if _MARKUP.match(text)}
        self._everywhere = _Spellings(special, marks)
        self._outside_assistant = _Spellings(special | markup, marks)
        texts = sorted(special | markup)
        self._private_names = {text: f"{_NAME_CHAR}{nonce}{index:x}{_NAME_CHAR}" for index, text in enumerate(texts)}
        self._tokenizer = _rename(tokenizer, self._private_names)
        self._original_ids = {
            renamed: token_id
            for token_id, token in added.items()
            if (renamed := self._tokenizer.token_to_id(self._private_names.get(token.content, token.content)))
            not in (None, token_id)
        }

    def protect(self, text: str, *, is_assistant: bool = False) -> str:
        """Mark every place where foreign text spells a control token, or could with its neighbour's help.

        An assistant's earlier turn keeps the markup that is ordinary text to the model (`<think>`, `<tool_call>`).
        """
        return (self._everywhere if is_assistant else self._outside_assistant).protect(text)

    def encode(self, rendered: str) -> list[int]:
        """Return the ids of a rendered chat whose foreign strings were protected."""
        named = self._outside_assistant.rename(rendered, self._private_names)
        ids = self._tokenizer.encode(self.plain(named), add_special_tokens=False).ids
        return [self._original_ids.get(token_id, token_id) for token_id in ids]

    def plain(self, rendered: str) -> str:
        """Return rendered text without the marks."""
        return rendered.replace(self._marks.inside, "").replace(self._marks.before, "")


@dataclass(frozen=True, slots=True)
class _Marks:
    """`inside` breaks a spelling, or stands where one could begin or end; `before` escapes one of one character."""

    inside: str
    before: str


class _Spellings:
    """A set of control strings, and where foreign text comes near one."""

    def __init__(self, texts: set[str], marks: _Marks) -> None:
        self._marks = marks
        longest_first = sorted(texts, key=len, reverse=True)
        choice = "|".join(re.escape(text) for text in longest_first)
        self._pattern = re.compile(f"(?<!{marks.before})(?:{choice})") if texts else None
        self._heads = {text[:size] for text in texts for size in range(1, len(text))}
        self._tails = {text[size:] for text in texts for size in range(1, len(text))}
        self._max_part = max((len(text) for text in texts), default=1) - 1

    def protect(self, text: str) -> str:
        if self._pattern is None or not text:
            return text
        sizes = range(1, min(self._max_part, len(text)) + 1)
        ends_in_head = any(text[-size:] in self._heads for size in sizes)
        starts_in_tail = any(text[:size] in self._tails for size in sizes)
        marked = self._pattern.sub(self._break, text)
        inside = self._marks.inside
        return (inside if starts_in_tail else "") + marked + (inside if ends_in_head else "")

    def _break(self, match: re.Match[str]) -> str:
        text = match[0]
        return text[0] + self._marks.inside + text[1:] if len(text) > 1 else self._marks.before + text

    def rename(self, rendered: str, names: dict[str, str]) -> str:
        if self._pattern is None:
            return rendered
        return self._pattern.sub(lambda match: names[match[0]], rendered)


def _rename(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """Return a copy that knows the control tokens by their private names only."""
    described = json.loads(tokenizer.to_str())
    described["post_processor"] = None
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    renamed = _from_description(described)
    # with a prefixing normaliser, a normalised token is only seen at a word's start: a template's own must always be
    unseen = {name for name in names.values() if not _is_seen(renamed, name)}
    if not unseen:
        return renamed
    for token in described["added_tokens"]:
        token["normalized"] = token["normalized"] and token["content"] not in unseen
    return _from_description(described)


def _from_description(described: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(described))


def _is_seen(tokenizer: Tokenizer, name: str) -> bool:
    token_id = tokenizer.token_to_id(name)
    texts = (name, f"a{name}b", f"a {name} b")
    return all(token_id in tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
