"""A step's ragged shapes as flat int32 arrays: block tables end to end, slots of tokens, tiles of prefill chunks.

Owns pure numpy: the caller packs the arrays into one copy to the device. Invariant: no array is padded, and none grows
with what is not in the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]

# query rows of one prefill tile
PREFILL_TILE_ROWS = 128


@dataclass(frozen=True, slots=True)
class RaggedBlocks:
    """Block tables end to end: sequence s has `ids[begins[s] :]`, as many as its context needs."""

    begins: Int32s
    ids: Int32s


@dataclass(frozen=True, slots=True)
class ChunkTiles:
    """The arrays of a `PrefillPart` besides its blocks; see there."""

    tile_seq: Int32s
    tile_row: Int32s
    row_begins: Int32s
    lengths: Int32s
    starts: Int32s


def ragged_blocks(contexts: Sequence[int], tables: Sequence[Sequence[int]], block_size: int) -> RaggedBlocks:
    """Lay the block tables end to end, each cut to the blocks that its context touches.

    Args:
        contexts: per sequence, positions that are attended, those of this step included; 0: no block.
        tables: per sequence, block ids that cover the context at least.
    Returns:
        begins [S] and ids [*].
    """
    counts = [-(-context // block_size) for context in contexts]
    ids = [block for table, count in zip(tables, counts, strict=True) for block in table[:count]]
    begins = np.zeros(len(counts), dtype=np.int32)
    np.cumsum(counts[:-1], out=begins[1:])
    assert len(ids) == sum(counts), "a block table is shorter than its context"
    return RaggedBlocks(begins, np.asarray(ids, dtype=np.int32))


def token_slots(starts: Sequence[int], lengths: Sequence[int], blocks: RaggedBlocks, block_size: int) -> Int32s:
    """Flat cache row of every new token, sequence after sequence: [sum of lengths].

    slot = id of the token's block * block_size + position % block_size.
    """
    positions = token_positions(starts, lengths)
    begins = np.repeat(blocks.begins, np.asarray(lengths, dtype=np.int64))
    ids = blocks.ids[begins + positions // block_size]
    return np.asarray(ids * block_size + positions % block_size, dtype=np.int32)


def token_positions(starts: Sequence[int], lengths: Sequence[int]) -> Int32s:
    """Position of every new token, sequence after sequence: [sum of lengths]."""
    counts = np.asarray(lengths, dtype=np.int64)
    shifts = np.repeat(np.asarray(starts, dtype=np.int64) - (np.cumsum(counts) - counts), counts)
    return np.asarray(np.arange(len(shifts)) + shifts, dtype=np.int32)


def chunk_tiles(
    starts: Sequence[int], lengths: Sequence[int], first_row: int, tile_rows: int = PREFILL_TILE_ROWS
) -> ChunkTiles:
    """Cut prefill chunks into tiles of query rows, those with the longest context first.

    Args:
        starts: per chunk, the position of its first row. lengths: rows of the chunk, each >= 1.
        first_row: row of the step where the first chunk begins; the others follow without gap.
    Notes: programs start in order, so the long tiles run while the short ones fill the gaps at the end.
    """
    counts = -(-np.asarray(lengths, dtype=np.int32) // tile_rows)
    seqs = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    rows = (np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    order = np.argsort(-(np.asarray(starts)[seqs] + rows), kind="stable")
    begins = first_row + np.cumsum(lengths) - np.asarray(lengths)
    return ChunkTiles(
        tile_seq=seqs[order].astype(np.int32),
        tile_row=rows[order].astype(np.int32),
        row_begins=begins.astype(np.int32),
        lengths=np.asarray(lengths, dtype=np.int32),
        starts=np.asarray(starts, dtype=np.int32),
    )
