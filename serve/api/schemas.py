"""What a client may send, as strict pydantic models: the fields that both generation endpoints share.

The only pydantic of the project lives here and in the `schemas_*` files beside it; nothing behind the API sees a model.
Invariant: no coercion (true, "1" and 1.0 are no integers), no NaN or infinity, and a bound on every size.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from serve.errors import InvalidValue
from serve.messages import MAX_COMPOSED, MAX_WEIGHT

MAX_N = 16
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = (1 << 31) - 1
MAX_STOP_TOKEN_IDS = 256
MAX_USER_CHARS = 1024
MAX_DEADLINE_S = 86_400

# fields that choose code, paths, templates or salts, or that would change the meaning of the answer unheard
_REFUSED_NAMES = """adapter_source allowed_token_ids api_token audio bad_words beam_width cache_salt chat_template
    chat_template_kwargs documents extra_body function_call functions guided_choice guided_decoding_backend
    guided_grammar guided_json guided_regex kv_transfer_params logits_processors lora_path lora_request
    mm_processor_kwargs prompt_embeds prompt_logprobs return_tokens_as_token_ids structural_tag suffix tokenizer
    trust_remote_code use_beam_search vllm_xargs web_search_options"""
REFUSED_FIELDS = frozenset(_REFUSED_NAMES.split())


class FieldError(Exception):
    """One wrong field: pydantic's kind of error, the dotted path, the reason in words, and the value."""

    def __init__(self, kind: str, path: str, reason: str, value: object) -> None:
        super().__init__(reason)
        self.kind = kind
        self.path = path
        self.reason = reason
        self.value = value


class RequestModel(BaseModel):
    """A request body: strict, immutable; unknown harmless fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)
    refused_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, data: dict[str, object]) -> Self:
        """Validate a JSON object.

        Raises:
            FieldError: the first field that is wrong.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path = [str(part) for part in first["loc"] if isinstance(part, int) or _is_field(part)]
            raise FieldError(first["type"], ".".join(path), first["msg"], first["input"]) from None


def _is_field(name: str) -> bool:
    # a union's branch is named by its type, which is no part of the client's path
    return name.isidentifier() and name not in ("str", "int", "float", "bool")


class Part(BaseModel):
    """An object inside a request body, under the same rules."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def _read_stop(value: object) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOP:
        raise ValueError(f"must be a string or a list of at most {MAX_STOP} strings")
    for text in strings:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise ValueError(f"each entry must be a string of 1 to {MAX_STOP_CHARS} characters")
    return strings


def _read_logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must be an object of at most {MAX_LOGIT_BIAS} entries")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("keys must be token ids written as decimal strings")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not -100 <= amount <= 100:
            raise ValueError("values must be numbers from -100 to 100")
        bias[int(key)] = float(amount)
    return bias


Number = Annotated[float, BeforeValidator(_no_bool)]
StopStrings = Annotated[
    list[str],
    PlainValidator(_read_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_read_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class StreamOptions(Part):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class WeightedAdapter(Part):
    """One entry of the extension field `adapters`: its change of the base's outputs counts `weight` times."""

    # a misspelt weight would act with the default one
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    weight: Annotated[Number, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0


class ModelChoice(RequestModel):
    """The fields that select base or adapter."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    adapter_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    adapters: Annotated[list[WeightedAdapter], Field(max_length=MAX_COMPOSED)] | None = None
    cold_start: Literal["wait", "fail", "base"] | None = None
    # seconds within which the answer must have ended, from when its prompt is tokenised
    deadline_s: Annotated[Number, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    # whose request it is: OpenAI's two names for it; all requests of one user get the same version
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None


class GenerationRequest(ModelChoice):
    """Sampling, stopping and streaming, as chat and completions share them."""

    refused_fields = REFUSED_FIELDS

    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    # -1 and 0 both mean off, as in vLLM
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # -1: cut to what the context holds
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # lower runs first: a caller may step back, never jump the queue
    priority: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    response_format: dict[str, object] | None = None
    structured_outputs: dict[str, object] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidValue("stream_options may only be sent together with 'stream': true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Say whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
