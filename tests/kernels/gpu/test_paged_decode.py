"""Split-KV decode under the interpreter against the row-by-row definition: ragged contexts, windows, caps, head shapes.

Outputs are pre-filled with NaN, and so is every cache slot and every partial result that is not to be read.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.paged_decode import DecodeWorkspace, paged_decode
from adapter_kernels.gpu.step import DecodePart
from adapter_kernels.reference_attention import paged_attention_rows
from tests.kernels.gpu.batches import RAGGED_ROWS
from tests.kernels.gpu.launches import record_launches
from tests.kernels.gpu.paged_cases import TOLERANCES, Heads, PagedCase, paged_case, queries, relative_error

CONTEXTS = (1, 15, 100, 0, 16, 17)
TILES = LaunchConfig(block_k=32)
DTYPES = [torch.float32, torch.float16]
SCALE = 0.2


def workspace(num_seqs: int, heads: Heads, num_splits: int, min_split_positions: int = 32) -> DecodeWorkspace:
    made = DecodeWorkspace.build(
        num_seqs,
        heads.num_heads,
        heads.head_dim,
        torch.device("cpu"),
        num_splits=num_splits,
        min_split_positions=min_split_positions,
    )
    for tensor in (made.tops, made.totals, made.partials):
        tensor.fill_(float("nan"))
    return made


def decode(
    case: PagedCase,
    q: Tensor,
    heads: Heads,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    num_splits: int = 3,
    part: DecodePart | None = None,
) -> Tensor:
    out = torch.full_like(q, float("nan"))
    paged_decode(
        q,
        case.k_cache,
        case.v_cache,
        part or case.decode_part(),
        out,
        scale=SCALE,
        window=window,
        soft_cap=soft_cap,
        workspace=workspace(q.shape[0], heads, num_splits),
        config=TILES,
    )
    return out


def expected_rows(case: PagedCase, q: Tensor, window: int | None = None, soft_cap: float | None = None) -> Tensor:
    return paged_attention_rows(
        q, case.k_cache, case.v_cache, case.contexts, case.tables, scale=SCALE, window=window, soft_cap=soft_cap
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "soft_cap", "num_splits"),
    [(None, None, 1), (None, None, 3), (1, None, 1), (16, None, 3), (33, 5.0, 3), (70, None, 3), (None, 5.0, 1)],
)
def test_decode_equals_the_reference(
    dtype: torch.dtype, window: int | None, soft_cap: float | None, num_splits: int
) -> None:
    heads = Heads()
    case = paged_case(CONTEXTS, heads, dtype)
    q = queries(len(CONTEXTS), heads, dtype)
    out = decode(case, q, heads, window=window, soft_cap=soft_cap, num_splits=num_splits)
    assert relative_error(out, expected_rows(case, q, window, soft_cap)) < TOLERANCES[dtype]
    assert torch.equal(out[3], torch.zeros_like(out[3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        Heads(2, 2, 64),
        Heads(6, 2, 80),
        Heads(7, 1, 96),
        Heads(8, 1, 128),
        Heads(2, 1, 256),
        # more query heads per KV head than the smallest tile has rows
        Heads(20, 1, 32),
    ],
)
def test_every_head_shape(heads: Heads, dtype: torch.dtype) -> None:
    case = paged_case((17, 70), heads, dtype)
    q = queries(2, heads, dtype)
    assert relative_error(decode(case, q, heads), expected_rows(case, q)) < TOLERANCES[dtype]


@pytest.mark.parametrize("num_seqs", RAGGED_ROWS)
def test_ragged_steps_of_ragged_contexts(num_seqs: int) -> None:
    heads = Heads(2, 1, 16)
    case = paged_case([1 + 17 * index % 67 for index in range(num_seqs)], heads, torch.float32)
    q = queries(num_seqs, heads, torch.float32)
    assert relative_error(decode(case, q, heads, num_splits=1), expected_rows(case, q)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("block_size", [8, 64])
def test_blocks_smaller_and_larger_than_a_tile(block_size: int) -> None:
    heads = Heads()
    case = paged_case((9, 100), heads, torch.float32, block_size=block_size)
    q = queries(2, heads, torch.float32)
    assert relative_error(decode(case, q, heads), expected_rows(case, q)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("window", [None, 40])
def test_a_result_has_the_same_bits_alone_and_beside_others(window: int | None) -> None:
    heads = Heads()
    together = paged_case(CONTEXTS, heads, torch.float16)
    q = queries(len(CONTEXTS), heads, torch.float16)
    out = decode(together, q, heads, window=window)
    for index in (1, 2):
        alone = paged_case(CONTEXTS, heads, torch.float16, kept=[index])
        assert torch.equal(decode(alone, q[index : index + 1], heads, window=window)[0], out[index])


def test_the_grid_does_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads()
    case = paged_case((100, 1), heads, torch.float32)
    q = queries(2, heads, torch.float32)
    spread = decode(case, q, heads, num_splits=4)
    # one program walks all splits of its sequence, as in a large batch
    monkeypatch.setattr("adapter_kernels.gpu.paged_decode._TARGET_PROGRAMS", 1)
    with record_launches() as launches:
        walked = decode(case, q, heads, num_splits=4)
    assert launches[0].grid == (2, heads.num_kv_heads, 1)
    assert torch.equal(walked, spread)


def test_a_sequence_that_is_not_finite_stays_alone() -> None:
    heads = Heads()
    case = paged_case((20, 40), heads, torch.float32)
    expected = expected_rows(case, queries(2, heads, torch.float32))
    case.v_cache[case.tables[0][0], 3] = float("nan")
    out = decode(case, queries(2, heads, torch.float32), heads)
    assert out[0].isnan().all()
    assert relative_error(out[1], expected[1]) < TOLERANCES[torch.float32]


def test_positions_before_the_window_are_never_read() -> None:
    heads = Heads()
    case = paged_case((100,), heads, torch.float32)
    q = queries(1, heads, torch.float32)
    expected = expected_rows(case, q, window=10)
    # the window covers positions 90 .. 99; its first tile begins at 64
    for position in range(90):
        block = case.tables[0][position // 16]
        case.k_cache[block, position % 16] = float("nan")
        case.v_cache[block, position % 16] = float("nan")
    assert relative_error(decode(case, q, heads, window=10), expected) < TOLERANCES[torch.float32]


def test_rows_after_the_decodes_are_not_touched() -> None:
    heads = Heads()
    case = paged_case((5,), heads, torch.float32)
    out = decode(case, queries(3, heads, torch.float32), heads)
    assert out[0].isfinite().all() and out[1:].isnan().all()


def test_launches_are_one_or_two() -> None:
    heads = Heads()
    case = paged_case((5, 9), heads, torch.float32)
    q = queries(2, heads, torch.float32)
    with record_launches(executed=False) as single:
        decode(case, q, heads, num_splits=1)
    with record_launches(executed=False) as split:
        decode(case, q, heads, num_splits=8)
    assert [launch.kernel for launch in single] == ["_paged_decode_kernel"]
    assert [(launch.kernel, launch.grid) for launch in split] == [
        ("_paged_decode_kernel", (2, 2, 8)),
        ("_combine_kernel", (2, 4)),
    ]


def test_a_workspace_that_is_too_small_is_refused() -> None:
    heads = Heads()
    case = paged_case((5,), heads, torch.float32)
    part = replace(case.decode_part(), num_seqs=2)
    with pytest.raises(AssertionError, match="q, out"):
        decode(case, queries(1, heads, torch.float32), heads, part=part)
