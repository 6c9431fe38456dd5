"""Chunked prefill under the interpreter against the row-by-row definition, and the arrays that cut a step into tiles.

Outputs are pre-filled with NaN, and so is every cache slot that is not to be read.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.paged_prefill import paged_prefill
from adapter_kernels.gpu.ragged import chunk_tiles, ragged_blocks, token_positions, token_slots
from adapter_kernels.reference_attention import paged_attention_rows
from tests.kernels.gpu.batches import RAGGED_ROWS
from tests.kernels.gpu.launches import record_launches
from tests.kernels.gpu.paged_cases import TOLERANCES, Heads, PagedCase, paged_case, queries, relative_error

TILES = LaunchConfig(block_k=32)
DTYPES = [torch.float32, torch.float16]
SCALE = 0.2
# three chunks: from the beginning, in the middle of a prompt, one row; two rows of decodes before them
CONTEXTS, STARTS, FIRST_ROW = (37, 100, 16), (0, 60, 15), 2


def prefill(
    case: PagedCase,
    q: Tensor,
    starts: tuple[int, ...],
    first_row: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    tile_rows: int = 32,
) -> Tensor:
    out = torch.full_like(q, float("nan"))
    part = case.prefill_part(starts, first_row, tile_rows)
    paged_prefill(q, case.k_cache, case.v_cache, part, out, scale=SCALE, window=window, soft_cap=soft_cap, config=TILES)
    return out


def expected_rows(
    case: PagedCase, q: Tensor, starts: tuple[int, ...], window: int | None = None, soft_cap: float | None = None
) -> Tensor:
    """The chunks' rows only, chunk after chunk."""
    contexts: list[int] = []
    tables: list[list[int]] = []
    for start, context, table in zip(starts, case.contexts, case.tables, strict=True):
        contexts += range(start + 1, context + 1)
        tables += [table] * (context - start)
    return paged_attention_rows(
        q, case.k_cache, case.v_cache, contexts, tables, scale=SCALE, window=window, soft_cap=soft_cap
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (1, None), (10, None), (33, 5.0), (None, 5.0)])
def test_prefill_equals_the_reference(dtype: torch.dtype, window: int | None, soft_cap: float | None) -> None:
    heads = Heads(2, 1, 32)
    case = paged_case(CONTEXTS, heads, dtype)
    num_rows = FIRST_ROW + sum(CONTEXTS) - sum(STARTS)
    q = queries(num_rows + 1, heads, dtype)
    out = prefill(case, q, STARTS, FIRST_ROW, window=window, soft_cap=soft_cap)
    expected = expected_rows(case, q[FIRST_ROW:num_rows], STARTS, window, soft_cap)
    assert relative_error(out[FIRST_ROW:num_rows], expected) < TOLERANCES[dtype]
    assert out[:FIRST_ROW].isnan().all() and out[num_rows:].isnan().all()


@pytest.mark.parametrize("start", [0, 7])
def test_chunks_of_ragged_lengths(start: int) -> None:
    heads = Heads(1, 1, 16)
    case = paged_case([start + length for length in RAGGED_ROWS], heads, torch.float32)
    q = queries(sum(RAGGED_ROWS), heads, torch.float32)
    starts = (start,) * len(RAGGED_ROWS)
    assert relative_error(prefill(case, q, starts, 0), expected_rows(case, q, starts)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads", [Heads(1, 1, 64), Heads(6, 2, 80), Heads(7, 1, 96), Heads(8, 1, 128), Heads(1, 1, 256)]
)
def test_every_head_shape(heads: Heads, dtype: torch.dtype) -> None:
    case = paged_case((40,), heads, dtype)
    q = queries(17, heads, dtype)
    assert relative_error(prefill(case, q, (23,), 0), expected_rows(case, q, (23,))) < TOLERANCES[dtype]


def test_a_chunk_has_the_same_bits_alone_and_beside_others() -> None:
    heads = Heads(2, 1, 32)
    q = queries(78, heads, torch.float16)
    out = prefill(paged_case(CONTEXTS, heads, torch.float16), q, STARTS, 0)
    alone = paged_case(CONTEXTS, heads, torch.float16, kept=[1])
    assert torch.equal(prefill(alone, q[37:77], STARTS[1:2], 0), out[37:77])


def test_positions_outside_the_rows_windows_are_never_read() -> None:
    heads = Heads(2, 1, 32)
    case = paged_case((100,), heads, torch.float32)
    q = queries(20, heads, torch.float32)
    expected = expected_rows(case, q, (80,), window=10)
    # the first row, position 80, sees from 71 on
    for position in range(71):
        block = case.tables[0][position // 16]
        case.k_cache[block, position % 16] = float("nan")
        case.v_cache[block, position % 16] = float("nan")
    out = prefill(case, q, (80,), 0, window=10)
    assert relative_error(out, expected) < TOLERANCES[torch.float32]


def test_a_chunk_that_is_not_finite_stays_alone() -> None:
    heads = Heads(1, 1, 32)
    case = paged_case((20, 33), heads, torch.float32)
    q = queries(53, heads, torch.float32)
    expected = expected_rows(case, q, (0, 0))
    case.v_cache[case.tables[0][0], 0] = float("inf")
    case.k_cache[case.tables[0][0], 0] = float("nan")
    out = prefill(case, q, (0, 0), 0)
    assert out[:20].isnan().all()
    assert relative_error(out[20:], expected[20:]) < TOLERANCES[torch.float32]


def test_a_tile_without_chunk_does_nothing_and_prefill_is_one_launch() -> None:
    heads = Heads(2, 1, 32)
    case = paged_case((40,), heads, torch.float32)
    part = case.prefill_part((0,), 0, 32)
    part.tile_seq.fill_(-1)
    # a kernel that went on would find a chunk of 40 rows at index -1
    lengths, zeros = torch.tensor([40, 40], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    part = replace(part, lengths=lengths[1:], starts=zeros[1:], row_begins=zeros[1:], block_begins=zeros[1:])
    q = queries(40, heads, torch.float32)
    out = torch.full_like(q, float("nan"))
    with record_launches() as launches:
        paged_prefill(q, case.k_cache, case.v_cache, part, out, scale=SCALE, window=None, soft_cap=None)
    assert [(launch.kernel, launch.grid) for launch in launches] == [("_paged_prefill_kernel", (2, 2))]
    assert out.isnan().all()


def test_tiles_cover_every_row_once_longest_context_first() -> None:
    starts, lengths = [0, 60, 15], [70, 33, 1]
    tiles = chunk_tiles(starts, lengths, first_row=4, tile_rows=32)
    assert tiles.row_begins.tolist() == [4, 74, 107]
    covered = [
        (seq, row)
        for seq, first in zip(tiles.tile_seq.tolist(), tiles.tile_row.tolist(), strict=True)
        for row in range(first, min(first + 32, lengths[seq]))
    ]
    assert sorted(covered) == [(seq, row) for seq, length in enumerate(lengths) for row in range(length)]
    begins = [starts[seq] + row for seq, row in zip(tiles.tile_seq, tiles.tile_row, strict=True)]
    assert begins == sorted(begins, reverse=True)
    assert all(array.dtype == np.int32 for array in (tiles.tile_seq, tiles.tile_row, tiles.row_begins, tiles.starts))


def test_slots_and_positions_are_those_of_the_cpu_plan() -> None:
    starts, lengths, tables = [5, 0, 9], [1, 6, 3], [[3, 4, 11], [5, 9], [2, 1, 0]]
    blocks = ragged_blocks([start + length for start, length in zip(starts, lengths, strict=True)], tables, 4)
    plan = AttentionPlan.build(starts, lengths, tables, 4)
    assert token_slots(starts, lengths, blocks, 4).tolist() == plan.slot_mapping.tolist()
    assert token_positions(starts, lengths).tolist() == plan.positions.tolist()
    # the first table has a block more than its context touches
    assert blocks.ids.tolist() == [3, 4, 5, 9, 2, 1, 0] and blocks.begins.tolist() == [0, 2, 4]


def test_an_empty_step_has_empty_arrays() -> None:
    blocks = ragged_blocks([], [], 16)
    assert blocks.begins.size == blocks.ids.size == token_slots([], [], blocks, 16).size == 0
    assert chunk_tiles([], [], 0).tile_seq.size == 0


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(AssertionError, match="shorter than its context"):
        ragged_blocks([17], [[0]], 16)
