"""The body of POST /v1/chat/completions.

Owns the chat fields on top of `schemas`. Invariant: a message's content is one string (or None beside tool calls) once
it is validated, whatever form the client chose.
"""

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from serve.api.schemas import MAX_LOGPROBS, MAX_TOKENS, GenerationRequest, Part
from serve.errors import InvalidValue

MAX_MESSAGES = 4096
MAX_TOOLS = 256


def _read_content(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return "\n".join(_read_part(part) for part in value)


def _read_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        shown = ascii(kind)[:32]
        raise ValueError(f"content part type {shown} is not supported; this server reads text parts only")
    text = part.get(kind) if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"a content part of type {kind!r} needs a string in {kind!r}")
    return text


Content = Annotated[
    str | None,
    PlainValidator(_read_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": {"type": "object"}}]}),
]


class CalledFunction(Part):
    """The function of an earlier tool call; `arguments` is JSON text."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class EarlierCall(Part):
    """A tool call in an assistant's earlier turn."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[EarlierCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role {self.role!r} needs 'content'")
        return self


def check_final_message(continues: bool | None, adds_prompt: bool | None) -> None:
    """Refuse to continue the last message and to open a new one; raises InvalidValue."""
    if continues and adds_prompt:
        raise InvalidValue(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )


class ChatRequest(GenerationRequest):
    """A chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidValue("top_logprobs needs 'logprobs': true", param="top_logprobs")
        check_final_message(self.continue_final_message, self.add_generation_prompt)
        return self
