"""A `StepPlan`'s rows as the flat arrays that the device reads: decodes first, then chunks, all in one run of words.

Owns the order of the rows and the sizes of the arrays; numpy only. Invariant: a step of decodes alone is padded to its
bucket, and then every array but the block ids, behind which only compositions lie, has a size and place that depend on
the bucket alone.
Padding rows have no adapter, slot mapping -1 and context 0: nothing is read or written for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapter_kernels.gpu.ragged import RaggedBlocks, chunk_tiles, token_positions, token_slots
from serve.engine.composed_packing import PairFields, pack_pairs
from serve.engine.packed_words import Field, Int32s, Words
from serve.engine.plan import Row


class BlockArrays:
    """Every live sequence's block table as an array, converted once per block instead of once per step."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[list[int], Int32s]] = {}

    def get(self, row: Row, num_blocks: int) -> Int32s:
        """Return the first blocks of the row's table.

        A sequence's table is one list that only grows until it is given back; then the sequence has a new list.
        """
        table = row.block_table
        assert len(table) >= num_blocks, f"{row.request_id} has {len(table)} blocks, its context needs {num_blocks}"
        known_table, known = self._arrays.get(row.request_id, (None, np.zeros(0, dtype=np.int32)))
        if known_table is not table or len(known) > len(table):
            known = np.asarray(table, dtype=np.int32)
        elif len(known) < len(table):
            known = np.concatenate((known, np.asarray(table[len(known) :], dtype=np.int32)))
        self._arrays[row.request_id] = (table, known)
        return known[:num_blocks]

    def release(self, request_id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
        self._arrays.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class StepFields:
    """Where each array of a step lies; all int32. T rows, S decodes, C chunks, padding included."""

    # [T]
    token_ids: Field
    positions: Field
    slot_mapping: Field
    # 0: no adapter, i: the i-th of this step; and the same as adapter slots, -1: none
    local: Field
    slots: Field
    # [S]; of a chained row the row of the previous step's logits whose token it runs, else -1
    chain: Field
    context_lens: Field
    # [adapters of the step + 1], of a bucket its size + 1; the first is -1
    slot_of: Field
    # [tiles], [tiles], [C], [C], [C]
    tile_seq: Field
    tile_row: Field
    row_begins: Field
    lengths: Field
    starts: Field
    # [S + C] where each sequence's block ids begin
    block_begins: Field
    # [S + C] last row of each sequence; [rows of the logits] the same of those that sample; both only with chunks
    ends: Field
    sampled_rows: Field
    # [*]
    block_ids: Field
    # of the rows with compositions, part by part
    pairs: tuple[PairFields, ...]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The host's view of a packed step."""

    # in the device's order; rows[i] runs at token rows begins[i] .. begins[i + 1]
    rows: list[Row]
    begins: list[int]
    # padding included
    num_rows: int
    num_decodes: int
    num_chunks: int
    # None: the step has chunks
    bucket: int | None
    # who owns row i of the step's logits: all rows of a step of decodes, else those that sample
    owners: list[Row]
    # distinct adapter slots of the rows that have one of their own, and of those that have a composition
    adapter_slots: list[int]
    composed_slots: list[int]
    fields: StepFields


def order_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that run one token first, each kind in its own order."""
    return sorted(rows, key=lambda row: len(row.token_ids) != 1)


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds so many decodes; `buckets` rise."""
    return next(bucket for bucket in buckets if bucket >= num_rows)


def pack_step(
    rows: Sequence[Row],
    buckets: Sequence[int],
    previous: Mapping[str, int],
    tables: BlockArrays,
    block_size: int,
    words: Words,
    max_pairs: int,
) -> PackedStep:
    """Pack a step into `words`.

    Args:
        rows: of a plan; none at all makes a step of padding, as wide as the first bucket.
        buckets: sizes that steps of decodes alone are padded to, rising; the last holds every such step.
        previous: by request id, the row of the previous step's logits.
        max_pairs: of a composed row and an adapter, in one part.
    """
    rows = order_rows(rows)
    lengths = [len(row.token_ids) for row in rows]
    num_decodes = lengths.count(1)
    num_chunks = len(rows) - num_decodes
    bucket = None if num_chunks else bucket_for(num_decodes, buckets)
    owners = [row for row in rows if row.sample is not None] if num_chunks else rows
    begins = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    slot_of = list(dict.fromkeys(row.adapter_slot for row in rows if row.adapter_slot is not None))
    return PackedStep(
        rows=rows,
        begins=begins,
        num_rows=bucket or begins[-1],
        num_decodes=bucket or num_decodes,
        num_chunks=num_chunks,
        bucket=bucket,
        owners=owners,
        adapter_slots=slot_of,
        composed_slots=list(dict.fromkeys(slot for row in rows for slot, _ in row.composed)),
        fields=_pack(rows, begins, num_decodes, bucket, previous, slot_of, tables, block_size, words, max_pairs),
    )


def _pack(
    rows: list[Row],
    begins: list[int],
    num_decodes: int,
    bucket: int | None,
    previous: Mapping[str, int],
    adapter_slots: list[int],
    tables: BlockArrays,
    block_size: int,
    words: Words,
    max_pairs: int,
) -> StepFields:
    starts, lengths = [row.start for row in rows], [len(row.token_ids) for row in rows]
    blocks = _blocks(rows, starts, lengths, tables, block_size)
    slot_of = [-1, *adapter_slots]
    place_of = {slot: place for place, slot in enumerate(adapter_slots, start=1)}
    own = [0 if row.adapter_slot is None else place_of[row.adapter_slot] for row in rows]
    local = np.repeat(np.asarray(own, dtype=np.int64), lengths)
    num_rows, num_seqs = sum(lengths), len(rows)
    ends = np.cumsum(lengths, dtype=np.int64) - 1
    tiles = chunk_tiles(starts[num_decodes:], lengths[num_decodes:], num_decodes)
    width, height = bucket or num_rows, bucket or num_decodes
    return StepFields(
        token_ids=words.put_padded(_token_ids(rows, num_decodes), width, 0),
        positions=words.put_padded(token_positions(starts, lengths), width, 0),
        slot_mapping=words.put_padded(token_slots(starts, lengths, blocks, block_size), width, -1),
        local=words.put_padded(local.astype(np.int32), width, 0),
        slots=words.put_padded(np.asarray(slot_of, dtype=np.int32)[local], width, -1),
        chain=words.put_padded([_source(row, previous) for row in rows[:num_decodes]], height, -1),
        context_lens=words.put_padded([start + 1 for start in starts[:num_decodes]], height, 0),
        slot_of=words.put_padded(slot_of, bucket + 1 if bucket else len(slot_of), -1),
        tile_seq=words.put(tiles.tile_seq, np.int32),
        tile_row=words.put(tiles.tile_row, np.int32),
        row_begins=words.put(tiles.row_begins, np.int32),
        lengths=words.put(tiles.lengths, np.int32),
        starts=words.put(tiles.starts, np.int32),
        block_begins=words.put_padded(blocks.begins, bucket or num_seqs, 0),
        ends=words.put([] if bucket else ends, np.int32),
        sampled_rows=words.put(
            [] if bucket else [end for row, end in zip(rows, ends, strict=True) if row.sample is not None], np.int32
        ),
        # never empty: a captured graph needs the address
        block_ids=words.put_padded(blocks.ids, max(1, len(blocks.ids)), 0),
        pairs=pack_pairs(rows, begins, max_pairs, words),
    )


def _blocks(
    rows: list[Row], starts: list[int], lengths: list[int], tables: BlockArrays, block_size: int
) -> RaggedBlocks:
    counts = [-(-(start + length) // block_size) for start, length in zip(starts, lengths, strict=True)]
    arrays = [tables.get(row, count) for row, count in zip(rows, counts, strict=True)]
    begins = np.cumsum(counts, dtype=np.int64) - counts
    ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
    return RaggedBlocks(begins.astype(np.int32), ids)


def _token_ids(rows: list[Row], num_decodes: int) -> Int32s:
    decodes = np.asarray([max(0, row.token_ids[0]) for row in rows[:num_decodes]], dtype=np.int32)
    return np.concatenate((decodes, *(np.asarray(row.token_ids, dtype=np.int32) for row in rows[num_decodes:])))


def _source(row: Row, previous: Mapping[str, int]) -> int:
    return previous[row.request_id] if row.is_chained else -1
