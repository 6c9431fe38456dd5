"""Where each token of a step reads and writes the paged KV cache: built once per step, used by every layer.

Owns the index tensors (positions, slot mapping, padded block tables, groups of sequences); knows no weights and no
dtype. Invariant: tokens lie sequence after sequence, and slot `block * block_size + offset` is written before any row
of the same step reads it.
"""

from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# prefill chunks are handled one by one, decodes and other short chunks in one padded call
_MAX_BATCHED_LENGTH = 1
_PADDING = 16


class AttendedRows(Protocol):
    """Rows of a step that attend each by itself, as the compiled kernel reads them."""

    @property
    def rows(self) -> Tensor:
        """[N] int64: row of the step's token axis."""
        ...

    @property
    def slots(self) -> Tensor:
        """Flat cache slot of each context position: a row of them for each row, or one that all share."""
        ...

    @property
    def slots_stride(self) -> int:
        """From the slots of one row to those of the next; 0: they are shared."""
        ...

    @property
    def context_lengths(self) -> Tensor:
        """[N] int64: how many positions each row sees, itself included."""
        ...


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

    @property
    def slots_stride(self) -> int:
        """See `AttendedRows`."""
        return self.max_context


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence that runs several tokens: rows `begin .. end` of the step, positions `start ..`."""

    begin: int
    end: int
    start: int
    # [context] int64: flat cache slot of positions 0 .. start + (end - begin) - 1
    slots: Tensor
    # [end - begin] int64 each: the rows `begin ..`, and `start + 1 ..`
    rows: Tensor
    context_lengths: Tensor
    # as in `DecodeGroup`
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def slots_stride(self) -> int:
        """See `AttendedRows`: all tokens of a chunk are of one sequence."""
        return 0


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
        begins = list(accumulate(lengths, initial=0))
        is_decode = [length <= _MAX_BATCHED_LENGTH for length in lengths]
        positions, slot_mapping = np.empty(begins[-1], dtype=np.int64), np.empty(begins[-1], dtype=np.int64)
        decodes = None
        if any(is_decode):
            rows = np.fromiter(compress(begins, is_decode), np.int64)
            own_starts = np.fromiter(compress(starts, is_decode), np.int64)
            slots = _decode_slots(own_starts, list(compress(block_tables, is_decode)), block_size)
            positions[rows] = own_starts
            slot_mapping[rows] = slots[np.arange(len(rows)), own_starts]
            decodes = DecodeGroup(
                rows=torch.from_numpy(rows),
                slots=torch.from_numpy(slots.reshape(-1)),
                context_lengths=torch.from_numpy(own_starts + 1),
                max_context=slots.shape[1],
                is_whole_step=all(is_decode),
            )
        chunks = []
        for index in (i for i, decodes_alone in enumerate(is_decode) if not decodes_alone):
            begin, end, start = begins[index], begins[index + 1], starts[index]
            context = _slots(block_tables[index], start + lengths[index], block_size)
            own = np.arange(start, start + lengths[index])
            positions[begin:end] = own
            slot_mapping[begin:end] = context[start:]
            lengths_seen = torch.from_numpy(own + 1)
            chunks.append(Chunk(begin, end, start, torch.from_numpy(context), torch.arange(begin, end), lengths_seen))
        return cls(
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slot_mapping),
            decodes=decodes,
            chunks=tuple(chunks),
            num_tokens=begins[-1],
        )


Slots = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _slots(table: list[int], context: int, block_size: int) -> Slots:
    num_blocks = -(-context // block_size)
    blocks = np.asarray(table[:num_blocks], dtype=np.int64)
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:context]


def _decode_slots(starts: Slots, tables: list[list[int]], block_size: int) -> Slots:
    """Return the slots [sequences, longest] of every position up to each sequence's own, all tables read at once."""
    # whole vectors of scores: else the last, partial one is summed in an order that depends on the longest neighbour
    longest = -(-(int(starts.max()) + 1) // _PADDING) * _PADDING
    num_blocks = -(-longest // block_size)
    flat: list[int] = []
    for table, start in zip(tables, starts.tolist(), strict=True):
        num_own = start // block_size + 1
        flat += table[:num_own]
        flat += table[:1] * (num_blocks - num_own)
    blocks = np.fromiter(flat, np.int64, len(flat)).reshape(len(tables), num_blocks, 1)
    slots = (blocks * block_size + np.arange(block_size)).reshape(len(tables), -1)[:, :longest]
    # padding repeats a slot of the sequence itself: never another tenant's, never unwritten memory
    first_end = int(starts.min()) + 1
    is_padding = np.arange(first_end, longest) > starts[:, None]
    np.copyto(slots[:, first_end:], slots[:, :1], where=is_padding)
    return slots
