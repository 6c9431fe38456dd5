"""Messages become prompt ids: foreign strings are marked, the template renders, the text is encoded.

Owns the order of these steps and the cut of `continue_final_message`. Invariant: control tokens in the result come from
the template alone.
"""

import secrets
from collections.abc import Sequence
from pathlib import Path

from serve.errors import InvalidRequest
from serve.text.chat_template import ChatTemplate, read_chat_template
from serve.text.special_text import SpecialText
from serve.text.tokenizer import TextTokenizer

Json = dict[str, object]

# names that templates look up; every other key inside a message or tool is a client's own text
_KNOWN_KEY_NAMES = """arguments content description enum function id items name parameters properties reasoning_content
    required role strict text tool_call_id tool_calls type"""
_KNOWN_KEYS = frozenset(_KNOWN_KEY_NAMES.split())


class ChatEncoder:
    """One model's way from messages to ids. Thread-safe."""

    def __init__(self, template: ChatTemplate, special_text: SpecialText) -> None:
        self._template = template
        self._special_text = special_text
        # where a continued final message ends in the rendered text; unguessable for the same reason as the marks
        self._end_tag = f"\ufdd2{secrets.token_hex(8)}\ufdd2"

    @classmethod
    def load(cls, model_dir: Path, tokenizer: TextTokenizer) -> "ChatEncoder | None":
        """Read a model folder's template; None when it has none."""
        template = read_chat_template(model_dir, tokenizer.config, tokenizer.control_strings())
        return None if template is None else cls(template, SpecialText(tokenizer.tokenizer, template.source))

    @property
    def template_source(self) -> str:
        """Return the template's text."""
        return self._template.source

    def encode(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> list[int]:
        """Return the prompt of a chat.

        Raises:
            InvalidRequest: the template refuses the messages, or the final one cannot be continued.
        """
        foreign = [self._protect_message(message) for message in messages]
        if continue_final_message:
            foreign[-1] = self._with_end_tag(foreign[-1])
        safe_tools = None if tools is None else [self._protect_object(tool, is_assistant=False) for tool in tools]
        rendered = self._template.render(foreign, safe_tools, add_generation_prompt=add_generation_prompt)
        return self._special_text.encode(self._cut(rendered) if continue_final_message else rendered)

    def _protect_message(self, message: Json) -> Json:
        role = message.get("role")
        # OpenAI's newer name; most templates know the older one only
        if role == "developer" and "developer" not in self.template_source:
            role = "system"
        return {**self._protect_object(message, is_assistant=role == "assistant"), "role": role}

    def _protect_object(self, value: Json, *, is_assistant: bool) -> Json:
        return {
            key if key in _KNOWN_KEYS else self._special_text.protect(key): self._protect(inner, is_assistant)
            for key, inner in value.items()
        }

    def _protect(self, value: object, is_assistant: bool) -> object:
        if isinstance(value, str):
            return self._special_text.protect(value, is_assistant=is_assistant)
        if isinstance(value, dict):
            return self._protect_object(value, is_assistant=is_assistant)
        if isinstance(value, list):
            return [self._protect(item, is_assistant) for item in value]
        return value

    def _with_end_tag(self, message: Json) -> Json:
        content = message.get("content")
        if not isinstance(content, str):
            raise InvalidRequest("the final message has no text to continue", param="continue_final_message")
        return {**message, "content": f"{content}{self._end_tag} "}

    def _cut(self, rendered: str) -> str:
        """Cut after the final message's text, trimmed if the template trims."""
        end = rendered.rfind(self._end_tag)
        if end < 0:
            raise InvalidRequest(
                "the chat template does not show the final message, so it cannot be continued",
                param="continue_final_message",
            )
        is_trimmed = not rendered[end + len(self._end_tag) :].startswith(" ")
        return rendered[:end].rstrip() if is_trimmed else rendered[:end]


def require_template(chat: ChatEncoder | None) -> ChatEncoder:
    """Return the encoder, or refuse the request with the way out.

    Raises:
        InvalidRequest: the model has no chat template.
    """
    if chat is None:
        raise InvalidRequest(
            "this model has no chat template; send a plain prompt to /v1/completions instead",
            param="messages",
            code="chat_template_missing",
        )
    return chat
