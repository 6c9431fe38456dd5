"""The bodies of POST /v1/completions, /v1/embeddings, /tokenize and /detokenize: those that take plain prompts.

Owns the four forms of a prompt on top of `schemas`. Invariant: after validation a prompt is a list of single prompts,
each a string or a list of ids.
"""

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from serve.api.schemas import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    REFUSED_FIELDS,
    GenerationRequest,
    ModelChoice,
    RequestModel,
    TokenId,
)
from serve.api.schemas_chat import MAX_MESSAGES, MAX_TOOLS, Message, check_final_message
from serve.errors import InvalidValue

MAX_PROMPTS = 2048
MAX_PROMPT_TOKENS = 1 << 20

Prompt = str | list[int]


def _read_prompts(value: object) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a non-empty string, list of strings, list of token ids or list of those lists")
    if _is_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts; the limit is {MAX_PROMPTS}")
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) and _is_ids(item) for item in value):
        return value
    raise ValueError("must hold only strings, only token ids from 0, or only non-empty lists of token ids")


def _is_ids(value: list[object]) -> bool:
    # `type`, not isinstance: true is no token id
    return 0 < len(value) <= MAX_PROMPT_TOKENS and all(type(item) is int and 0 <= item <= MAX_TOKENS for item in value)


Prompts = Annotated[
    list[Prompt],
    PlainValidator(_read_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}),
]


class CompletionRequest(GenerationRequest):
    """A plain completion."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class EmbeddingRequest(ModelChoice):
    """OpenAI's embeddings; `dimensions` would need a model trained for it."""

    refused_fields = REFUSED_FIELDS | {"dimensions"}

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None


class TokenizeRequest(RequestModel):
    """vLLM's /tokenize: a prompt or messages."""

    refused_fields = REFUSED_FIELDS

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidValue("send either 'prompt' or 'messages'", param="prompt")
        check_final_message(self.continue_final_message, self.add_generation_prompt)
        return self


class DetokenizeRequest(RequestModel):
    """vLLM's /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
