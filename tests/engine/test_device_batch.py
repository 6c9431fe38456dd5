"""A plan's rows as packed words, and their way to the device: order, padding, equal places, one copy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from serve.engine.device_batch import NUM_HOST_BUFFERS, StepBounds, WordBuffers, composed_part, device_step
from serve.engine.packed_words import Field, Words
from serve.engine.plan import Row, SampleSpec
from serve.engine.step_packing import BlockArrays, PackedStep, bucket_for, pack_step
from serve.messages import SamplingParams

BUCKETS = (1, 2, 4, 8)
BLOCK_SIZE = 4
MAX_PAIRS = 8
SPEC = SampleSpec(SamplingParams(max_tokens=4, seed=1), [1], [])
BOUNDS = StepBounds(max_step_tokens=300, max_num_seqs=8, max_blocks_per_seq=20)


def decode(name: str, position: int, blocks: list[int], slot: int | None = None, *, chained: bool = False) -> Row:
    return Row(name, [-1 if chained else 50 + position], position, blocks, slot, SPEC, is_chained=chained)


def chunk(
    name: str, start: int, length: int, blocks: list[int], slot: int | None = None, spec: SampleSpec | None = None
) -> Row:
    return Row(name, list(range(100, 100 + length)), start, blocks, slot, spec)


def pack(rows: list[Row], previous: dict[str, int] | None = None) -> tuple[PackedStep, np.ndarray]:
    words = Words()
    packed = pack_step(rows, BUCKETS, previous or {}, BlockArrays(), BLOCK_SIZE, words, MAX_PAIRS)
    array = np.full(words.size, -77, dtype=np.int32)
    words.write(array)
    return packed, array


def read(array: np.ndarray, field: Field) -> list[int]:
    return list(array[field.begin : field.end].tolist())


def test_decodes_come_first_and_chunks_follow_in_tiles() -> None:
    rows = [
        chunk("c", 2, 130, list(range(40, 73)), slot=6, spec=SPEC),
        decode("a", 5, [9, 8], slot=6),
        chunk("d", 0, 3, [7]),
        decode("b", 0, [3], chained=True),
    ]
    packed, array = pack(rows, {"x": 0, "b": 1})
    fields = packed.fields
    assert [row.request_id for row in packed.rows] == ["a", "b", "c", "d"]
    assert (packed.num_decodes, packed.num_chunks, packed.num_rows, packed.bucket) == (2, 2, 135, None)
    assert packed.begins == [0, 1, 2, 132, 135] and packed.adapter_slots == [6]
    assert read(array, fields.token_ids) == [55, 0, *range(100, 230), 100, 101, 102]
    assert read(array, fields.positions) == [5, 0, *range(2, 132), 0, 1, 2]
    slots = [8 * 4 + 1, 3 * 4, *((40 + p // 4) * 4 + p % 4 for p in range(2, 132)), 28, 29, 30]
    assert read(array, fields.slot_mapping) == slots
    assert read(array, fields.local) == [1, 0, *[1] * 130, 0, 0, 0]
    assert read(array, fields.slots) == [6, -1, *[6] * 130, -1, -1, -1]
    assert read(array, fields.slot_of) == [-1, 6]
    assert read(array, fields.chain) == [-1, 1]
    assert read(array, fields.context_lens) == [6, 1]
    assert read(array, fields.block_begins) == [0, 2, 3, 36]
    assert read(array, fields.block_ids) == [9, 8, 3, *range(40, 73), 7]
    tiles = set(zip(read(array, fields.tile_seq), read(array, fields.tile_row), strict=True))
    assert tiles == {(0, 0), (0, 128), (1, 0)}
    assert (read(array, fields.row_begins), read(array, fields.lengths)) == ([2, 132], [130, 3])
    assert read(array, fields.starts) == [2, 0]
    # rows of the logits belong to the sequences that sample
    assert [row.request_id for row in packed.owners] == ["a", "b", "c"]
    assert read(array, fields.sampled_rows) == [0, 1, 131] and read(array, fields.ends) == [0, 1, 131, 134]


def test_decodes_alone_are_padded_to_a_bucket_whose_places_never_change() -> None:
    three = [decode("a", 5, [9, 8], slot=2), decode("b", 0, [3]), decode("c", 9, [1, 2, 4], slot=7)]
    packed, array = pack(three)
    fields = packed.fields
    assert (packed.bucket, packed.num_rows, packed.num_decodes) == (4, 4, 4)
    assert read(array, fields.slot_mapping)[3] == -1 and read(array, fields.context_lens) == [6, 1, 10, 0]
    assert read(array, fields.slots) == [2, -1, 7, -1] and read(array, fields.local) == [1, 0, 2, 0]
    assert read(array, fields.slot_of) == [-1, 2, 7, -1, -1] and read(array, fields.chain) == [-1] * 4
    for other in ([], [decode("x", 20, list(range(6)), slot=slot) for slot in range(4)]):
        words = Words()
        again = pack_step(other, (4,), {}, BlockArrays(), BLOCK_SIZE, words, MAX_PAIRS).fields
        assert fields.pairs == again.pairs == ()
        for name in set(fields.__slots__) - {"pairs"}:
            field, same = getattr(fields, name), getattr(again, name)
            assert field.begin == same.begin and (name == "block_ids" or field.size == same.size), name
    assert all(getattr(fields, name).begin % 4 == 0 for name in set(fields.__slots__) - {"pairs"})


def test_every_number_of_decodes_has_a_bucket() -> None:
    assert [bucket_for(count, BUCKETS) for count in range(9)] == [1, 1, 2, 4, 4, 8, 8, 8, 8]


def test_block_arrays_follow_tables_that_grow_and_tables_that_are_new() -> None:
    tables = BlockArrays()
    blocks = [4, 5]
    row = decode("a", 3, blocks)
    assert tables.get(row, 1).tolist() == [4]
    blocks.append(9)
    assert tables.get(row, 3).tolist() == [4, 5, 9]
    # preempted: the old list is emptied, the sequence comes back with another one of the same length
    blocks.clear()
    assert tables.get(decode("a", 3, [1, 2, 3]), 3).tolist() == [1, 2, 3]
    with pytest.raises(AssertionError, match="its context needs 4"):
        tables.get(decode("a", 3, [1, 2, 3]), 4)
    tables.release("a")
    tables.release("never seen")


def test_words_reach_the_device_and_sampling_words_lie_behind_them() -> None:
    buffers = WordBuffers(BOUNDS, torch.device("cpu"))
    addresses = set()
    for turn in range(2 * NUM_HOST_BUFFERS):
        step, sampling = Words(), Words()
        ids = step.put([turn, 2, 3], np.int32)
        draws = sampling.put([0.25, turn / 3], np.float64)
        sent = buffers.send(step, sampling)
        assert sent.step.ints(ids).tolist() == [turn, 2, 3]
        assert sent.sampling.doubles(draws).tolist() == [0.25, turn / 3]
        addresses.add(sent.step.ints(ids).data_ptr())
    assert len(addresses) == 1


def test_sampling_words_beyond_the_buffer_travel_apart() -> None:
    buffers = WordBuffers(BOUNDS, torch.device("cpu"))
    step, sampling = Words(), Words()
    ids = step.put([5], np.int32)
    many = sampling.put(np.arange(400_000), np.int32)
    sent = buffers.send(step, sampling)
    assert sent.step.ints(ids).tolist() == [5]
    assert torch.equal(sent.sampling.ints(many), torch.arange(400_000, dtype=torch.int32))


def test_the_largest_steps_fit_the_buffer() -> None:
    blocks = list(range(20))
    full = [chunk(f"c{i}", 0, 37, blocks, slot=i, spec=SPEC) for i in range(7)] + [chunk("last", 39, 41, blocks)]
    wide = [decode(f"d{i}", 79, blocks, slot=i) for i in range(8)]
    for rows in (full, wide):
        assert pack(rows)[1].size <= BOUNDS.num_words
    assert sum(len(row.token_ids) for row in full) == BOUNDS.max_step_tokens


def test_a_step_of_one_kind_has_no_part_of_the_other() -> None:
    words = Words()
    packed = pack_step([decode("a", 5, [9, 8])], BUCKETS, {}, BlockArrays(), BLOCK_SIZE, words, MAX_PAIRS)
    sent = WordBuffers(BOUNDS, torch.device("cpu")).send(words, Words())
    step = device_step(packed, sent.step, None)
    assert step.prefills is None and step.decodes is not None and step.adapters is None
    assert step.decodes.context_lens.tolist() == [6] and step.token_ids.dtype == torch.int32
    words = Words()
    packed = pack_step([chunk("c", 0, 3, [7])], BUCKETS, {}, BlockArrays(), BLOCK_SIZE, words, MAX_PAIRS)
    sent = WordBuffers(BOUNDS, torch.device("cpu")).send(words, Words())
    step = device_step(packed, sent.step, None)
    assert step.decodes is None and step.prefills is not None
    assert (step.prefills.first_row, step.prefills.block_begins.tolist()) == (0, [0])


def test_compositions_lie_behind_everything_in_parts() -> None:
    rows = [
        chunk("c", 0, 3, [7], spec=SPEC),
        decode("a", 5, [9, 8], slot=6),
        decode("b", 0, [3]),
    ]
    bare, _ = pack(rows)
    composed = [replace(rows[0], composed=((6, 0.5), (2, -1.5))), rows[1], replace(rows[2], composed=((4, 2.0),))]
    packed, array = pack(composed)
    assert (packed.adapter_slots, packed.composed_slots) == ([6], [4, 6, 2])
    assert replace(packed.fields, pairs=()) == bare.fields
    # a, b, then the chunk's rows: b's composition alone, the chunk's adapter after adapter
    (part,) = packed.fields.pairs
    assert part.row_of.begin >= bare.fields.block_ids.end
    assert read(array, part.row_of) == [1, 2, 3, 4, 2, 3, 4]
    assert read(array, part.slots) == [4, 6, 6, 6, 2, 2, 2]
    assert array[part.weights.begin : part.weights.end].view(np.float32).tolist() == [2, 0.5, 0.5, 0.5, *[-1.5] * 3]
    blocks = [[0, 1, 1, 1], [1, 1, 3, 2], [2, 1, 3, 2], [3, 1, 3, 2]]
    assert read(array, part.blocks) == [word for block in blocks for word in block]

    buffers = WordBuffers(BOUNDS, torch.device("cpu"))
    words = Words()
    fields = pack_step(composed, BUCKETS, {}, BlockArrays(), BLOCK_SIZE, words, MAX_PAIRS).fields
    sent = composed_part(fields.pairs[0], buffers.send(words, Words()).step)
    assert sent.route.block_rows == 1 and sent.route.num_blocks == 7 and sent.weights[0] == 2
    assert sent.blocks.tolist() == blocks and sent.row_of.tolist() == [1, 2, 3, 4, 2, 3, 4]


def test_the_largest_step_of_compositions_fits_the_words() -> None:
    lengths = (65, 65, 40, 40, 30, 30, 29, 1)
    for num_adapters in (1, 5, 8):
        rows = [
            replace(
                chunk(str(i), 0, length, list(range(20)), spec=SPEC),
                composed=tuple((slot, 1 + i / 64) for slot in range(num_adapters)),
            )
            for i, length in enumerate(lengths)
        ]
        words = Words()
        packed = pack_step(rows, BUCKETS, {}, BlockArrays(), BLOCK_SIZE, words, BOUNDS.max_pairs)
        assert packed.num_rows == BOUNDS.max_step_tokens and words.size <= BOUNDS.num_words
        sizes = [part.row_of.size for part in packed.fields.pairs]
        assert sum(sizes) == num_adapters * packed.num_rows and max(sizes) <= BOUNDS.max_pairs == 300
