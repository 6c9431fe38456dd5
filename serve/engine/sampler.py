"""Choose the next token of each row from its logits: penalties, masks, temperature, truncation, one seeded draw.

Batched where rows agree, per row where a client asked for something of its own. Invariant: a row's token depends on
its own logits, its own parameters and (seed, output position) alone, never on the rest of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapter_kernels.native_cpu import cpu_kernels
from serve.engine.plan import SampleSpec
from serve.engine.sampling_plan import BitMask, uniform
from serve.messages import SamplingParams, TokenLogprobs

# candidates that usually hold top_p's mass; only rows where they do not are sorted whole
_TOP_P_CANDIDATES = 512
# one chunk sum per 512 tokens: 297 sums for a vocabulary of 152 k
_CHUNK = 512


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
        logits: [S, V] fp32, bf16 or fp16; left as it was. Rows that ask for more than the argmax are read in fp32.
        specs: one per row. eos_token_ids: ends that `min_tokens` forbids for a while.
        bit_mask: the grammar's mask of a row, or None when the row is free.
    """
    kernels = cpu_kernels()
    has_kernel = kernels is not None and kernels.can_read_rows(logits)
    best, tokens = kernels.argmax(logits) if kernels is not None and has_kernel else logits.max(dim=1)
    finite = torch.isfinite(best).tolist()
    greedy = tokens.tolist()
    return [
        _sample_row(logits[i], greedy[i], spec, eos_token_ids, bit_mask(i)) if finite[i] else Sampled(None, None)
        for i, spec in enumerate(specs)
    ]


def _sample_row(
    logits: Tensor, greedy: int, spec: SampleSpec, eos_token_ids: Sequence[int], mask: BitMask | None
) -> Sampled:
    params = spec.params
    is_free = mask is None and not _is_constrained(spec)
    if is_free and params.temperature == 0.0 and params.num_logprobs is None:
        return Sampled(greedy, None)
    row = logits.to(torch.float32, copy=True)
    logprobs = None if params.num_logprobs is None else torch.log_softmax(row, dim=-1)
    if not is_free:
        _constrain(row, spec, eos_token_ids, mask)
    token = int(row.argmax()) if params.temperature == 0.0 else _draw(row, params, len(spec.output_ids))
    return Sampled(token, None if logprobs is None else top_logprobs(logprobs, token, params.num_logprobs or 0))


def _is_constrained(spec: SampleSpec) -> bool:
    params = spec.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or len(spec.output_ids) < params.min_tokens
    )


def top_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the chosen token's log-probability and the `num_top` most likely ones'.

    Args:
        logprobs: [V] fp32.
    """
    values, ids = _falling(logprobs, min(num_top, logprobs.shape[0]))
    return TokenLogprobs(token_id, float(logprobs[token_id]), ids.tolist(), values.tolist())


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
    # a finished grammar allows only ends: it wins over min_tokens, or no token would be left
    if mask is None and len(spec.output_ids) < params.min_tokens:
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
        scaled, candidates = _falling(scaled, params.top_k)
    if params.min_p > 0.0:
        # probability relative to the most likely token's
        scaled = scaled.masked_fill(scaled.exp() < params.min_p, float("-inf"))
    if params.top_p < 1.0:
        scaled, order = _top_p(scaled, params.top_p)
        candidates = order if candidates is None else candidates[order]
    position = _inverse_cdf(scaled.exp_(), uniform(params.seed, index))
    return position if candidates is None else int(candidates[position])


def _inverse_cdf(weights: Tensor, draw: float) -> int:
    """Return the index where the running sum of `weights` [V] passes `draw` times the total; sums in fp64.

    Two levels, chunk sums first: one pass over the vocabulary instead of a running sum of all of it.
    """
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[0] % _CHUNK)).view(-1, _CHUNK)
    chunk_sums = padded.sum(dim=1, dtype=torch.float64).cumsum(0)
    target = draw * float(chunk_sums[-1])
    chunk = min(int(torch.searchsorted(chunk_sums, target, right=True)), chunk_sums.shape[0] - 1)
    before = float(chunk_sums[chunk - 1]) if chunk else 0.0
    inside = padded[chunk].double().cumsum(0)
    offset = min(int(torch.searchsorted(inside, target - before, right=True)), _CHUNK - 1)
    # rounding may land on a token without weight: step back to the last one that has some
    return int(torch.nonzero(weights[: chunk * _CHUNK + offset + 1])[-1])


def _top_p(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p`; returns (scaled, ids), falling."""
    total = scaled.double().exp().sum()
    for num_candidates in (_TOP_P_CANDIDATES, scaled.shape[0]):
        values, ids = _falling(scaled, min(num_candidates, scaled.shape[0]))
        before = (values.double().exp() / total).cumsum(0)
        if float(before[-1]) >= top_p or values.shape[0] == scaled.shape[0]:
            break
    num_kept = int((before < top_p).sum()) + 1
    return values[:num_kept], ids[:num_kept]


def _falling(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of `scores` [V] and their ids, falling; of equal ones the lower id comes first.

    `topk` alone leaves the order of equal scores open, and scores of a bf16 model are often equal.
    """
    if count == 0:
        return scores[:0], torch.empty(0, dtype=torch.int64)
    least = torch.topk(scores, count).values[-1]
    ids = (scores >= least).nonzero()[:, 0]
    values, order = scores[ids].sort(descending=True, stable=True)
    return values[:count], ids[order[:count]]
