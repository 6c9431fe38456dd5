"""The cache write under the interpreter: every row in its slot, padding nowhere, slices read in place."""

import pytest
import torch

from adapter_kernels import reference_attention
from adapter_kernels.gpu.kv_write import kv_write
from tests.kernels.gpu.batches import RAGGED_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 80), (9, 128)])
def test_rows_of_the_fused_projection_land_in_their_slots(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    width = num_kv_heads * head_dim
    fused = torch.randn(6, 3 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    # a padding row is never read: were it, its NaN would be somewhere
    fused[2] = float("nan")
    k = fused[:, width : 2 * width].view(6, num_kv_heads, head_dim)
    v = fused[:, 2 * width :].view(6, num_kv_heads, head_dim)
    slots = torch.tensor([5, 0, -1, 11, 6, -1], dtype=torch.int32)
    k_cache = torch.full((3, 4, num_kv_heads, head_dim), -7.0, dtype=dtype)
    v_cache = k_cache.clone()
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    reference_attention.kv_write(k, v, expected_k, expected_v, slots)
    kv_write(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("num_rows", RAGGED_ROWS)
def test_ragged_steps_write_their_own_slots_only(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    k, v = (torch.randn(num_rows, 1, 8, generator=generator) for _ in range(2))
    slots = torch.randperm(40 * 4, generator=generator)[:num_rows].int()
    slots[1::3] = -1
    k_cache, v_cache = (torch.full((40, 4, 1, 8), torch.nan) for _ in range(2))
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    reference_attention.kv_write(k, v, expected_k, expected_v, slots)
    kv_write(k, v, k_cache, v_cache, slots)
    for cache, expected in ((k_cache, expected_k), (v_cache, expected_v)):
        assert torch.equal(cache.isnan(), expected.isnan()) and torch.equal(cache.nan_to_num(), expected.nan_to_num())


def test_heads_that_are_not_side_by_side_are_refused() -> None:
    k = torch.zeros(2, 4, 2).transpose(1, 2)
    cache = torch.zeros(1, 4, 2, 4)
    with pytest.raises(AssertionError, match="contiguous"):
        kv_write(k, k, cache, cache.clone(), torch.zeros(2, dtype=torch.int32))
