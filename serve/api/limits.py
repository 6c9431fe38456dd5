"""How much one request may ask for, by the operator's configuration.

Owns the bounds of `LimitsConfig` on single requests; the schemas hold the hard caps, the body guard holds the bytes.
Invariant: what passes could be admitted by an idle server.
"""

from serve.api.schemas import GenerationRequest
from serve.api.schemas_chat import ChatRequest
from serve.config import LimitsConfig
from serve.errors import InvalidValue


def check_limits(request: GenerationRequest, limits: LimitsConfig, *, num_prompts: int) -> int:
    """Return how many sequences the request is made of.

    Raises:
        InvalidValue: one of its counts is over its bound.
    """
    num_choices = request.n or 1
    _check("n", num_choices, limits.max_n)
    _check("stop", len(request.stop or ()), limits.max_stop)
    check_num_prompts(num_prompts, limits, param="prompt")
    if isinstance(request, ChatRequest):
        _check("messages", len(request.messages), limits.max_messages)
        _check("top_logprobs", request.top_logprobs or 0, limits.max_top_logprobs)
    num_sequences = num_prompts * num_choices
    if num_sequences > limits.max_in_flight:
        raise InvalidValue(
            f"{num_prompts} prompts times n = {num_choices} make {num_sequences} sequences; this server takes at most"
            f" {limits.max_in_flight} at a time",
            param="n",
        )
    return num_sequences


def check_num_prompts(num_prompts: int, limits: LimitsConfig, *, param: str) -> None:
    """Refuse more prompts in one request than `max_prompts`.

    Raises:
        InvalidValue: it holds more.
    """
    _check(param, num_prompts, limits.max_prompts)


def _check(param: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidValue(f"{param}: {count} is over this server's limit of {limit}", param=param)
