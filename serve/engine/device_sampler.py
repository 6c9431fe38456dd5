"""Choose the next tokens of a step on the device: the same choices as `sampler`, all rows at once, nothing read back.

Owns torch ops over logits; what each row asks for comes as a `DrawGroup`. Decides nothing on the host, so nothing here
waits for the device. Invariant: a row's token depends on its own logits and its own parameters alone, and equal logits
are ordered by token id, so the number of rows or candidates beside it never shows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from serve.engine.packed_words import Field
from serve.engine.sampling_plan import DrawGroup, Sparse

# one chunk sum per 512 tokens: 297 sums for a vocabulary of 152 k
_CHUNK = 512


class DeviceWords:
    """The packed words of a step on the device; each array is a view, or a cast of one."""

    def __init__(self, words: Tensor) -> None:
        self._words = words

    def ints(self, field: Field) -> Tensor:
        """[n] int32."""
        return self._words[field.begin : field.end]

    def floats(self, field: Field) -> Tensor:
        """[n] fp32."""
        return self.ints(field).view(torch.float32)

    def doubles(self, field: Field) -> Tensor:
        """[n / 2] fp64."""
        return self.ints(field).view(torch.float64)

    def index(self, field: Field) -> Tensor:
        """[n] int64."""
        return self.ints(field).long()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What every row of a step's logits came to; static memory, so a captured graph and the next step find it.

    `words` [2, S] int32: tokens, and 1 where the logits were finite.
    """

    words: Tensor

    @classmethod
    def build(cls, max_rows: int, device: torch.device) -> "Outcome":
        """Allocate for up to `max_rows` rows of logits."""
        return cls(torch.zeros(2, max_rows, dtype=torch.int32, device=device))

    @property
    def max_rows(self) -> int:
        """The most rows of logits that a step can have."""
        return self.words.shape[1]

    @property
    def tokens(self) -> Tensor:
        """[S] int32; of a row that is not finite some token, so that a step chained to it can run."""
        return self.words[0]

    @property
    def finite(self) -> Tensor:
        """[S] int32."""
        return self.words[1]


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """Log-probabilities of some rows: the chosen token's [L], the K most likely ones' ids (int32) and values [L, K]."""

    chosen: Tensor
    top_ids: Tensor
    top_values: Tensor

    def words(self) -> list[Tensor]:
        """All as flat int32."""
        return [self.chosen.view(torch.int32), self.top_ids.reshape(-1), self.top_values.view(torch.int32).reshape(-1)]


def take_argmax(logits: Tensor, outcome: Outcome) -> None:
    """Write each row's argmax, the lowest id among equals, and whether its logits are finite.

    Args:
        logits: [S, V] any float dtype; rows `0 .. S - 1` of `outcome` are written.
    """
    best, tokens = logits.max(dim=1)
    outcome.tokens[: len(logits)].copy_(tokens)
    outcome.finite[: len(logits)].copy_(torch.isfinite(best))


def draw(logits: Tensor, group: DrawGroup, words: DeviceWords, outcome: Outcome) -> DeviceLogprobs | None:
    """Choose the tokens of a group's rows over what `take_argmax` wrote; log-probabilities are of the raw logits.

    Args:
        logits: [S, V] any float dtype; left as it was.
    """
    rows = words.index(group.rows)
    scores = logits.index_select(0, rows).float()
    raw: Tensor | None = None
    if group.logprob_owners:
        logprob_rows = words.index(group.logprob_rows)
        raw = torch.log_softmax(scores.index_select(0, logprob_rows), dim=-1)
    _constrain(scores, group, words)
    tokens = _choose(scores, group, words)
    outcome.tokens.index_copy_(0, rows, tokens.int())
    if raw is None:
        return None
    return find_logprobs(raw, tokens.index_select(0, logprob_rows), group.num_top)


def find_logprobs(logprobs: Tensor, targets: Tensor, num_top: int) -> DeviceLogprobs:
    """Pick from `logprobs` [L, V] fp32 the ones of `targets` [L] int64 and the `num_top` largest."""
    values, ids = falling(logprobs, num_top)
    return DeviceLogprobs(logprobs.gather(1, targets[:, None])[:, 0].contiguous(), ids.int(), values.contiguous())


def falling(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row of `scores` [M, V] fp32 and their ids, of equal ones the lower id first.

    One order for every count, so that what a neighbour asks for never shows.
    """
    vocab_size = scores.shape[1]
    if count == vocab_size:
        ordered = torch.sort(scores, dim=1, descending=True, stable=True)
        return ordered.values, ordered.indices
    # score and id in one key, no two alike: topk alone leaves the order of equal scores open. Adding 0 makes -0.0 a 0.0
    bits = (scores + 0.0).view(torch.int32)
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = vocab_size - 1
    keys = (ranks << 32) | (last - torch.arange(vocab_size, device=scores.device))
    ids = last - (torch.topk(keys, count, dim=1).values & 0xFFFFFFFF)
    return scores.gather(1, ids), ids


def _constrain(scores: Tensor, group: DrawGroup, words: DeviceWords) -> None:
    flat = scores.view(-1)
    if group.scales.places.size:
        places, penalty = _sparse(group.scales, words)
        values = flat[places]
        flat[places] = torch.where(values > 0, values / penalty, values * penalty)
    for sparse in (group.falls, group.biases):
        if sparse.places.size:
            places, change = _sparse(sparse, words)
            flat[places] += change
    if group.mask_rows.size:
        rows = words.index(group.mask_rows)
        bits = words.ints(group.mask_bits).view(len(rows), -1, 1)
        allowed = (bits >> torch.arange(32, dtype=torch.int32, device=scores.device)) & 1
        free = allowed.view(len(rows), -1)[:, : scores.shape[1]].bool()
        scores[rows] = scores[rows].masked_fill_(~free, float("-inf"))


def _sparse(sparse: Sparse, words: DeviceWords) -> tuple[Tensor, Tensor]:
    return words.index(sparse.places), words.floats(sparse.values)


def _choose(scores: Tensor, group: DrawGroup, words: DeviceWords) -> Tensor:
    """[M, V] -> [M] int64."""
    begin, end = group.num_argmax, group.num_argmax + group.num_free
    chosen = [scores[:begin].argmax(dim=1)] if begin else []
    if begin == group.num_rows:
        return chosen[0]
    drawn = scores[begin:]
    scaled = (drawn - drawn.amax(dim=1, keepdim=True)) / words.floats(group.temperature)[begin:, None]
    min_p, draws = words.floats(group.min_p)[:, None], words.doubles(group.draw)[:, None]
    if group.num_free:
        weights = scaled[: group.num_free].exp()
        # probability relative to the most likely token's
        weights.masked_fill_(weights < min_p[begin:end], 0.0)
        chosen.append(_inverse_cdf(weights, draws[begin:end])[:, 0])
    if end < group.num_rows:
        values, ids = falling(scaled[group.num_free :], group.max_candidates)
        top_k, top_p = words.ints(group.top_k)[end:, None], words.doubles(group.top_p)[end:, None]
        weights = _truncated(values, top_k, min_p[end:], top_p)
        chosen.append(ids.gather(1, _inverse_cdf(weights, draws[end:]))[:, 0])
    return torch.cat(chosen)


def _truncated(values: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
    """Weights of candidates in falling order, 0 behind the cut of each row.

    Args:
        values: [M, C] fp32, logits less the largest, by temperature. top_k: [M, 1] int32; min_p fp32; top_p fp64.
    """
    ranks = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill((ranks >= top_k) | (values.exp() < min_p), float("-inf"))
    probabilities = values.double().exp()
    reached = probabilities.div_(probabilities.sum(dim=1, keepdim=True)).cumsum(dim=1)
    # the smallest set that reaches top_p; all of it where top_p is off
    num_kept = torch.where(top_p < 1.0, (reached < top_p).sum(dim=1, keepdim=True) + 1, values.shape[1])
    return values.exp().masked_fill_(ranks >= num_kept, 0.0)


def _inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """Return per row the index where the running sum of `weights` [M, W] passes `draws` [M, 1] times the total.

    Sums in fp64, in two levels as `sampler` does: chunk sums first, then inside one chunk.

    Returns:
        [M, 1] int64; never a place without weight.
    """
    padded = functional.pad(weights, (0, -weights.shape[1] % _CHUNK)).view(len(weights), -1, _CHUNK)
    chunk_sums = padded.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = draws * chunk_sums[:, -1:]
    chunk = torch.searchsorted(chunk_sums, target, right=True).clamp_(max=chunk_sums.shape[1] - 1)
    before = torch.where(chunk > 0, chunk_sums.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    inside = padded.gather(1, chunk[:, :, None].expand(-1, 1, _CHUNK))[:, 0].double().cumsum(dim=1)
    offset = torch.searchsorted(inside, target - before, right=True).clamp_(max=_CHUNK - 1)
    # rounding may land on a token without weight: step back to the last one that has some
    places = torch.arange(weights.shape[1], dtype=torch.int32, device=weights.device)
    has_weight = (weights > 0) & (places <= chunk * _CHUNK + offset)
    return torch.where(has_weight, places, 0).amax(dim=1, keepdim=True).long()
