"""Rows of a step on which several adapters act, as arrays among the step's words.

Owns where these arrays lie; `composed_rows` says what they mean. numpy only. Invariant: a step without such rows has
none of them, so the words of all others lie where captured graphs look for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapter_kernels.gpu.composed_rows import BLOCK_COLUMNS, PairArrays, spread
from serve.engine.packed_words import Field, Words, padded_size
from serve.engine.plan import Row
from serve.messages import MAX_COMPOSED

# words of a pair: row, slot, weight, order, and the blocks that it may be alone in, of both kinds
_WORDS_PER_PAIR = 4 + BLOCK_COLUMNS + 3
_ARRAYS_PER_PART = 8
# of one part: the inputs of its pairs are copied, at the widest site of an 8 B model that is 58 MB
_MAX_PAIRS = 2048


@dataclass(frozen=True, slots=True)
class PairFields:
    """Where the arrays of one `PairArrays` lie; all int32 but the weights, which are fp32."""

    row_of: Field
    slots: Field
    weights: Field
    blocks: Field
    perm: Field
    block_slot: Field
    block_start: Field
    block_len: Field


def max_pairs_for(max_step_tokens: int) -> int:
    """Return how many pairs of a row and an adapter a part of a step may have: a whole composition, at the least."""
    return max(MAX_COMPOSED, min(max_step_tokens, _MAX_PAIRS))


def composed_words(max_step_tokens: int) -> int:
    """Return the most words that the compositions of a step take."""
    num_pairs = MAX_COMPOSED * max_step_tokens
    # of two parts in a row, one is at least half full
    num_parts = 2 * num_pairs // max_pairs_for(max_step_tokens) + 2
    return num_pairs * _WORDS_PER_PAIR + num_parts * _ARRAYS_PER_PART * padded_size(1)


def pack_pairs(rows: Sequence[Row], begins: Sequence[int], max_pairs: int, words: Words) -> tuple[PairFields, ...]:
    """Append what the composed ones among a step's rows need; `begins[i]` is the first token row of `rows[i]`."""
    composed = [
        (begin, len(row.token_ids), row.composed) for row, begin in zip(rows, begins, strict=False) if row.composed
    ]
    return tuple(_put(arrays, words) for arrays in spread(composed, max_pairs))


def _put(arrays: PairArrays, words: Words) -> PairFields:
    return PairFields(
        row_of=words.put(arrays.row_of, np.int32),
        slots=words.put(arrays.slots, np.int32),
        weights=words.put(arrays.weights, np.float32),
        blocks=words.put(arrays.blocks, np.int32),
        perm=words.put(arrays.perm, np.int32),
        block_slot=words.put(arrays.block_slot, np.int32),
        block_start=words.put(arrays.block_start, np.int32),
        block_len=words.put(arrays.block_len, np.int32),
    )
