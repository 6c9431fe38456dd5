"""A validated request becomes the engine's sampling parameters and its share of the context.

Owns defaults, seeds and every check that needs the model's dimensions. Invariant: `seed` is always set, and a prompt
plus its `max_tokens` always fits the context.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from serve.api.schemas import GenerationRequest
from serve.errors import ContextLengthExceeded, InvalidValue
from serve.messages import Grammar, Ready, SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class LogprobCounts:
    """How many alternatives to report per position; None: nothing."""

    output: int | None = None
    prompt: int | None = None


def build_sampling(
    request: GenerationRequest, ready: Ready, max_tokens: int, logprobs: LogprobCounts, grammar: Grammar | None
) -> SamplingParams:
    """Return the parameters of the request's first choice; `with_seed` makes those of the others.

    Raises:
        InvalidValue: a token id beyond the vocabulary, or `min_tokens` above `max_tokens`.
    """
    _check_ids("logit_bias", request.logit_bias or (), ready)
    _check_ids("stop_token_ids", request.stop_token_ids or (), ready)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidValue(f"min_tokens {min_tokens} exceeds max_tokens {max_tokens}", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        seed=0,
        temperature=_default(request.temperature, 1.0),
        top_p=_default(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=_default(request.min_p, 0.0),
        presence_penalty=_default(request.presence_penalty, 0.0),
        frequency_penalty=_default(request.frequency_penalty, 0.0),
        repetition_penalty=_default(request.repetition_penalty, 1.0),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logit_bias=tuple(sorted((request.logit_bias or {}).items())),
        num_logprobs=logprobs.output,
        num_prompt_logprobs=logprobs.prompt,
        grammar=grammar,
    )


def choice_seed(seed: int | None, index: int) -> int:
    """Return the seed of choice `index`: a 64-bit mix of both, or a random number without a request seed.

    Source: splitmix64's finaliser (Steele, Lea, Flood 2014; public domain reference by S. Vigna).
    """
    if seed is None:
        return secrets.randbits(64)
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def fit_prompt(
    token_ids: list[int],
    truncate: int | None,
    max_tokens: int | None,
    ready: Ready,
    *,
    num_virtual: int = 0,
    param: str = "prompt",
) -> list[int]:
    """Check a prompt's ids and cut them to their last `truncate` ones (-1: to what leaves room for the output).

    Args:
        num_virtual: positions that the adapter's own prompt takes.
    Raises:
        InvalidValue: no tokens, an id beyond the vocabulary, or `truncate` beyond the context.
    """
    if truncate is not None and truncate > ready.max_model_len:
        raise InvalidValue(
            f"truncate_prompt_tokens {truncate} exceeds the model's context of {ready.max_model_len} tokens",
            param="truncate_prompt_tokens",
        )
    if truncate == -1:
        truncate = max(ready.max_model_len - num_virtual - (max_tokens or 1), 1)
    if truncate:
        token_ids = token_ids[-truncate:]
    if not token_ids:
        raise InvalidValue("the prompt is empty: this tokenizer makes no token of it; send at least one", param=param)
    _check_ids(param, token_ids, ready)
    return token_ids


def output_budget(
    num_prompt_tokens: int,
    max_tokens: int | None,
    ready: Ready,
    *,
    prompt_param: str,
    budget_param: str = "max_tokens",
    num_virtual: int = 0,
) -> int:
    """Return how many tokens may be generated; None asks for all that fit.

    Args:
        num_virtual: positions that the adapter's own prompt takes.
        prompt_param: the field to blame when no budget would help; `budget_param`: when a smaller one would.
    Raises:
        ContextLengthExceeded: prompt and output do not fit into the context.
    """
    limit = ready.max_model_len - num_virtual
    taken = f" beside the adapter's own {num_virtual} virtual ones" if num_virtual else ""
    asked = 1 if max_tokens is None else max_tokens
    if num_prompt_tokens + asked > limit:
        raise ContextLengthExceeded(
            f"this model's context holds {max(limit, 0)} tokens{taken}; the prompt has {num_prompt_tokens} and at least"
            f" {asked} are to be generated; shorten the prompt, lower max_tokens or set truncate_prompt_tokens",
            param=prompt_param if num_prompt_tokens + min(asked, 1) > limit else budget_param,
        )
    return limit - num_prompt_tokens if max_tokens is None else max_tokens


def _check_ids(param: str, token_ids: Iterable[int], ready: Ready) -> None:
    highest = max(token_ids, default=0)
    if highest >= ready.vocab_size:
        raise InvalidValue(
            f"{param} holds token id {highest}; this model's ids end at {ready.vocab_size - 1}", param=param
        )


def _default(value: float | None, default: float) -> float:
    return default if value is None else float(value)
