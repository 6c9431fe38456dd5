"""What the rows of a step ask of the sampler, as flat arrays that travel in the step's one copy to the device.

Owns the order of the rows that want more than the argmax, and the sparse lists of their constraints; numpy only.
Invariant: all that is random (one uniform draw per row) and all that depends on a sequence's history is decided here,
so the device's part is a pure function of the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.engine.packed_words import Field, Words
from serve.engine.plan import Row, SampleSpec
from serve.engine.token_history import TokenHistories
from serve.messages import Grammar, SamplingParams

# rows that are worked on at once: bounds the fp32 and fp64 copies of their logits, [rows, V] each
MAX_GROUP_ROWS = 32
_MASK_64 = (1 << 64) - 1

# bit mask over the vocabulary (little-endian bits of int32 words) of the tokens a row may take
BitMask = NDArray[np.int32]


class Grammars(Protocol):
    """The matchers of constrained sequences."""

    def start(self, request_id: str, grammar: Grammar) -> None:
        """Hold a matcher for a sequence."""
        ...

    def mask(self, request_id: str) -> BitMask:
        """Return the allowed next tokens as bits."""
        ...

    def accept(self, request_id: str, token_id: int) -> None:
        """Advance by a sampled token."""
        ...

    def release(self, request_id: str) -> None:
        """Forget a sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Sparse:
    """Changes of single logits: `places` int32 (row of the group * V + token, none twice), `values` fp32."""

    places: Field
    values: Field


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Up to `MAX_GROUP_ROWS` rows that want more than the argmax of their logits.

    In this order: `num_argmax` rows that take the argmax of constrained logits, `num_free` that draw over the whole
    vocabulary in the order of ids, the others that draw over their `max_candidates` most likely tokens, falling.
    """

    num_rows: int
    num_argmax: int
    num_free: int
    max_candidates: int
    # [num_rows] int32: rows of the step's logits
    rows: Field
    # [num_rows] fp32, fp32, int32, fp64, fp64; the temperature of argmax rows is 1, a top_k that is off is V
    temperature: Field
    min_p: Field
    top_k: Field
    top_p: Field
    draw: Field
    # repetition: positive logits are divided, others multiplied; then falls and biases are added, in this order
    scales: Sparse
    falls: Sparse
    biases: Sparse
    # [G] int32 rows of the group; [G, words] int32 bits of the tokens they may take
    mask_rows: Field
    mask_bits: Field
    # [L] int32 rows of the group whose log-probabilities are wanted, each with the `num_top` most likely ones
    logprob_rows: Field
    num_top: int
    # [L] the same as rows of the logits, for the reader of the results
    logprob_owners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Drawing:
    """One row of a group while it is built; `index` is its row of the logits."""

    index: int
    row: Row
    spec: SampleSpec
    mask: BitMask | None

    @property
    def kind(self) -> int:
        params = self.spec.params
        if params.temperature == 0.0:
            return 0
        return 1 if params.top_k == 0 and params.top_p >= 1.0 else 2


def plan_draws(
    rows: Sequence[Row],
    vocab_size: int,
    eos_token_ids: Sequence[int],
    mask: Callable[[Row], BitMask | None],
    histories: TokenHistories,
    words: Words,
) -> list[DrawGroup]:
    """Group the rows that want more than the argmax; their arrays go into `words`.

    Args:
        rows: who owns row i of the step's logits; one without `sample` wants no token.
        eos_token_ids: ends that `min_tokens` forbids for a while.
        mask: the grammar's bits of a row, None when it is free.
    """
    drawings = [
        _Drawing(index, row, row.sample, mask(row))
        for index, row in enumerate(rows)
        if row.sample is not None and not _is_plain(row.sample.params, _num_outputs(row, row.sample))
    ]
    drawings.sort(key=lambda drawing: drawing.kind)
    return [
        _group(drawings[begin : begin + MAX_GROUP_ROWS], vocab_size, eos_token_ids, histories, words)
        for begin in range(0, len(drawings), MAX_GROUP_ROWS)
    ]


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


def _num_outputs(row: Row, spec: SampleSpec) -> int:
    # the newest token of a chained row is not in its list yet
    return len(spec.output_ids) + int(row.is_chained)


def _is_plain(params: SamplingParams, num_outputs: int) -> bool:
    return (
        params.temperature == 0.0
        and params.num_logprobs is None
        and params.grammar is None
        and not params.logit_bias
        and not _has_penalty(params)
        and num_outputs >= params.min_tokens
    )


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def _group(
    drawings: list[_Drawing],
    vocab_size: int,
    eos_token_ids: Sequence[int],
    histories: TokenHistories,
    words: Words,
) -> DrawGroup:
    params = [drawing.spec.params for drawing in drawings]
    kinds = [drawing.kind for drawing in drawings]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    draws = [uniform(d.spec.params.seed, _num_outputs(d.row, d.spec)) for d in drawings]
    masked = [(i, drawing.mask) for i, drawing in enumerate(drawings) if drawing.mask is not None]
    wanted = [(i, p.num_logprobs) for i, p in enumerate(params) if p.num_logprobs is not None]
    scales, falls, biases = _constraints(drawings, vocab_size, eos_token_ids, histories)
    return DrawGroup(
        num_rows=len(drawings),
        num_argmax=kinds.count(0),
        num_free=kinds.count(1),
        max_candidates=max((k for k, kind in zip(top_k, kinds, strict=True) if kind == 2), default=0),
        rows=words.put([drawing.index for drawing in drawings], np.int32),
        temperature=words.put([p.temperature or 1.0 for p in params], np.float32),
        min_p=words.put([p.min_p for p in params], np.float32),
        top_k=words.put(top_k, np.int32),
        top_p=words.put([p.top_p for p in params], np.float64),
        draw=words.put(draws, np.float64),
        scales=scales.put(words),
        falls=falls.put(words),
        biases=biases.put(words),
        mask_rows=words.put([i for i, _ in masked], np.int32),
        mask_bits=words.put(_stacked([bits for _, bits in masked], vocab_size), np.int32),
        logprob_rows=words.put([i for i, _ in wanted], np.int32),
        num_top=min(max((count for _, count in wanted), default=0), vocab_size),
        logprob_owners=tuple(drawings[i].index for i, _ in wanted),
    )


class _SparseList:
    """A `Sparse` while it grows."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(self, places: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        self._places.append(places)
        self._values.append(values)

    def put(self, words: Words) -> Sparse:
        places = np.concatenate(self._places) if self._places else np.zeros(0, dtype=np.int64)
        values = np.concatenate(self._values) if self._values else np.zeros(0, dtype=np.float32)
        return Sparse(words.put(places, np.int32), words.put(values, np.float32))


def _constraints(
    drawings: list[_Drawing], vocab_size: int, eos_token_ids: Sequence[int], histories: TokenHistories
) -> tuple[_SparseList, _SparseList, _SparseList]:
    scales, falls, biases = _SparseList(), _SparseList(), _SparseList()
    for i, drawing in enumerate(drawings):
        params = drawing.spec.params
        if _has_penalty(params):
            assert not drawing.row.is_chained, f"{drawing.row.request_id} has a penalty and an unknown newest token"
            counts = histories.counts(drawing.row.request_id, drawing.spec)
            if params.repetition_penalty != 1.0:
                seen = counts.seen()
                scales.add(i * vocab_size + seen, np.full(len(seen), params.repetition_penalty, dtype=np.float32))
            if params.presence_penalty or params.frequency_penalty:
                ids, numbers = counts.written()
                fall = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * numbers
                falls.add(i * vocab_size + ids, -fall)
        # a place beyond the row's end would be a neighbour's
        bias = {t: value for t, value in _biases(drawing, eos_token_ids).items() if 0 <= t < vocab_size}
        ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        biases.add(i * vocab_size + ids, np.fromiter(bias.values(), dtype=np.float32, count=len(bias)))
    return scales, falls, biases


def _biases(drawing: _Drawing, eos_token_ids: Sequence[int]) -> dict[int, float]:
    params = drawing.spec.params
    bias: dict[int, float] = {}
    for token, value in params.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    # a finished grammar allows only ends: it wins over min_tokens, or no token would be left
    if drawing.mask is None and _num_outputs(drawing.row, drawing.spec) < params.min_tokens:
        bias.update(dict.fromkeys((*eos_token_ids, *params.stop_token_ids), float("-inf")))
    return bias


def _stacked(masks: list[BitMask], vocab_size: int) -> BitMask:
    num_words = -(-vocab_size // 32)
    stacked = np.zeros((len(masks), num_words), dtype=np.int32)
    for i, bits in enumerate(masks):
        stacked[i, : len(bits)] = bits[:num_words]
    return stacked
