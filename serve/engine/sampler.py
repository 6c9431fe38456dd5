"""Choose the next token of each row from its logits: penalties, masks, temperature, truncation, one seeded draw.

Batched where rows agree, per row where a client asked for something of its own. Invariant: a row's token depends on
its own logits, its own parameters and (seed, output position) alone, never on the rest of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.engine.plan import SampleSpec
from serve.messages import SamplingParams, TokenLogprobs

# candidates that usually hold top_p's mass; only rows where they do not are sorted whole
_TOP_P_CANDIDATES = 512
_MASK_64 = (1 << 64) - 1

# bit mask over the vocabulary (little-endian bits of int32 words) of the tokens a row may take
BitMask = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome; `token_id` is None when its logits were not finite."""

    token_id: int | None
    logprobs: TokenLogprobs | None


def sample(
    logits: Tensor, specs: Sequence[SampleSpec], eos_token_ids: Sequence[int], bit_mask: Callable[[int], BitMask | None]
) -> list[Sampled]:
    """Sample one token per row.

    Args:
        logits: [S, V] fp32; changed in place.
        specs: one per row. eos_token_ids: ends that `min_tokens` forbids for a while.
        bit_mask: the grammar's mask of a row, or None when the row is free.
    """
    finite = torch.isfinite(logits.sum(dim=1)).tolist()
    raw = {
        i: _logprobs(logits[i]) for i, spec in enumerate(specs) if spec.params.num_logprobs is not None and finite[i]
    }
    for i, spec in enumerate(specs):
        if finite[i]:
            _constrain(logits[i], spec, eos_token_ids, bit_mask(i))
    tokens = logits.argmax(dim=1).tolist()
    for i, spec in enumerate(specs):
        if finite[i] and spec.params.temperature > 0.0:
            tokens[i] = _draw(logits[i], spec.params, len(spec.output_ids))
    return [
        Sampled(token, top_logprobs(raw[i], token, specs[i].params.num_logprobs or 0) if i in raw else None)
        if finite[i]
        else Sampled(None, None)
        for i, token in enumerate(tokens)
    ]


def top_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the chosen token's log-probability and the `num_top` most likely ones'.

    Args:
        logprobs: [V] fp32.
    """
    values, ids = torch.topk(logprobs, min(num_top, logprobs.shape[0]))
    return TokenLogprobs(token_id, float(logprobs[token_id]), ids.tolist(), values.tolist())


def uniform(seed: int, index: int) -> float:
    """Return the draw in [0, 1) of output position `index` under `seed`: a hash, so there is no state to share.

    Source: splitmix64's finaliser (Steele, Lea, Flood 2014), applied twice.
    """
    value = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & _MASK_64
    for _ in range(2):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
        value ^= value >> 31
    return (value >> 11) / (1 << 53)


def _logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def _constrain(logits: Tensor, spec: SampleSpec, eos_token_ids: Sequence[int], mask: BitMask | None) -> None:
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.asarray(spec.prompt_ids + spec.output_ids, dtype=np.int64)))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and spec.output_ids:
        ids, counts = np.unique(np.asarray(spec.output_ids, dtype=np.int64), return_counts=True)
        fall = params.presence_penalty + params.frequency_penalty * torch.from_numpy(counts).float()
        logits[torch.from_numpy(ids)] -= fall
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(spec.output_ids) < params.min_tokens:
        logits[list({*eos_token_ids, *params.stop_token_ids})] = float("-inf")
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[0]]
        free = torch.zeros(logits.shape[0], dtype=torch.bool)
        free[: allowed.shape[0]] = torch.from_numpy(allowed).bool()
        logits.masked_fill_(~free, float("-inf"))


def _draw(logits: Tensor, params: SamplingParams, index: int) -> int:
    scaled = (logits - logits.max()) / params.temperature
    candidates: Tensor | None = None
    if 0 < params.top_k < logits.shape[0]:
        scaled, candidates = torch.topk(scaled, params.top_k)
    if params.min_p > 0.0:
        # probability relative to the most likely token's
        scaled = scaled.masked_fill(scaled.exp() < params.min_p, float("-inf"))
    if params.top_p < 1.0:
        scaled, order = _top_p(scaled, params.top_p)
        candidates = order if candidates is None else candidates[order]
    weights = scaled.double().exp()
    cumulative = weights.cumsum(0)
    target = uniform(params.seed, index) * float(cumulative[-1])
    position = int(torch.searchsorted(cumulative, target, right=True))
    # rounding may put the target on the last sum; step back to a token that has weight
    position = min(position, int(torch.nonzero(weights)[-1]))
    return position if candidates is None else int(candidates[position])


def _top_p(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p`; returns (scaled, ids), falling."""
    total = scaled.double().exp().sum()
    for num_candidates in (_TOP_P_CANDIDATES, scaled.shape[0]):
        values, ids = torch.topk(scaled, min(num_candidates, scaled.shape[0]))
        before = (values.double().exp() / total).cumsum(0)
        if float(before[-1]) >= top_p or values.shape[0] == scaled.shape[0]:
            break
    num_kept = int((before < top_p).sum()) + 1
    return values[:num_kept], ids[:num_kept]
