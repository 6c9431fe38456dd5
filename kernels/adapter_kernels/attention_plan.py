"""Where each token of a step reads and writes the paged KV cache: built once per step, used by every layer.

Owns the index tensors (positions, slot mapping, padded block tables, groups of sequences); knows no weights and no
dtype. Invariant: tokens lie sequence after sequence, and slot `block * block_size + offset` is written before any row
of the same step reads it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# prefill chunks are handled one by one, decodes and other short chunks in one padded call
_MAX_BATCHED_LENGTH = 1
_PADDING = 16


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """All sequences of the step that run exactly one token: attended in one padded call."""

    # [G] int64: row of the step's token axis
    rows: Tensor
    # [G * max_context] int64: flat cache slot of each context position, padded with slot 0 of the own first block
    slots: Tensor
    # [G] int64
    context_lengths: Tensor
    max_context: int
    # True when the group is the whole step, in order: no gather of rows is needed
    is_whole_step: bool
    # by window: made by the first layer that needs it, read by all others of the step
    masks: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence that runs several tokens: rows `begin .. end` of the step, positions `start ..`."""

    begin: int
    end: int
    start: int
    # [context] int64: flat cache slot of positions 0 .. start + (end - begin) - 1
    slots: Tensor
    # as in `DecodeGroup`
    masks: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Index tensors of one step over sequences of ragged length."""

    positions: Tensor
    slot_mapping: Tensor
    decodes: DecodeGroup | None
    chunks: tuple[Chunk, ...]
    num_tokens: int

    @classmethod
    def build(
        cls, starts: list[int], lengths: list[int], block_tables: list[list[int]], block_size: int
    ) -> "AttentionPlan":
        """Build the plan of a step.

        Args:
            starts: per sequence, the position of its first new token.
            lengths: per sequence, how many tokens it runs, each >= 1.
            block_tables: per sequence, block ids that cover positions `0 .. start + length - 1` at least.
            block_size: positions per block.
        """
        slots = [
            _slots(table, start + length, block_size)
            for start, length, table in zip(starts, lengths, block_tables, strict=True)
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        decode_indices = [i for i, length in enumerate(lengths) if length <= _MAX_BATCHED_LENGTH]
        chunks = tuple(
            Chunk(int(offsets[i]), int(offsets[i + 1]), starts[i], torch.from_numpy(slots[i]))
            for i, length in enumerate(lengths)
            if length > _MAX_BATCHED_LENGTH
        )
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        mapping = np.concatenate([row[start:] for row, start in zip(slots, starts, strict=True)])
        return cls(
            positions=torch.from_numpy(positions.astype(np.int64)),
            slot_mapping=torch.from_numpy(mapping),
            decodes=_decode_group(decode_indices, slots, offsets, len(lengths)) if decode_indices else None,
            chunks=chunks,
            num_tokens=int(offsets[-1]),
        )


def _slots(table: list[int], context: int, block_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    num_blocks = -(-context // block_size)
    blocks = np.asarray(table[:num_blocks], dtype=np.int64)
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:context]


def _decode_group(
    indices: list[int],
    slots: list[np.ndarray[tuple[int], np.dtype[np.int64]]],
    offsets: np.ndarray[tuple[int], np.dtype[np.int64]],
    num_sequences: int,
) -> DecodeGroup:
    lengths = np.asarray([len(slots[i]) for i in indices], dtype=np.int64)
    # whole vectors of scores: else the last, partial one is summed in an order that depends on the longest neighbour
    longest = -(-int(lengths.max()) // _PADDING) * _PADDING
    padded = np.empty((len(indices), longest), dtype=np.int64)
    for row, i in enumerate(indices):
        # padding repeats a slot of the sequence itself: never another tenant's, never unwritten memory
        padded[row, : len(slots[i])] = slots[i]
        padded[row, len(slots[i]) :] = slots[i][0]
    return DecodeGroup(
        rows=torch.from_numpy(offsets[:-1][indices].astype(np.int64)),
        slots=torch.from_numpy(padded.reshape(-1)),
        context_lengths=torch.from_numpy(lengths),
        max_context=longest,
        is_whole_step=len(indices) == num_sequences,
    )
